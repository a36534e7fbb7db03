// Tables that are sorted, filtered and downloaded.
const bySignature = new Map(trials.map((t) => [t.signature, t]));
const rows = new Map([...document.querySelectorAll("#trials tbody tr")].map((row) => [row.dataset.trial, row]));
const collator = new Intl.Collator(undefined, { numeric: true });

// Name and place of the columns of the table of trials that say what came out.
function outcomes() {
  return [...document.querySelectorAll("#trials thead th")].map((head, i) => [head.textContent, i]).filter(([name]) => data.compared.includes(name));
}

function sort(table, column) {
  const heads = [...table.tHead.rows[0].cells], head = heads[column], body = table.tBodies[0];
  const text = (row) => row.cells[column].textContent.trim();
  const number = (row) => parseFloat(text(row).replace(/,/g, ""));
  const found = [...body.rows], numeric = found.some((row) => !isNaN(number(row)));
  // Numbers begin with the largest, names with the first.
  const first = numeric ? "descending" : "ascending", other = numeric ? "ascending" : "descending";
  const way = head.getAttribute("aria-sort") === first ? other : first, sign = way === "ascending" ? 1 : -1;
  heads.forEach((one) => one.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", way);
  found.sort((a, b) => {
    if (!numeric) return sign * collator.compare(text(a), text(b));
    const [x, y] = [number(a), number(b)];
    return isNaN(x) || isNaN(y) ? isNaN(x) - isNaN(y) : sign * (x - y);
  });
  body.append(...found);
}

// What a trial is found by: what its row says, and key=value of what differs between trials.
const searched = new Map();
function searchedText(trial) {
  if (!searched.has(trial.signature)) {
    const values = Object.entries(trial.values).map(([key, value]) => key + "=" + shownValue(value));
    searched.set(trial.signature, [rows.get(trial.signature).textContent, trial.signature, ...values].join(" ").toLowerCase());
  }
  return searched.get(trial.signature);
}

function filter(text) {
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  const found = trials.filter((t) => words.every((word) => searchedText(t).includes(word)));
  matching = new Set(found.map((t) => t.signature));
  for (const [signature, row] of rows) row.hidden = !matching.has(signature);
  const configurations = new Set(found.map((t) => t.configuration));
  for (const row of document.querySelectorAll("#results tbody tr[data-configuration]")) row.hidden = !configurations.has(Number(row.dataset.configuration));
  // It stands above each table, and acts on both and on the curves.
  document.querySelectorAll("input.filter").forEach((input) => { if (input.value !== text) input.value = text; });
  const said = words.length ? found.length + " of " + trials.length + " trials match" : "";
  document.querySelectorAll(".matching").forEach((element) => { element.textContent = said; });
  draw();
}

// The lines of a file: of results.csv, in the order and with the filter of the table of trials.
function linesOf(name) {
  const [head, ...lines] = data.files[name].trimEnd().split("\n");
  if (name !== "results.csv") return [head, ...lines];
  const line = new Map(trials.map((t, i) => [t.signature, lines[i]]));
  const shown = [...document.querySelectorAll("#trials tbody tr")].filter((row) => !row.hidden);
  return [head, ...shown.map((row) => line.get(row.dataset.trial))];
}

function saveFile(name) {
  const link = made("a", undefined, { download: data.name + "-" + name });
  link.href = URL.createObjectURL(new Blob([linesOf(name).join("\n") + "\n"], { type: "text/csv" }));
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
