// Level of detail for the timeline: what is drawn depends on how much is visible.
//
// A plot of one bar an op is unusable beyond some thousand ops. So ops arrive once, as typed arrays
// sorted by lane and start (planner/figures/timeline_data.py), and every change of the time axis cuts anew:
// up to BARS_AT_MOST visible ops are real bars, more are a raster with a cell a pixel, in which a
// cell has the colour of the class that fills most of it, paler the less is filled.
//
// The axes, lanes and lines come from Python (planner/figures/step.py). Times are ns in the arrays and ms
// on the axis. Needs the global `Plotly`; works from file://.

const BARS_AT_MOST = 3000;
const TEXT_PIXELS_A_LETTER = 6.5, TEXT_PIXELS_HIGH = 10;
const PATH_PIECES_AT_MOST = 2000;
const TONES = [0.4, 0.7, 1]; // how strong a cell is that is filled up to 1/3, 2/3, 3/3
const MARGIN = 0.5; // of the visible time, drawn on each side: panning shows it at once
const MEMORY_BINS = 400;
const FILLED = 0.88; // of a lane's height
const SHORTEST = 50; // ns that the axis shows at least
const MS = 1e6;

const ARRAYS = {
  uint8: Uint8Array, int8: Int8Array, uint16: Uint16Array, int16: Int16Array,
  uint32: Uint32Array, int32: Int32Array, float64: Float64Array,
};

/** A typed array from {dtype, data}, data in base64 of zlib. */
export async function unpack({ dtype, data }) {
  const text = atob(data), bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const inflated = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new ARRAYS[dtype](await new Response(inflated).arrayBuffer());
}

async function unpackAll(packed) {
  const entries = Object.entries(packed).filter(([, value]) => value?.dtype);
  return Object.fromEntries(
    await Promise.all(entries.map(async ([name, value]) => [name, await unpack(value)])));
}

function sums(differences) {
  const values = Float64Array.from(differences);
  for (let i = 1; i < values.length; i++) values[i] += values[i - 1];
  return values;
}

/** The data of planner/figures/timeline_data.py with its arrays unpacked, and differences summed up. */
export async function decode(data) {
  const [columns, path, memory] =
    await Promise.all([data, data.path, data.memory].map(unpackAll));
  const ops = { ...data, ...columns, path, memory };
  ops.start = new Float64Array(ops.gap.length);
  for (let lane = 0; lane < ops.lanes.length; lane++) {
    let end = 0;
    for (let op = ops.offsets[lane]; op < ops.offsets[lane + 1]; op++) {
      ops.start[op] = end + ops.gap[op];
      end = ops.start[op] + ops.duration[op];
    }
  }
  for (const name of ["start", "end"]) path[name] = sums(path[name]);
  for (const name of ["time", "bytes"]) memory[name] = sums(memory[name]);
  ops.height = Math.max(1, ...data.lanes.map((lane) => lane.bottom));
  ops.middle = Float64Array.from(data.lanes, (lane) => (lane.top + lane.bottom) / 2);
  ops.paint = Uint8Array.from(data.labels, (label) => label.paint);
  return ops;
}

/** First index in [low, high) at which `values` exceeds `bound`; `high` if none does. */
function firstAbove(values, bound, low, high) {
  while (low < high) {
    const middle = (low + high) >> 1;
    if (values[middle] > bound) high = middle;
    else low = middle + 1;
  }
  return low;
}

/** Range of ops [first, last) of a lane that touch the time from `begin` to `end`, ns. */
function visibleInLane(ops, lane, begin, end) {
  const low = ops.offsets[lane], high = ops.offsets[lane + 1];
  let first = firstAbove(ops.start, begin, low, high);
  while (first > low && ops.start[first - 1] + ops.duration[first - 1] >= begin) first--;
  return [first, firstAbove(ops.start, end, first, high)];
}

function countVisible(ops, begin, end) {
  let count = 0;
  for (let lane = 0; lane < ops.lanes.length; lane++) {
    const [first, last] = visibleInLane(ops, lane, begin, end);
    count += last - first;
  }
  return count;
}

/** The op of a lane that runs at an instant, or -1; `next` is the first to start after it. */
function opAt(ops, lane, time) {
  const low = ops.offsets[lane], high = ops.offsets[lane + 1];
  const next = firstAbove(ops.start, time, low, high);
  const runs = next > low && ops.start[next - 1] + ops.duration[next - 1] >= time;
  return { op: runs ? next - 1 : -1, next: next < high ? next : -1 };
}

// -- what is drawn ---------------------------------------------------------------------------------

/**
 * Bars of the ops between `begin` and `end`, a trace a class. They are cut where `view` ends, so that
 * the name of a long op is in sight; a name is left out where its bar is too short or too low.
 */
export function barTraces(ops, begin, end, shown, view, pixelsPerNs, pixelsHigh) {
  const traces = ops.paints.map((paint) => ({
    type: "bar", orientation: "h", name: paint.name, showlegend: false, hoverinfo: "none",
    x: [], y: [], base: [], width: [], customdata: [], text: [], textposition: "inside",
    insidetextanchor: "middle", textangle: 0, constraintext: "none", cliponaxis: true,
    insidetextfont: { size: 10, color: inkOn(paint.color) },
    marker: {
      color: paint.color, line: { width: 0 },
      pattern: paint.pattern ? { shape: paint.pattern, fillmode: "overlay", size: 6 } : {},
    },
  }));
  for (let lane = 0; lane < ops.lanes.length; lane++) {
    const [first, last] = visibleInLane(ops, lane, begin, end);
    const height = (ops.lanes[lane].bottom - ops.lanes[lane].top) * FILLED;
    const isHigh = height * pixelsHigh >= TEXT_PIXELS_HIGH;
    for (let op = first; op < last; op++) {
      const paint = ops.paint[ops.label[op]];
      if (!shown[paint]) continue;
      const trace = traces[paint], name = ops.labels[ops.label[op]].name;
      let from = Math.max(begin, ops.start[op]);
      const last = Math.min(end, ops.start[op] + ops.duration[op]);
      for (const to of [...view.filter((edge) => from < edge && edge < last), last]) {
        trace.x.push((to - from) / MS);
        trace.base.push(from / MS);
        trace.y.push(ops.middle[lane]);
        trace.width.push(height);
        trace.customdata.push(op);
        const isLong = (to - from) * pixelsPerNs > name.length * TEXT_PIXELS_A_LETTER;
        trace.text.push(isHigh && isLong ? name : "");
        from = to;
      }
    }
  }
  return traces.filter((trace) => trace.x.length);
}

/** A raster of all lanes, `columns` cells wide: a row a lane, class and tone or null where idle. */
export function raster(ops, begin, end, columns, shown) {
  const classes = ops.paints.length, scale = columns / (end - begin);
  const filled = new Float32Array(columns * classes);
  const rows = [];
  for (let lane = 0; lane < ops.lanes.length; lane++) {
    filled.fill(0);
    const [first, last] = visibleInLane(ops, lane, begin, end);
    for (let op = first; op < last; op++) {
      const paint = ops.paint[ops.label[op]];
      if (!shown[paint]) continue;
      const from = Math.max(0, (ops.start[op] - begin) * scale);
      const to = Math.min(columns, (ops.start[op] + ops.duration[op] - begin) * scale);
      const column = Math.floor(from);
      if (to <= column + 1) {
        filled[column * classes + paint] += to - from;
        continue;
      }
      filled[column * classes + paint] += column + 1 - from;
      const whole = Math.floor(to);
      for (let c = column + 1; c < whole; c++) filled[c * classes + paint] += 1;
      if (whole < columns) filled[whole * classes + paint] += to - whole;
    }
    rows.push(strongest(filled, columns, classes));
  }
  return rows;
}

function strongest(filled, columns, classes) {
  const row = new Array(columns);
  for (let column = 0; column < columns; column++) {
    let best = -1, most = 0, sum = 0;
    for (let c = 0, at = column * classes; c < classes; c++, at++) {
      sum += filled[at];
      if (filled[at] > most) [best, most] = [c, filled[at]];
    }
    const tone = Math.min(TONES.length - 1, Math.floor(sum * TONES.length));
    row[column] = best < 0 ? null : best * TONES.length + tone;
  }
  return row;
}

function heatTrace(ops, begin, end, columns, shown, plot) {
  const codes = ops.paints.length * TONES.length;
  const colorscale = [];
  for (let code = 0; code < codes; code++) {
    const paint = ops.paints[Math.floor(code / TONES.length)];
    const color = blend(plot, paint.color, TONES[code % TONES.length]);
    colorscale.push([code / codes, color], [(code + 1) / codes, color]);
  }
  // equal rows, as many a lane as it is high: what plotly draws as one image
  const rows = raster(ops, begin, end, columns, shown);
  const z = new Array(ops.height).fill(new Array(columns).fill(null));
  ops.lanes.forEach((lane, number) => z.fill(rows[number], lane.top, lane.bottom));
  return {
    type: "heatmap", z, colorscale, showscale: false,
    x0: (begin + (end - begin) / columns / 2) / MS, dx: (end - begin) / columns / MS,
    y0: 0.5, dy: 1, zmin: -0.5, zmax: codes - 0.5, zsmooth: false, hoverinfo: "none",
  };
}

/** Memory of every rank as steps, the most of each bin. */
function memoryTraces(ops, begin, end, ink) {
  const { offsets, time, bytes } = ops.memory, traces = [], ranks = offsets.length - 1;
  for (let rank = 0; rank < ranks; rank++) {
    const low = offsets[rank], high = offsets[rank + 1];
    if (low === high) continue;
    const x = [], y = [];
    let at = Math.max(low, firstAbove(time, begin, low, high) - 1);
    for (let bin = 0; bin < MEMORY_BINS && at < high; bin++) {
      const until = begin + ((end - begin) * (bin + 1)) / MEMORY_BINS;
      let most = -1;
      for (; at < high && time[at] <= until; at++) most = Math.max(most, bytes[at]);
      if (most < 0) continue;
      x.push((begin + ((end - begin) * bin) / MEMORY_BINS) / MS);
      y.push(most / 1e9);
    }
    if (!x.length) {
      x.push(begin / MS);
      y.push(bytes[Math.min(at, high - 1)] / 1e9);
    }
    x.push(end / MS);
    y.push(y[y.length - 1]);
    const shade = ranks > 1 ? 0.35 + (0.65 * rank) / (ranks - 1) : 1;
    traces.push({
      type: "scatter", mode: "lines", x, y, yaxis: "y2", name: `rank ${rank}`, showlegend: false,
      line: { shape: "hv", width: 1.3, color: blend(ink.plot, ink.text, shade) },
      hovertemplate: "%{y:.2f} GB at %{x:.3f} ms<extra>%{fullData.name}</extra>",
    });
  }
  return traces;
}

/** The critical path as one line beneath its ops; pieces below a pixel are joined. */
function pathTrace(ops, begin, end, ink) {
  const { lane, start, end: until } = ops.path, x = [], y = [];
  const first = Math.max(0, firstAbove(start, begin, 0, start.length) - 1);
  const last = firstAbove(start, end, first, start.length);
  const shortest = last - first > PATH_PIECES_AT_MOST ? (end - begin) / PATH_PIECES_AT_MOST : 0;
  for (let piece = first, from = -Infinity; piece < last; piece++) {
    if (start[piece] - from < shortest) continue;
    from = start[piece];
    x.push(start[piece] / MS, until[piece] / MS);
    y.push(ops.lanes[lane[piece]].bottom, ops.lanes[lane[piece]].bottom);
  }
  return {
    type: "scatter", mode: "lines", x, y, name: "critical path", showlegend: false,
    hoverinfo: "skip", line: { color: ink.text, width: 2.2 }, opacity: 0.9,
  };
}

// -- colours ---------------------------------------------------------------------------------------

function rgb(color) {
  return [1, 3, 5].map((i) => parseInt(color.slice(i, i + 2), 16));
}

function hex(parts) {
  return "#" + parts.map((v) => Math.round(v).toString(16).padStart(2, "0")).join("");
}

/** `share` of `color` over `ground`, both #rrggbb. */
export function blend(ground, color, share) {
  const [a, b] = [rgb(ground), rgb(color)];
  return hex(a.map((v, i) => v + (b[i] - v) * share));
}

function inkOn(color) {
  const [r, g, b] = rgb(color);
  return r * 0.299 + g * 0.587 + b * 0.114 > 140 ? "#000000" : "#ffffff";
}

/** The page's colours, light or dark: what its style sheet says now, as #rrggbb. */
export function pageInk() {
  const probe = document.body.appendChild(document.createElement("i"));
  const of = (name) => {
    probe.style.color = `var(${name})`;
    return hex(getComputedStyle(probe).color.match(/[\d.]+/g).slice(0, 3).map(Number));
  };
  const ink = { text: of("--text"), muted: of("--muted"), grid: of("--grid"), plot: of("--plot") };
  probe.remove();
  return ink;
}

/** Gives a figure made in Python the page's colours. */
export function themed(layout, ink) {
  const axis = (old) => ({
    ...old, gridcolor: ink.grid, zerolinecolor: ink.grid, linecolor: ink.grid, spikecolor: ink.grid,
  });
  const axes = Object.keys(layout).filter((key) => /^[xy]axis\d*$/.test(key));
  return {
    ...layout,
    ...Object.fromEntries(axes.map((key) => [key, axis(layout[key])])),
    font: { ...layout.font, color: ink.text },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: ink.muted, activecolor: ink.text },
    hoverlabel: { bgcolor: ink.plot, bordercolor: ink.grid, font: { color: ink.text } },
  };
}

// -- the timeline in the page ----------------------------------------------------------------------

/** Time in a unit that suits it, from ns. */
export function pretty(ns) {
  const size = Math.abs(ns);
  if (size >= 1e6) return `${(ns / 1e6).toFixed(3)} ms`;
  return size >= 1e3 ? `${(ns / 1e3).toFixed(1)} \u00b5s` : `${Math.round(ns)} ns`;
}

const WAITED = {
  start: "started with the step",
  host: "waited for the host to issue it",
  stream: "waited for its stream",
  event: "waited for",
  peer: "waited for the other end",
  link: "waited for its link",
  priority: "waited for a more urgent op",
  sms: "waited for the SMs of a kernel",
};

function laneOf(ops, op) {
  return firstAbove(ops.offsets, op, 0, ops.offsets.length) - 1;
}

/** Lines of text about an op. */
export function describe(ops, op) {
  const label = ops.labels[ops.label[op]], begin = ops.start[op], length = ops.duration[op];
  const lines = [
    `${label.name} (${ops.paints[label.paint].name})`,
    `${ops.cells[ops.cell[op]]}${ops.site[op] >= 0 ? `, site ${ops.site[op]}` : ""}`,
    ops.lanes[laneOf(ops, op)].name,
    `${pretty(length)}, from ${pretty(begin)} to ${pretty(begin + length)}`,
    (label.alone_ns === null ? "" : `${pretty(label.alone_ns)} alone, `) +
      `${label.source}: ${label.cost}`,
  ];
  const cause = op - ops.behind[op];
  const why = WAITED[ops.reasons[ops.reason[op]]];
  lines.push(cause === op ? why : `${why}: ${ops.labels[ops.label[cause]].name} of` +
    ` ${ops.cells[ops.cell[cause]]} on ${ops.lanes[laneOf(ops, cause)].name}`);
  return lines;
}

/**
 * Draws a timeline into `element` and keeps it current while it is zoomed and panned.
 *
 * `whole` is where its time axis ends, ns: with its step, or later. `onMove` is called with the range
 * to show next, ns; by default it shows it.
 */
export class Timeline {
  /**
   * @param element the plot's element
   * @param figure {layout} of planner/figures/step.py: timeline_figure
   * @param ops what `decode` made of the data of planner/figures/timeline_data.py
   */
  constructor(element, figure, ops) {
    this.element = element;
    this.layout = figure.layout;
    this.ops = ops;
    this.shown = this.ops.paints.map(() => true);
    this.pathShown = false;
    this.whole = this.ops.step_ns;
    this.range = [0, this.whole];
    this.onMove = (begin, end) => this.show(begin, end);
    // the wheel scrolls the page as everywhere; with Ctrl, as which a pinch comes too, it zooms
    element.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && !event.metaKey) event.stopPropagation();
    }, { capture: true, passive: true });
    this.tip = document.createElement("div");
    this.tip.className = "tip";
    this.tip.hidden = true;
    document.body.append(this.tip);
  }

  /** Draws for the first time; later only anew. */
  async start() {
    if (this.started) return this.draw();
    this.started = true;
    const config = {
      responsive: true, scrollZoom: true, displaylogo: false, doubleClick: "reset",
      modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d", "sendChartToCloud"],
    };
    await Plotly.newPlot(this.element, this.traces(), this.themedLayout(), config);
    this.element.on("plotly_relayout", (change) => this.onRelayout(change));
    this.element.on("plotly_hover", (event) => this.onHover(event));
    this.element.on("plotly_unhover", () => { this.tip.hidden = true; });
    return undefined;
  }

  /** Cuts what is visible now: traces for Plotly. */
  traces() {
    const [begin, end] = this.range, ink = pageInk(), span = end - begin;
    const { height, margin, yaxis: { domain: [bottom, top] } } = this.layout;
    const width = Math.max(200, (this.element.clientWidth || 1200) - margin.l - margin.r);
    const pixelsHigh = ((height - margin.t - margin.b) * (top - bottom)) / this.ops.height;
    const from = Math.max(0, begin - MARGIN * span);
    const to = Math.min(this.whole, end + MARGIN * span);
    this.isRaster = countVisible(this.ops, begin, end) > BARS_AT_MOST;
    const columns = Math.max(1, Math.round((width * (to - from)) / span));
    const drawn = countVisible(this.ops, from, to) > BARS_AT_MOST ? [begin, end] : [from, to];
    const ops = this.isRaster
      ? [heatTrace(this.ops, from, to, columns, this.shown, ink.plot)]
      : barTraces(this.ops, ...drawn, this.shown, this.range, width / span, pixelsHigh);
    const path = this.pathShown ? [pathTrace(this.ops, from, to, ink)] : [];
    return [...ops, ...path, ...memoryTraces(this.ops, from, to, ink)];
  }

  themedLayout() {
    const layout = themed(this.layout, pageInk());
    if (matchMedia("(pointer: coarse)").matches) layout.dragmode = false; // a finger scrolls the page
    layout.xaxis = { ...layout.xaxis, range: this.range.map((ns) => ns / MS) };
    return layout;
  }

  draw() {
    this.tip.hidden = true;
    return Plotly.react(this.element, this.traces(), this.themedLayout());
  }

  /** Draws another step in its place; the time axis stays where it is until it is shown anew. */
  load(figure, ops) {
    this.layout = figure.layout;
    this.ops = ops;
  }

  /** Shows the time from `begin` to `end`, ns, kept inside the axis. */
  show(begin, end) {
    const span = Math.min(Math.max(end - begin, SHORTEST), this.whole);
    const from = Math.min(Math.max(begin, 0), this.whole - span);
    this.range = [from, from + span];
    return this.draw();
  }

  zoom(factor) {
    const [begin, end] = this.range, middle = (begin + end) / 2, half = ((end - begin) * factor) / 2;
    return this.onMove(middle - half, middle + half);
  }

  pan(share) {
    const [begin, end] = this.range, by = (end - begin) * share;
    return this.onMove(begin + by, end + by);
  }

  reset() { return this.onMove(0, this.whole); }

  toggle(paint) {
    this.shown[paint] = !this.shown[paint];
    return this.draw();
  }

  togglePath() {
    this.pathShown = !this.pathShown;
    return this.draw();
  }

  onRelayout(change) {
    if (change["xaxis.autorange"]) return this.reset();
    const range = change["xaxis.range"] ?? [change["xaxis.range[0]"], change["xaxis.range[1]"]];
    if (range[0] !== undefined) return this.onMove(range[0] * MS, range[1] * MS);
    if (change.autosize) return this.draw();
    return undefined;
  }

  onHover(event) {
    const point = event.points[0];
    if (point.fullData.yaxis === "y2") return;
    const isBar = point.data.type === "bar";
    const lane = isBar ? laneOf(this.ops, point.customdata)
      : this.ops.lanes.findIndex((l) => l.top <= point.y && point.y < l.bottom);
    if (lane < 0) return;
    const found = isBar
      ? { op: point.customdata }
      : opAt(this.ops, lane, this.timeAt(event.event) ?? point.x * MS);
    this.tip.replaceChildren(...this.tipLines(found, lane).map((text) => {
      const line = document.createElement("div");
      line.textContent = text;
      return line;
    }));
    this.placeTip(event.event);
  }

  tipLines({ op, next }, lane) {
    if (op >= 0) return describe(this.ops, op);
    const idle = [`${this.ops.lanes[lane].name}: idle`];
    return next >= 0 ? [...idle, "next:", ...describe(this.ops, next)] : idle;
  }

  timeAt(mouse) {
    const axis = this.element._fullLayout?.xaxis;
    if (!axis?.p2d) return undefined;
    const left = this.element.getBoundingClientRect().left + axis._offset;
    return axis.p2d(mouse.clientX - left) * MS;
  }

  placeTip(mouse) {
    this.tip.hidden = false;
    const { offsetWidth: width, offsetHeight: height } = this.tip;
    const x = Math.min(mouse.clientX + 14, window.innerWidth - width - 8);
    const below = mouse.clientY + 14 + height < window.innerHeight;
    this.tip.style.left = `${Math.max(4, x) + window.scrollX}px`;
    this.tip.style.top = `${(below ? mouse.clientY + 14 : mouse.clientY - height - 10) + window.scrollY}px`;
  }
}
