// What the page does when something on it is used.
function toggle(signature) {
  if (!chosen.delete(signature)) chosen.add(signature);
  show();
}

function show() {
  for (const [signature, row] of rows) {
    row.classList.toggle("chosen", chosen.has(signature));
    if (chosen.has(signature)) row.setAttribute("aria-current", "true");
    else row.removeAttribute("aria-current");
  }
  const known = [...chosen].join(",");
  history.replaceState(null, "", known ? "#trials=" + known : location.pathname + location.search);
  document.getElementById("chosen").textContent = chosen.size ? chosen.size + " selected, shown below the table"
    : "A click on a curve, or a click or Enter on a row, opens a trial; two are compared.";
  document.getElementById("clear").hidden = !chosen.size;
  draw();
  details();
}

for (const [signature, row] of rows) {
  row.addEventListener("click", () => toggle(signature));
  row.addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); toggle(signature); } });
}
for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((head, column) => head.firstElementChild.addEventListener("click", () => sort(table, column)));
}
for (const button of document.querySelectorAll("[data-select]")) {
  button.addEventListener("click", () => { for (const s of button.dataset.select.split(",")) chosen.add(s); show(); });
}
for (const button of document.querySelectorAll("[data-figure]")) {
  button.addEventListener("click", () => saveFigure(button.dataset.figure, button.dataset.format));
}
for (const button of document.querySelectorAll("[data-file]")) button.addEventListener("click", () => saveFile(button.dataset.file));
document.getElementById("clear").addEventListener("click", () => { chosen.clear(); show(); });
document.querySelectorAll("input.filter").forEach((input) => input.addEventListener("input", () => filter(input.value)));
metricChoice.addEventListener("change", draw);

drawFigures();
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
