const data = JSON.parse(document.getElementById("curves").textContent);
const HEIGHT = 200, LEFT = 46, RIGHT = 10, TOP = 8, BOTTOM = 22;
const NUM_COLORS = 10;
const DASHES = ["", "5 3", "2 3", "8 3 2 3"];
const many = data.runs.length > 1;
const tip = document.getElementById("tip"), slider = document.getElementById("smoothing");
const unzoom = document.getElementById("unzoom");
const plots = [];
let smoothing = Number(slider.value), zoom = null;

function svg(name, attributes, parent) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const key in attributes) element.setAttribute(key, attributes[key]);
  if (parent) parent.append(element);
  return element;
}

function text(content, name = "span", parent = null) {  // never innerHTML: names come from files
  const element = document.createElement(name);
  element.textContent = content;
  if (parent) parent.append(element);
  return element;
}

function label(value, unit) {
  const size = Math.abs(value);
  if (unit === "share") return `${Number((100 * value).toPrecision(3))}%`;
  if (size >= 1e9 || (size !== 0 && size < 1e-3)) return value.toExponential(size < 1e-3 ? 1 : 0).replace("+", "");
  if (size >= 1e6) return `${Number((value / 1e6).toPrecision(3))}M`;
  if (size >= 1e3) return `${Number((value / 1e3).toPrecision(3))}k`;
  return `${Number(value.toPrecision(3))}`;
}

function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
  const found = [];
  if (!Number.isFinite(step) || step <= 0) return found;
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
  return found;
}

class Plot {
  constructor(figure, chart) {
    this.place = figure.querySelector(".plot");
    this.chart = chart;
    this.hidden = new Set();
    const metrics = [...new Set(chart.curves.map((curve) => curve.metric))];
    const byRun = many && !chart.stacked;
    this.curves = chart.curves.map((curve) => {
      const metric = metrics.indexOf(curve.metric);
      const color = `var(--c${(byRun ? curve.run : metric) % NUM_COLORS})`;
      const name = !byRun ? curve.metric
        : metrics.length > 1 ? `${data.runs[curve.run]} · ${curve.metric}` : data.runs[curve.run];
      return { ...curve, color, name, dash: byRun ? DASHES[metric % DASHES.length] : "" };
    });
    this.makeLegend(figure.querySelector(".legend"));
    this.place.addEventListener("pointermove", (event) => this.hover(event));
    this.place.addEventListener("pointerdown", (event) => { this.from = this.stepAt(event); });
    this.place.addEventListener("pointerup", (event) => this.zoomTo(event));
    this.place.addEventListener("pointerleave", () => { this.from = undefined; leave(); });
    this.place.addEventListener("dblclick", () => setZoom(null));
  }

  makeLegend(place) {
    if (this.curves.length < 2 && !many) return;
    this.curves.forEach((curve, i) => {
      const button = text("", "button", place);
      button.type = "button";
      const key = svg("svg", { viewBox: "0 0 20 8" }, button);
      svg("line", { x1: 0, x2: 20, y1: 4, y2: 4, "stroke-width": 3, "stroke-dasharray": curve.dash, style: `stroke: ${curve.color}` }, key);
      button.append(curve.name);
      button.addEventListener("click", () => {
        if (!this.hidden.delete(i)) this.hidden.add(i);
        button.classList.toggle("off", this.hidden.has(i));
        this.draw();
      });
    });
  }

  draw() {
    const width = this.place.clientWidth;
    if (!width) return;
    this.isDrawn = true;
    const visible = this.curves.filter((_, i) => !this.hidden.has(i));
    const steps = visible.flatMap((curve) => [curve.x[0], curve.x[curve.x.length - 1]]);
    let [first, last] = zoom || [Math.min(...steps), Math.max(...steps)];
    if (!(last > first)) { first -= 1; last = first + 2; }
    const inside = (x) => x >= first && x <= last;
    let low = Infinity, high = -Infinity;
    let below = null;
    for (const curve of visible) {
      if (this.chart.stacked) {
        curve.base = below || curve.y.map(() => 0);
        curve.top = curve.y.map((value, i) => value + curve.base[i]);
        below = curve.top;
        low = 0;
      }
      const lower = curve.low.length ? curve.low : curve.y, upper = this.chart.stacked ? curve.top
        : curve.high.length ? curve.high : curve.y;
      curve.x.forEach((x, i) => {
        if (!inside(x)) return;
        low = Math.min(low, lower[i]);
        high = Math.max(high, upper[i]);
      });
    }
    if (!(high >= low)) { low = 0; high = 1; }
    const isShare = this.chart.unit === "share" && low >= 0;
    if (high / 2 - low / 2 <= 1e-9 * Math.max(Math.abs(low), Math.abs(high))) {
      const reach = Math.abs(low) / 2 || 1;
      low -= reach; high += reach;
    }
    if (isShare) low = 0;
    const right = width - RIGHT, bottom = HEIGHT - BOTTOM;
    const px = (x) => LEFT + ((x - first) / (last - first)) * (right - LEFT);
    const py = (y) => bottom - (y / (high - low) - low / (high - low)) * (bottom - TOP);
    Object.assign(this, { first, last, px, py, right, bottom });

    const root = svg("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, role: "img" });
    for (const y of ticks(low, high, 4)) {
      svg("line", { class: "grid", x1: LEFT, x2: right, y1: py(y), y2: py(y) }, root);
      svg("text", { x: LEFT - 6, y: py(y) + 4, "text-anchor": "end" }, root).textContent = label(y, this.chart.unit);
    }
    const columns = ticks(first, last, Math.max(2, Math.floor(width / 90))).filter(Number.isInteger);
    for (const x of columns) {
      svg("text", { x: px(x), y: HEIGHT - 6, "text-anchor": px(x) > right - 12 ? "end" : "middle" }, root).textContent = label(x, "");
    }
    const id = `clip-${plots.indexOf(this)}`;
    svg("rect", { x: LEFT, y: 0, width: right - LEFT, height: bottom + 1 }, svg("clipPath", { id }, root));
    const content = svg("g", { "clip-path": `url(#${id})` }, root);
    for (const curve of visible) this.drawCurve(curve, content);
    for (const alarm of data.alarms) {
      if (!inside(alarm.step) || !visible.some((curve) => curve.run === alarm.run)) continue;
      svg("line", { class: "mark", x1: px(alarm.step), x2: px(alarm.step), y1: TOP, y2: bottom }, content);
    }
    this.cross = svg("line", { class: "cross", y1: TOP, y2: bottom, visibility: "hidden" }, root);
    this.range = svg("rect", { class: "zoom", y: TOP, height: bottom - TOP, visibility: "hidden" }, root);
    this.dots = visible.map((curve) => svg("circle", { r: 3.2, visibility: "hidden", style: `fill: ${curve.color}` }, root));
    this.visible = visible;
    this.place.replaceChildren(root);
  }

  drawCurve(curve, parent) {
    const path = (x, y) => x.map((step, i) => `${i ? "L" : "M"}${this.px(step).toFixed(1)},${this.py(y[i]).toFixed(1)}`).join("");
    const back = (x, y) => path([...x].reverse(), [...y].reverse()).replace("M", "L");
    if (this.chart.stacked) {
      const style = `fill: ${curve.color}`;
      curve.line = curve.top;
      svg("path", { class: "area", d: `${path(curve.x, curve.top)}${back(curve.x, curve.base)}Z`, style }, parent);
      return;
    }
    curve.line = smoothed(curve.x, curve.y, smoothing);
    const style = `stroke: ${curve.color}`;
    if (curve.x.length === 1) {
      svg("circle", { class: "point", cx: this.px(curve.x[0]), cy: this.py(curve.y[0]), r: 3.5, style: `fill: ${curve.color}` }, parent);
      return;
    }
    if (curve.low.length) {
      svg("path", { class: "band", d: `${path(curve.x, curve.high)}${back(curve.x, curve.low)}Z`, style: `fill: ${curve.color}` }, parent);
    }
    if (curve.line !== curve.y) svg("path", { class: "raw", d: path(curve.x, curve.y), style }, parent);
    svg("path", { class: "curve", d: path(curve.x, curve.line), style, "stroke-dasharray": curve.dash }, parent);
  }

  stepAt(event) {
    const box = this.place.getBoundingClientRect();
    const share = (event.clientX - box.left - LEFT) / (this.right - LEFT);
    return this.first + Math.max(0, Math.min(1, share)) * (this.last - this.first);
  }

  hover(event) {
    if (!this.isDrawn) return;
    const step = this.stepAt(event);
    for (const plot of plots) if (plot.isDrawn) plot.point(step);
    if (this.from !== undefined) {
      const [a, b] = [this.from, step].map(this.px).sort((p, q) => p - q);
      for (const [key, value] of Object.entries({ x: a, width: b - a, visibility: "visible" })) this.range.setAttribute(key, value);
    }
    tip.replaceChildren();
    const places = this.visible.map((curve) => nearest(curve.x, step));
    const closest = this.visible.reduce((best, curve, i) => {
      const x = curve.x[places[i]];
      return best === undefined || Math.abs(x - step) < Math.abs(best - step) ? x : best;
    }, undefined);
    text(`step ${closest.toLocaleString("en")}`, "small", tip);
    this.visible.forEach((curve, i) => {
      const at = places[i];
      const row = text("", "div", tip);
      text("", "i", row).style.background = curve.color;
      text(curve.name + (curve.x[at] === closest ? "" : ` (step ${curve.x[at]})`), "span", row);
      const range = curve.low.length ? ` (${shown(curve.low[at], this.chart.unit)} to ${shown(curve.high[at], this.chart.unit)})` : "";
      text(shown(curve.y[at], this.chart.unit) + range, "b", row);
    });
    const reach = (this.last - this.first) / 60;
    for (const alarm of data.alarms.filter((each) => Math.abs(each.step - step) <= reach).slice(0, 3)) {
      const row = text(`${many ? `${data.runs[alarm.run]}: ` : ""}step ${alarm.step}: ${alarm.text.slice(0, 160)}`, "div", tip);
      row.className = "alarmed";
    }
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const left = event.clientX + 14 + box.width > innerWidth ? event.clientX - 14 - box.width : event.clientX + 14;
    tip.style.left = `${Math.max(4, left)}px`;
    tip.style.top = `${Math.max(4, Math.min(event.clientY + 14, innerHeight - box.height - 4))}px`;
  }

  point(step) {
    const at = step === null ? null : this.px(step);
    const isInside = at !== null && step >= this.first && step <= this.last;
    this.cross.setAttribute("visibility", isInside ? "visible" : "hidden");
    if (isInside) { this.cross.setAttribute("x1", at); this.cross.setAttribute("x2", at); }
    this.visible.forEach((curve, i) => {
      const place = isInside ? nearest(curve.x, step) : 0;
      this.dots[i].setAttribute("visibility", isInside && curve.x[place] >= this.first && curve.x[place] <= this.last ? "visible" : "hidden");
      this.dots[i].setAttribute("cx", this.px(curve.x[place]));
      this.dots[i].setAttribute("cy", this.py(curve.line ? curve.line[place] : curve.y[place]));
    });
    if (!isInside) this.range.setAttribute("visibility", "hidden");
  }

  zoomTo(event) {
    if (this.from === undefined) return;
    const ends = [this.from, this.stepAt(event)].sort((a, b) => a - b);
    this.from = undefined;
    this.range.setAttribute("visibility", "hidden");
    if (event.pointerType === "mouse" && this.px(ends[1]) - this.px(ends[0]) > 8) setZoom(ends);
  }
}

function leave() {
  tip.hidden = true;
  for (const plot of plots) if (plot.isDrawn) plot.point(null);
}

function setZoom(range) {
  zoom = range;
  unzoom.hidden = range === null;
  redraw();
}

function redraw() {
  for (const plot of plots) if (plot.isDrawn) plot.draw();
}

// A plot is drawn when it comes near the screen.
const near = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    near.unobserve(entry.target);
    plots[Number(entry.target.dataset.chart)].draw();
  }
}, { rootMargin: "600px" });
for (const figure of document.querySelectorAll("figure[data-chart]")) {
  plots.push(new Plot(figure, data.charts[plots.length]));
  near.observe(figure);
}

slider.addEventListener("input", () => { smoothing = Number(slider.value); redraw(); });
unzoom.addEventListener("click", () => setZoom(null));
let width = innerWidth;
addEventListener("resize", () => {
  if (innerWidth !== width) { width = innerWidth; redraw(); }
});
addEventListener("beforeprint", () => {
  for (const fold of document.querySelectorAll("details.fold")) fold.open = true;
  for (const plot of plots) plot.draw();
});
const root = document.documentElement;
document.getElementById("theme").addEventListener("click", () => {
  const isDark = getComputedStyle(root).colorScheme === "dark"
    || (!root.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
  root.dataset.theme = isDark ? "light" : "dark";
});
