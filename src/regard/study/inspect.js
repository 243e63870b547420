// The page's common part: reading the data, drawing with plotly in the theme, and the chosen head.
"use strict";
const page = JSON.parse(document.getElementById("data").textContent);
const el = id => document.getElementById(id);
const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));
const patterns = bytes(page.patterns), flows = bytes(page.flows), received = bytes(page.received);
const G = page.groups.length, S = page.parts.length;
const state = {unit: page.start, query: null, measure: "role"};
const views = []; // what is drawn again when the state changes

// A level is 0 for nothing, and 1 to 255 logarithmically from the smallest share that is told apart to all.
const decades = Math.log10(page.smallest);
const log = level => level ? decades * (1 - (level - 1) / 254) : null;
const share = level => level ? 10 ** log(level) : 0;
const percent = x => x >= .0995 ? Math.round(100 * x) + "%" : (100 * x).toFixed(1) + "%";
// plotly reads some HTML in its texts; what comes from the model must not be read as such
const plain = text => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const square = (values, n, of) => Array.from({length: n}, (_, i) => Array.from({length: n}, (_, j) => of(values[i * n + j], i, j)));

function make(tag, attributes, text) {
  const node = document.createElement(tag);
  for (const name in attributes) node.setAttribute(name, attributes[name]);
  if (text !== undefined) node.textContent = text;
  return node;
}

const dark = matchMedia("(prefers-color-scheme: dark)");
const template = () => page.themes[dark.matches ? "dark" : "light"];
const drawn = new Set();
function plot(id, figure) {
  drawn.add(id);
  const config = {displayModeBar: false, responsive: true, doubleClick: false, showTips: false};
  return Plotly.react(id, figure.data, {...figure.layout, template: template()}, config);
}
dark.addEventListener("change", () => drawn.forEach(id => Plotly.relayout(id, {template: template()})));
const box = (x0, x1, y0, y1) => ({type: "rect", x0, x1, y0, y1});

function choose(unit) { state.unit = unit; update(); }
function update() { for (const view of views) view(); }
const rowOf = unit => page.rows.findIndex(row => row.includes(unit));
const meanOf = row => page.rows[row].at(-1);

// All heads
function overview() {
  const figure = page.overview[state.measure], row = rowOf(state.unit), mean = state.unit === meanOf(row);
  const left = mean ? figure.data[1].x[0] : page.rows[row].indexOf(state.unit) - .5;
  plot("overview", {data: figure.data, layout: {...figure.layout, shapes: [box(left, left + 1, row - .5, row + .5)]}});
  el("roles").hidden = state.measure !== "role";
}
views.push(overview);
document.querySelectorAll("#measure input").forEach(
  input => input.addEventListener("change", () => { state.measure = input.value; overview(); }));
el("overview").addEventListener("keydown", event => {
  const row = rowOf(state.unit), at = page.rows[row].indexOf(state.unit), last = page.rows[row].length - 1;
  const to = {ArrowLeft: [row, at - 1], ArrowRight: [row, at + 1], ArrowUp: [row - 1, at], ArrowDown: [row + 1, at],
    Home: [row, 0], End: [row, last]}[event.key];
  if (!to) return;
  event.preventDefault();
  const line = page.rows[to[0]];
  if (line && to[1] >= 0 && to[1] <= last) choose(at === last && to[1] === last ? line.at(-1) : line[Math.min(to[1], line.length - 1)]);
});

// One head
views.push(() => {
  const name = page.names[state.unit];
  el("head").textContent = name[0].toUpperCase() + name.slice(1);
  el("facts").textContent = page.facts[state.unit];
  document.querySelectorAll("[data-name]").forEach(node => { node.textContent = name; });

  const {data: [trace], layout} = page.pattern;
  const pattern = patterns.subarray(state.unit * G * G, (state.unit + 1) * G * G);
  const text = square(pattern, G, (level, q, k) => page.groups[q] + " → " + page.groups[k] + "<br><b>" + percent(share(level)) + "</b>");
  plot("pattern", {data: [{...trace, z: square(pattern, G, log), text}], layout});
  el("pattern").setAttribute("aria-label", "attention pattern of " + name);
});
function flow() {
  const {data: [trace], layout} = page.flow, width = el("flow").clientWidth, longest = width < 560 ? 20 : width < 900 ? 34 : 60;
  const shorter = text => text.length > longest ? text.slice(0, longest - 1) + "…" : text;
  const shares = flows.subarray(state.unit * S * S, (state.unit + 1) * S * S);
  const number = level => level ? (100 * share(level)).toFixed(share(level) < .0995 ? 1 : 0) : "";
  const hovertext = square(shares, S, (level, q, k) => plain(page.parts[q]) + "<br>→ " + plain(page.parts[k]) + "<br><b>" + percent(share(level)) + "</b>");
  plot("flow", {
    data: [{...trace, z: square(shares, S, level => level ? Math.sqrt(share(level)) : null), text: square(shares, S, number), hovertext}],
    layout: {...layout, yaxis: {...layout.yaxis, ticktext: page.parts.map(part => plain(shorter(part)))}},
  });
}
views.push(flow);
addEventListener("resize", flow);
