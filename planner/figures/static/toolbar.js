// Buttons and keys of timelines, and several timelines that move as one. Knows no page: also stands
// below timeline.js in the inline module of an exported one.

export const byId = (id) => document.getElementById(id);

function button(text, pressed, onPress) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = text;
  if (pressed !== null) made.setAttribute("aria-pressed", String(pressed));
  made.addEventListener("click", () => {
    if (pressed !== null) made.setAttribute("aria-pressed", String(made.ariaPressed !== "true"));
    onPress();
  });
  return made;
}

/** Several timelines that zoom, pan and toggle as one, on an axis that ends with the longest step. */
export class Together {
  constructor(timelines) {
    this.join(timelines);
  }

  /** Takes these in place of those before; what is shown stays, or is everything if it was. */
  join(timelines) {
    const before = this.timelines?.[0];
    const [begin, end] = before?.range ?? [0, Infinity];
    const whole = Math.max(...timelines.map((each) => each.ops.step_ns));
    const all = !before || (begin <= 0 && end >= before.whole);
    this.timelines = timelines;
    for (const each of timelines) {
      each.whole = whole;
      each.range = all ? [0, whole] : [Math.min(begin, whole / 2), Math.min(end, whole)];
      each.onMove = (...range) => this.all("show", ...range);
      if (before) [each.shown, each.pathShown] = [[...before.shown], before.pathShown];
    }
  }

  get paints() { return this.timelines[0].ops.paints; }
  all(name, ...given) { return Promise.all(this.timelines.map((each) => each[name](...given))); }
  toggle(paint) { return this.all("toggle", paint); }
  togglePath() { return this.all("togglePath"); }
  draw() { return this.all("draw"); }
  zoom(factor) { return this.timelines[0].zoom(factor); }
  pan(share) { return this.timelines[0].pan(share); }
  reset() { return this.timelines[0].reset(); }
}

/** Buttons for what the timelines show; gives what their keys do. */
export function buildToolbar(together) {
  const toolbar = byId("toolbar");
  together.paints.forEach((paint, number) => {
    const toggle = button(paint.name, true, () => together.toggle(number));
    const swatch = document.createElement("span");
    swatch.className = "swatch";
    swatch.style.background = paint.color;
    toggle.prepend(swatch);
    toolbar.append(toggle);
  });
  const path = button("critical path", false, () => together.togglePath());
  path.className = "plain";
  toolbar.append(path, button("show all", null, () => together.reset()));
  return { c: () => path.click() };
}

/** W, A, S, D and 0, as in Perfetto, and `more`; not while someone types. */
export function listenToKeys(together, more) {
  const keys = {
    w: () => together.zoom(0.5), s: () => together.zoom(2),
    a: () => together.pan(-0.25), d: () => together.pan(0.25),
    0: () => together.reset(), ...more,
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.closest?.("input, select, textarea")) return;
    keys[event.key.toLowerCase()]?.();
  });
}
