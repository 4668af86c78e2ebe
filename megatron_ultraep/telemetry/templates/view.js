"use strict";
// Errors are put on the page: whoever opens it should not need a console to see that something is missing.
window.addEventListener("error", (event) => warn(`This page failed to draw something: ${event.message}`));

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const REASONS = {
  balanced: "replicas were made",
  within_tolerance: "busiest rank already within the tolerance of the mean",
  gain_below_cost: "replicas would cost more time than they save",
  no_replica_possible: "no free slot, or no replica would reach the least number of tokens",
  empty: "no tokens",
};
const QUANTITIES = {
  before: ["imbalance before (max / mean)", 1],
  after: ["imbalance after (max / mean)", 1],
  replicas: ["replicas (count, mean)", 0],
  balanced: ["nodes given replicas (share)", 0],
};
const SVG = "http://www.w3.org/2000/svg";

function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "g", "rect", "line", "path", "text", "title", "defs", "pattern"].includes(tag);
  const node = svg ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value != null) node.setAttribute(name, value);
  node.append(...children.filter((child) => child != null));
  return node;
}
const count = (value) => Math.round(value).toLocaleString("en-US");
const ratio = (value) => value.toFixed(3);
const sum = (values) => values.reduce((a, b) => a + b, 0);
function warn(text) {
  document.getElementById("warnings").append(make("li", {}, text));
}
function short(value) {
  if (value >= 1e6) return `${+(value / 1e6).toPrecision(3)}M`;
  return value >= 1e4 ? `${+(value / 1e3).toPrecision(3)}k` : `${+value.toPrecision(4)}`;
}
function ticks(low, high, most) {
  const raw = (high - low) / most || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].find((m) => m * power >= raw * 0.999) * power;
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-6; i++) found.push(+(i * step).toPrecision(12));
  return found;
}
function fill(select, options, selected) {
  select.replaceChildren(...options.map(([value, text]) => make("option", { value }, text)));
  if (selected != null && options.some(([value]) => String(value) === String(selected))) select.value = selected;
}
function table(id, head, rows) {
  const cell = (tag, value, n) => make(tag, { class: n ? "n" : null, scope: tag === "th" ? "col" : null }, ...[].concat(value));
  $(id).replaceChildren(
    make("thead", {}, make("tr", {}, ...head.map(([name, n]) => cell("th", name, n)))),
    make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map((value, i) => cell("td", value, head[i][1]))))),
  );
}
const span = ([first, last]) => (first === last ? `${data.axis} ${first}` : `${data.axis}s ${first} to ${last}`);
// Wide content scrolls inside its own box rather than the page.
const width = (id) => Math.max(320, $(id).clientWidth || 1100);

// ---- imbalance over the run: percentile bands

function drawBands(series) {
  const w = width("bands"), h = 270, left = 48, right = 12, top = 8, bottom = 40;
  const bins = series.bins, n = bins.length;
  const high = Math.max(1.05, ...series.before.map((p) => p[5]), ...series.after.map((p) => p[5]));
  const x = (i) => (n === 1 ? (left + w - right) / 2 : left + ((w - left - right) * i) / (n - 1));
  const y = (value) => h - bottom - ((value - 1) / (high - 1)) * (h - top - bottom);
  const svg = make("svg", { width: w, height: h, role: "img", "aria-label": `Imbalance before and after balancing by ${data.axis}` });
  for (const value of ticks(1, high, 5)) {
    svg.append(make("line", { class: "grid", x1: left, x2: w - right, y1: y(value), y2: y(value) }),
      make("text", { class: "tick", x: left - 7, y: y(value) + 4, "text-anchor": "end" }, String(value)));
  }
  let lastLabel = -Infinity;
  bins.forEach(([first], i) => {
    if (x(i) - lastLabel < 64 || x(i) > w - right - 4 && n > 1 && i < n - 1) return;
    lastLabel = x(i);
    svg.append(make("text", { class: "tick", x: x(i), y: h - bottom + 18, "text-anchor": "middle" }, String(first)));
  });
  svg.append(make("text", { x: (left + w - right) / 2, y: h - 4, "text-anchor": "middle" }, data.axis));
  for (const name of ["before", "after"]) {
    const at = (k) => series[name].map((p) => p[k]), colour = `var(--${name})`;
    const points = (values) => values.map((v, i) => `${x(i).toFixed(1)},${y(v).toFixed(1)}`);
    if (n === 1) {
      const dx = name === "before" ? -26 : 26, [p5, p25, p50, p75, p95, top100] = series[name][0];
      const bar = (a, b, half, opacity) => make("rect", { x: x(0) + dx - half, width: 2 * half, y: y(b), height: Math.max(1, y(a) - y(b)), fill: colour, opacity });
      svg.append(bar(p5, p95, 13, 0.25), bar(p25, p75, 13, 0.4), make("rect", { x: x(0) + dx - 16, width: 32, y: y(p50) - 1, height: 2.5, fill: colour }),
        make("rect", { x: x(0) + dx - 4, width: 8, y: y(top100) - 1, height: 2, fill: colour }));
      continue;
    }
    const band = (a, b, opacity) => make("path", { d: `M${points(at(a)).join("L")}L${points(at(b)).reverse().join("L")}Z`, fill: colour, opacity });
    svg.append(band(0, 4, 0.16), band(1, 3, 0.28),
      make("path", { d: `M${points(at(5)).join("L")}`, fill: "none", stroke: colour, "stroke-dasharray": "2 3", "stroke-width": 1.1 }),
      make("path", { d: `M${points(at(2)).join("L")}`, fill: "none", stroke: colour, "stroke-width": 2 }));
  }
  $("bands").replaceChildren(svg);
  const key = (name, text) => make("span", {}, make("i", { style: `background:var(--${name})` }), text);
  $("bands-legend").replaceChildren(key("before", "before: without replicas"), key("after", "after: as computed"));
  const perBin = n > 1 && bins.some(([a, b]) => a !== b) ? `; neighbouring ${data.axis}s share a point` : "";
  $("bands-note").textContent = `Over micro-batches and layers: line, median; bands, 25th to 75th and 5th to 95th percentile; dotted, largest${perBin}.`;
}

// ---- heat map: layers by steps

const STOPS = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
function heatColour(t) {
  const at = Math.min(0.9999, Math.max(0, t)) * (STOPS.length - 1), i = Math.floor(at);
  return STOPS[i].map((c, k) => Math.round(c + (STOPS[i + 1][k] - c) * (at - i)));
}
let cursor = null;
function drawHeat(series) {
  const quantity = $("quantity").value, grid = series.heat[quantity], layers = series.layers, bins = series.heat_bins;
  const shared = quantity === "before" || quantity === "after" ? [...series.heat.before, ...series.heat.after] : grid;
  const values = shared.flat().filter((v) => v != null);
  const low = QUANTITIES[quantity][1], high = Math.max(low + 0.05, values.reduce((a, b) => Math.max(a, b), -Infinity));
  const left = 62, bottom = 40, w = width("heat") - left - 4, rows = layers.length;
  const cell = Math.max(4, Math.min(22, Math.floor(440 / rows))), h = Math.max(cell * rows, 36);
  const canvas = make("canvas", { width: bins.length, height: rows, tabindex: 0, role: "img", style: `left:${left}px;top:0;width:${w}px;height:${h}px`,
    "aria-label": `${QUANTITIES[quantity][0]} by layer and ${data.axis}. Arrow keys move, Enter opens a micro-batch.` });
  const image = canvas.getContext("2d").createImageData(bins.length, rows);
  grid.forEach((row, r) => row.forEach((value, c) => {
    if (value != null) image.data.set([...heatColour((value - low) / (high - low)), 255], 4 * (r * bins.length + c));
  }));
  canvas.getContext("2d").putImageData(image, 0, 0);
  const axes = make("svg", { width: w + left + 4, height: h + bottom, "aria-hidden": "true" });
  const every = Math.ceil(15 / (h / rows));
  layers.forEach((layer, r) => {
    if (r % every === 0) axes.append(make("text", { class: "tick", x: left - 7, y: (r + 0.5) * (h / rows) + 4, "text-anchor": "end" }, String(layer)));
  });
  axes.append(make("text", { x: -h / 2, y: 14, transform: "rotate(-90)", "text-anchor": "middle" }, "layer"));
  const gap = Math.ceil(64 / (w / bins.length));
  bins.forEach(([first], c) => {
    if (c % gap === 0) axes.append(make("text", { class: "tick", x: left + (c + 0.5) * (w / bins.length), y: h + 17, "text-anchor": "middle" }, String(first)));
  });
  const mark = make("rect", { fill: "none", stroke: "currentColor", "stroke-width": 2, visibility: "hidden" });
  axes.append(make("text", { x: left + w / 2, y: h + 35, "text-anchor": "middle" }, data.axis), mark);
  const box = make("div", { class: "heat" }, canvas, axes);
  axes.style.position = "relative";
  axes.style.pointerEvents = "none";
  $("heat").replaceChildren(box);
  const point = (row, column) => {
    cursor = [Math.min(rows - 1, Math.max(0, row)), Math.min(bins.length - 1, Math.max(0, column))];
    const [r, c] = cursor, show = (v) => (v == null ? "none" : v);
    for (const [name, value] of Object.entries({ x: left + c * (w / bins.length), y: r * (h / rows), width: w / bins.length, height: h / rows, visibility: "visible" })) mark.setAttribute(name, value);
    $("heat-readout").textContent = `Layer ${layers[r]}, ${span(bins[c])}: imbalance ${show(series.heat.before[r][c])} before, ` +
      `${show(series.heat.after[r][c])} after; ${show(series.heat.replicas[r][c])} replicas; share of nodes given replicas ${show(series.heat.balanced[r][c])} (means).`;
  };
  const where = (event) => [Math.floor((event.offsetY / h) * rows), Math.floor((event.offsetX / w) * bins.length)];
  canvas.addEventListener("mousemove", (event) => point(...where(event)));
  canvas.addEventListener("click", (event) => (point(...where(event)), openNear(layers[cursor[0]], bins[cursor[1]])));
  canvas.addEventListener("focus", () => cursor ?? point(0, 0));
  canvas.addEventListener("keydown", (event) => {
    const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (move) point(cursor[0] + move[0], cursor[1] + move[1]);
    else if (event.key === "Enter") openNear(layers[cursor[0]], bins[cursor[1]]);
    else return;
    event.preventDefault();
  });
  $("heat-readout").textContent = "Point at a cell for its figures; click it to see a micro-batch of that layer below.";
  const bar = make("canvas", { width: 100, height: 1 });
  for (let i = 0; i < 100; i++) {
    bar.getContext("2d").fillStyle = `rgb(${heatColour(i / 99)})`;
    bar.getContext("2d").fillRect(i, 0, 1, 1);
  }
  $("scale").replaceChildren(String(low), bar, String(+high.toFixed(2)));
}
function openNear(layer, [first, last]) {
  const x = (r) => (data.axis === "step" ? r.step : r.microbatch);
  const far = (r) => Math.max(0, first - x(r), x(r) - last);
  const found = mine().filter((r) => r.layer === layer).sort((a, b) => far(a) - far(b) || imbalance(loads(b).after) - imbalance(loads(a).after))[0];
  if (!found) {
    $("heat-readout").textContent = `No micro-batch of layer ${layer} is among those kept for this page.`;
    return;
  }
  $("choice").value = "all";
  $("layer").value = "all";
  listRecords(data.records.indexOf(found));
  drawRecord();
  $("detail-title").scrollIntoView({ behavior: "smooth" });
}

// ---- one micro-batch of one layer

// Where every expert is at home, and what each rank computes: lists of [expert, tokens, slot or -1] by rank.
function loads(record) {
  if (record.loads) return record.loads;
  const layout = data.layouts[record.layout], perRank = layout.experts / layout.ranks;
  const slotOf = (expert) => (layout.home.length ? layout.home[expert] : expert);
  const homeOf = (expert) => Math.floor(slotOf(expert) / perRank);
  const left = record.tokens.slice();
  for (const [expert, , , tokens] of record.replicas) left[expert] -= tokens;
  const before = Array.from({ length: layout.ranks }, () => []), after = Array.from({ length: layout.ranks }, () => []);
  const order = record.tokens.map((_, expert) => expert).sort((a, b) => slotOf(a) - slotOf(b));
  for (const expert of order) {
    before[homeOf(expert)].push([expert, record.tokens[expert], -1]);
    after[homeOf(expert)].push([expert, left[expert], -1]);
  }
  for (const [expert, rank, slot, tokens] of record.replicas) after[rank].push([expert, tokens, slot]);
  return (record.loads = { layout, homeOf, left, before, after });
}
const totals = (ranks) => ranks.map((parts) => sum(parts.map((part) => part[1])));
function imbalance(ranks) {
  const tokens = totals(ranks), all = sum(tokens);
  return all ? (tokens.reduce((a, b) => Math.max(a, b), 0) * tokens.length) / all : 1;
}
// Experts that have replicas get a colour of their own, the busiest first; the others are grey.
function colours(record) {
  const replicated = [...new Set(record.replicas.map((r) => r[0]))].sort((a, b) => record.tokens[b] - record.tokens[a]);
  return new Map(replicated.map((expert, i) => [expert, `hsl(${Math.round((205 + i * 137.508) % 360)} ${i % 2 ? 62 : 74}% ${54 + 8 * (Math.floor(i / 2) % 2)}%)`]));
}

function drawRecord() {
  const index = $("record").value, record = data.records[index];
  const has = record != null;
  for (const id of ["previous", "next"]) $(id).disabled = !has || $("record").options.length < 2;
  if (!has) {
    $("detail").replaceChildren();
    $("detail-facts").textContent = "No micro-batch of this choice and layer is among those kept for this page.";
    for (const id of ["nodes", "replicas", "experts"]) table(id, [], []);
    $("detail-legend").replaceChildren();
    return;
  }
  history.replaceState(null, "", `#record=${index}`);
  const { layout, homeOf, left, before, after } = loads(record), colour = colours(record);
  const facts = [`${data.series[record.series].name}, step ${record.step}, micro-batch ${record.microbatch}, layer ${record.layer}`, `recorded by ${record.group}`,
    `${count(sum(record.tokens))} (token, expert) pairs`, `imbalance ${ratio(imbalance(before))} → ${ratio(imbalance(after))}`,
    `${record.replicas.length} replica${record.replicas.length === 1 ? "" : "s"}`, record.why.map((name) => data.choices[name]).join(", ")];
  $("detail-facts").replaceChildren(...facts.map((fact) => make("span", {}, fact)));
  $("detail").replaceChildren(drawRanks(record, colour));
  drawLegend(colour);
  const nodes = record.decisions.map(([outcome, b, a, bound, saved, cost], node) => {
    const first = node * layout.node, costs = saved || cost ? [saved.toLocaleString("en-US"), cost.toLocaleString("en-US")] : ["–", "–"];
    const name = data.outcomes[outcome];
    return [layout.node > 1 ? `${first} to ${first + layout.node - 1}` : `${first}`, count(b), count(a), count(bound), ...costs, name, REASONS[name] ?? ""];
  });
  table("nodes", [["ranks", 0], ["busiest before", 1], ["after", 1], ["bound", 1], ["saved µs", 1], ["cost µs", 1], ["decision", 0], ["meaning", 0]], nodes);
  const swatch = (expert) => [make("i", { class: "swatch", style: `background:${colour.get(expert) ?? "var(--e1)"}` }), String(expert)];
  table("replicas", [["expert", 0], ["home rank", 1], ["to rank", 1], ["slot", 1], ["tokens", 1], ["share of expert", 1]],
    record.replicas.map(([expert, rank, slot, tokens]) => [swatch(expert), homeOf(expert), rank, slot, count(tokens), `${((100 * tokens) / record.tokens[expert]).toFixed(1)}%`]));
  const busiest = record.tokens.map((tokens, expert) => [tokens, expert]).sort((a, b) => b[0] - a[0] || a[1] - b[1]).slice(0, 24);
  const mean = sum(record.tokens) / record.tokens.length || 1;
  table("experts", [["expert", 0], ["home rank", 1], ["tokens", 1], ["of the mean", 1], ["left at home", 1], ["replicas", 1]],
    busiest.map(([tokens, expert]) => [swatch(expert), homeOf(expert), count(tokens), `${(tokens / mean).toFixed(2)}×`, count(left[expert]), record.replicas.filter((r) => r[0] === expert).length]));
}

function drawLegend(colour) {
  const first = colour.size ? colour.values().next().value : "var(--e1)";
  const box = (style) => make("i", { style });
  const items = [make("span", {}, box("background:var(--e0)"), box("background:var(--e1)"), "experts without replicas")];
  if (colour.size) items.push(make("span", {}, box(`background:${first}`), "an expert with replicas, at home (one colour each)"),
    make("span", {}, box(`background:repeating-linear-gradient(45deg, ${first} 0 4px, rgb(255 255 255 / 55%) 4px 6px), ${first}`), "its replica"));
  items.push(make("span", {}, make("svg", { width: 24, height: 10 }, make("line", { class: "mean", x1: 0, x2: 24, y1: 5, y2: 5 })), "mean of all ranks"),
    make("span", {}, make("svg", { width: 24, height: 10 }, make("line", { class: "bound", x1: 0, x2: 24, y1: 5, y2: 5 })), "bound of a node: its own mean"));
  $("detail-legend").replaceChildren(...items);
}

function drawRanks(record, colour) {
  const { layout, homeOf, before, after } = loads(record), ranks = layout.ranks;
  const left = 58, right = 10, h = 190, strip = record.replicas.length ? 74 : 0, head = 24, foot = 22;
  const slotWidth = Math.min(150, Math.max(7, (width("detail") - left - right) / ranks)), w = Math.max(width("detail") - 2, left + right + ranks * slotWidth);
  const bar = slotWidth * 0.82, high = Math.max(1, ...totals(before), ...totals(after));
  const x = (rank) => left + rank * slotWidth, end = x(ranks);
  const mean = sum(record.tokens) / ranks;
  const panels = [["Before: every token on its expert's home rank", before, head]];
  if (strip) panels.push(["After: with replicas", after, head + h + foot + strip + head]);
  const total = panels[panels.length - 1][2] + h + foot + 18;
  const svg = make("svg", { width: w, height: total, role: "img", "aria-label": `Tokens per rank and expert, ${ranks} ranks, before and after balancing; the tables below have the figures` });
  svg.append(make("defs", {}, make("pattern", { id: "stripes", width: 6, height: 6, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" }, make("rect", { width: 2, height: 6, fill: "#fff", opacity: 0.55 }))));
  const every = Math.ceil(26 / slotWidth);
  for (const [title, parts, top] of panels) {
    const y = (tokens) => top + h - (tokens / high) * h;
    svg.append(make("text", { x: left, y: top - 8, "font-weight": 600 }, `${title}; max / mean ${ratio(imbalance(parts))}`));
    for (const value of ticks(0, high, 4)) {
      svg.append(make("line", { class: "grid", x1: left, x2: end, y1: y(value), y2: y(value) }), make("text", { class: "tick", x: left - 6, y: y(value) + 4, "text-anchor": "end" }, short(value)));
    }
    svg.append(make("text", { x: -(top + h / 2), y: 13, transform: "rotate(-90)", "text-anchor": "middle" }, "tokens"));
    parts.forEach((experts, rank) => {
      let base = 0;
      experts.forEach(([expert, tokens, slot], place) => {
        if (!tokens) return;
        const box = { x: x(rank) + (slotWidth - bar) / 2, width: bar, y: y(base + tokens), height: Math.max(0.4, (tokens / high) * h - (slotWidth > 14 ? 0.6 : 0)) };
        const text = `rank ${rank}, expert ${expert}${slot >= 0 ? ` (replica in slot ${slot}; home rank ${homeOf(expert)})` : ""}: ${count(tokens)} tokens`;
        svg.append(make("rect", { ...box, fill: colour.get(expert) ?? `var(--e${place % 2})` }, make("title", {}, text)));
        if (slot >= 0) svg.append(make("rect", { ...box, fill: "url(#stripes)", class: "replica", "pointer-events": "none" }));
        if (colour.has(expert) && box.height > 13 && bar > 24) svg.append(make("text", { class: "inside", x: x(rank) + slotWidth / 2, y: box.y + box.height / 2 + 4, "text-anchor": "middle" }, `e${expert}`));
        base += tokens;
      });
      if (rank % every === 0) svg.append(make("text", { class: "tick", x: x(rank) + slotWidth / 2, y: top + h + 15, "text-anchor": "middle" }, String(rank)));
    });
    svg.append(make("line", { class: "mean", x1: left, x2: end, y1: y(mean), y2: y(mean) }));
    record.decisions.forEach((decision, node) => {
      const a = x(node * layout.node), b = x((node + 1) * layout.node);
      if (record.decisions.length > 1) svg.append(make("line", { class: "bound", x1: a + 1, x2: b - 1, y1: y(decision[3]), y2: y(decision[3]) }));
      if (node) svg.append(make("line", { class: "node", x1: a, x2: a, y1: top, y2: top + h + foot }));
    });
  }
  svg.append(make("text", { x: (left + end) / 2, y: total - 4, "text-anchor": "middle" }, layout.node < ranks ? `rank (dotted lines part nodes of ${layout.node} ranks)` : "rank"));
  const a = head + h + foot, b = a + strip;
  for (const [expert, rank, slot, tokens] of record.replicas) {
    const from = x(homeOf(expert)) + slotWidth / 2, to = x(rank) + slotWidth / 2, middle = (a + b) / 2;
    const d = `M${from},${a}C${from},${middle} ${to},${middle} ${to},${b - 7}`;
    svg.append(make("path", { d, class: "copy", fill: "none", stroke: colour.get(expert), "stroke-width": Math.max(1.3, Math.min(bar, 12, (tokens / high) * 30)), opacity: 0.85 },
        make("title", {}, `expert ${expert}: rank ${homeOf(expert)} to slot ${slot} of rank ${rank}, ${count(tokens)} tokens`)),
      make("path", { d: `M${to - 4},${b - 8}h8l-4,7z`, fill: colour.get(expert) }));
  }
  return svg;
}

// ---- a step that was planned ahead: layers from left to right

const STAGES = {
  before: ["homes as they are, no replicas", "before"],
  kept: ["homes as they are, with replicas", "kept"],
  reordered: ["experts reordered, no replicas", "moved"],
  after: ["experts reordered, with replicas", "after"],
};
function drawStep() {
  if (!data.step) return;
  $("step").hidden = false;
  const layers = data.step.layers, stages = Object.keys(STAGES), n = layers.length;
  const left = 48, right = 12, h = 250, top = 8, bottom = 40;
  const group = Math.max(16, (width("step-chart") - left - right) / n), w = Math.max(width("step-chart"), left + right + n * group);
  const bar = Math.min(30, (group * 0.8) / stages.length);
  const high = Math.max(1.05, ...layers.flatMap((layer) => stages.map((name) => layer[name])));
  const x = (i) => left + (i + 0.5) * group;
  const y = (value) => h - bottom - ((value - 1) / (high - 1)) * (h - top - bottom);
  const svg = make("svg", { width: w, height: h, role: "img", "aria-label": "Imbalance of each layer before, after reordering and after replication; the table below has the figures" });
  for (const value of ticks(1, high, 5)) {
    svg.append(make("line", { class: "grid", x1: left, x2: left + n * group, y1: y(value), y2: y(value) }),
      make("text", { class: "tick", x: left - 7, y: y(value) + 4, "text-anchor": "end" }, String(value)));
  }
  const every = Math.ceil(26 / group);
  layers.forEach((layer, i) => {
    stages.forEach((name, k) => {
      const at = y(Math.max(1, layer[name]));
      svg.append(make("rect", { class: "stage", x: x(i) + (k - stages.length / 2) * bar, width: bar * 0.9, y: Math.min(at, h - bottom - 1.5), height: Math.max(1.5, h - bottom - at), fill: `var(--${STAGES[name][1]})` },
        make("title", {}, `layer ${layer.layer}, ${STAGES[name][0]}: ${ratio(layer[name])}`)));
    });
    const half = (stages.length / 2) * bar + 2;
    svg.append(make("line", { class: "bound", x1: x(i) - half, x2: x(i) + half, y1: y(Math.max(1, layer.bound)), y2: y(Math.max(1, layer.bound)) }));
    if (i % every === 0) svg.append(make("text", { class: "tick", x: x(i), y: h - bottom + 18, "text-anchor": "middle" }, String(layer.layer)));
  });
  svg.append(make("text", { x: left + (n * group) / 2, y: h - 4, "text-anchor": "middle" }, "layer"));
  $("step-chart").replaceChildren(svg);
  $("step-legend").replaceChildren(...stages.map((name) => make("span", {}, make("i", { style: `background:var(--${STAGES[name][1]})` }), STAGES[name][0])),
    make("span", {}, make("svg", { width: 24, height: 10 }, make("line", { class: "bound", x1: 0, x2: 24, y1: 5, y2: 5 })), "bound: the busiest node, after reordering"));
  $("step-text").replaceChildren(...data.step.text.map((text) => make("span", {}, text)));
  const mib = (bytes) => (bytes / 2 ** 20).toFixed(1), ms = (ps) => (ps / 1e9).toFixed(2), timed = data.step.timed;
  table("step-layers", [["layer", 1], ["before", 1], ["replicas only", 1], ["reordered", 1], ["after", 1], ["bound", 1], ["moved", 1], ["MiB (across nodes)", 1], ["replicas", 1], ["MiB copied", 1],
    ...(timed ? [["ms before", 1], ["after", 1], ["copying", 1], ["moving", 1]] : [])],
  layers.map((l) => [l.layer, ...["before", "kept", "reordered", "after", "bound"].map((name) => ratio(l[name])), l.moved, `${mib(l.bytes_in_node + l.bytes_across)} (${mib(l.bytes_across)})`, count(l.replicas), mib(l.replica_bytes),
    ...(timed ? ["before_ps", "after_ps", "copy_ps", "move_ps"].map((name) => ms(l[name])) : [])]));
}

// ---- selects

const mine = () => data.records.filter((r) => r.series === +$("pass").value);
function listRecords(selected) {
  const choice = $("choice").value, layer = $("layer").value;
  let found = mine().filter((r) => (choice === "all" || r.why.includes(choice)) && (layer === "all" || r.layer === +layer));
  if (choice === "after" || choice === "before" || choice === "skipped") {
    const by = (r) => imbalance(choice === "before" ? loads(r).before : loads(r).after);
    found = found.sort((a, b) => by(b) - by(a));
  }
  const groups = new Set(data.records.map((r) => r.group)).size > 1;
  fill($("record"), found.map((r) => [data.records.indexOf(r), `step ${r.step}, micro-batch ${r.microbatch}, layer ${r.layer}${groups ? `, ${r.group}` : ""}: ${imbalance(loads(r).before).toFixed(2)} → ${imbalance(loads(r).after).toFixed(2)}`]), selected);
}
function drawPass(selected) {
  const series = data.series[$("pass").value];
  cursor = null;
  $("tiles").replaceChildren(...series.tiles.map(([label, value]) => make("div", { class: "card tile" }, make("b", {}, value), make("span", {}, label))));
  drawBands(series);
  drawHeat(series);
  const all = sum(series.decisions.map((d) => d[0])) || 1, figure = (v, digits) => (v == null ? "–" : v.toFixed(digits));
  table("decisions", [["decision, per node", 0], ["count", 1], ["share", 1], ["busiest before / bound", 1], ["saved µs", 1], ["cost µs", 1], ["meaning", 0]],
    series.decisions.map(([n, before, saved, cost], i) => [data.outcomes[i], count(n), `${((100 * n) / all).toFixed(1)}%`, figure(before, 3), saved || cost ? figure(saved, 1) : "–", saved || cost ? figure(cost, 1) : "–", REASONS[data.outcomes[i]] ?? ""]));
  fill($("layer"), [["all", "all"], ...series.layers.map((layer) => [layer, layer])]);
  listRecords(selected);
  drawRecord();
}

function start() {
  document.title = `${data.title}: expert loads`;
  $("title").textContent = data.title;
  $("facts").replaceChildren(...data.facts.map((fact) => make("span", {}, fact)));
  data.warnings.forEach(warn);
  if (!data.series.length) {
    $("empty").textContent = "There are no load records to show. They are written when balancing runs with a record directory set.";
    $("empty").hidden = false;
    return;
  }
  $("content").hidden = false;
  fill($("pass"), data.series.map((series, i) => [i, series.name]));
  $("pass-control").hidden = data.series.length < 2;
  fill($("quantity"), Object.entries(QUANTITIES).map(([name, [text]]) => [name, text]));
  fill($("choice"), [...Object.entries(data.choices), ["all", "all that are kept for this page"]]);
  $("rule").textContent = `${count(data.records.length)} of ${count(data.total)} load records are kept for this page: the largest imbalances after and before balancing and among those left alone, ` +
    "the worst of each layer, and a uniform random sample. All figures above this section count every record.";
  const wanted = data.records[(location.hash.match(/^#record=(\d+)$/) ?? [])[1]];
  if (wanted) {
    $("pass").value = wanted.series;
    $("choice").value = "all";
  }
  const redraw = () => (drawStep(), drawPass($("record").value));
  $("pass").addEventListener("change", () => drawPass());
  $("quantity").addEventListener("change", () => drawHeat(data.series[$("pass").value]));
  for (const id of ["choice", "layer"]) $(id).addEventListener("change", () => (listRecords($("record").value), drawRecord()));
  $("record").addEventListener("change", drawRecord);
  const step = (by) => {
    const select = $("record"), n = select.options.length;
    select.selectedIndex = (select.selectedIndex + by + n) % n;
    drawRecord();
  };
  $("previous").addEventListener("click", () => step(-1));
  $("next").addEventListener("click", () => step(1));
  let timer = null, last = document.body.clientWidth;
  window.addEventListener("resize", () => {
    clearTimeout(timer);
    timer = setTimeout(() => document.body.clientWidth !== last && ((last = document.body.clientWidth), redraw()), 150);
  });
  drawStep();
  drawPass(wanted ? data.records.indexOf(wanted) : null);
  document.body.dataset.ready = "true";
}
start();
