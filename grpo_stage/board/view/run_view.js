if (window.grpoRunView) return;
const NUM_COLORS = 10, DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"];
const FIRST = ["Reward", "Learning signal", "Lengths"];  // sections for everybody; the others are folded
const HEIGHT = 210, FEW_POINTS = 30, LOOK_MS = 100, RUNS_MS = 6000;
const KEPT_AS = "grpo-run-view";
const kept = { tab: "curves", smoothing: 0.6, more: false, charts: {}, log: {}, hidden: {}, ...stored() };

let root = null;  // the element that is filled; Gradio makes a new one when the stage is chosen again
let parts = {};  // elements that change, by name
let words = null, lang = null;  // the texts, and their language
let page = "", place = "";  // the name of this page, and a mark of the run that its form names
let seen = null;  // a mark of the last answer
let now = null;  // all that is known of the run
let asking = false, asksAgain = false, polledAt = 0, listedAt = 0, failures = 0;
let compared = [];  // names of other runs
let zoom = null, cursor = null;  // a range of steps, and a step
let charts = new Map();
let menuOf = "", alarmsOf = "", runsOf = "";
const want = { step: null, all: false, order: "sampled", text: "", lowest: null, highest: null, is_truncated: false };
let groupsOf = "", groupsAsked = 0;

function stored() {
  try { return JSON.parse(localStorage.getItem(KEPT_AS)) || {}; } catch { return {}; }
}

function keep() {
  try { localStorage.setItem(KEPT_AS, JSON.stringify(kept)); } catch { /* private windows have no storage */ }
}

// Elements. Text is added as text, never as HTML.

function make(name, options = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(options)) {
    if (value === null || value === undefined) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key in element && key !== "list" && key !== "style") element[key] = value;
    else element.setAttribute(key, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

function put(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function t(key, values = {}) {
  let text = words[key] ?? key;
  for (const [name, value] of Object.entries(values)) text = text.replaceAll(`{${name}}`, value);
  return text;
}

function seconds(value) {
  if (value < 60) return `${value < 10 ? value.toFixed(1) : Math.round(value)} s`;
  const minutes = Math.round(value / 60);
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

function score(value) {
  return value === null || value === undefined ? "–" : shown(value, "");
}

// The server

async function ask(question) {
  const config = window.gradio_config || {};
  const base = (config.root || location.origin + location.pathname).replace(/\/$/, "");
  const answer = await fetch(`${base}${config.api_prefix ?? "/gradio_api"}/run/grpo_run_view`, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ data: [question], session_hash: page }),
  });
  if (!answer.ok) throw new Error(`${answer.status}`);
  return (await answer.json()).data[0];
}

async function poll() {
  if (asking) { asksAgain = true; return; }
  asking = true;
  asksAgain = false;
  polledAt = performance.now();
  const askedOf = place;
  try {
    const answer = await ask({ what: "run", seen, lang, charts: kept.charts, compare: compared });
    failures = 0;
    if (askedOf === place && root) take(answer);
    asksAgain ||= askedOf !== place || answer.is_reading;
  } catch (error) {
    failures += 1;
    if (words && root) put(parts.faults, failures > 1 ? t("no_connection") : "");
  }
  asking = false;
  if (asksAgain && failures === 0) poll();
}

function take(answer) {
  if (answer.texts) {
    words = answer.texts;
    lang = answer.lang;
    build();
  }
  const isOther = !now || answer.name !== now.name || answer.is_chosen !== now.is_chosen;
  now = { ...(isOther ? {} : now), ...answer };
  seen = answer.seen;
  if (isOther) {  // what was chosen of another run's steps means nothing here
    groupsOf = "";
    zoom = cursor = want.step = null;
    parts.step.value = "";
    parts.unzoom.hidden = true;
  }
  showState();
  if (now.alarms) showAlarms();
  if (answer.sections) {
    showCurves();
    showDifferences();
  }
  if (kept.tab === "completions") followGroups();
}

// The frame

function build() {
  charts = new Map();
  menuOf = alarmsOf = runsOf = groupsOf = "";
  parts = {};
  const part = (name, element) => (parts[name] = element);
  const tab = (name) => part(`tab_${name}`, make("button", { type: "button", role: "tab", onclick: () => turnTo(name) }, t(`tab_${name}`)));
  const download = (name) => make("button", { type: "button", onclick: (event) => save(name, event.target) }, t(`download_${name}`));
  root.replaceChildren(
    make("section", { className: "state card", id: "grpo_run_status" },
      make("div", { className: "line" },
        part("badge", make("span", { className: "badge" })),
        part("progress", make("b")),
        part("name", make("span", { className: "soft" })),
        part("back", make("button", { type: "button", hidden: true, onclick: () => openRun("") }, t("back"))),
        make("span", { className: "room" }),
        part("downloads", make("span", { className: "downloads" }, download("curves"), download("completions"), download("report")))),
      part("bar", make("div", { className: "bar" }, make("i"))),
      part("doing", make("p", { className: "doing" })),
      part("error", make("div", { className: "failure", hidden: true })),
      part("faults", make("p", { className: "faults" })),
      part("facts", make("dl", { className: "facts" })),
      part("phases", make("div", { className: "phases" })),
      part("memory", make("div", { className: "meters" }))),
    part("alarms", make("section", { className: "alarms", id: "grpo_run_alarms" })),
    part("tabs", make("div", { className: "tabs", role: "tablist" }, tab("curves"), tab("completions"), tab("runs"))),
    part("curves", make("div", {},
      make("div", { className: "tools" },
        make("label", {}, `${t("smoothing")} `, make("input", {
          type: "range", min: 0, max: 0.95, step: 0.05, value: kept.smoothing, id: "grpo_run_smoothing",
          oninput: (event) => { kept.smoothing = Number(event.target.value); keep(); drawAll(); } })),
        part("unzoom", make("button", { type: "button", hidden: true, onclick: () => setZoom(null) }, t("unzoom"))),
        part("menu", make("details", { className: "menu", id: "grpo_run_menu" }, make("summary", {}, t("charts_shown")), make("div"))),
        part("at", make("span", { className: "soft" })),
        make("span", { className: "room" }),
        make("span", { className: "soft" }, t("click_hint"))),
      part("sections", make("div", { id: "grpo_run_charts", className: "charts" }, part("none", make("p", { className: "soft" })))))),
    part("completions", make("div", { id: "grpo_run_table" }, ...groupControls(part))),
    part("runs", make("div", { id: "grpo_run_list" },
      part("list", make("div", { className: "scroll" })), part("differences", make("div", { className: "scroll" })))),
  );
  turnTo(kept.tab);
}

function turnTo(name) {
  kept.tab = ["curves", "completions", "runs"].includes(name) ? name : "curves";
  keep();
  for (const each of ["curves", "completions", "runs"]) {
    parts[each].hidden = each !== kept.tab;
    parts[`tab_${each}`].setAttribute("aria-selected", String(each === kept.tab));
  }
  if (kept.tab === "completions" && now) followGroups();
  if (kept.tab === "runs") listRuns();
  if (kept.tab === "curves") drawAll();
}

// The state

function showState() {
  const state = now.state;
  const isEmpty = state.is_empty || !now.is_own;
  parts.badge.className = `badge ${isEmpty ? "none" : state.kind}`;
  put(parts.badge, now.is_own ? t(`state_${state.kind}`) : t("state_none"));
  put(parts.name, isEmpty ? "" : now.name);
  put(parts.progress, state.step === undefined || state.step === null ? "" : t("progress", { step: state.step, steps: state.steps ?? "?" }));
  parts.back.hidden = !now.is_chosen;
  parts.downloads.hidden = isEmpty;
  parts.tabs.hidden = !now.is_own;
  const share = state.steps > 0 ? Math.min(1, state.step / state.steps) : 0;
  parts.bar.hidden = !(share > 0);
  parts.bar.firstChild.style.width = `${100 * share}%`;
  let doing = "";
  if (!now.is_own) doing = t("foreign_folder");
  else if (isEmpty) doing = t("no_run");
  else if (state.kind === "preparing") {
    const done = state.done.filter(([, took]) => took >= 0.05).map(([name, took]) => `${t(`doing_${name}`)} ${seconds(took)}`);
    const present = t(`doing_${state.doing}`) + (state.seconds === null ? "" : ` … ${seconds(state.seconds)}`);
    doing = [...done, present].join(" · ");
  } else if (state.kind === "running" && !state.step && state.seconds !== null) doing = t("first_step", { seconds: seconds(state.seconds) });
  else if (state.kind === "evaluating" && state.seconds !== null) doing = seconds(state.seconds);
  else if (state.kind === "finished") {
    const { first, last, count, way } = state.rise ?? {};
    doing = [way && t(`reward_${way}`, { first: shown(first, ""), last: shown(last, ""), count }), t("talk_to_it", { folder: state.folder })].filter(Boolean).join(" ");
  } else if (state.kind === "stopped") doing = [state.error.replace(/[^.]$/, "$&."), state.checkpoint ? t("goes_on_from", { checkpoint: state.checkpoint }) : t("no_checkpoint")].filter(Boolean).join(" ");
  else if (state.kind === "killed") doing = state.checkpoint ? t("goes_on_from", { checkpoint: state.checkpoint }) : t("no_checkpoint");
  put(parts.doing, doing);
  parts.doing.hidden = !doing;
  put(parts.none, isEmpty ? "" : t("no_curves"));
  const failure = state.kind === "failed" ? state.error + state.log : "";
  sync(parts.error, failure, () => (state.kind !== "failed" ? [] : [
    make("p", {}, state.error || t("no_words")),
    make("p", { className: "soft" }, state.checkpoint ? t("goes_on_from", { checkpoint: state.checkpoint }) : t("no_checkpoint")),
    make("details", { ontoggle: showLog }, make("summary", {}, t("log")), make("pre", {}, state.log))]));
  put(parts.faults, now.faults.join(" ").replaceAll("`", ""));
  parts.faults.hidden = now.faults.length === 0;
  const facts = [
    ["elapsed", state.elapsed], ["left", state.is_live ? state.left : ""],
    ["reward", state.reward === null ? "" : shown(state.reward, "")],
    ["step_time", state.step_time === null ? "" : seconds(state.step_time)],
    ["rollout_rate", state.rollout_rate === null ? "" : shown(state.rollout_rate, "")],
    ["update_rate", state.update_rate === null ? "" : shown(state.update_rate, "")],
  ].filter(([, value]) => value);
  if (isEmpty) facts.length = 0;
  sync(parts.facts, facts.map(([name]) => name).join(), () => facts.map(([name]) => make("div", {}, make("dt", {}, t(`fact_${name}`)), make("dd"))));
  facts.forEach(([, value], i) => put(parts.facts.children[i].lastChild, value));
  const phases = isEmpty ? [] : state.phases;
  sync(parts.phases, JSON.stringify(phases.map((phase) => [phase.name, Math.round(100 * phase.share)])), () => phases.length === 0 ? [] : [
    make("span", { className: "soft" }, t("time_goes")),
    make("div", { className: "stack" }, ...phases.map((phase, i) => make("i", { style: `flex-grow: ${phase.share}; background: var(--c${i})` }))),
    make("div", { className: "key" }, ...phases.map((phase, i) => phase.share < 0.005 ? "" : make("span", {}, make("i", { style: `background: var(--c${i})` }), `${words[`phase_${phase.name}`] ?? phase.name} ${Math.round(100 * phase.share)} %`)))]);
  const [most] = Object.entries(state.memory);  // the highest comes first
  const meters = isEmpty ? [] : [
    ...state.devices.map((device) => [device.name, device.used / device.total, `${device.used.toFixed(1)} / ${device.total.toFixed(1)} GiB`]),
    ...(most ? [[t("memory_most"), null, `${words[`phase_${most[0]}`] ?? most[0]} ${most[1].toFixed(2)} GiB`]] : []),
  ];
  sync(parts.memory, JSON.stringify(meters), () => meters.map(([name, part, text]) => make("div", {}, make("span", { className: "soft" }, name),
    part === null ? null : make("span", { className: "meter" }, make("i", { className: part > 0.92 ? "full" : "", style: `width: ${100 * part}%` })), make("span", {}, text))));
}

function sync(element, mark, children) {  // new children only where they differ
  if (element.dataset.mark === mark) return;
  element.dataset.mark = mark;
  element.replaceChildren(...children());
  element.hidden = element.childElementCount === 0;
}

async function showLog(event) {
  if (!event.target.open) return;
  const answer = await ask({ what: "log" });
  if (answer.text) event.target.lastChild.textContent = `${now.state.log}\n\n${answer.text}`.trim();
}

function showAlarms() {
  const mark = JSON.stringify([now.alarms, now.recoveries]);
  if (mark === alarmsOf) return;
  alarmsOf = mark;
  const count = now.alarms.length;
  parts.alarms.replaceChildren(...(count + now.recoveries.length === 0 ? [] : [make("details", { open: true, className: "card" },
    make("summary", {}, t("alarms", { count })),
    ...now.recoveries.map((recovery) => make("p", { className: "recovery" },
      t("recovered", { step: recovery.step, resumed: recovery.resumed_step }), make("pre", {}, recovery.settings))),
    ...now.alarms.slice(0, 20).map((alarm, i) => make("article", {},
      make("header", {},
        make("b", {}, alarm.monitor.replaceAll("_", " ")),
        make("button", { type: "button", className: "link", onclick: () => openStep(alarm.step) }, t("at_step", { step: alarm.step })),
        make("span", { className: "soft" }, alarm.action)),
      make("p", {}, alarm.seen, " ", alarm.meaning),
      make("p", {}, make("b", {}, t("remedy")), " ", alarm.remedy),
      alarm.settings === "" ? null : make("div", { className: "settings" }, make("pre", {}, alarm.settings),
        make("button", { type: "button", onclick: () => applyRemedy(i) }, t("apply"))))))]));
}

async function applyRemedy(alarm) {
  await ask({ what: "remedy", alarm });
  document.getElementById("grpo_view_apply").click();
}

// Curves

function plotly() {  // loaded once, when the first plot is drawn
  window.grpoPlotly ??= new Promise((resolve, reject) => {
    const config = window.gradio_config || {};
    const base = (config.root || location.origin + location.pathname).replace(/\/$/, "");
    document.head.append(make("script", {
      src: `${base}${config.api_prefix ?? "/gradio_api"}/file=${root.dataset.plotly}`,
      onload: () => resolve(window.Plotly), onerror: reject }));
  });
  return window.grpoPlotly;
}

const near = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    const chart = entry.target.chart;
    chart.isNear = entry.isIntersecting;
    if (chart.isNear && chart.isStale) chart.draw();
  }
}, { rootMargin: "300px" });
const sized = new ResizeObserver((entries) => {
  for (const entry of entries) {
    const chart = entry.target.chart;
    if (chart.isDrawn && chart.width !== entry.target.clientWidth) chart.draw();
  }
});

function showCurves() {
  const listed = now.sections.flatMap((section) => section.charts.map((chart) => ({ ...chart, section: section.title })));
  const menu = JSON.stringify(listed.map((chart) => [chart.key, chart.title, chart.is_shown, chart.section]));
  if (menu !== menuOf) {
    menuOf = menu;
    parts.menu.lastChild.replaceChildren(...now.sections.flatMap((section) => [
      make("b", {}, section.title),
      ...section.charts.map((chart) => make("label", {}, make("input", { type: "checkbox", checked: chart.is_shown, onchange: (event) => {
        kept.charts[chart.key] = event.target.checked;
        keep();
        poll();
      } }), ` ${chart.title}`))]));
  }
  const places = new Map();
  const elements = [];
  let numFolded = 0;
  for (const section of now.sections) {
    const shownCharts = section.charts.filter((chart) => chart.is_shown && chart.curves.length);
    const isFirst = (chart) => FIRST.includes(section.key) || kept.charts[chart.key];
    numFolded += shownCharts.filter((chart) => !isFirst(chart)).length;
    const unfolded = shownCharts.filter((chart) => kept.more || isFirst(chart));
    const seenKeys = {};
    for (const data of unfolded) {
      const key = `${data.key}#${(seenKeys[data.key] = (seenKeys[data.key] ?? 0) + 1)}`;
      if (!charts.has(key)) charts.set(key, new Chart(key));
      const chart = charts.get(key);
      chart.update(data);
      put(chart.over, section.title);
      chart.over.title = section.about;
      places.set(key, true);
      elements.push(chart.element);
    }
  }
  for (const [key, chart] of charts) {
    if (places.has(key)) continue;
    chart.remove();
    charts.delete(key);
  }
  const mark = JSON.stringify([elements.map((element) => element.chart.key), numFolded]);
  if (parts.sections.dataset.mark === mark) return;
  parts.sections.dataset.mark = mark;
  const fold = make("button", { type: "button", className: "more", onclick: () => { kept.more = !kept.more; keep(); showCurves(); } },
    kept.more ? t("fewer_charts") : t("more_charts", { count: numFolded }));
  parts.sections.replaceChildren(...(elements.length ? elements : [parts.none]), ...(numFolded ? [fold] : []));
}

function drawAll() {
  for (const chart of charts.values()) chart.draw();
}

function setZoom(range) {
  zoom = range;
  parts.unzoom.hidden = range === null;
  drawAll();
}

function setCursor(step) {
  cursor = step;
  put(parts.at, step === null ? "" : t("at_step", { step: step.toLocaleString("en") }));
  for (const chart of charts.values()) chart.point();
}

class Chart {
  constructor(key) {
    this.key = key;
    this.isNear = this.isDrawn = this.isStale = false;
    this.title = make("span", { className: "title" });
    this.over = make("small", { className: "soft" });
    this.hint = make("p", { className: "soft hint", hidden: true });
    this.legend = make("div", { className: "legend" });
    this.plot = make("div", { className: "plot" });
    this.line = make("div", { className: "cursor", hidden: true });
    this.log = make("button", { type: "button", title: t("log_scale"), onclick: () => { kept.log[this.data.key] = !kept.log[this.data.key]; keep(); this.draw(); } }, "log");
    this.element = make("figure", { className: "card" },
      make("figcaption", {}, make("span", { className: "titles" }, this.over, this.title), this.log,
        make("button", { type: "button", title: t("picture"), onclick: () => this.save() }, "PNG")),
      this.hint, this.legend, make("div", { className: "place" }, this.plot, this.line));
    this.element.chart = this.plot.chart = this;
    near.observe(this.element);
    sized.observe(this.plot);
    this.plot.addEventListener("pointermove", (event) => {
      const step = this.stepAt(event);
      if (step !== null) setCursor(step);
    });
    this.plot.addEventListener("pointerdown", (down) => {  // a click that does not drag: plotly covers the page in between
      const step = this.stepAt(down);
      addEventListener("pointerup", (up) => {
        if (step !== null && Math.hypot(up.clientX - down.clientX, up.clientY - down.clientY) < 4) openStep(step);
      }, { once: true, capture: true });
    });
    this.plot.addEventListener("pointerleave", () => setCursor(null));
  }

  remove() {
    near.unobserve(this.element);
    sized.unobserve(this.plot);
    if (this.isDrawn) window.Plotly.purge(this.plot);
    this.element.remove();
  }

  update(data) {
    const mark = JSON.stringify(data);
    if (mark === this.mark) return;
    this.mark = mark;
    this.data = data;
    put(this.title, now.runs.length > 1 && data.is_stacked ? `${data.title} · ${now.runs[data.curves[0].run]}` : data.title);
    put(this.hint, data.hint);
    this.hint.hidden = !data.hint;
    this.title.title = Object.entries(data.definitions).map(([name, text]) => `${name}: ${text}`).join("\n\n");
    const many = now.runs.length > 1, byRun = many && !data.is_stacked;
    const metrics = [...new Set(data.curves.map((curve) => curve.metric))];
    const short = shortNames(metrics);
    this.curves = data.curves.map((curve) => {
      const metric = metrics.indexOf(curve.metric);
      const name = !byRun ? short[metric] : metrics.length > 1 ? `${short[metric]} · ${now.runs[curve.run]}` : now.runs[curve.run];
      return { ...curve, name, id: `${data.key}/${byRun ? curve.run : ""}/${curve.metric}`, color: (byRun ? curve.run : metric) % NUM_COLORS, dash: DASHES[metric % DASHES.length] };
    });
    const isPositive = this.curves.length > 0 && !data.is_stacked && this.curves.every((curve) => (curve.low.length ? curve.low : curve.y).every((value) => value > 0));
    this.log.hidden = !isPositive;
    this.isLog = isPositive;
    const legend = JSON.stringify(this.curves.map((curve) => [curve.id, curve.name]));
    if (legend !== this.legendOf) {
      this.legendOf = legend;
      this.legend.replaceChildren(...this.curves.map((curve) => {
        const button = make("button", { type: "button", title: `${curve.metric} · ${now.runs[curve.run]}`, className: kept.hidden[curve.id] ? "off" : "", onclick: () => {
          kept.hidden[curve.id] = !kept.hidden[curve.id];
          button.className = kept.hidden[curve.id] ? "off" : "";
          keep();
          this.draw();
        } }, make("i", { className: "key", style: `border-top: 3px ${{ solid: "solid", dot: "dotted" }[curve.dash] ?? "dashed"} var(--c${curve.color})` }), make("span", {}, curve.name), make("b"));
        return button;
      }));
    }
    this.draw();
  }

  get visible() {
    return this.curves.filter((curve) => !kept.hidden[curve.id]);
  }

  stepAt(event) {  // the logged step that is nearest to the pointer
    const axis = this.plot._fullLayout?.xaxis;
    if (!axis) return null;
    const step = axis.p2d(event.clientX - this.plot.getBoundingClientRect().left - axis._offset);
    let best = null;
    for (const curve of this.visible) {
      const x = curve.x[nearest(curve.x, step)];
      if (best === null || Math.abs(x - step) < Math.abs(best - step)) best = x;
    }
    return best;
  }

  figure(style) {
    const color = (i) => style.getPropertyValue(`--c${i}`).trim();
    const isLog = this.isLog && Boolean(kept.log[this.data.key]);
    const traces = [];
    for (const curve of this.visible) {
      const stroke = color(curve.color), base = { x: curve.x, type: "scatter", name: curve.name, hoverinfo: "skip" };
      const isFew = curve.x.length <= FEW_POINTS;
      const main = { ...base, hoverinfo: "none", cliponaxis: false, mode: isFew ? "lines+markers" : "lines", marker: { color: stroke, size: curve.x.length === 1 ? 8 : 4 } };
      if (this.data.is_stacked) {
        traces.push({ ...main, y: curve.y, stackgroup: "all", mode: curve.x.length === 1 ? "lines+markers" : "lines", line: { color: stroke, width: 0.5 }, fillcolor: stroke });
        continue;
      }
      if (curve.low.length) {
        traces.push({ ...base, y: curve.low, mode: "lines", line: { width: 0 } });
        traces.push({ ...base, y: curve.high, mode: "lines", line: { width: 0 }, fill: "tonexty", fillcolor: faint(stroke, 0.15) });
      }
      // A smoothed line lags behind; the schedule is no measurement.
      const line = curve.metric === "learning_rate" ? curve.y : smoothed(curve.x, curve.y, kept.smoothing);
      if (line !== curve.y) traces.push({ ...base, y: curve.y, mode: "lines", line: { color: faint(stroke, 0.35), width: 1 } });
      traces.push({ ...main, y: line, line: { color: stroke, width: 2, dash: curve.dash } });
    }
    const [first, last] = this.steps(), [low, high] = this.range(first, last, isLog);
    const ink = style.getPropertyValue("--soft").trim(), grid = style.getPropertyValue("--line").trim(), card = style.getPropertyValue("--card").trim();
    const axis = { gridcolor: grid, zerolinecolor: grid, linecolor: grid, tickfont: { size: 11 }, automargin: true };
    const layout = {
      height: HEIGHT, margin: { l: 44, r: 8, t: 6, b: 24 }, showlegend: false, hovermode: false, dragmode: "zoom",
      paper_bgcolor: card, plot_bgcolor: card, font: { color: ink, family: "system-ui, sans-serif" },
      xaxis: { ...axis, range: [first, last], tickformat: ",d", showgrid: false, zeroline: false, ...(last - first < 8 ? { dtick: 1, tick0: 0 } : { nticks: 6 }) },
      yaxis: { ...axis, range: [low, high], fixedrange: true, nticks: 5, exponentformat: "e", tickformat: this.data.unit === "share" ? ".2~%" : "", zeroline: false, ...(isLog ? { type: "log", dtick: undefined } : { type: "linear" }) },
      shapes: now.alarms.filter((alarm) => alarm.step >= first && alarm.step <= last && !this.data.is_stacked).slice(0, 30).map((alarm) => (
        { type: "line", x0: alarm.step, x1: alarm.step, y0: 0, y1: 1, yref: "paper", line: { color: style.getPropertyValue("--bad").trim(), width: 1, dash: "dot" } })),
    };
    return { traces, layout };
  }

  steps() {
    if (zoom) return zoom;
    const ends = [];
    for (const other of this.curves) ends.push(other.x[0], other.x[other.x.length - 1]);
    const first = Math.min(...ends), last = Math.max(...ends);
    return last > first ? [first, last] : [first - 1, first + 1];
  }

  range(first, last, isLog) {  // around what is visible, so that an axis shows no more and no less
    let low = Infinity, high = -Infinity;
    if (this.data.is_stacked) {
      const sums = new Map();
      for (const curve of this.visible) curve.x.forEach((x, i) => { if (x >= first && x <= last) sums.set(x, (sums.get(x) ?? 0) + curve.y[i]); });
      low = 0;
      high = Math.max(0, ...sums.values()) || 1;
    } else {
      for (const curve of this.visible) {
        const lower = curve.low.length ? curve.low : curve.y, upper = curve.high.length ? curve.high : curve.y;
        for (let i = 0; i < curve.x.length; i++) {
          if (curve.x[i] < first || curve.x[i] > last) continue;
          low = Math.min(low, lower[i]);
          high = Math.max(high, upper[i]);
        }
      }
    }
    if (!(high >= low)) return [0, 1];
    if (isLog) return [Math.log10(low) - 0.05, Math.log10(high) + 0.05];
    if (this.data.unit === "share" && low >= 0 && high <= 1) return [0, high > 0 ? Math.min(1.03, high * 1.1) : 1];
    if (high / 2 - low / 2 <= 1e-9 * Math.max(Math.abs(low), Math.abs(high))) {
      const reach = Math.abs(low) / 2 || 1;
      return [low - reach, high + reach];
    }
    const margin = (high / 2 - low / 2) * 0.1;
    return [this.data.is_stacked ? 0 : low - margin, high + margin];
  }

  async draw() {
    this.isStale = true;
    if (!this.isNear || kept.tab !== "curves" || !this.plot.clientWidth) return;
    this.isStale = false;
    const Plotly = await plotly();
    if (!this.plot.isConnected) return;
    this.width = this.plot.clientWidth;
    const { traces, layout } = this.figure(getComputedStyle(root));
    await Plotly.react(this.plot, traces, { ...layout, width: this.width }, { displayModeBar: false, doubleClick: false, showTips: false });
    if (!this.isDrawn) {
      this.isDrawn = true;
      this.plot.on("plotly_relayout", (change) => {
        if ("xaxis.range[0]" in change) setZoom([change["xaxis.range[0]"], change["xaxis.range[1]"]]);
      });
    }
    this.point();
  }

  point() {  // the shared cursor, and in the legend each curve's value there, or its last
    const axis = this.isDrawn ? this.plot._fullLayout?.xaxis : null;
    const at = axis && cursor !== null ? axis.d2p(cursor) : null;
    const isInside = at !== null && at >= 0 && at <= axis._length;
    this.line.hidden = !isInside;
    if (isInside) this.line.style.left = `${axis._offset + at}px`;
    this.curves.forEach((curve, i) => {
      const place = cursor === null ? curve.x.length - 1 : nearest(curve.x, cursor);
      const range = cursor !== null && curve.low.length && this.curves.length === 1 ? ` (${shown(curve.low[place], this.data.unit)} – ${shown(curve.high[place], this.data.unit)})` : "";
      put(this.legend.children[i].lastChild, shown(curve.y[place], this.data.unit) + range);
    });
  }

  async save() {
    const Plotly = await plotly(), { traces, layout } = this.figure(getComputedStyle(root));
    const plain = (text) => text.replace(/[&<>]/g, (sign) => `&#${sign.charCodeAt(0)};`);  // plotly reads tags in texts
    const named = traces.map((trace) => ({ ...trace, name: plain(trace.name), showlegend: trace.hoverinfo === "none" }));
    const framed = { ...layout, title: { text: plain(this.data.title) }, showlegend: true, margin: { l: 60, r: 20, t: 50, b: 40 }, height: 520, width: 1100 };
    Plotly.downloadImage({ data: named, layout: framed }, { format: "png", width: 1100, height: 520, scale: 2, filename: `${now.name} ${this.data.title}`.replace(/[^\w.-]+/g, "_") });
  }
}

function faint(color, share) {
  const [red, green, blue] = [1, 3, 5].map((i) => parseInt(color.slice(i, i + 2), 16));
  return `rgba(${red}, ${green}, ${blue}, ${share})`;
}

function shortNames(metrics) {  // the parts in which the metrics of a plot differ
  if (metrics.length === 1) return metrics;
  const split = metrics.map((metric) => metric.split("/"));
  const isShared = (place) => split.every((each) => each.length === split[0].length && each[place] === split[0][place]);
  return split.map((each, i) => each.filter((_, place) => !isShared(place)).join("/") || metrics[i]);
}

function openStep(step) {
  want.step = step;
  want.all = false;
  parts.step.value = step;
  parts.all.checked = false;
  turnTo("completions");
  loadGroups();
  parts.tabs.scrollIntoView({ block: "nearest" });
}

// Completions

function groupControls(part) {
  const changed = () => {
    const number = (name) => (parts[name].value.trim() === "" || !Number.isFinite(Number(parts[name].value)) ? null : Number(parts[name].value));
    const step = number("step");
    Object.assign(want, { step: step === null ? null : Math.max(0, Math.min(Number.MAX_SAFE_INTEGER, Math.round(step))), all: parts.all.checked, order: parts.order.value,
      text: parts.text.value, lowest: number("lowest"), highest: number("highest"), is_truncated: parts.cut.checked });
    loadGroups();
  };
  let waiting = null;
  const typed = () => { clearTimeout(waiting); waiting = setTimeout(changed, 350); };
  const walk = (by) => { parts.step.value = Math.max(0, (want.step ?? now.completions.steps[1] ?? 0) + by); changed(); };
  const box = (name, label) => make("label", {}, part(name, make("input", { type: "checkbox", onchange: changed })), ` ${label}`);
  const field = (name, label, size) => make("label", {}, `${label} `, part(name, make("input", { type: "text", size, oninput: typed, id: `grpo_run_${name}` })));
  return [
    make("div", { className: "tools" },
      make("span", { className: "walk" }, make("button", { type: "button", title: t("earlier"), onclick: () => walk(-1) }, "‹"), field("step", t("step"), 6),
        make("button", { type: "button", title: t("later"), onclick: () => walk(1) }, "›")),
      box("all", t("all_steps")),
      make("label", {}, `${t("order")} `, part("order", make("select", { onchange: changed, id: "grpo_run_order" },
        ...["sampled", "best", "worst", "spread"].map((name) => make("option", { value: name }, t(`order_${name}`)))))),
      field("text", t("search"), 16), field("lowest", t("reward_from"), 4), field("highest", t("reward_to"), 4), box("cut", t("only_truncated"))),
    make("p", { className: "soft" }, t("group_hint")),
    part("found", make("p", { className: "soft", role: "status" })),
    part("bars", make("div", { className: "bars" })),
    part("groups", make("div", { className: "groups" })),
    part("more", make("button", { type: "button", hidden: true, onclick: () => moreGroups() }, t("more"))),
  ];
}

function followGroups() {  // new completions of the newest step, unless another is being read
  const isNewest = want.step === null && !want.all;
  if (now.is_reading && !isNewest) { put(parts.found, t("reading")); return; }  // the end of the file is read first
  const isBeingRead = parts.groups.querySelector(".whole, .times") !== null || String(getSelection()) !== "";
  if (groupsMark() === groupsOf || (isBeingRead && groupsOf)) return;
  loadGroups();
}

function groupsMark() {
  return JSON.stringify([now.name, now.is_reading, want.step === null || want.all ? now.completions?.version : ""]);
}

function loadGroups() {
  groupsOf = groupsMark();
  const asked = (groupsAsked += 1);
  parts.more.hidden = true;
  addGroups(asked, 0, true);
}

function moreGroups() {
  parts.more.hidden = true;
  addGroups(groupsAsked, parts.more.start, false);
}

async function addGroups(asked, start, isFirst) {
  let answer = await ask({ what: "groups", ...want, start });
  if (asked !== groupsAsked || !root) return;
  if (answer.error) { put(parts.found, answer.error); return; }
  if (isFirst) {
    parts.groups.replaceChildren();
    showBars(answer.bars);
    const steps = now.completions?.steps ?? [];
    const isThere = want.step === null || want.all || (want.step >= steps[0] && want.step <= steps[1]);
    put(parts.found, answer.step === null ? t("no_completions")
      : (isThere ? "" : `${t("no_such_step", { step: want.step, first: steps[0], last: steps[1] })} `)
        + (want.all ? t("groups_of_all", { count: answer.total }) : t("groups_of_step", { step: answer.step, count: answer.total })));
    parts.found.total = parts.found.textContent;
  }
  parts.groups.append(...answer.groups.map(groupCard));
  while (answer.next !== null && parts.groups.childElementCount === 0 && asked === groupsAsked) {  // nothing found yet
    put(parts.found, t("searching", { share: Math.round((100 * answer.next) / answer.total) }));
    answer = await ask({ what: "groups", ...want, start: answer.next });
    if (asked !== groupsAsked || !root) return;
    parts.groups.append(...(answer.groups ?? []).map(groupCard));
  }
  // A text is looked for as far as is needed: how many groups have it is not known before the end.
  const count = `${parts.groups.childElementCount}${answer.next === null ? "" : "+"}`;
  put(parts.found, want.text ? t("groups_of_all", { count }) : parts.found.total);
  if (answer.total > 0 && parts.groups.childElementCount === 0) put(parts.found, t("nothing_found"));
  parts.more.start = answer.next;
  parts.more.hidden = answer.next === null;
}

function showBars(bars) {
  const most = bars ? Math.max(...bars.y) : 0;
  parts.bars.replaceChildren(...(bars ? [
    make("span", { className: "soft" }, t("histogram")),
    make("div", { className: "columns" }, ...bars.x.map((x, i) => make("span", { title: `${shown(x, "")}: ${bars.y[i]}` },
      make("i", { style: `height: ${(54 * bars.y[i]) / most}px` }), make("small", {}, bars.x.length <= 8 || i % 6 === 0 ? shown(x, "") : ""))))] : []));
}

function groupCard(group) {
  const all = group.completions;
  const names = [...new Set(all.flatMap((each) => Object.keys(each.rewards)))];
  const scale = (values) => {  // of the bars of one reward: the largest value, and whether some are below 0
    const known = values.filter((value) => value !== null && value !== undefined);
    return { most: Math.max(1e-9, ...known.map(Math.abs)), hasNegative: known.some((value) => value < 0) };
  };
  const scales = { total: scale(all.map((each) => each.reward)), advantage: scale(all.map((each) => each.advantage)) };
  for (const name of names) scales[`r:${name}`] = scale(all.map((each) => each.rewards[name]));
  const times = make("div");
  const totals = all.map((each) => each.reward ?? -Infinity), best = Math.max(...totals);
  const isMixed = Math.min(...totals) < best;
  return make("article", { className: "group card" },
    make("header", {},
      make("b", {}, t("group", { step: group.step, prompt: group.prompt })),
      make("span", { className: "soft" }, t("mean_reward", { mean: score(group.mean), count: all.length })),
      make("span", { className: "room" }),
      group.num_steps > 1 ? make("button", { type: "button", onclick: () => showTimes(group, times) }, t("over_time", { count: group.num_steps })) : null),
    make("div", { className: "asked" }, make("div", { className: "prompt" }, text(group.prompt_text)),
      group.reference ? make("div", { className: "reference" }, make("small", { className: "soft" }, t("reference")), text(group.reference)) : null),
    times,
    make("div", { className: "answers" }, ...all.map((each, i) => {
      const body = make("div", { className: "body" }, ...partsOf(each.parts));
      const meter = (name, value, { most, hasNegative }) => make("div", { className: "score", title: `${name}: ${value ?? "–"}` }, make("span", {}, name),
        make("span", { className: hasNegative ? "swing" : "swing positive" },
          make("i", { className: (value ?? 0) < 0 ? "minus" : "", style: `width: ${((hasNegative ? 50 : 100) * Math.abs(value ?? 0)) / most}%` })), make("b", {}, score(value)));
      return make("section", { className: `answer${isMixed && each.reward === best ? " best" : ""}${each.is_match ? "" : " other"}` },
        make("header", {}, make("b", {}, `#${i + 1}`), make("span", { className: "soft" }, t("tokens", { count: each.num_tokens ?? "?" })),
          each.is_truncated ? make("span", { className: "badge stopped" }, t("truncated")) : null),
        make("div", { className: "scores" }, meter(t("total"), each.reward, scales.total),
          ...names.map((name) => meter(name, each.rewards[name], scales[`r:${name}`])), meter(t("advantage"), each.advantage, scales.advantage)),
        body,
        each.num_characters ? make("button", { type: "button", onclick: (event) => showWhole(group, each, body, event.target) }, t("show_all", { count: each.num_characters.toLocaleString("en") })) : null);
    })));
}

function text(content) {
  return make("div", { className: "text", dir: "auto" }, content);
}

function partsOf(list) {
  return list.map(([kind, content]) => kind === "text" ? text(content.trim() === "" ? content : content.replace(/^\n+|\n+$/g, ""))
    : make("details", { className: kind, open: kind !== "thinking" }, make("summary", {}, `${t(`part_${kind}`)} · ${content.length.toLocaleString("en")}`), text(content.trim())));
}

async function showWhole(group, each, body, button) {
  const answer = await ask({ what: "text", step: group.step, prompt: group.prompt, place: each.place });
  body.replaceChildren(...(answer.error ? [text(answer.error)] : partsOf(answer.parts)));
  body.classList.add("whole");
  button.remove();
}

async function showTimes(group, where) {
  if (where.childElementCount) { where.replaceChildren(); return; }
  const answer = await ask({ what: "prompt", prompt: group.prompt });
  where.replaceChildren(make("ol", { className: "times" }, ...(answer.times ?? []).map((time) => make("li", {},
    make("header", {}, make("button", { type: "button", className: "link", onclick: () => openStep(time.step) }, t("at_step", { step: time.step })),
      make("span", { className: "soft" }, t("shown_of_mean", { reward: score(time.reward), mean: score(time.mean) }))),
    make("div", { className: "text", dir: "auto" }, ...time.changes.map(([kind, words]) => kind === "same" ? words : make(kind === "new" ? "ins" : "del", {}, words)))))));
}

// Runs

async function listRuns() {
  listedAt = performance.now();
  const answer = await ask({ what: "runs" });
  const mark = JSON.stringify([answer.runs, compared]);
  if (mark === runsOf || !root) return;
  runsOf = mark;
  parts.list.replaceChildren(answer.runs.length === 0 ? make("p", { className: "soft" }, t("no_runs")) : make("table", {},
    make("thead", {}, make("tr", {}, ...["compare", "run", "state", "steps", "reward", "changed", "checkpoint"].map((name) => make("th", {}, t(`column_${name}`))))),
    make("tbody", {}, ...answer.runs.map((run) => make("tr", {},
      make("td", {}, make("input", { type: "checkbox", "aria-label": `${t("column_compare")} ${run.name}`, checked: compared.includes(run.name), onchange: (event) => {
        compared = event.target.checked ? [...compared, run.name].slice(-6) : compared.filter((name) => name !== run.name);
        poll();
      } })),
      make("td", {}, make("button", { type: "button", className: "link", onclick: () => openRun(run.name) }, run.name)),
      make("td", {}, make("span", { className: `badge ${run.state.kind}` }, t(`state_${run.state.kind}`))),
      make("td", {}, run.step === null ? "–" : `${run.step} / ${run.total_steps ?? "?"}`),
      make("td", {}, score(run.reward)),
      make("td", {}, run.changed ? new Date(1000 * run.changed).toLocaleString(lang) : ""),
      make("td", {}, run.state.checkpoint || "–"))))));
}

async function openRun(name) {
  await ask({ what: "open", run: name });
  seen = null;
  turnTo("curves");
  poll();
}

function showDifferences() {
  const rowsOf = (rows) => make("table", {},
    make("thead", {}, make("tr", {}, make("th", {}, ""), ...now.runs.map((name) => make("th", {}, name)))),
    make("tbody", {}, ...rows.map((row) => make("tr", {}, make("th", {}, row.name), ...row.values.map((value) => make("td", {}, value))))));
  const known = now.differences.filter((row) => !row.values.includes("–")), others = now.differences.filter((row) => row.values.includes("–"));
  sync(parts.differences, JSON.stringify([now.runs, now.differences]), () => now.runs.length < 2 ? [] : [
    make("h3", {}, t("differences")), known.length ? rowsOf(known) : null,
    others.length ? make("details", {}, make("summary", { className: "soft" }, t("only_some", { count: others.length })), rowsOf(others)) : null].filter(Boolean));
}

async function save(what, button) {
  const names = { curves: ["curves.csv", "text/csv"], completions: ["completions.jsonl", "application/x-ndjson"], report: ["report.html", "text/html"] };
  button.disabled = true;
  const pieces = [];
  let start = 0;
  while (start !== null) {
    const answer = await ask({ what, start, compare: compared });
    if (answer.error) { put(parts.faults, answer.error); parts.faults.hidden = false; break; }
    pieces.push(answer.text);
    start = answer.next;
  }
  button.disabled = false;
  if (start !== null) return;
  const url = URL.createObjectURL(new Blob(pieces, { type: names[what][1] }));
  make("a", { href: url, download: `${now.name}-${names[what][0]}` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

// The page

function look() {
  const element = document.getElementById("grpo_view");
  if (element !== root) {
    root = element;
    lang = seen = now = null;
  }
  const named = document.querySelector("#grpo_view_page span");
  if (!root || !named || !root.offsetParent) return;
  page = named.dataset.page;
  if (place !== named.dataset.place) {
    place = named.dataset.place;
    seen = null;
    poll();
    return;
  }
  const since = performance.now() - polledAt;
  if (!asking && (lang === null || since > 1000 * Number(root.dataset.tick)) && (lang !== null || since > 300)) poll();
  if (kept.tab === "runs" && words && performance.now() - listedAt > RUNS_MS) listRuns();
}

window.grpoRunView = { setZoom, kept };
setInterval(look, LOOK_MS);
new MutationObserver(drawAll).observe(document.body, { attributes: true, attributeFilter: ["class"] });  // light and dark
