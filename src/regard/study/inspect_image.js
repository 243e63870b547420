// The picture, with what the chosen head makes of it on top, and the same of all layers or of a layer's heads.
const {leading} = page, [ROWS, COLUMNS] = page.cells;
state.panels = "layers";
state.query = leading + Math.floor(ROWS / 2) * COLUMNS + Math.floor(COLUMNS / 2);
// what the query gives to each group, or without a query all tokens together
const given = unit => state.query === null ? received.subarray(unit * G, (unit + 1) * G) :
  patterns.subarray((unit * G + state.query) * G, (unit * G + state.query + 1) * G);
const asker = () => state.query === null ? "all tokens" : page.groups[state.query];
const before = unit => { let sum = 0; for (let i = 0; i < leading; i++) sum += share(given(unit)[i]); return sum; };

function shown(figure, of, title) {
  const cell = state.query - leading, row = Math.floor(cell / COLUMNS), column = cell % COLUMNS, asks = state.query !== null && cell >= 0;
  const {data, layout} = figure, shapes = [];
  const traces = data.map((trace, at) => {
    const parts = Array.from(given(of[at]).subarray(leading), share), z = [], text = [];
    for (let r = 0; r < ROWS; r++) {
      z.push(parts.slice(r * COLUMNS, (r + 1) * COLUMNS));
      text.push(z[r].map((part, c) => page.groups[leading + r * COLUMNS + c] + "<br>gets <b>" + percent(part) + "</b> of " + asker()));
    }
    const axes = {xref: trace.xaxis, yref: trace.yaxis};
    if (asks) shapes.push({...box(column - .5, column + .5, row - .5, row + .5), ...axes, line: {color: "#fff", width: data.length > 1 ? 1 : 2}});
    if (data.length > 1 && of[at] === state.unit) shapes.push({...box(-.5, COLUMNS - .5, -.5, ROWS - .5), ...axes, line: {width: 4}});
    return {...trace, z, text, zmax: Math.max(...parts) || 1};
  });
  return {data: traces, layout: {...layout, shapes,
    images: layout.images.map(image => ({...image, source: page.picture})),
    annotations: layout.annotations.map((note, at) => ({...note, text: title(of[at])}))}};
}

views.push(() => {
  plot("overlay", shown(page.overlay, [state.unit], () => ""));
  const most = Math.max(...Array.from(given(state.unit).subarray(leading), share));
  el("shown").textContent = "Brightness: the share of attention that " + (state.query === null ? "a patch gets from all tokens, on average"
    : "a patch gets from the " + asker()) + ", from 0 to " + percent(most) + (leading ? "; " + percent(before(state.unit)) + " goes to the class token" +
    (leading > 1 ? " and others before the patches" : "") : "") + ".";
  document.querySelectorAll("#from input").forEach(input => {
    input.checked = input.value === (state.query === null ? "all" : state.query < leading ? "class" : "patch");
  });
});
const narrow = matchMedia("(max-width: 60rem)");
narrow.addEventListener("change", update);
views.push(() => {
  const of = state.panels === "layers" ? page.rows.map(row => row.at(-1)) : page.rows[rowOf(state.unit)].slice(0, -1);
  const figure = page.panels[state.panels][narrow.matches ? 1 : 0], count = of.length;
  const title = unit => (state.panels === "layers" ? "layer " + page.layers[rowOf(unit)] : "head " + page.rows[rowOf(unit)].indexOf(unit)) +
    (leading ? " · " + percent(before(unit)) + " class" : "");
  const whole = {data: figure.data.slice(0, count), layout: {...figure.layout, annotations: figure.layout.annotations.slice(0, count), images: figure.layout.images.slice(0, count)}};
  el("panels").style.aspectRatio = figure.aspect;
  plot("panels", shown(whole, of, title)).then(() => Plotly.Plots.resize("panels"));
  el("panels").dataset.units = of.join(" ");
  el("of").textContent = state.panels === "layers" ? "Each layer, mean of its heads" : "The heads of layer " + page.layers[rowOf(state.unit)];
});

function ask(query) { state.query = query; update(); }
document.querySelectorAll("#from input").forEach(input => input.addEventListener("change", () => ask(
  {all: null, class: 0, patch: leading + Math.floor(ROWS / 2) * COLUMNS + Math.floor(COLUMNS / 2)}[input.value])));
document.querySelectorAll("#many input").forEach(input => input.addEventListener("change", () => { state.panels = input.value; update(); }));
el("overlay").addEventListener("keydown", event => {
  const step = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -COLUMNS, ArrowDown: COLUMNS}[event.key];
  if (event.key === "Escape") ask(null);
  else if (step) {
    const from = state.query === null || state.query < leading ? leading - step : state.query, column = (from - leading) % COLUMNS;
    const off = (step === -1 && column === 0) || (step === 1 && column === COLUMNS - 1);
    if (from + step >= leading && from + step < G && !(off && from === state.query)) ask(from + step);
  } else return;
  event.preventDefault();
});

update();
el("overview").on("plotly_click", event => choose(event.points[0].customdata));
el("overlay").on("plotly_click", event => { const [row, column] = event.points[0].pointIndex; ask(leading + row * COLUMNS + column); });
el("panels").on("plotly_click", event => choose(+el("panels").dataset.units.split(" ")[event.points[0].curveNumber]));
