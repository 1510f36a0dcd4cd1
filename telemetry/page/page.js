"use strict";

const $ = id => document.getElementById(id);

// Dark to light, seen alike with and without colour blindness
// (cividis: Nunez, Anderton and Renslow, PLoS ONE 13(7), 2018).
const cividis = [
  [0, 34, 78], [18, 53, 112], [59, 73, 108], [87, 93, 109], [112, 113, 115],
  [138, 134, 120], [165, 156, 116], [195, 179, 105], [225, 204, 85], [254, 232, 56],
];

function colour(level) {
  const at = level * (cividis.length - 1), i = Math.min(Math.floor(at), cividis.length - 2);
  return cividis[i].map((from, c) => Math.round(from + (at - i) * (cividis[i + 1][c] - from)));
}

const isDark = ([r, g, b]) => .299 * r + .587 * g + .114 * b < 128;

// How measures are shown. Columns of tokens belong to heads that keep tokens of their own, all others to
// query heads.
const measures = {
  kept: { name: "kept tokens", text: tokens, log: 1 },
  candidates: { name: "candidates", text: tokens, log: 1 },
  mass: { name: "estimated mass", text: share },
  true_mass: { name: "true mass", text: share },
  error: { name: "output error", text: x => x.toPrecision(2), log: 1e-4 },
};

function tokens(x) { return x < 10 ? x.toFixed(1) : Math.round(x).toLocaleString("en"); }
function share(x) { return (100 * x).toFixed(1) + "%"; }

function bytes(n) {
  let unit = 0;
  while (n >= 1024 && unit < 5) { n /= 1024; unit++; }
  return (unit && n < 100 ? n.toFixed(1) : Math.round(n)) + " " + ["B", "KiB", "MiB", "GiB", "TiB", "PiB"][unit];
}

function duration(s) {
  if (s < 60) return Math.floor(s) + " s";
  return s < 3600 ? Math.floor(s / 60) + " min" : (s / 3600).toFixed(1) + " h";
}

function element(name, attributes, ...children) {
  const e = name in svgNames ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) e.setAttribute(key, value);
  e.append(...children);
  return e;
}

const svgNames = { rect: 1, text: 1, path: 1, title: 1, g: 1, line: 1 };

// What is shown, and what of it.
let snapshot = null;
let leaseID = null;
let sequence = "";
let measure = "kept";
let cursor = { row: 0, column: 0 };

const lease = () => snapshot.leases.find(l => l.id === leaseID) || snapshot.leases[0];

// value of a cell in a measure; undefined if it is not known. Columns are query heads, those of a group
// share what the group keeps.
function value(l, of, row, column) {
  const cells = l[of][row];
  if (!cells || !cells.length) return undefined;
  const x = cells[Math.floor(column * cells.length / l.query_heads)];
  return x < 0 ? undefined : x;
}

// scale maps a measure's values over a lease to [0, 1].
function scaleOf(l, of) {
  const all = l[of].flat().filter(x => x >= 0), { log } = measures[of];
  if (!all.length) return null;
  let least = Math.min(...all), most = Math.max(...all);
  if (log) least = Math.max(least, log), most = Math.max(most, log);
  const place = log ? Math.log : x => x;
  const span = place(most) - place(least);
  return {
    level: x => span > 0 ? Math.min(1, Math.max(0, (place(Math.max(x, log || x)) - place(least)) / span)) : 0,
    at: level => log ? least * (most / least) ** level : least + level * (most - least),
  };
}

function draw() {
  const empty = !snapshot.leases.length;
  $("empty").hidden = !empty;
  $("live").hidden = empty;
  $("daemon").textContent = snapshot.version;
  if (empty) return;
  const l = lease();
  leaseID = l.id;
  drawLeases(l);
  drawCards(l);
  drawHeat(l);
  drawSequences(l);
  drawTrace(l);
}

const readShare = l => l.dense_bytes ? l.read_bytes / l.dense_bytes : 1;

function drawLeases(chosen) {
  const body = $("leases").tBodies[0];
  const focused = body.contains(document.activeElement);
  body.replaceChildren(...snapshot.leases.map(l => {
    const radio = element("input", { type: "radio", name: "lease", value: l.id, "aria-label": "lease " + l.id });
    radio.checked = l === chosen;
    const cell = (text, number) => element("td", number ? { class: "number" } : {}, text);
    return element("tr", {}, element("td", {}, radio), cell(String(l.id)), cell(l.engine || "unnamed"), cell(l.device),
      cell([l.selector, l.estimator, l.pruner].join(" → ")), cell(duration(l.age_s), true), cell(l.steps.toLocaleString("en"), true),
      cell(l.valid_tokens ? share(l.kept_tokens / l.valid_tokens) : "", true), cell(l.dense_bytes ? share(readShare(l)) : "", true),
      cell(bytes(l.lent_bytes), true), cell(bytes(l.shadow_bytes), true));
  }));
  if (focused) body.querySelector(":checked").focus();
}

function meanOf(rows) {
  const all = rows.flat().filter(x => x >= 0);
  return all.length ? all.reduce((a, b) => a + b) / all.length : undefined;
}

function drawCards(l) {
  const known = (x, text) => x === undefined ? "–" : text(x);
  $("kept-share").textContent = l.valid_tokens ? share(l.kept_tokens / l.valid_tokens) : "–";
  $("read-saved").textContent = l.read_bytes ? (l.dense_bytes / l.read_bytes).toFixed(1) + "×" : "–";
  $("read-text").textContent = l.dense_bytes ? `fewer bytes: ${bytes(l.read_bytes)} read in place of ${bytes(l.dense_bytes)}` : "fewer bytes read";
  $("mass").textContent = known(meanOf(l.mass), share);
  $("true-mass").textContent = known(meanOf(l.true_mass), share);
  const error = meanOf(l.error);
  $("audit-text").textContent = "of the attention, where audited" + (error === undefined ? "" : `; error ${measures.error.text(error)}`);
}

const cellHeight = 22, left = 70, above = 22;

function drawHeat(l) {
  const svg = $("heat"), scale = scaleOf(l, measure), columns = l.query_heads, rows = l.layers.length;
  const cellWidth = Math.max(9, Math.min(64, Math.floor((1100 - left) / columns)));
  const width = left + columns * cellWidth, height = above + rows * cellHeight;
  svg.setAttribute("width", width + 4);
  svg.setAttribute("height", height + 4);
  svg.setAttribute("aria-label", `${measures[measure].name}, ${rows} layers by ${columns} query heads`);
  const parts = [];
  const every = Math.ceil(28 / cellWidth);
  for (let h = 0; h < columns; h += every) {
    parts.push(element("text", { x: left + (h + .5) * cellWidth, y: 14, "text-anchor": "middle", class: "faint" }, "h" + h));
  }
  for (let r = 0; r < rows; r++) {
    const y = above + r * cellHeight;
    parts.push(element("text", { x: left - 8, y: y + 15, "text-anchor": "end" }, "layer " + l.layers[r]));
    for (let h = 0; h < columns; h++) {
      const x = value(l, measure, r, h), at = { x: left + h * cellWidth, y, width: cellWidth - 1, height: cellHeight - 1 };
      const title = element("title", {}, describe(l, r, h));
      if (x === undefined) {
        parts.push(element("rect", { ...at, class: "unknown" }, title));
        continue;
      }
      const c = colour(scale.level(x)), text = measures[measure].text(x);
      parts.push(element("rect", { ...at, fill: `rgb(${c})`, "data-row": r, "data-column": h }, title));
      if (text.length * 6.5 < cellWidth) {
        parts.push(element("text", { x: at.x + cellWidth / 2, y: y + 15, "text-anchor": "middle", class: isDark(c) ? "light" : "dark", "pointer-events": "none" }, text));
      }
    }
  }
  cursor = { row: Math.min(cursor.row, Math.max(rows - 1, 0)), column: Math.min(cursor.column, columns - 1) };
  if (document.activeElement === svg && rows) {
    parts.push(element("rect", { x: left + cursor.column * cellWidth, y: above + cursor.row * cellHeight, width: cellWidth - 1, height: cellHeight - 1, class: "cursor" }));
    say($("cell"), describe(l, cursor.row, cursor.column));
  }
  svg.replaceChildren(...parts);
  drawScale(scale);
  if ($("as-table").open) drawTable(l);
}

// say changes a live region only if it says something else.
function say(region, text) {
  if (region.textContent !== text) region.textContent = text;
}

function describe(l, row, column) {
  const parts = [];
  for (const [of, m] of Object.entries(measures)) {
    const x = value(l, of, row, column);
    if (x !== undefined) parts.push(`${m.name} ${m.text(x)}`);
  }
  return `layer ${l.layers[row]}, head ${column}: ` + (parts.join(", ") || "nothing yet");
}

function drawScale(scale) {
  const svg = $("scale"), parts = [], steps = 60, width = 320;
  svg.setAttribute("width", left + width + 60);
  svg.setAttribute("height", 34);
  if (!scale) {
    svg.setAttribute("aria-label", "nothing is known of this measure");
    svg.replaceChildren(element("text", { x: left, y: 12, class: "faint" }, measure === "true_mass" || measure === "error" ?
      "no row was audited: set \"audit\" in the lease's config" : "nothing is known of this measure yet"));
    return;
  }
  for (let i = 0; i < steps; i++) {
    parts.push(element("rect", { x: left + i * width / steps, y: 0, width: width / steps + .5, height: 12, fill: `rgb(${colour(i / (steps - 1))})` }));
  }
  const { text, log } = measures[measure];
  for (const level of [0, .5, 1]) {
    parts.push(element("text", { x: left + level * width, y: 26, "text-anchor": "middle", class: "faint" }, text(scale.at(level))));
  }
  if (log) parts.push(element("text", { x: left + width + 30, y: 11, class: "faint" }, "logarithmic"));
  svg.setAttribute("aria-label", `colours from ${text(scale.at(0))}, dark, to ${text(scale.at(1))}, light`);
  svg.replaceChildren(...parts);
}

function drawTable(l) {
  const heads = [...Array(l.query_heads).keys()];
  const line = (cells, tag) => element("tr", {}, ...cells.map(c => element(tag, { class: "number" }, c)));
  $("cells").replaceChildren(
    line(["layer", ...heads.map(h => "head " + h)], "th"),
    ...l.layers.map((layer, r) => line([String(layer), ...heads.map(h => {
      const x = value(l, measure, r, h);
      return x === undefined ? "–" : measures[measure].text(x);
    })], "td")));
}

function drawSequences(l) {
  const select = $("sequence");
  if ([...select.options].map(o => o.value).join() !== l.sequences.join()) {
    select.replaceChildren(...l.sequences.map(s => element("option", { value: s }, s)));
  }
  select.value = l.sequence;
  drawChart(l.budget);
}

// drawChart draws tokens over steps, on a logarithmic scale. Lines are told apart by their dashes and
// names, not by colours.
function drawChart(points) {
  const svg = $("chart"), width = 900, height = 220, x0 = left, y0 = 10, x1 = width - 90, y1 = height - 30;
  svg.setAttribute("width", width);
  svg.setAttribute("height", height);
  if (!points.length) {
    svg.setAttribute("aria-label", "no step of this lease is over yet");
    svg.replaceChildren(element("text", { x: x0, y: 30, class: "faint" }, "no step is over yet"));
    return;
  }
  const all = points.flatMap(p => [p.kept, p.candidates, p.length]).map(x => Math.max(x, 1));
  const least = 10 ** Math.floor(Math.log10(Math.min(...all))), most = 10 ** Math.ceil(Math.log10(Math.max(...all, 10 * least)));
  const first = points[0].step, last = points[points.length - 1].step;
  const x = step => last > first ? x0 + (step - first) / (last - first) * (x1 - x0) : (x0 + x1) / 2;
  const y = n => y1 - Math.log(Math.max(n, 1) / least) / Math.log(most / least) * (y1 - y0);
  const parts = [];
  for (let n = least; n <= most * 1.01; n *= 10) {
    parts.push(element("line", { x1: x0, x2: x1, y1: y(n), y2: y(n), class: "axis" }),
      element("text", { x: x0 - 8, y: y(n) + 4, "text-anchor": "end", class: "faint" }, n.toLocaleString("en")));
  }
  const ends = [];
  for (const name of ["length", "candidates", "kept"]) {
    const path = points.map((p, i) => (i ? "L" : "M") + x(p.step).toFixed(1) + " " + y(p[name]).toFixed(1)).join("");
    const end = points[points.length - 1];
    let at = y(end[name]) + 4;
    while (ends.some(e => Math.abs(e - at) < 13)) at += 13;
    ends.push(at);
    parts.push(element("path", { d: path, class: "line " + name }),
      element("text", { x: x1 + 8, y: at }, `${name} ${tokens(end[name])}`));
    if (points.length === 1) parts.push(element("rect", { x: x(end.step) - 2, y: y(end[name]) - 2, width: 4, height: 4 }));
  }
  parts.push(element("text", { x: x0, y: height - 10, class: "faint" }, "step " + first),
    element("text", { x: x1, y: height - 10, "text-anchor": "end", class: "faint" }, "step " + last));
  const end = points[points.length - 1];
  svg.setAttribute("aria-label", `tokens of sequence ${lease().sequence}, steps ${first} to ${last}; at the last ${tokens(end.kept)} kept of ${tokens(end.candidates)} candidates of ${end.length}`);
  svg.replaceChildren(...parts);
}

function drawTrace(l) {
  $("trace").hidden = !l.trace_id;
  $("no-trace").hidden = !!l.trace_id;
  say($("trace-id"), l.trace_id);
  if (snapshot.trace_url && l.trace_id) $("trace-link").href = snapshot.trace_url.replace("{trace_id}", l.trace_id);
}

// connect follows the daemon, through its restarts.
let source = null;

function connect() {
  if (source) source.close();
  const mine = source = new EventSource("budgets/live" + (sequence ? "?sequence=" + encodeURIComponent(sequence) : ""));
  mine.onmessage = event => {
    const next = JSON.parse(event.data);
    if (snapshot && next.instance !== snapshot.instance) leaseID = null, sequence = "";
    snapshot = next;
    status(next.draining ? "draining" : "live");
    draw();
  };
  mine.onerror = () => {
    status("waiting", "the daemon does not answer: trying again");
    if (mine.readyState === EventSource.CLOSED) setTimeout(() => mine === source && connect(), 1000);
  };
}

function status(name, text) {
  $("status").className = name;
  say($("status"), text || name);
  $("live").classList.toggle("stale", name === "waiting");
}

$("measures").addEventListener("change", event => {
  measure = event.target.value;
  if (snapshot) draw();
});

$("leases").addEventListener("change", event => {
  leaseID = Number(event.target.value);
  draw();
});

$("sequence").addEventListener("change", event => {
  sequence = event.target.value;
  connect();
});

$("heat").addEventListener("keydown", event => {
  const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  if (!step || !snapshot || !snapshot.leases.length) return;
  event.preventDefault();
  const l = lease(), within = (x, n) => Math.min(Math.max(x, 0), Math.max(n - 1, 0));
  cursor = { row: within(cursor.row + step[0], l.layers.length), column: within(cursor.column + step[1], l.query_heads) };
  drawHeat(l);
});

for (const event of ["focus", "blur"]) $("heat").addEventListener(event, () => snapshot && snapshot.leases.length && drawHeat(lease()));

$("heat").addEventListener("mouseover", event => {
  const { row, column } = event.target.dataset;
  if (row !== undefined) say($("cell"), describe(lease(), Number(row), Number(column)));
});

$("as-table").addEventListener("toggle", () => snapshot && snapshot.leases.length && drawTable(lease()));

$("copy").addEventListener("click", async () => {
  const text = $("trace-link").href || $("trace-id").textContent;
  try {
    await navigator.clipboard.writeText(text);
    $("copied").textContent = "copied";
  } catch {
    getSelection().selectAllChildren($("trace-id")); // to be copied by hand
    $("copied").textContent = "selected";
  }
  setTimeout(() => { $("copied").textContent = ""; }, 2000);
});

connect();
