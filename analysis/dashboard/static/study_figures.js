// Figures of studies: panels of lines as charts; bars, points and heatmaps as pictures with tables.

import { lineChart } from "./chart.js";
import { dataTable, el, measure as formatMeasure, scrollBox } from "./elements.js";
import { Picture, downloadButtons, showPicture } from "./picture.js";
import { cellColor, differenceColor, probeColor, textOn, themeColor } from "./theme.js";

const DASH = { solid: [], dash: [7, 4], dot: [2, 3] };
const WIDE = 720;

// Cards of all panels of a figure; `name` begins the names of downloads. Gives elements.
export function figureCards(figure, name, signal) {
  const labels = [...new Set(figure.rows.flat().flatMap((panel) => (panel.series ?? []).map((one) => one.label)))];
  const colorOf = (label) => () => probeColor(null, labels.indexOf(label));
  return figure.rows.map((row, line) => el("div", { class: "columns" }, row.map((panel, column) => {
    const file = `${name}-${figure.name}${figure.rows.flat().length > 1 ? `-${line}-${column}` : ""}`;
    return el("div", { class: panel.values ? "card wide" : "card" }, panelElement(panel, file, colorOf, signal));
  })));
}

function panelElement(panel, file, colorOf, signal) {
  if (panel.values) return heatElement(panel, file, signal);
  const isLines = panel.series.every((one) => one.kind === "line" && one.x.every((x) => typeof x === "number"));
  if (!isLines) return marksElement(panel, file, colorOf, signal);
  const series = panel.series.map((one) => ({
    name: one.label, color: colorOf(one.label), dash: DASH[one.dash],
    points: one.x.map((x, index) => ({ x, y: one.y[index], low: one.low?.[index] ?? null, high: one.high?.[index] ?? null })),
  }));
  if (panel.reference !== null && panel.reference !== undefined) {
    const xs = series.flatMap((one) => one.points.map((point) => point.x));
    series.push({
      name: panel.reference_label || "reference", color: () => themeColor("quiet"), dash: [2, 3],
      points: [Math.min(...xs), Math.max(...xs)].map((x) => ({ x, y: panel.reference })),
    });
  }
  return lineChart({ title: panel.title, name: file, xLabel: panel.x_label, yLabel: panel.y_label, series, signal }).element;
}

// A picture that is drawn again for another theme, with its numbers as a table.
function pictureElement({ title, file, makePicture, header, rows, describe, signal }) {
  const canvas = el("canvas", { role: "img", "aria-label": `${title}. The same numbers are in the table below.` });
  const readout = describe ? el("output", { class: "readout", "aria-live": "polite" }, "Point at a cell.") : null;
  const draw = () => showPicture(canvas, makePicture());
  draw();
  window.addEventListener("themechange", draw, { signal });
  if (describe) {
    canvas.addEventListener("mousemove", (event) => {
      const text = describe(event.offsetX, event.offsetY);
      if (text) readout.textContent = text;
    });
  }
  const table = el("div");
  const details = el("details", {
    on: {
      toggle: () => {
        if (details.open && !table.childElementCount) {
          table.append(dataTable({
            caption: title, rows,
            columns: header.map((heading, column) => ({
              title: heading, number: rows.some((row) => typeof row[column] === "number"),
              cell: (row) => (typeof row[column] === "number" ? formatMeasure(row[column]) : row[column] ?? "–"),
            })),
          }));
        }
      },
    },
  }, el("summary", {}, "The same as a table"), table);
  return el("div", {}, el("h2", { class: "chart-title" }, title), scrollBox(title, canvas), readout,
    downloadButtons(file, makePicture, () => [header, rows]), details);
}

// Bars and points.
function marksElement(panel, file, colorOf, signal) {
  const rows = panel.series.flatMap((one) => one.x.map((x, index) => [
    one.label, x, one.y[index], one.low?.[index] ?? null, one.high?.[index] ?? null, one.names?.[index] ?? null,
  ]));
  const header = ["series", panel.x_label || "x", panel.y_label || "y", "low", "high", "name"];
  return pictureElement({
    title: panel.title, file, header, rows, signal, makePicture: () => marksPicture(panel, colorOf),
  });
}

function marksPicture(panel, colorOf) {
  const [left, top, right, bottom, plot] = [64, 14, 16, 54, 260];
  const height = top + plot + bottom + 18 * panel.series.length;
  const picture = new Picture(WIDE, height, themeColor("surface"), panel.title);
  const [text, quiet, rule] = ["text", "quiet", "line"].map(themeColor);
  const words = [...new Set(panel.series.flatMap((one) => one.x).filter((x) => typeof x === "string"))];
  const place = (x) => (typeof x === "string" ? words.indexOf(x) : x);
  const xs = panel.series.flatMap((one) => one.x.map(place));
  const ys = panel.series.flatMap((one) => [...one.y, ...(one.low ?? []), ...(one.high ?? [])]).filter((y) => y !== null);
  if (!ys.length) return picture;
  const bars = panel.series.filter((one) => one.kind === "bars");
  const margin = bars.length || words.length ? 0.5 : 0;
  const [x0, x1] = [Math.min(...xs) - margin, Math.max(...xs) + margin];
  const [y0, y1] = [panel.y_range[0] ?? Math.min(bars.length ? 0 : Infinity, ...ys), panel.y_range[1] ?? Math.max(...ys)];
  const px = (x) => left + ((x - x0) / (x1 - x0 || 1)) * (WIDE - left - right);
  const py = (y) => top + (1 - (Math.min(y1, Math.max(y0, y)) - y0) / (y1 - y0 || 1)) * plot;
  for (let step = 0; step <= 4; step += 1) {
    const y = y0 + ((y1 - y0) * step) / 4;
    picture.line([[left, py(y)], [WIDE - right, py(y)]], { stroke: rule, lineWidth: 1 });
    picture.text(left - 6, py(y) + 4, formatMeasure(y, 3), { size: 11, fill: quiet, align: "right" });
  }
  const marks = words.length ? words.map((word, index) => [index, word]) : [...new Set(xs)].sort((a, b) => a - b).slice(0, 24).map((x) => [x, formatMeasure(x, 3)]);
  const room = (WIDE - left - right) / Math.max(1, marks.length) - 4;
  for (const [x, label] of marks) picture.text(px(x), top + plot + 16, label, { size: 11, fill: quiet, align: "center", maxWidth: Math.max(18, room) });
  picture.text((left + WIDE - right) / 2, top + plot + 36, panel.x_label, { size: 12, fill: quiet, align: "center" });
  picture.text(14, top + plot / 2, panel.y_label, { size: 12, fill: quiet, align: "center", angle: -90 });
  const step = Math.min(...[...new Set(xs)].sort((a, b) => a - b).map((x, index, all) => (index ? x - all[index - 1] : 1)));
  panel.series.forEach((one, number) => {
    const fill = colorOf(one.label)();
    const width = (0.8 * step) / Math.max(1, bars.length);
    const shift = one.kind === "bars" ? width * (bars.indexOf(one) - (bars.length - 1) / 2) : 0;
    const points = one.x.map((x, index) => [place(x) + shift, one.y[index], one.low?.[index] ?? null, one.high?.[index] ?? null]);
    if (one.kind === "line") picture.line(points.filter((p) => p[1] !== null).map((p) => [px(p[0]), py(p[1])]), { stroke: fill, lineWidth: 2, dash: DASH[one.dash] });
    for (const [x, y, low, high] of points) {
      if (y === null) continue;
      if (one.kind === "bars") {
        const [a, b] = [px(x - width / 2), px(x + width / 2)];
        const base = Math.min(y1, Math.max(y0, 0));
        picture.rect(a, Math.min(py(y), py(base)), b - a, Math.abs(py(base) - py(y)), { fill });
      } else picture.circle(px(x), py(y), 3.5, { fill });
      if (low !== null && high !== null) picture.line([[px(x), py(low)], [px(x), py(high)]], { stroke: text, lineWidth: 1 });
    }
    picture.rect(left, top + plot + bottom + 18 * number - 8, 14, 8, { fill });
    picture.text(left + 22, top + plot + bottom + 18 * number, one.label, { size: 12, fill: text, maxWidth: 600 });
  });
  if (panel.reference !== null && panel.reference !== undefined) {
    picture.line([[left, py(panel.reference)], [WIDE - right, py(panel.reference)]], { stroke: quiet, dash: [3, 3] });
    picture.text(WIDE - right, py(panel.reference) - 4, panel.reference_label, { size: 11, fill: quiet, align: "right" });
  }
  return picture;
}

function heatElement(panel, file, signal) {
  const cell = panel.texts ? { width: 66, height: 24 } : { width: Math.max(14, Math.min(40, 640 / panel.x_names.length)), height: 20 };
  const [left, foot] = [Math.min(220, 20 + 7 * Math.max(5, ...panel.y_names.map((name) => name.length))), 96];
  const known = panel.values.flat().filter((value) => value !== null);
  const most = Math.max(1e-12, ...known.map(Math.abs));
  const low = panel.color_range[0] ?? (panel.diverging ? -most : Math.min(...known, 0));
  const high = panel.color_range[1] ?? (panel.diverging ? most : Math.max(...known, low + 1e-12));
  const color = (value) => (panel.diverging ? differenceColor(value / most) : cellColor((value - low) / (high - low || 1)));
  const count = panel.y_names.length;
  const rowAt = (number) => count - 1 - number;
  const makePicture = () => {
    const [width, height] = [Math.max(WIDE / 2, left + cell.width * panel.x_names.length + 10), 8 + cell.height * count + foot];
    const picture = new Picture(width, height, themeColor("surface"), panel.title);
    const [text, quiet] = [themeColor("text"), themeColor("quiet")];
    for (let line = 0; line < count; line += 1) {
      const row = rowAt(line);
      const y = 8 + line * cell.height;
      picture.text(left - 8, y + cell.height * 0.7, panel.y_names[row], { size: 11, fill: quiet, align: "right", maxWidth: left - 14 });
      panel.values[row].forEach((value, column) => {
        const x = left + column * cell.width;
        const fill = value === null ? null : color(value);
        picture.rect(x, y, cell.width - 1, cell.height - 1, { fill: fill ?? themeColor("surface") });
        if (panel.texts) picture.text(x + 4, y + 16, panel.texts[row][column], { size: 11, maxWidth: cell.width - 8, fill: fill ? textOn(fill) : quiet });
      });
    }
    const under = 8 + count * cell.height;
    const every = Math.ceil(panel.x_names.length / Math.max(1, Math.floor((cell.width * panel.x_names.length) / (panel.texts ? 60 : 34))));
    panel.x_names.forEach((name, column) => {
      if (column % every === 0) picture.text(left + column * cell.width, under + 16, name, { size: 11, fill: quiet, maxWidth: cell.width * every - 4 });
    });
    picture.text(left, under + 36, panel.x_label, { size: 12, fill: quiet });
    for (let step = 0; step < 60; step += 1) picture.rect(left + step * 2, under + 50, 2.2, 10, { fill: color(low + ((high - low) * step) / 59) });
    picture.text(left + 128, under + 59, panel.color_label, { size: 12, fill: text, maxWidth: width - left - 136 });
    picture.text(left, under + 76, formatMeasure(low, 3), { size: 11, fill: quiet });
    picture.text(left + 120, under + 76, formatMeasure(high, 3), { size: 11, fill: quiet, align: "right" });
    return picture;
  };
  const describe = (x, y) => {
    const column = Math.floor((x - left) / cell.width);
    const row = rowAt(Math.floor((y - 8) / cell.height));
    if (!(row in panel.values) || !(column in panel.values[row])) return "";
    const more = panel.hovers?.[row][column] ?? panel.texts?.[row][column] ?? "";
    return `${panel.y_label} ${panel.y_names[row]}, ${panel.x_label} ${panel.x_names[column]}: ${formatMeasure(panel.values[row][column])} ${more.replaceAll("\n", " · ")}`;
  };
  const rows = panel.y_names.flatMap((name, row) => panel.x_names.map((column, index) => [
    name, column, panel.values[row][index], panel.texts?.[row][index] ?? null,
  ]));
  return pictureElement({
    title: panel.title, file, makePicture, describe, signal, rows,
    header: [panel.y_label || "row", panel.x_label || "column", panel.color_label, "text"],
  });
}
