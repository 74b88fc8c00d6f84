// A form from the JSON schema of a command's arguments, and its values as the arguments of a job.

import { el, field, replace } from "./elements.js";

const typesOf = (schema) => [schema.type, ...(schema.anyOf ?? []).map((one) => one.type)].flat();

// Known values for arguments that name something: {cache: [[value, label]], probes: [...]}.
// Returns {element, read()}; `read` gives the arguments that were filled in.
export function schemaForm(schema, known = {}, given = {}) {
  const required = new Set(schema.required ?? []);
  const inputs = new Map();
  const simple = [];
  const more = [];
  for (const [name, property] of Object.entries(schema.properties ?? {})) {
    const [element, read] = inputOf(name, property, known, given[name]);
    inputs.set(name, read);
    const star = required.has(name) ? " (needed)" : "";
    const control = element.matches?.("input, select, textarea")
      ? field(`${name.replaceAll("_", " ")}${star}`, element, { hint: hintOf(property) })
      : element;
    if (required.has(name) && element.matches?.("input, select")) element.required = true;
    (required.has(name) || given[name] !== undefined || simple.length < 6 ? simple : more).push(control);
  }
  const element = el("div", {}, el("div", { class: "form-grid" }, simple));
  if (more.length) {
    element.append(el("details", {}, el("summary", {}, `${more.length} more options`), el("div", { class: "form-grid" }, more)));
  }
  return {
    element,
    read() {
      const values = {};
      for (const [name, read] of inputs) {
        const value = read();
        if (value !== undefined) values[name] = value;
      }
      return values;
    },
  };
}

function hintOf(property) {
  const text = property.description ?? null;
  return text && text !== text.toUpperCase() ? text : null;
}

// An input and a function that reads it; undefined stands for what was left alone.
function inputOf(name, property, known, given) {
  const types = typesOf(property);
  if (property.type === "array") return severalOf(name, property, known, given);
  if (types.includes("boolean")) {
    const start = given ?? property.default ?? null;
    const input = choice([["", "default"], ["true", "yes"], ["false", "no"]], start === null ? "" : String(start));
    return [input, () => (input.value === "" ? undefined : input.value === "true")];
  }
  if (property.enum) {
    const input = choice([["", `default${property.default === undefined ? "" : ` (${property.default})`}`], ...property.enum.map((one) => [one, one])], given ?? "");
    return [input, () => input.value || undefined];
  }
  if (known[name]) {
    const input = choice(known[name], given ?? known[name][0]?.[0] ?? "");
    return [input, () => input.value || undefined];
  }
  const input = el("input", { type: "text", value: given ?? "", placeholder: property.default ?? "" });
  return [input, () => {
    const text = input.value.trim();
    return text === "" ? undefined : text;
  }];
}

function choice(options, value) {
  const input = el("select");
  replace(input, options.map(([key, label]) => el("option", { value: key }, label)));
  input.value = String(value);
  return input;
}

// Several values: check boxes for what is known, else words separated by spaces.
function severalOf(name, property, known, given) {
  const chosen = new Set([given ?? []].flat());
  const options = known[name] ?? property.items?.enum?.map((one) => [one, one]);
  if (!options) {
    const input = el("input", { type: "text", value: [...chosen].join(" ") });
    return [input, () => input.value.trim().split(/\s+/).filter(Boolean)];
  }
  const boxes = options.map(([value, label]) => {
    const box = el("input", { type: "checkbox", value, checked: chosen.has(value) });
    return [box, el("label", {}, box, label)];
  });
  const element = el("fieldset", {}, el("legend", {}, name.replaceAll("_", " ")), el("div", { class: "choices" }, boxes.map(([, label]) => label)));
  return [element, () => boxes.filter(([box]) => box.checked).map(([box]) => box.value)];
}
