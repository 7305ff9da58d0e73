// What a page that fits must not have. Each function lists the faults that it sees on
// the open page, in words; the tests expect empty lists. `survey` asks several of them:
// what an element looks like is found out once for all.
(() => {
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  // Forgotten at the next survey.
  let known;
  const forget = () => { known = { seen: new Map(), style: new Map(), ground: new Map(), looks: new Map() }; };
  const once = (what, e, find) => {
    if (!known[what].has(e)) known[what].set(e, find(e));
    return known[what].get(e);
  };
  const seen = (e) => once("seen", e, () => e.getClientRects().length > 0 && e.checkVisibility());
  const style = (e) => once("style", e, getComputedStyle);

  // Where something stands, short enough to read in a report.
  const where = (e) => {
    const names = [];
    for (let at = e; at && at.tagName !== "ARTICLE" && names.length < 4; at = at.parentElement) {
      names.unshift(at.tagName.toLowerCase() + (at.id ? `#${at.id}` : at.classList.length ? `.${at.classList[0]}` : ""));
      if (at.id) break;
    }
    const text = (e.textContent || "").trim().replace(/\s+/g, " ").slice(0, 50);
    return `${names.join(" > ")} "${text}"`;
  };

  const speaks = (e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());

  // What one sees of the text; within a block of code and within formulas, whose many
  // parts are made alike, one of each look.
  const looks = () => once("looks", document, () => {
    const paths = new Map(), had = new Set();
    let blocks = 0;
    return all("article, article *").filter((e) => {
      const above = paths.get(e.parentElement);
      if (above === undefined) {
        if (e.tagName === "PRE") paths.set(e, `${blocks += 1}`);
        if (e.tagName === "MJX-CONTAINER") paths.set(e, `${e.parentElement.tagName} ${e.getAttribute("display")}`);
        return seen(e);
      }
      const path = `${above}/${e.tagName} ${e.getAttribute("class")} ${e.getAttribute("style")}`;
      paths.set(e, path);
      const look = `${path} ${speaks(e)}`;
      return !had.has(look) && seen(e) && had.add(look);
    });
  });

  // How far the contents of an element reach over its right edge.
  const excess = (e) => e.scrollWidth - e.clientWidth;
  const scrolls = (e) => excess(e) > 1 && /auto|scroll/.test(style(e).overflowX);

  const wide = (selector) =>
    all(selector).filter((e) => seen(e) && excess(e) > 1)
      .map((e) => `${excess(e)} px are cut: ${where(e)}`);

  // Formulas within a line that reach over the edge of their paragraph.
  const wideInline = () =>
    all("article mjx-container:not([display])").filter(seen).flatMap((e) => {
      const box = e.closest("td, th, figcaption, caption, li, dd, p, summary") || e.parentElement;
      const over = e.getBoundingClientRect().right - box.getBoundingClientRect().right;
      return over > 2 && !e.closest(".scrolls") ? [`${Math.round(over)} px over the edge: ${where(e)}`] : [];
    });

  const numbers = (colour) => (colour.match(/[\d.]+/g) || []).map(Number);
  const luminance = (colour) => {
    const [r, g, b] = numbers(colour).map((c) => c / 255)
      .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };

  // The first colour behind an element that hides what is behind it.
  const ground = (e) => !e ? "rgb(255, 255, 255)" : once("ground", e, () => {
    const colour = style(e).backgroundColor;
    const [, , , a = 1] = numbers(colour);
    return a > 0.5 ? colour : ground(e.parentElement);
  });

  const measures = {
    equations: () => [
      ...wide("article mjx-container[display], article div.math"),
      ...wideInline(),
    ],
    code: () => wide("article pre"),
    tables: () => wide("article .pst-scrollable-table-container, article .table-wrapper"),

    // What a table shows is read without scrolling it.
    captions: () =>
      all("article caption").filter(seen).flatMap((e) => {
        const box = e.closest(".pst-scrollable-table-container, .table-wrapper") || e.parentElement;
        const over = e.getBoundingClientRect().right - box.getBoundingClientRect().right;
        return over > 1 ? [`${Math.round(over)} px over the edge: ${where(e)}`] : [];
      }),

    // The page itself never moves sideways.
    body: () => {
      const width = document.documentElement.clientWidth;
      if (document.documentElement.scrollWidth <= width) return [];
      return all("body *").filter((e) => seen(e) && e.getBoundingClientRect().right > width + 1)
        .slice(0, 5).map((e) => `${Math.round(e.getBoundingClientRect().right)} px: ${where(e)}`);
    },

    // What is no figure begins where the text does.
    edges: () =>
      all("article section > :is(.admonition, .sd-card, .math, div[class*=highlight-], .cell > .cell_input)").filter(seen).flatMap((e) => {
        const off = e.getBoundingClientRect().left - e.closest("section").getBoundingClientRect().left;
        return Math.abs(off) > 2 ? [`${Math.round(off)} px beside the text: ${where(e)}`] : [];
      }),

    // What scrolls says so, has a name and can be reached without a mouse.
    silentScrollers: () =>
      looks().filter((e) => scrolls(e) &&
        !(e.classList.contains("scrolls") && e.tabIndex === 0 && e.getAttribute("aria-label")))
        .map(where),

    // Formulas are read, not stopped at.
    tabStops: () => all("article mjx-container[tabindex], article mjx-container [tabindex]").filter((e) => e.tabIndex === 0 && !e.classList.contains("scrolls")).map(where),

    // What one clicks is called what it says; what one moves has a name.
    names: () => [
      ...all("summary, button").filter((e) => seen(e) && !(e.getAttribute("aria-label") || e.textContent.trim() || e.title)),
      ...all("summary[aria-label]").filter((e) => e.getAttribute("aria-label").trim() !== e.innerText.trim()),
      ...all("input:not([type=hidden]), select, canvas:not([aria-hidden])").filter((e) => seen(e) &&
        !(e.getAttribute("aria-label") || e.getAttribute("aria-labelledby") || e.labels?.length || e.placeholder || e.title)),
    ].map(where),

    // Code is read against its ground: 4.5 to 1.
    codeContrast: () => {
      const seenPairs = new Map();
      for (const e of looks().filter((e) => e.matches("pre, pre span, code, .export-badge span") && speaks(e))) {
        const pair = `${style(e).color} on ${ground(e)}`;
        if (!seenPairs.has(pair)) seenPairs.set(pair, e);
      }
      return [...seenPairs].flatMap(([pair, e]) => {
        const [front, back] = pair.split(" on ").map(luminance);
        const ratio = (Math.max(front, back) + 0.05) / (Math.min(front, back) + 0.05);
        return ratio < 4.5 ? [`${ratio.toFixed(2)}, ${pair}: ${where(e)}`] : [];
      });
    },

    // Text in a drawing is at least seven pixels high.
    smallText: () =>
      all("article picture img, article canvas").filter((e) => seen(e) && e.clientWidth).flatMap((e) => {
        const source = e.previousElementSibling;
        const shown = source?.media && matchMedia(source.media).matches ? source : e;
        const share = e.tagName === "CANVAS" ? e.written?.smallest : shown.dataset.smallestText;
        const height = e.clientWidth * share;
        return height < 7 ? [`${height.toFixed(1)} px: ${where(e.closest("figure") || e)}`] : [];
      }),

    // In the dark no box of the page is light.
    slabs: () =>
      looks().flatMap((e) => {
        const colour = style(e).backgroundColor;
        const [, , , a = 1] = numbers(colour);
        return a > 0.5 && luminance(colour) > 0.16 && !e.closest(".export-badge, .sd-btn, .copybtn") ? [`${colour}: ${where(e)}`] : [];
      }),
  };

  // What the script of an explorable has drawn, as a text.
  window.pictures = (box) =>
    all(".explorable-stage :is(canvas, svg)", box).map((e) => e.toDataURL?.() ?? e.outerHTML).join();

  window.survey = (kinds) => {
    forget();
    return Object.fromEntries(kinds.map((kind) => [kind, measures[kind]()]));
  };
})();
