// The exported page: figures around the Timeline of timeline.js, whose toolbar and keys are those of
// toolbar.js; both stand above this text in the same inline module.

const page = JSON.parse(document.getElementById("page-data").textContent);

function drawFigures() {
  for (const name of ["breakdown", "memory"]) {
    const { data, layout } = page[name];
    const config = { responsive: true, displayModeBar: false };
    // not dragged: a finger on it scrolls the page
    Plotly.react(byId(name), data, { ...themed(layout, pageInk()), dragmode: false }, config);
  }
}

const timeline = new Timeline(byId("timeline"), page.timeline, await decode(page.ops));
const together = new Together([timeline]);
listenToKeys(together, buildToolbar(together));
await timeline.start();
drawFigures();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  timeline.draw();
  drawFigures();
});
document.documentElement.dataset.ready = "true";
window.mhcplan = { timeline }; // for the console, and for tests
