// Buttons and keys of a timeline, or of several that move together; stands below timeline.js in the
// same inline module.

const byId = (id) => document.getElementById(id);

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

function buildToolbar(timeline) {
  const toolbar = byId("toolbar");
  timeline.ops.paints.forEach((paint, number) => {
    const toggle = button(paint.name, true, () => timeline.toggle(number));
    const swatch = document.createElement("span");
    swatch.className = "swatch";
    swatch.style.background = paint.color;
    toggle.prepend(swatch);
    toolbar.append(toggle);
  });
  const path = button("critical path", false, () => timeline.togglePath());
  path.className = "plain";
  toolbar.append(path, button("show all", null, () => timeline.reset()));
  return { c: () => path.click() };
}

function listenToKeys(timeline, more) {
  const keys = {
    w: () => timeline.zoom(0.5), s: () => timeline.zoom(2),
    a: () => timeline.pan(-0.25), d: () => timeline.pan(0.25),
    0: () => timeline.reset(), ...more,
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    keys[event.key.toLowerCase()]?.();
  });
}
