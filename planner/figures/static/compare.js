// The page of a comparison: two timelines, one above the other, that move as one. Stands below
// timeline.js and toolbar.js in the same inline module.

const page = JSON.parse(document.getElementById("page-data").textContent);
const elements = [byId("timeline-a"), byId("timeline-b")];
const timelines = await Promise.all(page.sides.map(
  async (side, i) => new Timeline(elements[i], side.timeline, await decode(side.ops))));
const together = new Together(timelines);
listenToKeys(together, buildToolbar(together));
await together.all("start");
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => together.draw());
document.documentElement.dataset.ready = "true";
window.mhcplan = { timelines }; // for the console, and for tests
