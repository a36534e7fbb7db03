// The data of the page, its figures, and the curves of its trials.
const data = JSON.parse(document.getElementById("data").textContent);
const trials = data.trials;
const chosen = new Set(); // run IDs, in the order of their selection
let matching = new Set(trials.map((t) => t.signature)); // those that the filter lets through
const place = document.getElementById("curves");
const metricChoice = document.getElementById("metric");
// Buttons would cover a narrow figure. A drag zooms, a double click resets.
const options = { responsive: true, displaylogo: false, displayModeBar: false };

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
  if (trials.length <= data.most_curves) return work();
  element.style.minHeight = height + "px";
  waiting.set(element, work);
  observer.observe(element);
}

function drawFigures() {
  for (const [id, figure] of Object.entries(data.figures)) {
    whenSeen(document.getElementById(id), figure.layout.height, () => Plotly.newPlot(id, figure.data, figure.layout, options));
  }
}

function saveFigure(id, format) {
  const plot = document.getElementById(id);
  arrive(plot);
  const size = { width: Math.max(plot.clientWidth, 500), height: plot.layout.height };
  return Plotly.downloadImage(plot, { format, scale: format === "png" ? 3 : 1, filename: data.name + "-" + id, ...size });
}

// The selected trials, and as many of the best as a browser draws at once, in the sweep's order; of those that match the filter.
function drawn(metric) {
  const known = data.best_first.map((i) => trials[i]).filter((t) => t.curves[metric] && (matching.has(t.signature) || chosen.has(t.signature)));
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
