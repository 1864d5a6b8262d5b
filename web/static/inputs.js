// Inputs of the plan's fields, made of what the server says there is (web/controls.py).

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/** One field: a picker, or an input with a slider over its usual values. */
class Input {
  constructor(control, onInput, onEnd) {
    this.control = control;
    const id = `field-${control.name}`;
    this.problem = element("p", { className: "problem", id: `${id}-problem`, hidden: true });
    const help = element("p", { className: "help", id: `${id}-help` }, control.help);
    this.value = control.kind === "picker"
      ? element("select", { id }, ...control.values.map((v) => element("option", { value: v }, v)))
      : element("input", { id, type: "text", autocomplete: "off", spellcheck: false });
    this.value.name = control.name;
    this.value.setAttribute("aria-describedby", `${this.problem.id} ${help.id}`);
    const label = element("label", { htmlFor: id, title: control.help }, control.label);
    this.root = element("div", { className: `field ${control.kind}` }, label, this.value);
    this.root.dataset.name = control.name;
    this.value.addEventListener("input", () => {
      const text = this.value.value.trim();
      this.moveSlider(text || control.default);
      onInput(control.name, text);
    });
    this.value.addEventListener("change", onEnd);
    if (control.kind === "slider") this.addSlider(onInput, onEnd);
    this.root.append(this.problem, help);
  }

  addSlider(onInput, onEnd) {
    const { name, label, values } = this.control;
    this.slider = element("input", { type: "range", min: 0, max: values.length - 1, step: 1 });
    this.slider.setAttribute("aria-label", `${label}, slider`);
    this.slider.addEventListener("input", () => {
      this.value.value = values[this.slider.value];
      this.moveSlider(this.value.value);
      onInput(name, this.value.value);
    });
    this.slider.addEventListener("change", onEnd);
    this.root.append(this.slider);
  }

  show(text) {
    if (this.value.value !== text) {
      const known = this.control.kind !== "picker" || this.control.values.includes(text);
      if (!known) this.value.append(element("option", { value: text }, "from the link"));
      this.value.value = text;
    }
    this.moveSlider(text);
  }

  moveSlider(text) {
    if (!this.slider) return;
    this.slider.value = nearest(this.control.values, text);
    this.slider.setAttribute("aria-valuetext", text);
  }

  say(message) {
    this.problem.textContent = message ?? "";
    this.problem.hidden = !message;
    this.value.setAttribute("aria-invalid", String(Boolean(message)));
  }
}

/** Where a slider stands for a value that may lie between its stops. */
function nearest(values, text) {
  const exact = values.indexOf(text);
  if (exact >= 0) return exact;
  const distance = values.map((v) => Math.abs(Number(v) - Number(text)));
  const finite = distance.map((d) => (Number.isNaN(d) ? Infinity : d));
  return finite.indexOf(Math.min(...finite));
}

/** All inputs of the page; `more` fields are shown once they are set or asked for. */
export class Inputs {
  constructor(controls, onInput, onEnd) {
    this.all = new Map();
    this.more = document.getElementById("more-inputs");
    this.adder = document.getElementById("adder");
    const main = document.getElementById("main-inputs");
    this.build = (control, parent) => {
      const input = new Input(control, onInput, onEnd);
      this.all.set(control.name, input);
      parent.append(input.root);
      return input;
    };
    for (const control of controls.main) this.build(control, main);
    this.others = new Map(controls.more.map((control) => [control.name, control]));
    for (const control of controls.more) {
      this.adder.append(element("option", { value: control.name, title: control.help }, control.name));
    }
    this.adder.addEventListener("change", () => {
      const { value } = this.adder;
      this.adder.value = "";
      if (value) this.added(value).value.focus();
    });
  }

  /** The input of a field, made if need be. */
  added(name) {
    const known = this.all.get(name);
    if (known) return known;
    document.getElementById("more").open = true;
    const control = this.others.get(name)
      ?? { name, label: name, help: "", kind: "text", values: [], default: "" };
    const input = this.build(control, this.more);
    input.show(control.default);
    return input;
  }

  /** Shows what a state says, in all inputs. */
  show(state) {
    for (const name of state.fields.keys()) this.added(name);
    for (const [name, input] of this.all) input.show(state.value(name));
  }

  /** Says what is wrong beside its field; false if no field shows it. */
  say(message, field) {
    for (const input of this.all.values()) input.say(null);
    if (message) this.all.get(field)?.say(message);
    return this.all.has(field);
  }
}
