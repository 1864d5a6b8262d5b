// Asks the server. What it refuses is thrown as Refusal, one line and the field to blame.

export class Refusal extends Error {
  constructor(message, field) {
    super(message);
    this.field = field;
  }
}

const GONE = "the server does not answer: was it stopped?";

async function asked(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw Object.assign(new Refusal(GONE, null), { gone: true });
  }
  if (response.ok) return response;
  const said = await response.json().catch(() => ({}));
  throw new Refusal(said.message ?? `the server said ${response.status}`, said.field);
}

export async function json(path, options) {
  return (await asked(path, options)).json();
}

/** A file and the name that the server gives it. */
export async function file(path) {
  const response = await asked(path);
  const [, name] = /filename="([^"]+)"/.exec(response.headers.get("Content-Disposition"));
  return { name, content: await response.blob() };
}

/** JSON values of a response that has one a line, as they come. */
export async function* lines(path, options) {
  const reader = (await asked(path, options)).body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = "", part = await reader.read(); !part.done; part = await reader.read()) {
    const whole = (rest + part.value).split("\n");
    rest = whole.pop();
    for (const line of whole) yield JSON.parse(line);
  }
}

/**
 * Calls `task` with the newest arguments only: what comes while it runs waits, and the last of that
 * is next. A task that keeps newer ones waiting for `patience` ms is aborted by its signal.
 */
export function newest(task, patience = 1500) {
  let next = null, running = false;
  return async (...given) => {
    next = given;
    if (running) return;
    running = true;
    try {
      while (next) {
        const now = next, abort = new AbortController();
        next = null;
        const watch = setInterval(() => next && abort.abort(), patience);
        await task(abort.signal, ...now).finally(() => clearInterval(watch));
      }
    } finally {
      running = false;
    }
  };
}
