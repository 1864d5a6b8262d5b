// The page of a comparison: two Timelines, one above the other, on one time axis. Both stand under one
// toolbar; what zooms or pans one does it to the other. Stands below timeline.js and toolbar.js in
// the same inline module.

const page = JSON.parse(document.getElementById("page-data").textContent);
const longest = Math.max(...page.sides.map((side) => side.ops.step_ns));

async function timelineOf(side, element) {
  const ops = await decode(side.ops);
  ops.step_ns = longest; // the axis ends where the longer step does
  return new Timeline(element, side.timeline, ops);
}

const elements = [byId("timeline-a"), byId("timeline-b")];
const timelines = await Promise.all(page.sides.map((side, i) => timelineOf(side, elements[i])));
const [first] = timelines;
const onAll = (name) => (...given) => Promise.all(timelines.map((each) => each[name](...given)));

const showEach = timelines.map((each) => each.show.bind(each));
for (const each of timelines) {
  each.show = (begin, end) => Promise.all(showEach.map((show) => show(begin, end)));
}
const together = {
  ops: first.ops,
  toggle: onAll("toggle"),
  togglePath: onAll("togglePath"),
  reset: () => first.reset(), // a show, which is everyone's
  zoom: (factor) => first.zoom(factor),
  pan: (share) => first.pan(share),
};
listenToKeys(together, buildToolbar(together));
await Promise.all(timelines.map((each) => each.start()));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", onAll("draw"));
document.documentElement.dataset.ready = "true";
window.mhcplan = { timelines }; // for the console, and for tests
