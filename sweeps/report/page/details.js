// What the page shows of the selected trials: their configurations, what differs between them, and their logs.
const MOST_COMPARED = 6; // side by side

function made(name, text, more) {
  const element = document.createElement(name);
  if (text !== undefined) element.textContent = text;
  return Object.assign(element, more);
}

function shownValue(value) {
  return value === undefined ? "-" : typeof value === "string" ? value : JSON.stringify(value);
}

function tableOf(header, lines, label) {
  const table = made("table"), head = table.createTHead().insertRow(), body = table.createTBody();
  header.forEach((name) => head.append(made("th", name, { scope: "col" })));
  for (const [key, ...cells] of lines) {
    const row = body.insertRow();
    row.append(made("th", key, { scope: "row" }));
    cells.forEach((cell) => row.append(made("td", cell, { className: "left" })));
  }
  const box = made("div", undefined, { className: "scroll", tabIndex: 0 });
  box.setAttribute("role", "region");
  box.setAttribute("aria-label", label);
  box.append(table);
  return box;
}

function valuesOf(trial) {
  return Object.assign({}, data.common, trial.values);
}

// Key, and the value of each trial, of the keys in which they differ.
function differences(some) {
  const keys = [...new Set(some.flatMap((t) => Object.keys(t.values)))];
  return keys.map((key) => [key, ...some.map((t) => shownValue(t.values[key]))]).filter(([, first, ...rest]) => rest.some((v) => v !== first));
}

function comparison(some) {
  const shown = some.slice(0, MOST_COMPARED);
  const title = "Difference of " + shown.length + (some.length > shown.length ? " of " + some.length : "") + " selected trials";
  const lines = differences(shown), found = [made("h3", title)];
  if (!lines.length) return [...found, made("p", "They have the same configuration.")];
  const scores = outcomes().map(([name, column]) => [name, ...shown.map((t) => rows.get(t.signature).cells[column].textContent)]);
  return [...found, tableOf(["", ...shown.map((t) => t.name)], [...lines, ...scores], title)];
}

function configuration(trial) {
  const own = Object.entries(trial.values).map(([key, value]) => [key, shownValue(value)]);
  const found = own.length ? [made("h4", "What differs between trials"), tableOf(["key", "value"], own, "what differs, of " + trial.name)] : [];
  const whole = made("details"), all = Object.entries(valuesOf(trial)).map(([key, value]) => [key, shownValue(value)]);
  whole.append(made("summary", "whole configuration, " + all.length + " keys"));
  // A table of a hundred keys is made when it is asked for.
  whole.addEventListener("toggle", () => {
    if (whole.open && whole.children.length === 1) whole.append(tableOf(["key", "value"], all, "configuration of " + trial.name));
  });
  return [...found, whole];
}

function detailsOf(trial) {
  const list = made("ul");
  trial.about.forEach((line) => list.append(made("li", line)));
  const box = made("article");
  box.append(made("h3", trial.name), list, ...configuration(trial));
  if (trial.log) {
    const log = made("pre", trial.log, { tabIndex: 0 });
    log.setAttribute("role", "region");
    log.setAttribute("aria-label", "end of the log of " + trial.name);
    box.append(made("h4", "End of its log"), log);
  }
  return box;
}

function details() {
  const some = [...chosen].map((signature) => bySignature.get(signature));
  const box = document.getElementById("details");
  box.replaceChildren(...(some.length > 1 ? comparison(some) : []), ...some.slice(0, 20).map(detailsOf));
  if (some.length > 20) box.append(made("p", some.length - 20 + " more are selected; these are the first 20."));
}
