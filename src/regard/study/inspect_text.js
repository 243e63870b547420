// The text, coloured, and where each layer looks from a token of it.
const tokens = page.tokens, N = tokens.length, K = page.kept, WIDEST = 24;
const top_ = new Int16Array(bytes(page.top).buffer), shares = bytes(page.shares);
const visible = text => text.replace(/\n/g, "⏎").replace(/\t/g, "⇥");
const shorter = text => text.length > 14 ? text.slice(0, 13) + "…" : text;
const tint = part => "color-mix(in srgb, var(--heat) " + Math.round(100 * Math.max(0, Math.min(1, part))) + "%, transparent)";
const least = Math.max(page.smallest, Math.min(.003, .3 / N)); // what the colours of the text begin with
const strength = part => part > least ? .05 + .8 * (1 - Math.log10(part) / Math.log10(least)) : 0;
el("least").textContent = (100 * least).toFixed(2) + "%";

// One token is in the tab order; arrow keys go on from there.
const words = tokens.map((token, i) => {
  const node = make("span", {role: "button", tabindex: -1}, token.replace(/\n/g, "⏎\n"));
  node.addEventListener("click", () => ask(i));
  return node;
});
el("text").append(...words);
words[0].tabIndex = 0;
function focusable(at) { words.forEach((word, i) => { word.tabIndex = i === at ? 0 : -1; }); }
el("text").addEventListener("keydown", event => {
  const at = words.indexOf(event.target), step = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[event.key];
  if (at < 0) return;
  if (event.key === "Enter" || event.key === " ") ask(at);
  else if (event.key === "Escape") { if (state.query !== null) ask(state.query); }
  else if (step) { if (words[at + step]) { focusable(at + step); words[at + step].focus(); } }
  else return;
  event.preventDefault();
});

// Keys are kept of the layers' means only, so a token shows those.
function ask(i) {
  state.query = state.query === i ? null : i;
  focusable(i);
  if (state.query !== null) state.unit = meanOf(rowOf(state.unit));
  update();
}
const looks = (row, i) => Array.from({length: K}, (_, n) => {
  const at = (row * N + i) * K + n;
  return [top_[at], share(shares[at])];
}).filter(([, part]) => part > 0);

views.push(() => {
  const row = rowOf(state.unit), parts = new Float64Array(N), {query} = state;
  if (query === null) {
    for (let i = 0; i < N; i++) parts[i] = share(received[state.unit * N + i]);
    el("shown").textContent = "Colour: the share of attention that a token gets, mean over the tokens that may see it, in " + page.names[state.unit] + ".";
  } else {
    for (const [j, part] of looks(row, query)) parts[j] = part;
    el("shown").textContent = "Colour: where token " + query + " looks in " + page.names[meanOf(row)] + ", the " + K +
      " largest shares. Choose the token again to let it go.";
  }
  words.forEach((node, i) => {
    node.style.background = strength(parts[i]) > 0 ? tint(strength(parts[i])) : "";
    node.title = "token " + i + ": " + percent(parts[i]);
    node.classList.toggle("query", i === query);
    node.setAttribute("aria-pressed", i === query);
  });
});

views.push(() => {
  const {query} = state, row = rowOf(state.unit);
  el("looks").hidden = query === null;
  el("chips").replaceChildren();
  el("token").textContent = query === null ? "Choose a token" : "Where token " + query + ", “" + visible(tokens[query]) + "”, looks";
  el("hint").textContent = query === null ? "in the text, to see where each layer looks from there." :
    "Mean over the heads of each layer; the tokens that get most, in their order. Blank: not among a layer's " + K + " largest shares.";
  if (query === null) return;

  const found = page.rows.map((_, r) => new Map(looks(r, query))), sums = new Map();
  for (const line of found) for (const [j, part] of line) sums.set(j, (sums.get(j) || 0) + part);
  const columns = [...sums.keys()].sort((a, b) => sums.get(b) - sums.get(a)).slice(0, WIDEST).sort((a, b) => a - b);
  const cells = of => found.map((line, r) => columns.map(j => line.has(j) ? of(line.get(j), r, j) : null));
  const {data: [trace], layout} = page.looks;
  plot("looks", {
    data: [{...trace, x: columns.map((_, at) => at), z: cells(part => Math.max(decades, Math.log10(part))),
      text: cells((part, r, j) => "layer " + layout.yaxis.ticktext[r] + " → token " + j + ", “" + plain(visible(tokens[j])) + "”<br><b>" + percent(part) + "</b>")}],
    layout: {...layout, shapes: [box(-.5, columns.length - .5, row - .5, row + .5)],
      xaxis: {...layout.xaxis, tickvals: columns.map((_, at) => at), ticktext: columns.map(j => plain(shorter(visible(tokens[j]).trim() || "␣")))}},
  }).then(listen);

  el("chips").append("Layer " + layout.yaxis.ticktext[row] + ": ");
  for (const [j, part] of looks(row, query).slice(0, 5)) {
    const chip = el("chips").appendChild(make("span", {class: "chip", title: "token " + j, style: "background: " + tint(.8 * part)}, visible(tokens[j]) + " "));
    chip.append(make("small", {}, percent(part)));
  }
});
let listening = false;
function listen() {
  if (!listening) el("looks").on("plotly_click", event => choose(meanOf(event.points[0].pointIndex[0])));
  listening = true;
}
el("looks").addEventListener("keydown", event => {
  const to = rowOf(state.unit) + ({ArrowUp: -1, ArrowDown: 1}[event.key] || 0);
  if (to === rowOf(state.unit)) return;
  event.preventDefault();
  if (page.rows[to]) choose(meanOf(to));
});

update();
el("overview").on("plotly_click", event => choose(event.points[0].customdata));
