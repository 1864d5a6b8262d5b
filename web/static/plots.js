// Plotly figures in the page: made in Python (planner/figures), coloured here as the page is.

import { pageInk, themed } from "/static/timeline.js";

const CONFIG = { displayModeBar: false };
const drawn = new Map();
const resized = new ResizeObserver((changes) => {
  for (const { target } of changes) Plotly.relayout(target, { width: target.clientWidth });
});
let loading = null;

/** Loads plotly.js; running it takes the better part of a second, so what is there is shown first. */
export function plotly() {
  loading ??= new Promise((resolve, reject) => {
    const script = document.createElement("script");
    Object.assign(script, { src: "/static/plotly.min.js", onload: resolve, onerror: reject });
    requestAnimationFrame(() => setTimeout(() => document.head.append(script)));
  });
  return loading;
}

/** Draws a figure into an element, again when the theme changes; `changes` are to its layout. */
export async function draw(element, figure, changes = {}) {
  drawn.set(element, [figure, changes]);
  await plotly();
  if (drawn.get(element)[0] !== figure) return; // a newer one has come meanwhile
  // nothing to zoom into: a drag would only lose the figure, and a finger scrolls the page
  const layout = { ...themed(figure.layout, pageInk()), dragmode: false, ...changes };
  await Plotly.react(element, figure.data, layout, CONFIG);
  resized.observe(element);
}

export function redrawAll() {
  for (const [element, [figure, changes]] of drawn) draw(element, figure, changes);
}
