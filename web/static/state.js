// The what-if as the address holds it: fields that differ from their defaults, by name, and the
// query of the plan that is pinned beside it as `a`. The server reads the same query.

const PINNED = "a", MODEL = "model";

export class State {
  /** @param defaults value of every field that has one, by name */
  constructor(defaults) {
    this.defaults = defaults;
    this.inGesture = false;
    this.read();
  }

  /** Takes over what the address says. */
  read() {
    const all = new URLSearchParams(location.search);
    this.pinned = all.get(PINNED);
    all.delete(PINNED);
    this.fields = new Map(all);
  }

  value(name) {
    return this.fields.get(name) ?? this.defaults[name] ?? "";
  }

  /** The query of the plan alone. */
  get plan() {
    const rest = [...this.fields].filter(([name]) => name !== MODEL);
    return new URLSearchParams([[MODEL, this.value(MODEL)], ...rest]).toString();
  }

  /** The query of everything. */
  get query() {
    return this.pinned ? `${this.plan}&${new URLSearchParams({ [PINNED]: this.pinned })}` : this.plan;
  }

  /** Sets a field; null puts it back to its default. */
  set(name, text) {
    if (text === null || text === this.defaults[name]) this.fields.delete(name);
    else this.fields.set(name, text);
    this.write();
  }

  /** Goes to another plan. */
  go(query) {
    this.fields = new Map(new URLSearchParams(query));
    this.write();
  }

  pin(query) {
    this.pinned = query;
    this.write();
  }

  /** Changes of one gesture (a drag) are one step back in the history. */
  write() {
    const address = `?${this.query}`;
    if (this.inGesture) history.replaceState(null, "", address);
    else history.pushState(null, "", address);
    this.inGesture = true;
  }

  endGesture() {
    this.inGesture = false;
  }
}
