"use strict";
(() => {
  const all = (query, root) => [...(root || document).querySelectorAll(query)];
  const one = (query, root) => (root || document).querySelector(query);

  // Colours: as the system has them, light, dark.
  const themes = ["auto", "light", "dark"];
  const theme = one("#theme");
  let current = 0;
  theme.addEventListener("click", () => {
    current = (current + 1) % themes.length;
    const name = themes[current];
    if (name === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = name;
    theme.textContent = `Colours: ${name}`;
    theme.setAttribute("aria-label", name === "auto" ? "Colours: as the system has them" : `Colours: ${name}`);
  });

  // Commands are copied; where the browser forbids it, they are selected.
  for (const button of all(".copy")) {
    button.addEventListener("click", async () => {
      const code = one("code", button.parentElement);
      let done = "Copied";
      try {
        await navigator.clipboard.writeText(code.textContent);
      } catch {
        getSelection().selectAllChildren(code);
        if (!document.execCommand("copy")) done = "Selected";
      }
      button.textContent = done;
      setTimeout(() => { button.textContent = "Copy"; }, 1600);
    });
  }

  // The frontier: hover or focus shows a plan, click, focus or the table chooses it.
  const tip = one("#tip");
  const marks = all(".marks [role=radio]");

  function choose(number) {
    for (const plan of all(".plan")) plan.hidden = plan.dataset.plan !== number;
    for (const row of all("#all-plans tbody tr")) row.classList.toggle("chosen", row.dataset.plan === number);
    for (const mark of marks) {
      const own = mark.dataset.plan === number;
      mark.setAttribute("aria-checked", own);
      mark.setAttribute("tabindex", own ? "0" : "-1");
    }
  }

  function show(mark) {
    const plan = one(`.plan[data-plan="${mark.dataset.plan}"]`);
    const title = document.createElement("strong");
    title.textContent = one("h3", plan).textContent;
    const figures = document.createElement("span");
    figures.textContent = `${one(".figures", plan).textContent} ${one(".words", plan).textContent}`;
    tip.replaceChildren(title, figures);
    const line = one(".command code", plan);
    if (line) {
      const code = document.createElement("code");
      code.textContent = line.textContent;
      tip.append(code);
    }
    tip.hidden = false;
    const box = mark.getBoundingClientRect();
    const width = document.documentElement.clientWidth;
    tip.style.left = "0px";
    const left = Math.max(12, Math.min(box.left + box.width / 2 - tip.offsetWidth / 2, width - tip.offsetWidth - 12));
    const above = box.top - tip.offsetHeight - 10;
    const top = above > 4 ? above : box.bottom + 10;
    tip.style.left = `${left + scrollX}px`;
    tip.style.top = `${top + scrollY}px`;
  }

  if (tip) {
    document.body.append(tip);  // positioned against the page
    const hide = () => { tip.hidden = true; };
    for (const plot of all(".marks")) {
      const own = all("[role=radio]", plot);
      const nearest = (event) => {
        let best = null, least = 26 * 26;
        for (const mark of own) {
          const box = mark.getBoundingClientRect();
          const x = event.clientX - box.left - box.width / 2, y = event.clientY - box.top - box.height / 2;
          if (x * x + y * y < least) { least = x * x + y * y; best = mark; }
        }
        return best;
      };
      plot.addEventListener("pointermove", (event) => { const mark = nearest(event); if (mark) show(mark); else hide(); });
      plot.addEventListener("pointerleave", hide);
      plot.addEventListener("click", (event) => { const mark = nearest(event); if (mark) { choose(mark.dataset.plan); show(mark); } });
      own.forEach((mark, place) => {
        mark.addEventListener("focus", () => { choose(mark.dataset.plan); if (mark.matches(":focus-visible")) show(mark); });
        mark.addEventListener("blur", hide);
        mark.addEventListener("keydown", (event) => {
          const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
          if (event.key === "Escape") hide();
          if (!step) return;
          event.preventDefault();
          own[(place + step + own.length) % own.length].focus();
        });
      });
    }
    addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
    for (const button of all(".choose")) button.addEventListener("click", () => choose(button.closest("tr").dataset.plan));
    choose((one(".plan:not([hidden])") || one(".plan")).dataset.plan);
  }

  // Switches show one picture of several.
  const value = (name) => (one(`input[name="${name}"]:checked`) || {}).value;
  for (const input of all('input[name="loss"], input[name="size"]')) {
    input.addEventListener("change", () => {
      for (const plot of all("[data-loss]")) {
        plot.hidden = plot.dataset.loss !== value("loss") || plot.dataset.size !== value("size");
      }
    });
  }
  for (const input of all('input[name="run"]')) {
    input.addEventListener("change", () => {
      const own = input.value === "0" ? /^[^r]/ : new RegExp(`^r${input.value}-`);
      for (const part of all(`.marks .run-${input.value}`)) part.style.display = input.checked ? "" : "none";
      for (const mark of marks) if (own.test(mark.dataset.plan)) mark.style.display = input.checked ? "" : "none";
      for (const row of all("#all-plans tbody tr")) if (own.test(row.dataset.plan)) row.hidden = !input.checked;
    });
  }
  const readout = one("#cell");
  for (const input of all('input[name="metric"], input[name="tokens"]')) {
    input.addEventListener("change", () => {
      for (const heat of all(".heat")) {
        heat.hidden = heat.dataset.metric !== value("metric") || heat.dataset.tokens !== value("tokens");
      }
      readout.textContent = "";
    });
  }

  // Tables: each can be taken away as CSV, and says when there is more to the side.
  const csv = (table) => all("tr", table).map((row) => [...row.cells].flatMap((cell) => {
    const copy = cell.cloneNode(true);
    for (const own of all(".script-less", copy)) own.remove();
    const text = copy.textContent.trim().replace(/\s+/g, " ");
    const safe = /^[=+@\t\r]|^-(?![\d.])/.test(text) ? `'${text}` : text;  // no formula of anybody's
    const quoted = /[",\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
    return [quoted, ...Array(cell.colSpan - 1).fill("")];
  }).join(",")).join("\r\n") + "\r\n";
  for (const scroll of all(".scroll")) {
    const table = one("table", scroll);
    const bar = document.createElement("p");
    bar.className = "tools";
    const more = document.createElement("span");
    more.className = "more";
    more.textContent = "scroll sideways →";
    bar.append(more);
    if (table) {
      const link = document.createElement("a");
      const name = one("caption", table).textContent.toLowerCase().replace(/[^a-z0-9]+/g, "-").slice(0, 40).replace(/^-|-$/g, "");
      link.className = "csv";
      link.download = `${name || "table"}.csv`;
      link.textContent = "CSV";
      link.setAttribute("aria-label", `Download as CSV: ${one("caption", table).textContent}`);
      link.href = "#" + (scroll.closest("section") || {}).id;
      link.addEventListener("click", () => {
        link.href = "data:text/csv;charset=utf-8," + encodeURIComponent("\ufeff" + csv(table));
      });
      bar.append(link);
    }
    const box = document.createElement("div");
    box.className = "boxed";
    scroll.replaceWith(box);
    box.append(bar, scroll);
    const look = () => {
      const rest = scroll.scrollWidth - scroll.clientWidth - scroll.scrollLeft;
      scroll.classList.toggle("right", rest > 2);
      scroll.classList.toggle("left", scroll.scrollLeft > 2);
      more.hidden = rest <= 2;
    };
    scroll.addEventListener("scroll", look, { passive: true });
    new ResizeObserver(look).observe(scroll);
    look();
  }

  // The part that is read is marked in the navigation, and kept in sight there.
  const links = new Map(all("nav a").map((link) => [link.hash.slice(1), link]));
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      for (const [id, link] of links) {
        if (id === entry.target.id) link.setAttribute("aria-current", "true");
        else link.removeAttribute("aria-current");
      }
      const link = links.get(entry.target.id), list = link && link.closest("ul");
      if (link) list.scrollLeft = link.offsetLeft - list.clientWidth / 2 + link.offsetWidth / 2;
    }
  }, { rootMargin: "-20% 0px -75% 0px" });
  for (const section of all("main section")) seen.observe(section);

  // Heat maps: single cells, by pointer or by arrow keys.
  for (const heat of all(".heat")) {
    const plot = one(".cells", heat), cursor = one(".cursor", heat);
    const rows = all("tbody tr", heat).map((row) => all("td", row).map((cell) => cell.textContent));
    const heads = all("thead th", heat).map((cell) => cell.textContent);
    const last = rows.length - 1;
    let at = [0, 0];
    const read = (row, column) => {
      at = [row, column];
      const picture = one("image", plot).getBoundingClientRect(), outer = plot.getBoundingClientRect();
      const width = picture.width / rows.length, height = picture.height / rows.length;
      cursor.hidden = false;
      cursor.style.left = `${picture.left - outer.left + column * width}px`;
      cursor.style.top = `${picture.top - outer.top + row * height}px`;
      cursor.style.width = `${width}px`;
      cursor.style.height = `${height}px`;
      const known = rows[row][column];
      readout.textContent = `h[${heads[row]}] and h[${heads[column]}]: ${known === "–" ? "not defined" : known}`;
    };
    plot.addEventListener("pointermove", (event) => {
      const picture = one("image", plot).getBoundingClientRect();
      const row = Math.floor((event.clientY - picture.top) / picture.height * rows.length);
      const column = Math.floor((event.clientX - picture.left) / picture.width * rows.length);
      if (row >= 0 && column >= 0 && row <= last && column <= last) read(row, column);
    });
    plot.addEventListener("pointerleave", () => { cursor.hidden = true; });
    plot.addEventListener("focus", () => read(...at));
    plot.addEventListener("blur", () => { cursor.hidden = true; });
    plot.addEventListener("keydown", (event) => {
      const step = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
      if (!step) return;
      event.preventDefault();
      read(Math.min(last, Math.max(0, at[0] + step[0])), Math.min(last, Math.max(0, at[1] + step[1])));
    });
  }
})();
