"use strict";
(() => {
  const root = document.documentElement;
  const media = matchMedia("(prefers-color-scheme: dark)");
  let chosen = new URLSearchParams(location.search).get("theme");
  const dark = () => (chosen ? chosen === "dark" : media.matches);
  const specs = JSON.parse(document.getElementById("specs").textContent);
  for (const { spec } of specs) spec.data = { values: unpacked(spec.data) };
  const views = {};

  // Rows of data that came by column, words as places in a list.
  function unpacked(columns) {
    const rows = [];
    for (const [key, { numbers, words, at }] of Object.entries(columns)) {
      const values = numbers ?? at.map((place) => words[place]);
      values.forEach((value, row) => {
        rows[row] ??= {};
        if (value !== null) rows[row][key] = value;
      });
    }
    return rows;
  }

  // Colors of what a plot is drawn with beside its data.
  const config = () => {
    const style = getComputedStyle(root);
    const [ink, soft, line] = ["--ink", "--soft", "--line"].map((name) => style.getPropertyValue(name).trim());
    const text = { labelColor: soft, titleColor: soft, labelFontWeight: 400, titleFontWeight: 400 };
    return {
      background: null, font: "system-ui, sans-serif", view: { stroke: null },
      axis: { ...text, gridColor: line, domainColor: line, tickColor: line },
      legend: text, header: { labelColor: ink, titleColor: soft }, rule: { color: soft },
    };
  };

  // A copy of the spec in the shape that the width asks for.
  function fitted(spec, width) {
    const shape = structuredClone(spec);
    const { fit, across, down, letters } = spec.usermeta;
    if (fit === "heat") heat(shape, width, across, down, letters);
    else if (fit === "facet") facet(shape, width);
    else shape.width = "container";
    return shape;
  }

  // Blocks across where there is room for their figures, else down.
  function heat(shape, width, across, down, letters) {
    const labels = Math.min(220, 5.4 * letters + 16);
    let step = Math.min(44, Math.floor((width - labels - 10) / across));
    let height = Math.max(6, Math.min(22, Math.floor(900 / down)));
    if (step < 21 && down <= 16) {
      const encoding = shape.encoding;
      [encoding.x, encoding.y] = [encoding.y, encoding.x];
      encoding.x.axis = { ...encoding.x.axis, orient: "top", labelAngle: -90 };
      encoding.y.axis = { ...encoding.y.axis, orient: "left", labelAngle: 0 };
      step = Math.max(14, Math.min(60, Math.floor((width - 45) / down)));
      height = across > 48 ? 10 : 17;
    }
    shape.width = { step: Math.max(8, step) };
    shape.height = { step: height };
    if (step < 21 || height < 15) shape.layer.splice(1, 1); // the figures
  }

  function facet(shape, width) {
    const { panels: count, legend } = shape.usermeta;
    const columns = Math.max(1, Math.min(count, Math.floor((width - 70) / 230)));
    shape.columns = columns;
    const beside = width < 600 || !legend ? 60 : 130; // axis, and a legend
    shape.spec.width = Math.max(120, Math.floor((width - beside) / columns - 34));
  }

  let turn = 0;

  async function draw() {
    if (!window.vegaEmbed) return;
    const mine = ++turn; // a later call, for another width or theme, ends this one
    root.dataset.theme = dark() ? "dark" : "light";
    for (const { name, spec } of specs) {
      const place = document.getElementById(name);
      const options = { actions: false, renderer: "svg", config: config(), tooltip: { theme: "custom" } };
      const shape = fitted(spec, place.clientWidth);
      if (place.clientWidth < 600) options.config.legend = { ...options.config.legend, orient: "top" };
      const before = views[name];
      let { view } = await vegaEmbed(place, shape, options);
      const over = place.scrollWidth - place.clientWidth; // of long names beside the panels
      if (over > 0 && shape.columns) {
        view.finalize();
        shape.spec.width = Math.max(120, shape.spec.width - Math.ceil(over / shape.columns));
        ({ view } = await vegaEmbed(place, shape, options));
      }
      if (before) before.finalize();
      views[name] = view;
      if (mine !== turn) return;
    }
    root.dataset.drawn = "true";
  }

  async function load() {
    const packed = document.getElementById("library").textContent.trim();
    if (!packed) return;
    try {
      const bytes = Uint8Array.from(atob(packed), (sign) => sign.charCodeAt(0));
      const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
      const element = document.createElement("script");
      element.textContent = await new Response(stream).text();
      document.head.append(element);
      await draw();
    } catch (error) {
      for (const place of document.querySelectorAll(".plot")) {
        place.textContent = `This browser cannot draw the plot (${error.message}); the tables below have the figures.`;
      }
    }
  }

  function save(href, name) {
    const link = Object.assign(document.createElement("a"), { href, download: name });
    link.click();
  }

  function saveRows(rows, name) {
    const quoted = (value) => (/[",\n]/.test(value) ? `"${value.replaceAll('"', '""')}"` : value);
    const text = rows.map((row) => row.map((value) => quoted(String(value ?? ""))).join(",")).join("\n");
    const link = URL.createObjectURL(new Blob([text + "\n"], { type: "text/csv" }));
    save(link, `${name}.csv`);
    setTimeout(() => URL.revokeObjectURL(link), 10000);
  }

  function rowsOf(spec) {
    const values = spec.data.values;
    const keys = [...new Set(values.flatMap(Object.keys))].filter((key) => key !== "ink");
    return [keys, ...values.map((value) => keys.map((key) => value[key]))];
  }

  const valueOf = (cell) => cell.dataset.value ?? cell.textContent;

  function sort(heading) {
    const table = heading.closest("table");
    const column = heading.cellIndex;
    const up = heading.getAttribute("aria-sort") === "descending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", up ? "ascending" : "descending");
    const rank = (row) => valueOf(row.cells[column]);
    const compare = (a, b) => {
      const [x, y] = [rank(a), rank(b)];
      if (x === "" || y === "") return (x === "") - (y === ""); // unknown ones last
      const order = isNaN(x) || isNaN(y) ? x.localeCompare(y, undefined, { numeric: true }) : x - y;
      return up ? order : -order;
    };
    table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
  }

  document.addEventListener("click", async (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    const name = button.dataset.chart;
    if (button.id === "theme") {
      chosen = dark() ? "light" : "dark";
      root.dataset.theme = chosen;
      await draw();
    } else if (button.id === "copy") {
      await navigator.clipboard.writeText(document.getElementById("command").textContent);
      button.textContent = "copied";
    } else if (name && button.className === "png") {
      const ground = getComputedStyle(document.body).backgroundColor;
      const view = views[name].background(ground);
      save(await view.toImageURL("png", 2), `${name}.png`);
    } else if (name) {
      saveRows(rowsOf(specs.find((one) => one.name === name).spec), name);
    } else if (button.className === "csv") {
      const table = button.parentElement.nextElementSibling.querySelector("table");
      saveRows([...table.rows].map((row) => [...row.cells].map(valueOf)), table.dataset.name);
    } else if (button.parentElement.tagName === "TH") {
      sort(button.parentElement);
    }
  });

  document.addEventListener("input", (event) => {
    if (event.target.type !== "search") return;
    const words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
    const table = event.target.closest(".tools").nextElementSibling.querySelector("table");
    for (const row of table.tBodies[0].rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
  });

  let waiting;
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth === width) return;
    width = innerWidth;
    clearTimeout(waiting);
    waiting = setTimeout(draw, 150);
  });
  media.addEventListener("change", draw);
  root.dataset.theme = dark() ? "dark" : "light";
  load();
})();
