"use strict";
(() => {
  const tip = document.getElementById("tip");
  let shown = null;

  const hide = () => {
    if (shown) shown.classList.remove("on");
    shown = null;
    tip.hidden = true;
  };

  const boxOf = (mark) => (mark.querySelector(".dot, .ring, .phase, .median") || mark).getBoundingClientRect();

  const show = (mark) => {
    if (mark === shown) return;
    hide();
    shown = mark;
    mark.classList.add("on");
    tip.textContent = mark.getAttribute("aria-label");
    tip.hidden = false;
    place();
  };

  const place = () => {
    const box = boxOf(shown);
    const width = tip.offsetWidth, height = tip.offsetHeight;
    const left = Math.min(Math.max(8, box.left + box.width / 2 - width / 2), innerWidth - width - 8);
    const above = box.top - height - 10;
    tip.style.left = `${left}px`;
    tip.style.top = `${above > 4 ? above : box.bottom + 10}px`;
  };

  const nearest = (x, y) => {  // marks that lie close together cover each other's surroundings
    const away = (mark) => {
      const box = boxOf(mark);
      const dx = Math.max(box.left - x, 0, x - box.right), dy = Math.max(box.top - y, 0, y - box.bottom);
      return Math.hypot(dx, dy) + Math.hypot(box.left + box.width / 2 - x, box.top + box.height / 2 - y) / 1e3;
    };
    const marks = document.elementsFromPoint(x, y).map((one) => one.closest(".mark")).filter(Boolean);
    return marks.sort((one, other) => away(one) - away(other))[0];
  };

  for (const svg of document.querySelectorAll("figure svg")) {
    const marks = [...svg.querySelectorAll(".mark")];
    marks.forEach((mark, index) => {
      mark.querySelector("title").remove();  // the browser's own tooltip would cover ours
      mark.tabIndex = index ? -1 : 0;  // one stop a plot; the arrow keys go from mark to mark
      mark.addEventListener("focus", () => show(mark));
      mark.addEventListener("blur", hide);
      mark.addEventListener("keydown", (event) => {
        const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
        if (!step) return;
        event.preventDefault();
        const next = marks[(index + step + marks.length) % marks.length];
        marks.forEach((one) => { one.tabIndex = one === next ? 0 : -1; });
        next.focus();
      });
    });
  }
  const look = (event) => {
    const mark = nearest(event.clientX, event.clientY);
    if (mark) show(mark);
    else if (shown) hide();
  };
  document.addEventListener("pointermove", (event) => event.pointerType === "mouse" && look(event));
  document.addEventListener("click", look);
  document.addEventListener("keydown", (event) => event.key === "Escape" && hide());
  addEventListener("scroll", () => {
    if (shown && shown === document.activeElement) place();
    else hide();
  }, { passive: true });

  const value = (row, index) => row.children[index].dataset.value;
  for (const table of document.querySelectorAll("table.sorts")) {
    const heads = [...[...table.tHead.rows].at(-1).cells];  // a row above may name groups of columns
    heads.forEach((head, index) => head.querySelector("button").addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      const body = table.tBodies[0];
      const rows = [...body.rows].sort((one, other) => {
        const a = value(one, index), b = value(other, index);
        if (a === "" || b === "") return (a === "") - (b === "");  // what was not measured stays last
        const order = isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b;
        return down ? -order : order;
      });
      heads.forEach((each) => each.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      body.append(...rows);
    }));
  }
})();
