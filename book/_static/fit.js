// What is wider than its place. A formula breaks where its parts are apart, then before
// its relations, then before its sums, then within its brackets, then shrinks as far as one can read
// it. What is still too wide scrolls, shows that it does, has a name and is reached by keyboard.
(() => {
  "use strict";
  const SMALLEST = 0.6; // of the size of a formula
  const KINDS = {
    "article pre": "Code",
    "article div.math > mjx-container": "Formula",
    "article .pst-scrollable-table-container, article .table-wrapper": "Table",
  };
  const BREAKS = [ // what comes first is tried first
    ["relation", /[=<>≤≥≈∝∼≡⟺⟹≪≫]/],
    ["sum", /[+−]/],
  ];
  const BAR = /[‖∥]/; // of a norm, or of a divergence
  const STAGES = ["broken", "broken-relation", "broken-sum", "broken-inner"];

  const tooWide = (box) => box.scrollWidth > box.clientWidth + 1;

  // The lines of a formula: all of it, or the cells of an aligned one.
  function lines(part) {
    const inside = [...part.children].filter((child) => child.tagName !== "MJX-TSTRUT");
    const only = inside.length === 1 ? inside[0] : null;
    if (only?.tagName === "MJX-MROW") return lines(only);
    if (only?.tagName !== "MJX-MTABLE") return [part];
    const cells = only.querySelectorAll(
      ":scope > mjx-table > mjx-itable > mjx-mtr > mjx-mtd, :scope > mjx-table > mjx-itable > mjx-mlabeledtr > mjx-mtd");
    return [...cells].flatMap(lines);
  }

  // The brackets that are open behind an operator; a norm's bars open and close in turns.
  function brackets(before, sign) {
    if (/[([{⟨⌊⌈]/.test(sign)) return [...before, sign];
    if (/[)\]}⟩⌋⌉]/.test(sign)) return before.slice(0, Math.max(before.findLastIndex((open) => !BAR.test(open)), 0));
    if (BAR.test(sign)) return before.at(-1) === sign ? before.slice(0, -1) : [...before, sign];
    return before;
  }

  // Mark where a line may break: at a quad, and before a relation or a sum, but not
  // before the first of a line.
  function prepare(formula) {
    for (const line of lines(formula.querySelector("mjx-math"))) {
      let first = true;
      let open = [];
      for (const part of [...line.children]) {
        const base = part.tagName === "MJX-MO" ? part : part.firstElementChild; // of a bracket with an exponent
        if (base?.tagName === "MJX-MO") open = brackets(open, text(base));
        if (part.querySelector(":scope > mjx-mspace")?.style.width === "2em") {
          part.classList.add("break");
          first = true;
        } else if (part.tagName === "MJX-MO") {
          const [kind] = BREAKS.find(([, signs]) => signs.test(text(part))) ?? [];
          if (kind && (open.length || !first)) {
            const spacer = document.createElement("mjx-mspace");
            spacer.className = `may-break ${open.length ? "inner" : kind}`;
            part.before(spacer);
          }
          if (kind === "relation" && !open.length) first = false;
        }
      }
    }
  }

  // The characters of an operator; MathJax writes them into the names of classes.
  function text(part) {
    return [...part.querySelectorAll("mjx-c")].map((c) =>
      String.fromCodePoint(parseInt(c.className.match(/mjx-c([0-9A-F]+)/)?.[1] ?? "20", 16))).join("");
  }

  // All at once, stage by stage: each look at a width lays the page out again.
  function fold(formulas) {
    for (const formula of formulas) {
      formula.parentElement.style.fontSize = "";
      formula.classList.remove(...STAGES);
    }
    let wide = formulas;
    for (const name of STAGES) {
      wide = wide.filter(tooWide);
      for (const formula of wide) formula.classList.add(name);
    }
    const sizes = wide.map((formula) => {
      const share = formula.clientWidth / formula.scrollWidth;
      const size = parseFloat(getComputedStyle(formula.parentElement).fontSize);
      return share < 1 ? `${size * Math.max(0.98 * share, SMALLEST)}px` : "";
    });
    wide.forEach((formula, k) => { formula.parentElement.style.fontSize = sizes[k]; });
  }

  function mark(boxes, kinds) {
    fold(boxes.filter((box) => kinds.get(box) === "Formula"));
    const did = boxes.map((box) => box.classList.contains("scrolls"));
    for (const box of boxes) box.classList.remove("scrolls"); // what scrolls is set wider
    const wide = boxes.map(tooWide);
    boxes.forEach((box, k) => {
      box.classList.toggle("scrolls", wide[k]);
      if (wide[k] === did[k]) return;
      if (wide[k]) {
        box.tabIndex = 0;
        box.setAttribute("role", "group");
        box.setAttribute("aria-label", `${kinds.get(box)}, scrolls sideways`);
      } else {
        for (const name of ["tabindex", "role", "aria-label"]) box.removeAttribute(name);
      }
    });
  }

  // The right edge fades until one has scrolled to it.
  function fade({ target }) {
    const left = target.scrollWidth - target.clientWidth - target.scrollLeft;
    target.classList.toggle("at-end", left < 2);
  }

  function watch() {
    const kinds = new Map();
    const observer = new ResizeObserver((entries) => {
      mark(entries.map(({ target }) => target), kinds);
    });
    for (const [selector, kind] of Object.entries(KINDS)) {
      for (const box of document.querySelectorAll(selector)) {
        if (kind === "Formula") prepare(box);
        kinds.set(box, kind);
        box.addEventListener("scroll", fade, { passive: true });
        observer.observe(box);
      }
    }
    // Letters that come late have other widths.
    document.fonts.addEventListener("loadingdone", () => mark([...kinds.keys()], kinds));
  }

  window.addEventListener("load", () => {
    (window.MathJax?.startup?.promise ?? Promise.resolve()).then(watch);
  });
})();

// On paper solutions and answers are open, and all is light.
(() => {
  "use strict";
  const restore = [];

  window.addEventListener("beforeprint", () => {
    const root = document.documentElement;
    const theme = root.dataset.theme;
    root.dataset.theme = "light";
    restore.push(() => { root.dataset.theme = theme; });
    for (const box of document.querySelectorAll("article details:not([open], .fold-under, .fold-plumbing)")) {
      box.open = true;
      restore.push(() => { box.open = false; });
    }
  });

  window.addEventListener("afterprint", () => {
    while (restore.length) restore.pop()();
  });
})();
