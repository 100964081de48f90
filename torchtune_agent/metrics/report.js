// Draws the charts of a run and answers the mouse, a finger and the keyboard. Text of the run only ever enters the page
// as text content, never as markup.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const steps = data.steps.map((deltas) => { let sum = 0; return deltas.map((delta) => (sum += delta)); });
const titles = Object.fromEntries(data.classes.map(({ id, title }) => [id, title]));
const whole = new Set(["overall", "reasoning", "tool_call"]);
const lasts = steps.filter((list) => list.length);
const span = [Math.min(...lasts.map((list) => list[0])), Math.max(...lasts.map((list) => list[list.length - 1]))];
const state = { hidden: new Set(), hiddenSplits: new Set(), smoothing: noisy() ? 0.7 : 0, zoom: null };
const charts = [];
// So many points that a line through all of them would be a thicket
function noisy() {
  return data.charts.some((chart) => chart.section === "classes" && chart.curves.some((curve) => curve.y.length > 60));
}

// Elements

function make(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}
function draw(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}
function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}
const colour = (id) => `var(--class-${id})`;
const swatch = (id) => make("i", { class: "swatch", style: `background: ${colour(id)}` });

// Numbers

function number(value) {
  if (value === null) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e9)) return value.toExponential(2).replace("e+", "e");
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(4)));
}
function short(value) {
  const size = Math.abs(value);
  if (size >= 1e6) return `${Number((value / 1e6).toPrecision(4))}M`;
  if (size >= 1e4) return `${Number((value / 1e3).toPrecision(4))}k`;
  if (size !== 0 && size < 1e-3) return value.toExponential(1).replace(".0e", "e");
  return String(Number(value.toPrecision(4)));
}
function niceTicks(low, high, count) {
  const rough = (high - low) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough * 0.999);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) ticks.push(i * step);
  return ticks;
}
function logTicks(low, high, count) {
  const decades = Math.log10(high / low);
  if (decades < 0.7) return niceTicks(low, high, count);
  const factors = decades < 2 ? [1, 2, 5] : [1];
  const every = Math.max(1, Math.round(decades / count));
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power += every)
    for (const factor of factors) {
      const tick = Number(`${factor}e${power}`);
      if (tick >= low && tick <= high) ticks.push(tick);
    }
  return ticks;
}
function nearest(list, step) {
  let low = 0, high = list.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (list[middle] < step) low = middle + 1; else high = middle;
  }
  return low > 0 && step - list[low - 1] <= list[low] - step ? low - 1 : low;
}
function smoothed(values, weight) {
  let sum = 0, total = 0;
  return values.map((value) => {
    if (value === null) return null;
    sum = sum * weight + value * (1 - weight);
    total = total * weight + 1 - weight;
    return sum / total;
  });
}

// One chart

class Chart {
  constructor(spec) {
    this.spec = spec;
    this.log = spec.log;
    this.curves = spec.curves.map((curve) => ({ ...curve, x: steps[curve.steps] }));
    this.svg = draw("svg", { tabindex: 0, role: "img", "aria-label": `${spec.title} over steps` });
    this.scale = make("button", { class: "scale", type: "button", title: "logarithmic scale" }, "log");
    this.scale.onclick = () => { this.log = !this.log; this.draw(); };
    const caption = make("figcaption", {}, spec.title, make("small", {}, spec.unit), this.scale);
    this.figure = make("figure", { "data-metric": spec.metric, class: spec.section }, caption, this.svg);
    this.svg.onpointermove = (event) => this.pointerMoved(event);
    this.svg.onpointerdown = (event) => this.pointerPressed(event);
    this.svg.onpointerup = (event) => this.pointerReleased(event);
    this.svg.onpointerleave = (event) => { if (event.pointerType === "mouse") point(null); };
    this.svg.onpointercancel = () => { this.pressed = null; this.draw(); };
    this.svg.ondblclick = () => zoom(null);
    this.svg.onkeydown = (event) => this.keyPressed(event);
    this.svg.onblur = () => point(null);
    new ResizeObserver(() => this.draw()).observe(this.svg);
  }

  shown() {
    return this.curves.filter((curve) => !state.hiddenSplits.has(curve.split)
      && (this.spec.section === "run" || !state.hidden.has(curve.class)));
  }

  draw() {
    const wide = this.spec.section === "classes" && this.svg.clientWidth > 800;
    this.width = this.svg.clientWidth - (wide ? 180 : 54);
    this.height = this.svg.clientHeight - 28;
    if (this.width <= 0) return;
    this.scale.setAttribute("aria-pressed", this.log);
    const curves = this.shown();
    for (const curve of curves) {
      curve.smooth = state.smoothing && curve.split === "train" ? smoothed(curve.y, state.smoothing) : null;
    }
    this.domain = state.zoom || span;
    this.range = this.valueRange(curves);
    this.cross = draw("g");
    this.selection = draw("rect", { class: "selection", height: this.height, width: 0 });
    const plot = draw("svg", { x: 46, y: 4, width: this.width, height: this.height });
    if (this.range) {  // validation above training, lines above what spreads around them
      const layers = ["train", "val"].flatMap((split) => {
        const drawn = curves.filter((curve) => curve.split === split).map((curve) => this.curve(curve));
        return [...drawn.flatMap(([behind]) => behind), ...drawn.flatMap(([, ahead]) => ahead)];
      });
      plot.append(...layers);
    } else plot.append(draw("text", { class: "none", x: this.width / 2, y: this.height / 2 }, "nothing to show"));
    plot.append(this.selection, this.cross);
    this.svg.replaceChildren(...this.axes(), plot, ...(wide && this.range ? this.names(curves) : []));
  }

  valueRange(curves) {
    let low = Infinity, high = -Infinity;
    for (const curve of curves) {
      const series = curve.smooth ? [curve.y, curve.smooth] : curve.low ? [curve.low, curve.high] : [curve.y];
      for (let i = 0; i < curve.x.length; i++) {
        if (curve.x[i] < this.domain[0] || curve.x[i] > this.domain[1]) continue;
        for (const values of series) {
          const value = values[i];
          if (value === null || (this.log && value <= 0)) continue;
          if (value < low) low = value;
          if (value > high) high = value;
        }
      }
    }
    if (low > high) return null;
    if (this.log) return low === high ? [low / 2, high * 2] : [low, high];
    if (this.spec.zero && low > 0 && !state.zoom) low = 0;
    if (high - low <= 1e-9 * Math.abs(high)) return low === 0 ? [0, 1] : [Math.min(low * 0.9, low * 1.1), Math.max(low * 0.9, low * 1.1)];
    return [low, high + (high - low) * 0.04];
  }

  px(step) {
    const [low, high] = this.domain;
    return 6 + (this.width - 12) * (high === low ? 0.5 : (step - low) / (high - low));
  }
  py(value) {
    let [low, high] = this.range;
    if (this.log) [value, low, high] = [value, low, high].map(Math.log);
    return 5 + (this.height - 7) * (1 - (value - low) / (high - low));
  }
  drawable(value) {
    return value !== null && !(this.log && value <= 0);
  }

  axes() {
    const parts = [];
    if (this.range) {
      const ticks = (this.log ? logTicks : niceTicks)(...this.range, this.height / 45);
      for (const tick of ticks) {
        const y = Math.round(this.py(tick)) + 4;
        parts.push(draw("line", { class: "grid", x1: 46, x2: 46 + this.width, y1: y, y2: y }));
        parts.push(draw("text", { x: 41, y: y + 4, "text-anchor": "end" }, short(tick)));
      }
    }
    for (const tick of niceTicks(...this.domain, this.width / 70).filter(Number.isInteger)) {
      const x = 46 + this.px(tick);
      parts.push(draw("text", { x, y: this.height + 20, "text-anchor": "middle" }, short(tick)));
    }
    return parts;
  }

  // The classes' names beside the ends of their curves, moved apart where they would overlap.
  names(curves) {
    const ends = new Map();
    for (const curve of curves) {  // validation comes after training and takes its place
      let i = nearest(curve.x, this.domain[1]);
      while (i >= 0 && !this.drawable(curve.y[i])) i--;
      if (i >= 0 && (curve.split === "val" || !ends.has(curve.class))) ends.set(curve.class, this.py(curve.y[i]));
    }
    const sorted = [...ends].sort((a, b) => a[1] - b[1]);
    let y = -Infinity;
    for (const end of sorted) end[1] = y = Math.max(end[1], y + 15);
    y = this.height + 15;
    for (const end of sorted.reverse()) end[1] = y = Math.min(end[1], y - 15);
    const x = 46 + this.width + 8;
    return sorted.flatMap(([id, middle]) => [
      draw("rect", { x, y: middle, width: 9, height: 9, rx: 3, fill: colour(id) }),
      draw("text", { class: "name", x: x + 15, y: middle + 9 }, titles[id]),
    ]);
  }

  curve(curve) {
    const { x } = curve, last = x.length - 1;
    const from = Math.max(0, nearest(x, this.domain[0]) - 1), to = Math.min(last, nearest(x, this.domain[1]) + 1);
    const look = `curve k-${curve.class}${whole.has(curve.class) ? " whole" : ""}`;
    const named = { "data-class": curve.class, "data-split": curve.split };
    const behind = [], parts = [];
    if (curve.low && !curve.smooth) {
      behind.push(draw("path", { class: `range ${look}`, d: this.band(curve, from, to), fill: colour(curve.class) }));
    }
    if (curve.smooth) {
      behind.push(draw("path", { class: `raw ${look}`, d: this.path(x, curve.y, from, to), stroke: colour(curve.class) }));
    }
    const y = curve.smooth || curve.y;
    const d = this.path(x, y, from, to);
    parts.push(draw("path", { class: `line ${look} ${curve.split}`, d, stroke: colour(curve.class), ...named }));
    const dots = this.dots(x, y, from, to, curve.split === "val" && to - from < 60);
    if (dots) parts.push(draw("path", { class: `dots ${look}`, d: dots, fill: colour(curve.class) }));
    for (const [step, value] of curve.marks || []) {
      if (step < this.domain[0] || step > this.domain[1]) continue;
      const mark = draw("path", { class: `mark ${look}`, d: `M${this.px(step) - 4} 3l8 8m0 -8l-8 8`, stroke: colour(curve.class) });
      mark.append(draw("title", {}, `${curve.name} is ${value} at step ${step}`));
      parts.push(mark);
    }
    return [behind, parts];
  }

  path(x, y, from, to) {
    let d = "", pen = "M";
    for (let i = from; i <= to; i++) {
      if (!this.drawable(y[i])) { pen = "M"; continue; }
      d += `${pen}${this.px(x[i]).toFixed(1)} ${this.py(y[i]).toFixed(1)}`;
      pen = "L";
    }
    return d;
  }
  band({ x, low, high }, from, to) {
    let d = "", top = "", bottom = "";
    for (let i = from; i <= to + 1; i++) {
      if (i <= to && this.drawable(low[i]) && this.drawable(high[i])) {
        const px = this.px(x[i]).toFixed(1);
        top += `${top ? "L" : "M"}${px} ${this.py(high[i]).toFixed(1)}`;
        bottom = `L${px} ${this.py(low[i]).toFixed(1)}${bottom}`;
      } else if (top) {
        d += `${top}${bottom}Z`;
        top = bottom = "";
      }
    }
    return d;
  }
  // Every point where there are few, else those that no line reaches.
  dots(x, y, from, to, all) {
    let d = "";
    for (let i = from; i <= to; i++) {
      if (!this.drawable(y[i])) continue;
      const alone = !(i > from && this.drawable(y[i - 1])) && !(i < to && this.drawable(y[i + 1]));
      if (all || alone) d += `M${(this.px(x[i]) - 3).toFixed(1)} ${this.py(y[i]).toFixed(1)}a3 3 0 1 0 6 0a3 3 0 1 0 -6 0`;
    }
    return d;
  }

  // Pointing

  stepAt(event) {
    const share = (event.clientX - this.svg.getBoundingClientRect().left - 52) / (this.width - 12);
    return this.domain[0] + Math.min(1, Math.max(0, share)) * (this.domain[1] - this.domain[0]);
  }
  snapped(step) {
    let best = null;
    for (const { x } of this.shown()) {
      const candidate = x[nearest(x, step)];
      if (candidate < this.domain[0] || candidate > this.domain[1]) continue;
      if (best === null || Math.abs(candidate - step) < Math.abs(best - step)) best = candidate;
    }
    return best;
  }
  pointerMoved(event) {
    if (this.pressed === undefined || this.pressed === null || event.pointerType === "touch") {
      point(this.snapped(this.stepAt(event)), this, event.clientX, event.clientY, event.pointerType === "touch");
      return;
    }
    const [from, to] = [this.pressed, this.stepAt(event)].sort((a, b) => a - b);
    this.selection.setAttribute("x", this.px(from));
    this.selection.setAttribute("width", this.px(to) - this.px(from));
    point(null);
  }
  pointerPressed(event) {
    if (event.pointerType === "touch") { this.pointerMoved(event); return; }
    if (event.button !== 0) return;
    this.svg.setPointerCapture(event.pointerId);
    this.pressed = this.stepAt(event);
    event.preventDefault();
  }
  pointerReleased(event) {
    if (this.pressed === undefined || this.pressed === null) return;
    const [from, to] = [this.pressed, this.stepAt(event)].sort((a, b) => a - b);
    this.pressed = null;
    this.selection.setAttribute("width", 0);
    if (this.px(to) - this.px(from) > 6 && to - from >= 1) zoom([from, to]);
  }
  keyPressed(event) {
    if (event.key === "Escape") { point(null); zoom(null); return; }
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move) return;
    event.preventDefault();
    const all = [...new Set(this.shown().flatMap(({ x }) => x))].sort((a, b) => a - b)
      .filter((step) => step >= this.domain[0] && step <= this.domain[1]);
    if (!all.length) return;
    const now = pointed === null ? (move > 0 ? -1 : all.length) : nearest(all, pointed);
    const step = all[Math.min(all.length - 1, Math.max(0, now + move))];
    const box = this.svg.getBoundingClientRect();
    point(step, this, box.left + 46 + this.px(step), box.top + 40);
  }

  markStep(step, withDots) {
    if (!this.cross) return;
    this.cross.replaceChildren();
    if (step === null || step < this.domain[0] || step > this.domain[1]) return;
    const x = this.px(step);
    this.cross.append(draw("line", { class: "cross", x1: x, x2: x, y1: 0, y2: this.height }));
    if (!withDots) return;
    for (const curve of this.shown()) {
      const i = nearest(curve.x, step);
      if (curve.x[i] !== step || !this.drawable(curve.y[i])) continue;
      const where = { cx: x, cy: this.py(curve.y[i]), r: 4 };
      this.cross.append(draw("circle", { ...where, class: "dots", fill: colour(curve.class) }));
    }
  }

  // What the tooltip says: a line for each class, a column for each split.
  values(step) {
    const curves = this.shown();
    const splits = ["train", "val"].filter((split) => curves.some((curve) => curve.split === split));
    const rows = data.classes.filter(({ id }) => curves.some((curve) => curve.class === id)).map(({ id }) => {
      const cells = splits.map((split) => {
        const curve = curves.find((one) => one.class === id && one.split === split);
        return make("td", {}, ...(curve ? this.value(curve, step) : []));
      });
      const name = this.spec.section === "run" ? this.spec.title : titles[id];
      return make("tr", { "data-class": id }, make("td", {}, swatch(id), name), ...cells);
    });
    const head = splits.map((split) => make("th", {}, { train: "training", val: "validation" }[split]));
    return make("table", {}, make("tr", {}, make("th"), ...head), ...rows);
  }
  value(curve, step) {
    const i = nearest(curve.x, step), found = curve.x[i];
    const mark = (curve.marks || []).find(([where]) => where === found);
    const text = curve.y[i] === null && mark ? mark[1] : number(curve.y[i]);
    const parts = [text];
    if (curve.low) parts.push(make("small", {}, ` ${number(curve.low[i])}–${number(curve.high[i])}`));
    if (found !== step) parts.push(make("small", {}, ` at ${found.toLocaleString("en")}`));
    return parts;
  }
  heading(step) {
    const long = this.shown().find((curve) => curve.low && curve.x[nearest(curve.x, step)] === step);
    if (!long) return `step ${step.toLocaleString("en")}`;
    const i = nearest(long.x, step), first = i ? long.x[i - 1] + 1 : 1;
    return `steps ${first.toLocaleString("en")}–${step.toLocaleString("en")}: mean, least–greatest`;
  }
}

// The whole page

let pointed = null;
function point(step, chart, x, y, finger) {  // a finger hides what is under it, so for it the tip keeps to an edge
  pointed = step;
  for (const one of charts) one.markStep(step, one === chart);
  const tip = at("tip");
  tip.hidden = step === null;
  if (step === null) return;
  tip.replaceChildren(make("b", {}, chart.heading(step)), chart.values(step));
  const { width, height } = tip.getBoundingClientRect();
  const left = x + 16 + width > innerWidth ? x - 16 - width : x + 16;
  const top = finger ? (y < innerHeight * 0.55 ? innerHeight : 0) : y + 16;
  tip.style.left = `${Math.max(8, Math.min(left, innerWidth - width - 8))}px`;
  tip.style.top = `${Math.max(8, Math.min(top, innerHeight - height - 8))}px`;
}
function zoom(range) {
  state.zoom = range;
  at("reset").hidden = !range;
  redraw();
}
let waiting = false;
function redraw() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; charts.forEach((chart) => chart.draw()); });
}
function toggle(set, id) {
  if (!set.delete(id)) set.add(id);
}
function chip(label, icon, hidden, id, all) {
  const button = make("button", { class: "chip", type: "button", "data-id": id, title: "click: show or hide; double-click: only this one" }, icon, label);
  const update = () => button.setAttribute("aria-pressed", !hidden.has(id));
  button.onclick = () => { toggle(hidden, id); refresh(); };
  button.ondblclick = () => {
    const only = all.every((other) => hidden.has(other) === (other !== id));
    hidden.clear();
    if (!only) all.filter((other) => other !== id).forEach((other) => hidden.add(other));
    refresh();
  };
  update();
  chips.push(update);
  return button;
}
const chips = [];
function refresh() {
  chips.forEach((update) => update());
  redraw();
}

function head() {
  document.title = `${data.title}: training report`;
  at("title").append(data.title);
  at("subtitle").append(`Training report of torchtune_agent, made ${data.made}`);
  at("facts").append(...data.facts.map(([name, value, note]) =>
    make("div", {}, make("dt", {}, name), make("dd", {}, value, make("small", {}, note)))));
  at("findings").append(...data.findings.map((sentence) => make("li", {}, sentence)));
  if (!data.findings.length) at("standing").hidden = true;
  if (data.shares) {
    const bar = (key) => make("div", { class: "bar", "data-share": key }, ...data.shares.of.map((share) => {
      const percent = `${Math.round(share[key] * 100)}%`;
      const style = `flex: ${share[key]} 0 0; background: ${colour(share.class)}`;
      return make("i", { style, title: `${titles[share.class]}: ${percent} of the ${key}` },
        share[key] > 0.2 ? make("span", {}, `${titles[share.class]} `) : "", share[key] > 0.06 ? percent : "");
    }));
    at("shares").append(make("span", {}, `${data.shares.split} tokens`), bar("tokens"), make("span", {}, "their loss"), bar("loss"));
  }
}
function controls() {
  const drawn = data.charts.filter((chart) => chart.section === "classes").flatMap((chart) => chart.curves);
  const present = data.classes.map(({ id }) => id).filter((id) => drawn.some((curve) => curve.class === id));
  const emphasis = document.head.appendChild(make("style"));
  for (const id of present) {
    const button = chip(titles[id], swatch(id), state.hidden, id, present);
    const strong = () => { emphasis.textContent = `figure.classes .curve:not(.k-${id}) { opacity: .1 }`; };
    button.onpointerenter = (event) => { if (event.pointerType === "mouse") strong(); };
    button.onpointerleave = () => { emphasis.textContent = ""; };
    at("classes").append(button);
  }
  const splits = ["train", "val"].filter((split) => data.charts.some((chart) => chart.curves.some((curve) => curve.split === split)));
  const names = { train: "training", val: "validation" };
  if (splits.length > 1) {
    at("splits").append(...splits.map((split) =>
      chip(names[split], make("i", { class: `swatch ${split}` }), state.hiddenSplits, split, splits)));
  }
  const smoothing = at("smoothing");
  smoothing.value = state.smoothing;
  at("amount").textContent = state.smoothing;
  smoothing.oninput = () => {
    state.smoothing = Number(smoothing.value);
    at("amount").textContent = smoothing.value;
    redraw();
  };
  at("reset").onclick = () => zoom(null);
  document.addEventListener("pointerdown", (event) => { if (!event.target.closest("figure")) point(null); });
}
function body() {
  const first = data.charts.filter((spec) => spec.section === "classes").slice(0, 5);
  for (const spec of data.charts) {
    const chart = new Chart(spec);
    charts.push(chart);
    at(spec.section === "run" ? "run" : first.includes(spec) ? "classes-first" : "classes-more").append(chart.figure);
  }
  if (!at("classes-more").children.length) at("more").hidden = true;
  if (data.thinned) {
    at("thinned").append(`The longest curve has ${data.thinned.toLocaleString("en")} points. To keep this page small, curves of `
      + `more than ${data.points.toLocaleString("en")} show the mean of neighbouring points, with the range from the least to the greatest as a band.`);
  }
}
function tables() {
  for (const table of data.tables) {
    const rows = table.rows.map((row) => make("tr", {}, ...row.cells.map((cell, i) => {
      if (Array.isArray(cell)) return make("td", {}, make("span", { class: "before" }, `${cell[0]} → `), cell[1]);
      return make("td", {}, ...(i === 0 && row.class ? [swatch(row.class)] : []), cell);
    })));
    const top = make("tr", {}, ...table.head.map((cell) => make("th", {}, cell)));
    at("tables").append(make("div", { class: "table" }, make("table", {}, make("caption", {}, table.title), top, ...rows)));
  }
  at("config").hidden = !data.config;
  at("config").querySelector("pre").append(data.config);
}

head();
controls();
body();
tables();
