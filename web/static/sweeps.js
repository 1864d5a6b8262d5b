// Sweeps around the plan, on demand: points come one by one, and a click on one goes there.

import { byId } from "/static/toolbar.js";
import { lines } from "/static/api.js";
import { draw, plotly } from "/static/plots.js";

/** Makes the sweeps' buttons work; `go` goes to the plan of a query. */
export function addSweeps(state, go) {
  let running = null;
  byId("cancel").addEventListener("click", () => running?.abort());
  for (const button of document.querySelectorAll("[data-sweep]")) {
    button.addEventListener("click", async () => {
      running?.abort();
      const mine = running = new AbortController();
      byId("cancel").hidden = false;
      await sweep(button.dataset.sweep, button.textContent, state.plan, go, mine.signal);
      if (running !== mine) return; // another one has begun
      byId("cancel").hidden = true;
      running = null;
    });
  }
}

async function sweep(kind, title, plan, go, signal) {
  const plot = await plotOf(kind, go), said = byId("sweep-state");
  said.textContent = `${title}…`;
  try {
    for await (const line of lines(`/api/sweep/${kind}?${plan}`, { signal })) {
      if (line.message) throw new Error(line.message);
      const { plan: name, done, total, refused, figure } = line;
      plot.previousElementSibling.textContent =
        `${title} of ${name}. Hollow: does not fit. Large: the plan. Click to go there.`;
      await draw(plot, figure);
      said.textContent = `${title}: ${done} of ${total}`
        + (refused.length ? `, ${refused.length} cannot be run (${refused.at(-1)})` : "");
    }
  } catch (error) {
    said.textContent = error.name === "AbortError" ? `${title}: cancelled` : error.message;
  }
}

/** The plot of a kind of sweep, made when it is first asked for. */
async function plotOf(kind, go) {
  let plot = document.querySelector(`[data-plot="${kind}"]`);
  if (!plot) {
    const box = document.createElement("figure"), caption = document.createElement("figcaption");
    plot = document.createElement("div");
    plot.className = "plot";
    plot.dataset.plot = kind;
    box.append(caption, plot);
    byId("sweep-plots").append(box);
    await plotly();
    await Plotly.newPlot(plot, []);
    plot.on("plotly_click", ({ points: [point] }) => point.customdata && go(point.customdata));
  }
  return plot;
}
