"use strict";
(function () {
  const data = JSON.parse(document.getElementById("data").textContent);
  const options = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d"] };
  // The figures of a large sweep are drawn as they come into sight, so that the page answers before.
  const waiting = new Map();
  const observer = new IntersectionObserver((seen) => seen.filter((one) => one.isIntersecting).forEach((one) => arrive(one.target)),
    { rootMargin: "300px" });

  function arrive(element) {
    const work = waiting.get(element);
    if (!work) return;
    waiting.delete(element);
    observer.unobserve(element);
    work();
  }

  function whenSeen(element, height, work) {
    if (data.trials.length <= data.most_curves) return work();
    element.style.minHeight = height + "px";
    waiting.set(element, work);
    observer.observe(element);
  }

  for (const [id, figure] of Object.entries(data.figures)) {
    // Buttons would cover a narrow figure. A drag zooms, a double click resets.
    whenSeen(document.getElementById(id), figure.layout.height, () =>
      Plotly.newPlot(id, figure.data, figure.layout, Object.assign({}, options, { displayModeBar: false })));
  }

  const trials = data.trials;
  const chosen = new Set();
  const place = document.getElementById("curves");
  const metricChoice = document.getElementById("metric");
  const rows = new Map([...document.querySelectorAll("#trials tbody tr")].map((row) => [row.dataset.trial, row]));

  // The selected trials, and as many of the best as a browser draws at once, in the sweep's order.
  function drawn(metric) {
    const known = data.best_first.map((i) => trials[i]).filter((t) => t.curves[metric]);
    const first = known.filter((t) => chosen.has(t.signature)), others = known.filter((t) => !chosen.has(t.signature));
    const shown = new Set([...first, ...others].slice(0, Math.max(data.most_curves, first.length)));
    return trials.filter((t) => shown.has(t));
  }

  function traces(metric) {
    return drawn(metric).map((t) => {
      const [epochs, values] = t.curves[metric];
      const faded = chosen.size > 0 && !chosen.has(t.signature);
      return {
        x: epochs, y: values, name: t.name, meta: t.signature, type: "scatter", mode: values.length > 1 ? "lines" : "markers",
        line: { color: t.colour, width: chosen.has(t.signature) ? 3.5 : 1.4 }, marker: { color: t.colour, size: 8 },
        opacity: faded ? 0.12 : 0.9, showlegend: false,
        hovertemplate: "%{fullData.name}<br>" + data.one + (data.one === "epoch" ? " %{x:.4g}" : " %{x:,.0f}") + ": %{y:.5g}<extra></extra>",
      };
    });
  }

  function draw() {
    if (!place || !metricChoice.value || waiting.has(place)) return;
    const shown = traces(metricChoice.value);
    shown.sort((a, b) => chosen.has(a.meta) - chosen.has(b.meta));
    const layout = Object.assign({}, data.curve_layout, {
      xaxis: { title: { text: data.one }, automargin: true, rangemode: "tozero" },
      yaxis: { title: { text: metricChoice.selectedOptions[0].text }, automargin: true },
    });
    Plotly.react(place, shown, layout, options);
  }

  function details() {
    const box = document.getElementById("details");
    box.replaceChildren();
    for (const t of trials.filter((one) => chosen.has(one.signature))) {
      const heading = document.createElement("h3");
      heading.textContent = t.name;
      const list = document.createElement("ul");
      for (const line of t.about) {
        const item = document.createElement("li");
        item.textContent = line;
        list.append(item);
      }
      box.append(heading, list);
      if (t.log) {
        const log = document.createElement("pre");
        log.textContent = t.log;
        box.append(log);
      }
    }
  }

  function toggle(signature) {
    if (!chosen.delete(signature)) chosen.add(signature);
    show();
  }

  function show() {
    for (const [signature, row] of rows) {
      row.classList.toggle("chosen", chosen.has(signature));
      row.setAttribute("aria-selected", String(chosen.has(signature)));
    }
    const known = [...chosen].join(",");
    history.replaceState(null, "", known ? "#trials=" + known : location.pathname + location.search);
    document.getElementById("chosen").textContent = chosen.size ? chosen.size + " selected" : "click a line or a row to select trials";
    draw();
    details();
  }

  for (const [signature, row] of rows) {
    row.addEventListener("click", () => toggle(signature));
    row.addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); toggle(signature); } });
  }
  for (const link of document.querySelectorAll("[data-select]")) {
    link.addEventListener("click", () => { for (const s of link.dataset.select.split(",")) chosen.add(s); show(); });
  }
  document.getElementById("clear").addEventListener("click", () => { chosen.clear(); show(); });
  document.getElementById("filter").addEventListener("input", (event) => {
    const wanted = event.target.value.toLowerCase();
    for (const row of rows.values()) row.hidden = !row.textContent.toLowerCase().includes(wanted);
  });

  document.querySelectorAll("#trials th").forEach((head, column) => head.addEventListener("click", () => {
    const body = document.querySelector("#trials tbody");
    const down = head.dataset.down !== "true";
    head.dataset.down = String(down);
    const of = (row) => row.children[column].textContent;
    const number = (text) => parseFloat(text.replace(/,/g, ""));
    const order = (a, b) => {
      const [x, y] = [number(of(a)), number(of(b))];
      if (isNaN(x) || isNaN(y)) return isNaN(x) && isNaN(y) ? of(a).localeCompare(of(b)) : isNaN(x) - isNaN(y);
      return down ? y - x : x - y;
    };
    body.append(...[...body.children].sort(order));
  }));

  if (metricChoice) metricChoice.addEventListener("change", draw);
  for (const signature of (location.hash.match(/^#trials=(.+)$/) || ["", ""])[1].split(",")) if (rows.has(signature)) chosen.add(signature);
  if (place) {
    whenSeen(place, data.curve_layout.height, () => {
      draw();
      if (place.on) place.on("plotly_click", (event) => toggle(event.points[0].data.meta));
    });
  }
  show();

  const all = () => document.querySelectorAll(".js-plotly-plot");
  window.addEventListener("beforeprint", () => [...waiting.keys()].forEach(arrive));
  window.addEventListener("beforeprint", () => all().forEach((plot) => Plotly.relayout(plot, { width: Math.min(plot.clientWidth, 680) })));
  window.addEventListener("afterprint", () => all().forEach((plot) => Plotly.relayout(plot, { width: null, autosize: true })));
  document.body.dataset.ready = "true";
})();
