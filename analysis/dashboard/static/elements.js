// Elements, tables and formats. Data becomes text nodes only: token texts may hold any letters.

export function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "on") {
      for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
    } else if (name === "value" || name === "checked" || name === "disabled" || name === "selected") {
      element[name] = value;
    } else {
      element.setAttribute(name, value === true ? "" : String(value));
    }
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

// Replaces the children of `parent`. Views that refresh keep the focus, on the element that does
// the same, and how far their tables were scrolled.
export function replace(parent, ...children) {
  const focused = parent.contains(document.activeElement) ? purposeOf(document.activeElement) : null;
  const scrolled = [...parent.querySelectorAll(".scroll")].map((box) => box.scrollLeft);
  parent.replaceChildren(...children.flat().filter((child) => child !== null && child !== undefined));
  if (scrolled.some((left) => left > 0)) {
    [...parent.querySelectorAll(".scroll")].forEach((box, index) => { box.scrollLeft = scrolled[index] ?? 0; });
  }
  if (focused) {
    const again = [...parent.querySelectorAll("a, button, summary, [tabindex]")].find((one) => purposeOf(one) === focused);
    again?.focus({ preventScroll: true });
  }
}

const purposeOf = (element) => [element.tagName, element.getAttribute("href") ?? element.getAttribute("aria-label") ?? element.textContent].join(" ");

// A table that scrolls sideways by itself. Columns: {title, cell(row), number}.
export function dataTable({ caption, columns, rows, empty = "Nothing here yet." }) {
  if (!rows.length) return el("p", { class: "quiet" }, empty);
  const head = el("tr", {}, columns.map((column) =>
    el("th", { scope: "col", class: column.number ? "number" : null }, column.title)));
  const body = rows.map((row) => el("tr", {}, columns.map((column, index) => {
    const content = column.cell(row);
    const attributes = { class: column.number ? "number" : null };
    return index === 0
      ? el("th", { scope: "row", ...attributes }, content)
      : el("td", attributes, content ?? "–");
  })));
  return scrollBox(caption, el("table", {},
    el("caption", {}, caption), el("thead", {}, head), el("tbody", {}, body)));
}

export function scrollBox(label, ...children) {
  return el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label }, ...children);
}

export function facts(pairs) {
  return el("dl", { class: "facts" }, pairs
    .filter(([, value]) => value !== null && value !== undefined && value !== "")
    .flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));
}

let numberOfFields = 0;

export function field(label, input, { hint = null, size = "" } = {}) {
  numberOfFields += 1;
  input.id ||= `field-${numberOfFields}`;
  const hintElement = hint ? el("div", { class: "hint", id: `${input.id}-hint` }, hint) : null;
  if (hintElement) input.setAttribute("aria-describedby", hintElement.id);
  return el("div", { class: `field ${size}` }, el("label", { for: input.id }, label), input, hintElement);
}

// Options: [value, label] pairs or plain values.
export function select(options, value, onChange) {
  const element = el("select", { on: { change: () => onChange(element.value) } });
  setOptions(element, options, value);
  return element;
}

export function setOptions(element, options, value) {
  replace(element, options.map((option) => {
    const [key, label] = Array.isArray(option) ? option : [option, option];
    return el("option", { value: key }, String(label));
  }));
  if (value !== null && value !== undefined) element.value = String(value);
}

export function stateMark(state) {
  const kinds = { complete: "good", saved: "good", done: "good", running: "busy", leased: "busy",
    failed: "bad", cancelled: "idle", queued: "idle" };
  const text = String(state);
  const kind = kinds[text] ?? (text.startsWith("damaged") ? "bad" : text.includes(" of ") ? "busy" : "idle");
  return el("span", { class: `state ${kind}` }, text);
}

export function errorBox(error) {
  return el("p", { class: "error", role: "alert" }, error?.message ?? String(error));
}

export function loading(text = "Loading …") {
  return el("p", { class: "quiet", role: "status" }, text);
}

// Formats

export const shortId = (id) => String(id ?? "").slice(0, 12);

export function count(value) {
  return value === null || value === undefined ? "–" : Number(value).toLocaleString("en-US");
}

export function bytes(value) {
  if (value === null || value === undefined) return "–";
  const units = ["B", "kB", "MB", "GB", "TB", "PB"];
  let size = Number(value);
  let unit = 0;
  while (Math.abs(size) >= 1000 && unit < units.length - 1) {
    size /= 1000;
    unit += 1;
  }
  return `${unit && Math.abs(size) < 100 ? size.toFixed(1) : Math.round(size)} ${units[unit]}`;
}

export function duration(seconds) {
  if (seconds === null || seconds === undefined || !Number.isFinite(Number(seconds))) return "–";
  const s = Math.max(0, Number(seconds));
  if (s < 60) return `${s < 10 ? s.toFixed(1) : Math.round(s)} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${Math.round(s % 60)} s`;
  return `${Math.floor(s / 3600)} h ${Math.round((s % 3600) / 60)} min`;
}

export function moment(value) {
  if (value === null || value === undefined) return "–";
  const date = new Date(typeof value === "number" ? value * 1000 : value);
  return Number.isNaN(date.getTime()) ? String(value) : date.toLocaleString("en-GB", { hour12: false });
}

export function measure(value, digits = 4) {
  if (value === null || value === undefined) return "–";
  const number = Number(value);
  if (Number.isInteger(number)) return count(number);
  const size = Math.abs(number);
  return size >= 0.001 && size < 100000 ? String(Number(number.toPrecision(digits))) : number.toExponential(digits - 1);
}

// Layers such as 0-6 or 0, 2, 5-7.
export function ranges(numbers) {
  const sorted = [...numbers].sort((a, b) => a - b);
  const parts = [];
  for (let i = 0; i < sorted.length; i += 1) {
    const start = i;
    while (i + 1 < sorted.length && sorted[i + 1] === sorted[i] + 1) i += 1;
    parts.push(start === i ? `${sorted[i]}` : `${sorted[start]}-${sorted[i]}`);
  }
  return parts.join(",");
}
