// The page: it reads the fields, asks the server, and draws the answers. All text goes in as textContent.
const $ = (id) => document.getElementById(id);
const on = (id, event, act) => $(id).addEventListener(event, act);
const TITLES = { unsteered: "unsteered", steered: "steered", random: "random vectors" };
const COLUMNS = Object.keys(TITLES);
const CIVIDIS = ["#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369",
  "#e1cc55", "#fee838"].map((hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)));
const LOW = 0.03, HIGH = 3;             // the map's scale, the same for every setting, so that maps compare
const CLIENT = crypto.getRandomValues(new Uint32Array(4)).join("-");
const TOKEN = new URLSearchParams(location.search).get("token") ?? "";
const form = $("setting");
let shown = null;                       // the answer that is drawn

// ---- the server ----

async function post(path, data, signal) {
  const request = { method: "POST", body: JSON.stringify({ ...data, client: CLIENT }), signal,
    headers: { "Content-Type": "application/json", "X-Token": TOKEN } };
  const answer = await fetch(path, request).catch(() => {
    signal?.throwIfAborted();
    throw new Error("The server does not answer.");
  });
  if (answer.ok) return answer;
  const text = await answer.text();
  throw Object.assign(new Error(), answer.status === 422 ? JSON.parse(text) : { message: text });
}

const ask = async (path, data, signal) => (await post(path, data, signal)).json();

// The steps that the server sends, until it says that it is done.
async function* follow(path, data, signal, status) {
  const { body } = await post(path, data, signal);
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = "", part; !(part = await reader.read()).done;) {
    const events = (rest + part.value).split("\n\n");
    rest = events.pop();
    for (const text of events) {
      const event = JSON.parse(text.slice("data: ".length));
      if (event.message) throw Object.assign(new Error(), event);
      if (event.done) return;
      if (event.ahead) status.textContent = `${event.ahead} before you in the queue …`;
      else yield event.step;
    }
  }
  throw new Error("The server stopped in the middle of its answer.");
}

// Begin work of some kind, and end the older work of that kind.
const running = {};
function begin(kind) {
  running[kind]?.abort();
  running[kind] = new AbortController();
  return running[kind].signal;
}

// ---- elements ----

function make(tag, attributes = {}, ...children) {
  const space = ["rect", "text", "title"].includes(tag) ? "2000/svg" : "1999/xhtml";
  const element = document.createElementNS(`http://www.w3.org/${space}`, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// A token's text with its spaces and line ends made visible.
const visible = (text) => text.replace(/[ \n\t]/g, (sign) => ({ " ": "·", "\n": "↵", "\t": "⇥" })[sign]);
const piece = (text) => make("span", { class: "piece" }, visible(text));
const head = (child) => make("th", { scope: "row" }, child);
const number = (text) => make("td", { class: "number" }, text);
const short = (x) => (x >= 1000 ? Math.round(x).toLocaleString("en") : x.toPrecision(x < 0.001 ? 1 : 3));
const signed = (x) => (x > 0 ? "+" : "") + x.toFixed(2);
const percent = (p) => (p && p < 0.001 ? (100 * p).toPrecision(1) : (100 * p).toFixed(p < 0.1)) + " %";
// The lowest and the highest of some numbers, in words.
function range(numbers, say, between) {
  return [...new Set([Math.min(...numbers), Math.max(...numbers)].map(say))].join(between);
}

function colour(share) {
  const x = Math.min(Math.max(share, 0), 1) * (CIVIDIS.length - 1);
  const i = Math.min(Math.floor(x), CIVIDIS.length - 2);
  return CIVIDIS[i].map((low, k) => Math.round(low + (x - i) * (CIVIDIS[i + 1][k] - low)));
}

// Show an error beside the field that it names, or at the top. Aborted requests are not errors.
function complain(error) {
  if (error.name === "AbortError") return;
  forgive();
  const input = error.field && form.elements[error.field];
  if (!input) return void ($("status").textContent = error.message);
  input.setAttribute("aria-invalid", "true");
  input.setAttribute("aria-describedby", "error");
  input.closest(".field").append(make("p", { id: "error", role: "alert" }, error.message));
  input.closest("details")?.setAttribute("open", "");
}

function forgive() {
  $("status").textContent = "";
  $("error")?.remove();
  form.querySelector("[aria-invalid]")?.removeAttribute("aria-invalid");
}

// ---- the setting, which is also the address ----

function setting() {
  const given = Object.fromEntries(new FormData(form));
  for (const input of form.querySelectorAll("[type=number]")) given[input.name] = input.valueAsNumber;
  if (/^\d+$/.test(given.where)) given.where = Number(given.where);
  return given;
}

function fill(values) {
  if (/^\d+$/.test(values.where)) {             // a token's number; the list has one option for all of them
    $("from").value = values.where;
    $("from").textContent = `from position ${values.where} on`;
    $("from").hidden = false;
  }
  for (const [name, value] of Object.entries(values)) {
    if (form.elements[name]) form.elements[name].value = value;
  }
  for (const name of ["layer", "coeff"]) $(`${name}-slide`).value = $(name).value;
}

function remember() {
  history.replaceState(null, "", "#" + new URLSearchParams(new FormData(form)));
}

function change(values) {
  fill(values);
  remember();
  look();
}

// ---- the map and the next token: one request at a time, and only for the newest setting ----

let wanted = null, asking = false, later;

// With one random vector at first, which is quick; with all five when the setting has stood for a moment.
async function look(controls = 1) {
  clearTimeout(later);
  wanted = { ...setting(), controls };
  if (asking) return;
  asking = true;
  while (wanted) {
    const given = wanted;
    wanted = null;
    try {
      shown = { ...await ask("look", given), given };
      forgive();
      drawTokens();
      drawNext();
      $("python").textContent = shown.python;
      $("command").textContent = shown.command;
      await drawMap();
      if (given.controls === 1 && !wanted) later = setTimeout(look, 300, 5);
    } catch (error) {
      complain(error);
    }
  }
  asking = false;
}

function drawTokens() {
  const row = (name, chips) => [make("dt", {}, name), make("dd", {}, ...chips)];
  const side = (pieces, padded) => pieces.map((text, i) => (i < pieces.length - padded
    ? make("span", { class: "token", title: `position ${i}` }, piece(text))
    : make("span", { class: "token pad", title: "a space that pads the shorter prompt" }, piece(text))));
  const focused = document.activeElement?.dataset.position;
  $("tokens").replaceChildren(
    ...row("prompt", shown.tokens.map((text, i) => {
      const steered = shown.steered.includes(i);
      const norm = steered ? short(shown.change[shown.layer][i]) + " ×" : "\u00a0";
      return make("button", { type: "button", class: steered ? "token steered" : "token", "data-position": i,
        "aria-pressed": steered, title: `position ${i}` }, piece(text), make("small", {}, norm));
    })),
    ...row("towards", side(shown.plus, shown.padded[0])),
    ...row("away from", side(shown.minus, shown.padded[1])));
  if (focused) $("tokens").querySelector(`[data-position="${focused}"]`)?.focus();
  $("strength").textContent = shown.strength === null ? ""
    : `On average, the addition has ${shown.strength.toFixed(2)}\u00a0× the layer’s mean norm (BOS left out).`;
  $("sink").hidden = shown.sink < 0.5;
  $("share").textContent = percent(shown.sink);
}

function drawNext() {
  const most = Math.max(...shown.next.map(([, logp]) => Math.exp(Math.max(...logp))));
  $("most").textContent = `0 to ${percent(most)}`;
  $("next").tBodies[0].replaceChildren(...shown.next.map(([token, [plain, steered, ...controls]]) => {
    const bar = (kind, logp) => {
      const mark = make("i", { class: kind });
      mark.style[kind === "dot" ? "left" : "width"] = `${94 * Math.exp(logp) / most}%`;
      return mark;
    };
    const title = `unsteered ${percent(Math.exp(plain))}, steered ${percent(Math.exp(steered))}`;
    const bars = make("td", { class: "bars", title }, bar("unsteered", plain), bar("steered", steered),
      ...controls.map((logp) => bar("dot", logp)));
    const random = range(controls.map((logp) => logp - plain), signed, " … ");
    return make("tr", {}, head(piece(token)), bars, number(signed(steered - plain)), number(random));
  }));
}

// ---- grids of cells: the map of the stream, and the map of layers and coefficients ----

// rows from the bottom up; cell(row, column) -> {share: 0 … 1 or null, title, text: if any, outlined}
function grid(svg, rows, columns, cell, labels) {
  const left = 30, height = 15, room = Math.min(760, svg.parentElement.clientWidth) - left;
  const width = Math.max(cell(0, 0).text === undefined ? 24 : 70, Math.min(110, room / columns));
  const total = [left + columns * width, rows * height + 20];
  svg.setAttribute("viewBox", `0 0 ${total.join(" ")}`);
  svg.setAttribute("width", total[0]);
  svg.setAttribute("height", total[1]);
  const parts = [], last = [];      // outlined cells come last, so that no neighbour covers the line
  for (let row = 0; row < rows; row++) {
    const y = (rows - 1 - row) * height;
    if (row % 5 === 0) parts.push(make("text", { x: left - 5, y: y + 11, "text-anchor": "end" }, row));
    for (let column = 0; column < columns; column++) {
      const { share, title, text, outlined } = cell(row, column), x = left + column * width;
      const rgb = share === null ? null : colour(share), layer = outlined ? last : parts;
      const kinds = `cell${rgb ? "" : " unchanged"}${outlined ? " outlined" : ""}`;
      const rect = make("rect", { x, y, width, height, "data-row": row, "data-column": column, class: kinds },
        make("title", {}, title));
      if (rgb) rect.setAttribute("fill", `rgb(${rgb})`);
      layer.push(rect);
      if (text === undefined) continue;
      const label = make("text", { x: x + 3, y: y + 11 }, visible(text).slice(0, 9));
      if (rgb) label.style.fill = rgb[1] > 115 ? "#000" : "#fff";
      layer.push(label);
    }
  }
  const names = labels.map((label, column) => make("text", { x: left + (column + 0.5) * width,
    y: total[1] - 6, "text-anchor": "middle" }, label.slice(0, Math.floor(width / 6.7))));
  const cursor = svg.querySelector(".cursor");
  svg.replaceChildren(...parts, ...names, ...last);
  if (cursor) frame(svg, cursor.dataset.row, cursor.dataset.column);
}

// Frame a cell, if there is one.
function frame(svg, row, column) {
  const rect = svg.querySelector(`[data-row="${row}"][data-column="${column}"]`);
  if (!rect) return false;
  svg.querySelector(".cursor")?.remove();
  svg.append(rect.cloneNode());             // last, so that no neighbour covers it
  svg.lastChild.setAttribute("class", "cursor");
  return true;
}

async function drawMap() {
  const answer = shown, { tokens, layer, steered, norms, random } = answer;
  const { value: kind, dataset: { says } } = document.querySelector("[name=view]:checked");
  if (kind === "lens") answer.lens ??= await ask("lens_map", answer.given);
  if (answer !== shown) return;                 // a newer one has been drawn
  const values = { norms, random: random[$("control").value] ?? random[0] }[kind] ?? shown.change;
  const [low, high] = kind === "norms" ? [Math.min, Math.max].map((f) => f(...norms.flat())) : [LOW, HIGH];
  grid($("map"), values.length, tokens.length, (row, column) => {
    const x = values[row][column];
    return { share: x < 1e-5 ? null : Math.log(x / low) / Math.log(high / low),
      title: `resid[${row}], position ${column}: ${kind === "norms" ? "norm" : "change"} ${short(x)}`,
      text: kind === "lens" ? answer.lens[row][column] : undefined,
      outlined: kind !== "norms" && row === layer && steered.includes(column) };
  }, tokens.map(visible));
  $("low").textContent = kind === "norms" ? short(low) : `${low} or less`;
  $("high").textContent = kind === "norms" ? short(high) : `${high} × the norm there`;
  $("map-says").textContent = `${says} Layers go upward, positions to the right.`;
  $("map").setAttribute("aria-label", `Map, ${tokens.length} positions by ${values.length} layers. ${says}`);
}

// Say what is at one place: the numbers at once, the logit lens when the server has answered.
async function read(row, column) {
  const random = shown.random.map((map) => map[row][column]), signal = begin("read");
  $("lens").hidden = true;
  $("place").replaceChildren(make("b", {}, `resid[${row}], position ${column}, `),
    piece(shown.tokens[column]), `: steering moves it by ${short(shown.change[row][column])} × its norm of ` +
    `${short(shown.norms[row][column])}; random vectors by ${range(random, short, " to ")} ×.`);
  await new Promise((resolve) => setTimeout(resolve, 120));
  signal.throwIfAborted();
  const { steered, unsteered } = await ask("lens", { ...shown.given, at_layer: row, at: column }, signal);
  const cells = ([token, p]) => [make("td", {}, piece(token)), number(percent(p))];
  $("lens").tBodies[0].replaceChildren(...unsteered.map((plain, i) =>
    make("tr", {}, ...cells(plain), ...cells(steered[i]))));
  $("lens").hidden = false;
}

// Pointer and arrow keys frame a cell and call `at` with it; click and Enter call `choose`.
function explore(svg, at, choose) {
  const place = ({ dataset }) => [Number(dataset.row), Number(dataset.column)];
  const go = (row, column) => frame($(svg), row, column) && at(row, column);
  on(svg, "pointerover", ({ target }) => target.dataset.row && go(...place(target)));
  on(svg, "click", ({ target }) => target.dataset.row && choose(...place(target)));
  on(svg, "keydown", (event) => {
    const cursor = $(svg).querySelector(".cursor"), [row, column] = cursor ? place(cursor) : [0, 0];
    const ways = { ArrowUp: [1, 0], ArrowDown: [-1, 0], ArrowRight: [0, 1], ArrowLeft: [0, -1] };
    const [up, right] = ways[event.key] ?? [];
    if (event.key === "Enter" && cursor) choose(row, column);
    if (up === undefined) return;
    event.preventDefault();
    if (cursor) go(row + up, column + right);
    else go(row, column);
  });
}

// ---- completions and the counter ----

const complete = (name = "") => [...$("columns").querySelectorAll(`ol${name} .complete`)];

async function drawCompletions() {
  const signal = begin("completions"), given = setting(), progress = $("progress"), total = 3 * given.n;
  const lists = Object.fromEntries(COLUMNS.map((name) => [name, make("ol", { class: name })]));
  $("columns").replaceChildren(...COLUMNS.map((name) =>
    make("div", {}, make("h3", { class: name }, TITLES[name]), lists[name])));
  $("counts").tBodies[0].replaceChildren();
  $("columns").classList.add("growing");
  $("stop").disabled = false;
  progress.textContent = "reading the prompt …";
  try {
    for await (const step of follow("complete", given, signal, progress)) {
      for (const [name, i, text, over] of step) {
        const item = lists[name].children[i] ?? lists[name].appendChild(make("li", {},
          ...(name === "random" ? [make("small", {}, `seed ${i % 5} `)] : []), make("span")));
        item.lastChild.append(text);
        item.classList.toggle("complete", over);
      }
      progress.textContent = `${complete().length} of ${total} are complete`;
      if (step.some(([, , , over]) => over)) count();
    }
  } finally {
    if (running.completions.signal === signal) {            // no newer one has taken its place
      const ended = complete().length;
      progress.textContent = (ended < total ? `stopped: ${ended} of` : "all") + ` ${total} are complete`;
      $("columns").classList.remove("growing");
      $("stop").disabled = true;
    }
  }
}

async function count() {
  const items = {}, texts = {};
  for (const name of COLUMNS) {
    items[name] = complete(`.${name}`);
    texts[name] = items[name].map((item) => item.lastChild.textContent);
  }
  const counts = await ask("count", { words: $("words").value, texts }, begin("count"));
  $("counts").tBodies[0].replaceChildren(...COLUMNS.map((name) => {
    const [k, n, low, high, hits] = counts[name];
    items[name].forEach((item, i) => item.classList.toggle("hit", hits[i]));
    const line = make("i", { class: name }), point = make("b", { class: name });
    line.style.left = `${100 * low}%`;
    line.style.width = `${100 * (high - low)}%`;
    point.style.left = `${100 * k / n}%`;
    const share = n ? `${percent(k / n)}  (${percent(low)} to ${percent(high)})` : "";
    return make("tr", {}, head(TITLES[name]), number(`${k} of ${n}`), number(share),
      make("td", { class: "bars" }, ...(n ? [line, point] : [])));
  }));
}

// ---- which layer ----

let scanned = null;

async function scan() {
  const signal = begin("scan"), status = $("scan-says");
  status.textContent = "";
  for await (const step of follow("scan", setting(), signal, status)) {
    if (step.coeffs) scanned = { ...step, layers: [] };
    else scanned.layers.push(step);
    drawScan();
    status.textContent = `${scanned.layers.length} of ${scanned.n_layer} layers`;
  }
}

function drawScan() {
  const { layers, coeffs, coeff, n_layer, target, unsteered } = scanned, own = coeffs.indexOf(coeff);
  const most = Math.max(1, ...layers.flatMap(({ steered }) => steered.map(Math.abs)));
  const beyond = layers.map(({ steered, random }) =>
    steered[own] < Math.min(...random) || steered[own] > Math.max(...random));
  grid($("layers"), n_layer, coeffs.length, (row, column) => ({
    share: layers[row] ? 0.5 + layers[row].steered[column] / most / 2 : null,
    title: layers[row] ? sayScan(row, column) : "",
    text: column === own && beyond[row] ? "●" : "",
    outlined: row === Number($("layer").value) && coeffs[column] === Number($("coeff").value) }),
  coeffs.map(String));
  $("layers").setAttribute("aria-label", `Change of log p of ${visible(target)} in nats, by layer and coeff`);
  const nats = `${most.toFixed(1)} nats`, marked = beyond.filter(Boolean).length;
  $("scan-place").textContent = `Target ${visible(target)}, unsteered ${percent(Math.exp(unsteered))}. ` +
    `Dark blue: ${nats} less likely; yellow: ${nats} likelier; grey: no change. ` +
    `● beyond all five random vectors of coeff ${coeff}: ${marked} of ${layers.length} layers.`;
}

function sayScan(row, column) {
  const { layers, coeffs, coeff, target, unsteered } = scanned, change = layers[row].steered[column];
  const [before, after] = [unsteered, unsteered + change].map((logp) => percent(Math.exp(logp)));
  return `Layer ${row}, coeff ${coeffs[column]}: p of ${visible(target)} goes from ${before} to ${after}, ` +
    `${signed(change)} nats. Five random vectors of coeff ${coeff}: ` +
    `${range(layers[row].random, signed, " to ")} nats.`;
}

// ---- keep this setting ----

function save(name, blob) {
  const link = make("a", { download: name, href: URL.createObjectURL(blob) });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function saveMap() {
  const copy = $("map").cloneNode(true), parts = copy.querySelectorAll("rect, text");
  $("map").querySelectorAll("rect, text").forEach((part, i) => {      // the copy lacks the page's styles
    const style = getComputedStyle(part);
    for (const name of ["fill", "stroke", "stroke-width", "font"]) parts[i].style[name] = style[name];
  });
  copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
  copy.style.background = getComputedStyle($("stream")).backgroundColor;
  copy.prepend(make("title", {}, `${$("map-says").textContent}\n${shown.python}`));
  save("map.svg", new Blob([new XMLSerializer().serializeToString(copy)], { type: "image/svg+xml" }));
}

// ---- start ----

addEventListener("unhandledrejection", (event) => {
  if (["Error", "AbortError"].includes(event.reason.name)) event.preventDefault();   // no fault of this file
  complain(event.reason);
});
document.addEventListener("input", ({ target }) => {         // two of the form's fields stand outside it
  if (target.form !== form) return;
  for (const name of ["layer", "coeff"]) {
    if (target.id === `${name}-slide`) $(name).value = target.value;
    if (target.id === name) $(`${name}-slide`).value = target.value;
  }
  remember();
  if (target.id === "words") count();
  else if (target.id !== "target") look();
});
on("setting", "submit", (event) => event.preventDefault());
on("tokens", "click", ({ target }) => {
  const chip = target.closest("[data-position]");
  if (chip) change({ where: chip.dataset.position });
});
on("views", "change", drawMap);
explore("map", read, () => {});
explore("layers", (row, column) => {
  if (scanned.layers[row]) $("scan-place").textContent = sayScan(row, column);
}, (row, column) => {
  change({ layer: row, coeff: scanned.coeffs[column] });
  drawScan();
});
on("draw", "click", drawCompletions);
on("stop", "click", () => running.completions?.abort());
on("scan", "click", scan);
on("copy-link", "click", async () => {
  await navigator.clipboard?.writeText(location.href);       // browsers offer it only on https and localhost
  $("copied").textContent = navigator.clipboard ? "copied" : "please copy the address of this page";
});
on("save-vector", "click", async () => {
  save("vector.safetensors", await (await post("vector", setting())).blob());
});
on("save-map", "click", saveMap);

const about = await (await fetch("about", { headers: { "X-Token": TOKEN } })).json();
$("model").textContent = about.model;
$("layer-slide").max = about.n_layer - 1;
for (const [name, preset] of Object.entries(about.presets)) {
  const button = $("presets").appendChild(make("button", { type: "button" }, name));
  button.addEventListener("click", () => change(preset));
}
const restore = () => {
  const state = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  fill({ ...Object.values(about.presets)[0], ...state });
  look();
};
addEventListener("hashchange", restore);
restore();
document.querySelector("main").inert = false;       // a click before this would act on empty fields
