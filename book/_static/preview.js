// What a link leads to, beside the link: an equation, a figure, a term, a source, a
// signature; and beside a symbol in a formula, its row of the page of notation. For a
// mouse that rests there and for the keyboard's focus; Escape closes it, touch does not
// open it. The texts (book/_ext/previews.py) are loaded when the first is wanted, by a
// script, for a page that was opened as a file may fetch nothing.
"use strict";

{
  const REST = 300; // ms before it opens, and before it closes
  const WANTED = "article a.reference.internal, article mjx-container:not([display])";
  const root = new URL(document.documentElement.dataset.content_root, location.href).href;
  const box = document.createElement("div");
  box.id = "preview";
  box.className = "preview";
  box.setAttribute("role", "tooltip");
  box.hidden = true;
  let texts = null;
  let timer = 0;
  let owner = null;

  const script = (name) =>
    new Promise((resolve) => {
      const element = document.createElement("script");
      element.src = `${root}_static/${name}`;
      element.onload = resolve;
      document.head.append(element);
    });

  const load = () => (texts ??= script("previews.js").then(() => window.PREVIEWS));

  // A page without mathematics may refer to some.
  const typeset = async ({ mathjax }) => {
    if (!window.MathJax) {
      window.MathJax = mathjax;
      await script("mathjax/startup.js");
    }
    await MathJax.startup.promise;
    MathJax.typesetClear([box]);
    await MathJax.typesetPromise([box]);
  };

  const textFor = (element, { targets, symbols }) => {
    if (element.href) return targets[element.href.slice(root.length)];
    const [formula] = MathJax.startup.document.getMathItemsWithin([element.parentNode])
      .filter((item) => item.typesetRoot === element);
    return formula && symbols[formula.math.trim()];
  };

  const place = () => {
    const [line] = owner.getClientRects();
    const { offsetWidth: width, offsetHeight: height } = box;
    const room = document.documentElement.clientWidth - width - 8;
    box.style.left = `${Math.max(8, Math.min(line.left, room))}px`;
    const below = line.bottom + 6;
    const fits = below + height < window.innerHeight || line.top < height + 6;
    box.style.top = `${fits ? below : line.top - height - 6}px`;
  };

  const hide = () => {
    clearTimeout(timer);
    owner?.removeAttribute("aria-describedby");
    owner = null;
    box.hidden = true;
  };

  const show = async (element) => {
    const previews = await load();
    const text = textFor(element, previews);
    if (!text) return;
    hide();
    box.innerHTML = text;
    box.hidden = false;
    owner = element;
    element.setAttribute("aria-describedby", box.id);
    place();
    if (!text.includes('class="math')) return;
    await typeset(previews);
    if (owner) place();
  };

  const later = (action) => {
    clearTimeout(timer);
    timer = setTimeout(action, REST);
  };

  document.addEventListener("pointerover", (event) => {
    if (event.pointerType !== "mouse") return;
    const element = event.target.closest(WANTED);
    if (element && element !== owner) later(() => show(element));
    else if (element || box.contains(event.target)) clearTimeout(timer);
    else later(hide);
  });
  document.addEventListener("focusin", ({ target }) => {
    if (target.matches(WANTED) && target.matches(":focus-visible")) show(target);
    else if (!box.contains(target)) hide();
  });
  document.addEventListener("focusout", hide);
  document.addEventListener("scroll", () => owner && place(), { passive: true });
  document.addEventListener("keydown", ({ key }) => key === "Escape" && hide());
  document.body.append(box);
}
