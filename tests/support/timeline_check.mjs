// Runs functions of timeline.js outside a browser. Reads {script, data, calls} from standard input,
// prints one JSON line a call.
import { readFileSync } from "node:fs";

const { script, data, calls } = JSON.parse(readFileSync(0, "utf8"));
const js = await import("data:text/javascript;base64," + Buffer.from(script).toString("base64"));
const ops = await js.decode(data);
const all = ops.paints.map(() => true);
for (const [name, ...args] of calls) {
  const result = {
    raster: (begin, end, columns) => js.raster(ops, begin, end, columns, all),
    bars: (...given) => js.barTraces(ops, ...given.toSpliced(2, 0, all)),
    describe: (op) => js.describe(ops, op),
    pretty: (ns) => js.pretty(ns),
    blend: (a, b, share) => js.blend(a, b, share),
    array: (column) => Array.from(column.split(".").reduce((at, name) => at[name], ops)),
  }[name](...args);
  console.log(JSON.stringify(result));
}
