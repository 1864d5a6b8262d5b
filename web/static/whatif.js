// The what-if page: inputs, the answer as they move, the timeline once they rest, sweeps on demand.
//
// The address holds the what-if (state.js), the server works everything out and makes every figure
// and word (web/answers.py); here they are only put in place.

import { decode, Timeline } from "/static/timeline.js";
import { buildToolbar, byId, listenToKeys, Together } from "/static/toolbar.js";
import { file, json, newest } from "/static/api.js";
import { Inputs } from "/static/inputs.js";
import { draw, plotly, redrawAll } from "/static/plots.js";
import { State } from "/static/state.js";
import { addSweeps } from "/static/sweeps.js";

const REST_MS = 250; // after which the timeline follows the answer,
const HELD_MS = 1000; // while a slider is held: the next answer would have to wait for it
const REFUSED_MS = 300; // after which a refusal is said: to type 128 is to pass 1 and 12
const RETRY_MS = 2000;
const DONE_MS = 2500, FAILED_MS = 10000; // how long it stands what a button did
const SLOW_MS = 1500;
const SPEAK_MS = 900;
const BESIDE_TABLE_PIXELS = 196; // height of a figure whose legend is the table beneath it

const controls = await json("/api/controls");
const defaults = Object.fromEntries(
  [...controls.main, ...controls.more].map(({ name, default: value }) => [name, value]));
const state = new State(defaults);
const inputs = new Inputs(
  controls,
  (name, text) => { state.set(name, text === "" ? null : text); ask(); },
  () => { state.endGesture(); inputs.show(state); if (rest) restFor(REST_MS); },
);
const together = { drawn: null, plan: null, pinned: null };
let answered = null, spoken = 0, rest = 0, refusal = 0, retry = 0, saying = 0;

// -- the answer ------------------------------------------------------------------------------------

const ask = newest(async (signal) => {
  clearTimeout(refusal);
  clearTimeout(retry);
  byId("content").dataset.stale = "true";
  const slow = setTimeout(() => {
    sayCertainty("working… (the first answer after an installation compiles)");
  }, SLOW_MS);
  try {
    show(await json(`/api/answer?${state.query}`, { signal }));
  } catch (error) {
    if (error.name !== "AbortError") refusal = setTimeout(refuse, REFUSED_MS, error);
  } finally {
    clearTimeout(slow);
  }
});

/** Says why there is no answer; one from before stays in sight, but nothing is to be done with it. */
function refuse(error) {
  sayCertainty(null);
  if (error.gone) retry = setTimeout(ask, RETRY_MS);
  const shown = inputs.say(error.message, error.field);
  byId("problem").textContent = error.gone ? `${error.message} Asking again` : error.message;
  byId("problem").hidden = shown && !error.gone && Boolean(answered);
  byId("unpin").hidden = !state.pinned; // the pinned plan may be to blame
  setAnswered(false);
}

/** What needs an answer can be used while there is one. */
function setAnswered(yes) {
  byId("content").dataset.empty = String(!answered);
  const menu = byId("downloads");
  for (const button of document.querySelectorAll("[data-needs-answer]")) button.disabled = !yes;
  if (!yes) menu.open = false;
  menu.inert = !yes;
}

function show(answer) {
  const isFirst = !answered;
  answered = answer;
  inputs.say(null);
  byId("problem").hidden = true;
  setAnswered(true);
  byId("facts").replaceChildren(...answer.facts.map(factElement));
  byId("facts").dataset.fits = answer.report.fits;
  for (const name of ["breakdown", "memory"]) {
    const figure = answer.figures[name], table = byId(`${name}-table`);
    draw(byId(name), figure, { showlegend: false, height: BESIDE_TABLE_PIXELS });
    putTables(table, answer.tables[name]);
    addLegend(table, figure);
  }
  putTables(byId("tables"), answer.tables.others);
  putTables(byId("differences"), answer.differences);
  sayCertainty(null);
  showRemarks(answer.report.warnings);
  byId("command").textContent = answer.report.command;
  const { mhcplan_version: version, plan_digest: plan, profile_digest: profile } = answer.report;
  byId("origin").textContent =
    `mhcplan ${version}, plan ${plan.slice(0, 12)}, profile ${profile.slice(0, 12)}`;
  showPinned();
  document.title = `${answer.headline.split(";")[0]} – ${answer.report.plan.model.name}`;
  speak(answer.headline);
  delete byId("content").dataset.stale;
  const held = document.querySelector("input[type=range]:active");
  restFor(isFirst ? 0 : held ? HELD_MS : REST_MS);
}

/** Lets the timeline follow after so long without another answer. */
function restFor(ms) {
  clearTimeout(rest);
  rest = setTimeout(() => { rest = 0; followTimeline(); }, ms);
}

/** How sure the answer is; until that is known (null) the line before keeps its room, unseen. */
function sayCertainty(line) {
  const element = byId("certainty");
  element.dataset.known = String(line !== null);
  if (line !== null) element.textContent = line;
}

function showRemarks(remarks) {
  byId("warnings").replaceChildren(...remarks.map((text) => {
    const item = document.createElement("li");
    item.textContent = text;
    return item;
  }));
}

/** Tables come as HTML, escaped where it is made: planner/figures/timeline_page.py. */
function putTables(element, tables) {
  element.innerHTML = tables.map((table) => `<div>${table}</div>`).join("");
}

/** Makes the table beneath a figure its legend, with a line for what it has no row of. */
function addLegend(table, figure) {
  const cells = new Map(
    [...table.querySelectorAll("td:first-child")].map((cell) => [cell.textContent, cell]));
  const others = document.createElement("p");
  others.className = "hint";
  for (const { name, marker, mode } of figure.data) {
    const swatch = document.createElement("span"), cell = cells.get(name);
    swatch.className = mode === "markers" ? "swatch mark" : marker.pattern ? "swatch hatched" : "swatch";
    swatch.style.backgroundColor = marker.color ?? marker.line.color;
    if (cell) cell.prepend(swatch);
    else others.append(swatch, `${name} `);
  }
  if (others.childElementCount) table.prepend(others);
}

function factElement({ label, value, note, pinned, change }) {
  const fact = document.createElement("div");
  const add = (tag, name, text) => {
    if (!text) return;
    fact.append(Object.assign(document.createElement(tag), { className: name, textContent: text }));
  };
  add("dt", "", label);
  add("dd", "value", value);
  add("dd", "note", note);
  add("dd", "change", pinned && `A ${pinned}\n${change}`);
  fact.dataset.fact = label;
  return fact;
}

/** Tells a screen reader the answer, once the sliders rest. */
function speak(text) {
  clearTimeout(spoken);
  spoken = setTimeout(() => { byId("spoken").textContent = text; }, SPEAK_MS);
}

function showPinned() {
  const pinned = Boolean(state.pinned);
  for (const name of ["swap", "unpin", "name-a", "name-b", "timeline-a", "difference"]) {
    byId(name).hidden = !pinned;
  }
  const [a, b] = answered.names;
  byId("name-a").textContent = `A: ${a}`;
  byId("name-b").textContent = `B: ${b}`;
}

// -- the timeline ----------------------------------------------------------------------------------

const followTimeline = newest(async (signal) => {
  byId("timeline-state").textContent = "…";
  try {
    const { plan, pinned } = state;
    await drawTimelines(plan, pinned, signal);
    byId("timeline-state").textContent = "";
    document.documentElement.dataset.ready = "true";
    performance.mark("timeline"); // for those who measure how soon it is there
    const { line, remarks } = await json(`/api/certainty?${plan}`, { signal });
    if (plan !== state.plan) return;
    sayCertainty(line);
    showRemarks(remarks);
  } catch (error) {
    if (error.gone) refuse(error); // the timeline follows the answer that is asked for again
    else if (error.name !== "AbortError") byId("timeline-state").textContent = error.message;
  }
}, 500);

async function drawTimelines(plan, pinned, signal) {
  const b = await timelineOf("plan", byId("timeline"), plan, signal);
  const a = pinned ? await timelineOf("pinned", byId("timeline-a"), pinned, signal) : null;
  const timelines = a ? [a, b] : [b];
  if (together.drawn) together.drawn.join(timelines);
  else {
    await plotly();
    together.drawn = new Together(timelines);
    listenToKeys(together.drawn, buildToolbar(together.drawn));
  }
  await together.drawn.all("start");
}

/** The timeline of a query, in an element that it keeps. */
async function timelineOf(slot, element, query, signal) {
  if (together[slot]?.query === query) return together[slot].timeline;
  const { timeline: figure, ops } = await json(`/api/timeline?${query}`, { signal });
  const decoded = await decode(ops);
  const timeline = together[slot]?.timeline ?? new Timeline(element, figure, decoded);
  timeline.load(figure, decoded);
  together[slot] = { query, timeline };
  return timeline;
}

// -- buttons ---------------------------------------------------------------------------------------

/** Goes to another plan, as one step in the history. */
function go(query, pinned = state.pinned) {
  state.endGesture();
  state.pinned = pinned;
  state.go(query);
  state.endGesture();
  inputs.show(state);
  return ask();
}

const actions = {
  reset: () => go("", null),
  pin: () => go(state.plan, state.plan),
  swap: () => go(state.pinned, state.plan),
  unpin: () => { go(state.plan, null); byId("pin").focus(); }, // its own button goes
  open: () => byId("plan-file").click(),
  "copy-link": () => copy(location.href, "link copied"),
  "copy-command": () => copy(answered?.report.command ?? "", "command copied"),
};
for (const [name, action] of Object.entries(actions)) byId(name).addEventListener("click", action);

async function copy(text, done) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    done = "the browser does not let this page copy";
  }
  say(done, DONE_MS);
}

/** Says what a button did, for so long, or what it does, until there is more to say. */
function say(text, ms = null) {
  clearTimeout(saying);
  byId("done").textContent = text;
  if (ms) saying = setTimeout(() => { byId("done").textContent = ""; }, ms);
}

byId("plan-file").addEventListener("change", async ({ target }) => {
  const [chosen] = target.files;
  target.value = ""; // so that the same file can be opened again
  if (!chosen) return;
  try {
    go((await json("/api/open", { method: "POST", body: chosen })).query);
  } catch (error) {
    refuse(error);
  }
});

function addDownloads() {
  const kinds = [
    ["html", "HTML page with the timeline", ""],
    ["perfetto", "Perfetto trace", ""],
    ["plan", "plan (TOML)", ""],
    ["report", "report (JSON)", ""],
    ...Object.entries(controls.exports)
      .filter(([kind]) => kind !== "perfetto")
      .map(([kind, losses]) => [kind, `${kind} (zip)`, `leaves out ${losses.join("; ")}`]),
  ];
  const menu = byId("downloads");
  menu.addEventListener("focusout", ({ relatedTarget }) => {
    if (!menu.contains(relatedTarget)) menu.open = false;
  });
  menu.addEventListener("keydown", ({ key }) => {
    if (key !== "Escape") return;
    menu.open = false;
    menu.firstElementChild.focus();
  });
  menu.lastElementChild.append(...kinds.map(([kind, text, title]) => {
    const made = document.createElement("button");
    Object.assign(made, { type: "button", textContent: text, title });
    made.addEventListener("click", () => { menu.open = false; download(kind); });
    return made;
  }));
}

async function download(kind) {
  say("preparing…");
  try {
    const { name, content } = await file(`/api/download/${kind}?${state.plan}`);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(content);
    link.download = name;
    link.click();
    URL.revokeObjectURL(link.href);
    say(`${name} downloaded`, DONE_MS);
  } catch (error) {
    say(error.message, FAILED_MS);
  }
}

// -- begin -----------------------------------------------------------------------------------------

byId("inputs").addEventListener("submit", (event) => event.preventDefault());
addEventListener("popstate", () => { state.read(); inputs.show(state); ask(); });
document.addEventListener("theme", () => { redrawAll(); together.drawn?.draw(); });
addDownloads();
addSweeps(state, go);
inputs.show(state);
setAnswered(false);
window.mhcplan = { together, state }; // for the console, and for tests
await ask();
