// What is wider than its place: formulas shrink as far as one can read them; what is
// still too wide scrolls, shows that it does, has a name and is reached by keyboard.
(() => {
  "use strict";
  const SMALLEST = 0.66; // of the size of a formula
  const KINDS = {
    "article pre": "Code",
    "article div.math > mjx-container": "Formula",
    "article .pst-scrollable-table-container, article .table-wrapper": "Table",
  };

  function shrink(box) {
    const place = box.parentElement;
    place.style.fontSize = "";
    const share = box.clientWidth / box.scrollWidth;
    if (share < 1) place.style.fontSize = `${100 * Math.max(0.98 * share, SMALLEST)}%`;
  }

  function mark(box, kind) {
    if (kind === "Formula") shrink(box);
    const wide = box.scrollWidth > box.clientWidth + 1;
    if (wide === box.classList.contains("scrolls")) return;
    box.classList.toggle("scrolls", wide);
    if (wide) {
      box.tabIndex = 0;
      box.setAttribute("role", "group");
      box.setAttribute("aria-label", `${kind}, scrolls sideways`);
    } else {
      for (const name of ["tabindex", "role", "aria-label"]) box.removeAttribute(name);
    }
  }

  // The right edge fades until one has scrolled to it.
  function fade({ target }) {
    const left = target.scrollWidth - target.clientWidth - target.scrollLeft;
    target.classList.toggle("at-end", left < 2);
  }

  function watch() {
    const kinds = new Map();
    const observer = new ResizeObserver((entries) => {
      for (const { target } of entries) mark(target, kinds.get(target));
    });
    for (const [selector, kind] of Object.entries(KINDS)) {
      for (const box of document.querySelectorAll(selector)) {
        kinds.set(box, kind);
        box.addEventListener("scroll", fade, { passive: true });
        observer.observe(box);
      }
    }
  }

  window.addEventListener("load", () => {
    (window.MathJax?.startup?.promise ?? Promise.resolve()).then(watch);
  });
})();
