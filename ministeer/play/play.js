// The page: it reads the fields, asks the server, and draws the answers. All text goes in as textContent.
const $ = (id) => document.getElementById(id);
const TITLES = { unsteered: "unsteered", steered: "steered", random: "random vectors" };
const COLUMNS = Object.keys(TITLES);
const NUMBERS = ["layer", "coeff", "n", "max_new_tokens", "temperature", "top_p", "freq_penalty", "seed"];
const CIVIDIS = ["#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369",
  "#e1cc55", "#fee838"].map((hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)));
const LOW = 0.03, HIGH = 3;             // the map's scale, the same for every setting, so that maps compare
const CLIENT = crypto.getRandomValues(new Uint32Array(4)).join("-");
const TOKEN = new URLSearchParams(location.search).get("token") ?? "";
const form = $("setting");
let shown = null, lensMap = null, texts = null, cursor = null;

// ---- the server ----

function post(path, data, signal) {
  return fetch(path, { method: "POST", body: JSON.stringify({ ...data, client: CLIENT }), signal,
    headers: { "Content-Type": "application/json", "X-Token": TOKEN } })
    .catch((error) => {
      throw error.name === "AbortError" ? error : new Error("The server does not answer.");
    });
}

async function ask(path, data, signal) {
  const answer = await post(path, data, signal);
  if (answer.ok) return answer.json();
  throw await refusal(answer);
}

async function refusal(answer) {
  const text = await answer.text();
  const said = answer.status === 422 ? JSON.parse(text) : { message: text };
  return Object.assign(new Error(said.message), said);
}

// Call `step` with each event that the server sends, until the last.
async function follow(path, data, signal, step) {
  const answer = await post(path, data, signal);
  if (!answer.ok) throw await refusal(answer);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let over = false;
  for (let rest = "", part; !(part = await reader.read()).done;) {
    const events = (rest + part.value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const said = JSON.parse(event.slice("data: ".length));
      if (said.message) throw Object.assign(new Error(said.message), said);
      over ||= said.done;
      if (said.step || said.ahead) step(said);
    }
  }
  if (!over) throw new Error("The server stopped in the middle of its answer.");
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
function piece(text) {
  const span = make("span", { class: "piece" });
  for (const part of text.split(/(\s)/)) {
    const sign = { " ": "·", "\n": "↵", "\t": "⇥" }[part];
    if (part) span.append(sign ? make("span", { class: "space" }, sign) : part);
  }
  return span;
}

const visible = (text) => piece(text).textContent;
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

function complain(error) {
  if (error.name === "AbortError") return;
  const input = error.field && form.elements[error.field];
  if (!input) return void ($("status").textContent = error.message);
  input.setAttribute("aria-invalid", "true");
  const where = input.closest(".field");
  where.querySelector(".error")?.remove();
  const line = make("p", { class: "error", role: "alert", id: `${error.field}-error` }, error.message);
  input.setAttribute("aria-describedby", line.id);
  where.append(line);
  where.closest("details")?.setAttribute("open", "");
}

function forgive() {
  $("status").textContent = "";
  document.querySelectorAll(".error").forEach((line) => line.remove());
  document.querySelectorAll("[aria-invalid]").forEach((input) => input.removeAttribute("aria-invalid"));
}

// ---- the setting, which is also the address ----

function setting() {
  const given = Object.fromEntries(new FormData(form));
  for (const name of NUMBERS) given[name] = given[name] === "" ? null : Number(given[name]);
  if (/^\d+$/.test(given.where)) given.where = Number(given.where);
  return given;
}

function fill(values) {
  for (const [name, value] of Object.entries(values)) {
    const input = form.elements[name];
    if (name === "where") place(value);
    else if (input) input.value = value;
  }
  $("layer-slide").value = form.elements.layer.value;
  $("coeff-slide").value = form.elements.coeff.value;
}

// Choose a position; a token's number gets an option of its own.
function place(where) {
  const select = $("where");
  if (/^\d+$/.test(where) && ![...select.options].some((option) => option.value === String(where))) {
    select.querySelector("[data-token]")?.remove();
    select.append(make("option", { value: where, "data-token": "" }, `from position ${where} on`));
  }
  select.value = where;
}

function changed() {
  const state = Object.fromEntries(new FormData(form));
  history.replaceState(null, "", "#" + new URLSearchParams(state));
  look();
}

// ---- the map and the next token: one request at a time, and only for the newest setting ----

let wanted = null, asking = false, resting;

async function look(seeds = [Number($("control").value)]) {
  clearTimeout(resting);
  wanted = { ...setting(), seeds };
  if (asking) return;
  asking = true;
  while (wanted) {
    const now = wanted;
    wanted = null;
    try {
      const answer = await ask("look", now);
      forgive();
      shown = { ...answer, given: now };
      lensMap = null;
      await draw();
      // When the sliders rest, all five random vectors.
      if (!wanted && now.seeds.length === 1) resting = setTimeout(look, 250, [0, 1, 2, 3, 4]);
    } catch (error) {
      forgive();
      complain(error);
    }
  }
  asking = false;
}

async function draw() {
  drawTokens();
  drawNext();
  $("python").textContent = shown.python;
  $("command").textContent = shown.command;
  await drawMap();
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
  $("sink").hidden = shown.sink < 0.5;
  $("sink").textContent = `${percent(shown.sink)} of the vector’s squared norm lies in four dimensions: an ` +
    "attention sink of one prompt, often its padding. Try an earlier layer, or prompts of the same length.";
}

function drawNext() {
  const most = Math.max(...shown.next.map(([, logp]) => Math.exp(Math.max(...logp))));
  $("most").textContent = `0 to ${percent(most)}`;
  $("next").tBodies[0].replaceChildren(...shown.next.map(([token, logp]) => {
    const [plain, steered, ...controls] = logp;
    const bars = make("td", { class: "bars" });
    const bar = (name, value) => {
      const mark = make("i", { class: name });
      mark.style[name === "dot" ? "left" : "width"] = `${97 * Math.exp(value) / most}%`;
      bars.append(mark);
    };
    bar("unsteered", plain);
    bar("steered", steered);
    controls.forEach((value) => bar("dot", value));
    bars.title = `unsteered ${percent(Math.exp(plain))}, steered ${percent(Math.exp(steered))}`;
    const moved = controls.map((value) => value - plain);
    return make("tr", {}, make("th", { scope: "row" }, piece(token)), bars,
      make("td", { class: "number" }, signed(steered - plain)),
      make("td", { class: "number" }, range(moved, signed, " … ")));
  }));
}

// ---- grids of cells: the map of the stream, and the map of layers and coefficients ----

// rows from the bottom up; cell(row, column) -> {share: 0 … 1 or null, text, title}
function grid(svg, rows, columns, cell, outlined, labels) {
  const text = cell(0, 0).text !== undefined, left = 30, height = 15;
  const room = Math.min(760, svg.parentElement.clientWidth) - left;
  const width = Math.max(text ? 70 : 24, Math.min(110, room / columns));
  const total = [left + columns * width, rows * height + 20];
  svg.setAttribute("viewBox", `0 0 ${total.join(" ")}`);
  svg.setAttribute("width", total[0]);
  svg.setAttribute("height", total[1]);
  const parts = [], marked = [];
  for (let row = 0; row < rows; row++) {
    const y = (rows - 1 - row) * height;
    if (row % 5 === 0) parts.push(make("text", { x: left - 5, y: y + 11, "text-anchor": "end" }, row));
    for (let column = 0; column < columns; column++) {
      const { share, text, title } = cell(row, column), x = left + column * width;
      const place = { x, y, width, height, "data-row": row, "data-column": column };
      const rgb = share === null ? null : colour(share), mark = outlined(row, column);
      const kinds = ["cell", ...(rgb ? [] : ["unchanged"]), ...(mark ? ["outlined"] : [])];
      const rect = make("rect", { ...place, class: kinds.join(" ") }, make("title", {}, title));
      if (rgb) rect.setAttribute("fill", `rgb(${rgb})`);
      (mark ? marked : parts).push(rect);
      if (text === undefined) continue;
      const written = visible(text).slice(0, 9);
      const label = make("text", { x: x + 3, y: y + 11, "pointer-events": "none" }, written);
      if (rgb) label.style.fill = rgb[1] > 115 ? "#000" : "#fff";
      (mark ? marked : parts).push(label);
    }
  }
  for (let column = 0; column < columns; column++) {
    parts.push(make("text", { x: left + (column + 0.5) * width, y: total[1] - 6, "text-anchor": "middle" },
      labels[column].slice(0, Math.floor(width / 6.7))));
  }
  svg.replaceChildren(...parts, ...marked);      // outlined cells last, so that no neighbour covers the line
}

const view = () => document.querySelector("[name=view]:checked").value;

async function drawMap() {
  const { tokens, layer, steered, norms } = shown, kind = view(), seed = $("control").value;
  if (kind === "lens" && !lensMap) {
    const given = shown.given, answer = await ask("lens_map", given);
    if (given !== shown.given) return;
    lensMap = answer;
  }
  const values = kind === "norms" ? norms : kind === "random" ? shown.random[seed] : shown.change;
  if (!values) return look();
  const all = norms.flat();
  const [low, high] = kind === "norms" ? [Math.min(...all), Math.max(...all)] : [LOW, HIGH];
  const name = kind === "norms" ? "norm" : "change";
  grid($("map"), values.length, tokens.length, (row, column) => {
    const x = values[row][column];
    return { share: x < 1e-5 ? null : Math.log(x / low) / Math.log(high / low),
      text: kind === "lens" ? lensMap[row][column] : undefined,
      title: `resid[${row}], position ${column}: ${name} ${short(x)}` };
  }, (row, column) => kind !== "norms" && row === layer && steered.includes(column),
  tokens.map(visible));
  $("low").textContent = kind === "norms" ? short(low) : `${low} or less`;
  $("high").textContent = kind === "norms" ? short(high) : `${high} × the norm there`;
  const says = {
    steered: "How far steering moves resid[l], relative to its norm.",
    random: `How far the random vector of seed ${seed}, with the same norm, moves resid[l].`,
    norms: "The norm of resid[l] without steering. A position far above the others is an attention sink.",
    lens: "The token that the steered stream would predict at each place; colours show the change." }[kind];
  $("map-says").textContent = `${says} Layers go upward, positions to the right.` +
    (kind === "norms" ? "" : " The addition is outlined; pale cells are unchanged.");
  $("map").setAttribute("aria-label", `Map, ${tokens.length} positions by ${values.length} layers. ${says}`);
  if (cursor) mark($("map"), ...cursor);
}

let reading = null;

// Say what is at one place: the numbers at once, the logit lens when the server has answered.
async function read(row, column) {
  cursor = [row, column];
  mark($("map"), row, column);
  const random = Object.values(shown.random).map((map) => map[row][column]);
  $("place").replaceChildren(make("p", {}, make("b", {}, `resid[${row}], position ${column}, `),
    piece(shown.tokens[column]), `: steering moves it by ${short(shown.change[row][column])} × its norm of ` +
    `${short(shown.norms[row][column])}; random vectors by ${range(random, short, " to ")} ×.`));
  reading?.abort();
  reading = new AbortController();
  const { signal } = reading;
  await new Promise((resolve) => setTimeout(resolve, 120));
  if (signal.aborted) return;
  const { steered, unsteered } = await ask("lens", { ...shown.given, at_layer: row, at: column }, signal);
  const cells = ([token, p]) => [make("td", {}, piece(token)), make("td", { class: "number" }, percent(p))];
  const heads = ["lens, unsteered", "steered"].map((text) => make("th", { colspan: 2, scope: "col" }, text));
  $("place").append(make("table", {}, make("thead", {}, make("tr", {}, ...heads)),
    make("tbody", {}, ...unsteered.map((row, i) => make("tr", {}, ...cells(row), ...cells(steered[i]))))));
}

// Frame a cell, if there is one.
function mark(svg, row, column) {
  const rect = svg.querySelector(`[data-row="${row}"][data-column="${column}"]`);
  if (!rect) return false;
  svg.querySelector(".cursor")?.remove();
  const frame = svg.appendChild(rect.cloneNode());       // last, so that no neighbour covers it
  frame.setAttribute("class", "cursor");
  return true;
}

// Pointer and arrow keys call `at` with a cell; click and Enter call `choose`.
function explore(svg, at, choose) {
  const cell = (target) => [Number(target.dataset.row), Number(target.dataset.column)];
  svg.addEventListener("pointerover", (event) => event.target.dataset.row && at(...cell(event.target)));
  svg.addEventListener("click", (event) => event.target.dataset.row && choose(...cell(event.target)));
  svg.addEventListener("keydown", (event) => {
    const here = svg.querySelector(".cursor"), [row, column] = here ? cell(here) : [0, 0];
    const ways = { ArrowUp: [1, 0], ArrowDown: [-1, 0], ArrowRight: [0, 1], ArrowLeft: [0, -1] };
    const [up, right] = ways[event.key] ?? [];
    if (event.key === "Enter" && here) choose(row, column);
    if (up === undefined) return;
    event.preventDefault();
    const next = here ? [row + up, column + right] : [row, column];
    if (mark(svg, ...next)) at(...next);
  });
}

// ---- completions and the counter ----

let drawing = null;

async function complete() {
  drawing?.abort();
  drawing = new AbortController();
  const { signal } = drawing, given = setting(), total = 3 * given.n;
  let ended = 0;
  texts = Object.fromEntries(COLUMNS.map((name) => [name, []]));
  const lists = Object.fromEntries(COLUMNS.map((name) => [name, make("ol")]));
  $("columns").replaceChildren(...COLUMNS.map((name) =>
    make("div", {}, make("h3", { class: name }, TITLES[name]), lists[name])));
  $("counts").tBodies[0].replaceChildren();
  $("stop").disabled = false;
  $("progress").textContent = "reading the prompt …";
  try {
    await follow("complete", given, signal, ({ ahead, step }) => {
      if (ahead) return void ($("progress").textContent = `${ahead} before you in the queue …`);
      for (const [name, i, text, over] of step) {
        const item = lists[name].children[i] ?? lists[name].appendChild(make("li", { class: "growing" },
          ...(name === "random" ? [make("small", {}, `seed ${i % 5} `)] : []), make("span")));
        item.lastChild.textContent += text;
        if (!over) continue;
        item.classList.remove("growing");
        texts[name][i] = item.lastChild.textContent;
        ended++;
      }
      $("progress").textContent = `${ended} of ${total} are complete`;
      if (step.some((row) => row[3])) count();
    });
  } catch (error) {
    forgive();
    complain(error);
  }
  if (drawing?.signal !== signal) return;          // a newer one has taken its place
  $("columns").querySelectorAll(".growing").forEach((item) => item.classList.remove("growing"));
  $("progress").textContent = (ended < total ? `stopped: ${ended} of` : "all") + ` ${total} are complete`;
  $("stop").disabled = true;
  await count();
}

let counting = false, recount = false;

async function count() {
  recount = true;
  if (counting || !texts) return;
  counting = true;
  while (recount) {
    recount = false;
    const asked = texts, done = COLUMNS.map((name) => [name, Object.entries(texts[name])]);
    const given = Object.fromEntries(done.map(([name, rows]) => [name, rows.map(([, text]) => text)]));
    const counts = await ask("count", { words: $("words").value, texts: given }).catch(complain);
    if (!counts || asked !== texts) continue;
    $("counts").tBodies[0].replaceChildren(...done.map(([name, rows], column) => {
      const [k, n, low, high, hits] = counts[name];
      const items = $("columns").querySelectorAll("ol")[column].children;
      rows.forEach(([i], row) => items[i].classList.toggle("hit", hits[row]));
      const line = make("i", { class: name }), point = make("b", { class: name });
      const bars = make("td", { class: "bars" });
      line.style.left = `${100 * low}%`;
      line.style.width = `${100 * (high - low)}%`;
      point.style.left = `${100 * k / n}%`;
      if (n) bars.append(line, point);
      const share = n ? `${percent(k / n)}  (${percent(low)} to ${percent(high)})` : "";
      return make("tr", {}, make("th", { scope: "row" }, TITLES[name]),
        make("td", { class: "number" }, `${k} of ${n}`), make("td", { class: "number" }, share), bars);
    }));
  }
  counting = false;
}

// ---- which layer ----

let scanning = null, scanned = null;

async function scan() {
  scanning?.abort();
  scanning = new AbortController();
  const { signal } = scanning, given = setting();
  scanned = null;
  $("scan-says").textContent = "reading …";
  try {
    await follow("scan", given, signal, ({ ahead, step }) => {
      if (ahead) return void ($("scan-says").textContent = `${ahead} before you in the queue …`);
      if (step.coeffs) return void (scanned = { ...step, rows: [] });
      scanned.rows.push(...step.logp);
      drawScan();
      $("scan-says").textContent = `${scanned.rows.length} of ${scanned.n_layer} layers`;
    });
  } catch (error) {
    if (error.name !== "AbortError") $("scan-says").textContent = "";
    forgive();
    complain(error);
  }
}

function drawScan() {
  const { rows, coeffs, n_layer, target } = scanned, zero = coeffs.indexOf(0);
  const change = (row, column) => rows[row][column] - rows[row][zero];
  const most = Math.max(1, ...rows.flatMap((row, l) => row.map((_, c) => Math.abs(change(l, c)))));
  const layer = Number(form.elements.layer.value), coeff = Number(form.elements.coeff.value);
  grid($("layers"), n_layer, coeffs.length, (row, column) => ({
    share: rows[row] ? 0.5 + change(row, column) / most / 2 : null,
    title: rows[row] ? `layer ${row}, coeff ${coeffs[column]}: ${signed(change(row, column))} nats` : "" }),
  (row, column) => row === layer && coeffs[column] === coeff, coeffs.map(String));
  $("layers").setAttribute("aria-label", `Change of log p of ${visible(target)} in nats, by layer and coeff`);
  const nats = `${most.toFixed(1)} nats`;
  $("scan-place").textContent = `Target ${visible(target)}, unsteered ${percent(Math.exp(rows[0][zero]))}. ` +
    `Dark blue: ${nats} less likely; yellow: ${nats} likelier; grey: no change.`;
}

function sayScan(row, column) {
  if (!scanned?.rows[row]) return;
  mark($("layers"), row, column);
  const before = scanned.rows[row][scanned.coeffs.indexOf(0)], after = scanned.rows[row][column];
  $("scan-place").textContent = `Layer ${row}, coeff ${scanned.coeffs[column]}: p of ` +
    `${visible(scanned.target)} goes from ${percent(Math.exp(before))} to ${percent(Math.exp(after))}, ` +
    `${signed(after - before)} nats.`;
}

// ---- take it away ----

function save(name, data, type) {
  const link = make("a", { download: name, href: URL.createObjectURL(new Blob([data], { type })) });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

async function saveVector() {
  const answer = await post("vector", setting());
  if (answer.ok) save("vector.safetensors", await answer.arrayBuffer(), "application/octet-stream");
  else complain(await refusal(answer));
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
  save("map.svg", new XMLSerializer().serializeToString(copy), "image/svg+xml");
}

// ---- start ----

document.addEventListener("input", ({ target }) => {         // two of the form's fields stand outside it
  if (target.form !== form) return;
  for (const name of ["layer", "coeff"]) {
    if (target.id === `${name}-slide`) form.elements[name].value = target.value;
    if (target.id === name) $(`${name}-slide`).value = target.value;
  }
  if (target.id !== "words" && target.id !== "target") return changed();
  history.replaceState(null, "", "#" + new URLSearchParams(new FormData(form)));
  if (target.id === "words") count();
});
form.addEventListener("submit", (event) => event.preventDefault());
$("tokens").addEventListener("click", ({ target }) => {
  const chip = target.closest("[data-position]");
  if (chip) { place(chip.dataset.position); changed(); }
});
$("views").addEventListener("change", () => drawMap().catch(complain));
explore($("map"), (row, column) => read(row, column).catch(complain), () => {});
explore($("layers"), sayScan, (row, column) => {
  fill({ layer: row, coeff: scanned.coeffs[column], where: "front" });
  drawScan();
  changed();
});
$("draw").addEventListener("click", complete);
$("stop").addEventListener("click", () => drawing?.abort());
$("scan").addEventListener("click", scan);
$("copy-link").addEventListener("click", async () => {
  await navigator.clipboard?.writeText(location.href);       // browsers offer it only on https and localhost
  $("copied").textContent = navigator.clipboard ? "copied" : "please copy the address of this page";
});
$("save-vector").addEventListener("click", saveVector);
$("save-map").addEventListener("click", saveMap);

const about = await (await fetch("about", { headers: { "X-Token": TOKEN } })).json();
$("model").textContent = about.model;
$("layer-slide").max = about.n_layer - 1;
for (const [name, preset] of Object.entries(about.presets)) {
  const button = $("presets").appendChild(make("button", { type: "button" }, name));
  button.addEventListener("click", () => { fill(preset); changed(); });
}
const restore = () => {
  const state = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  fill({ ...Object.values(about.presets)[0], ...state });
  look();
};
addEventListener("hashchange", restore);
restore();
