// Line charts with interval bands: uPlot on the page, the same lines as a Picture for downloads.

import uPlot from "./vendor/uPlot.esm.js";
import { dataTable, el, measure as formatMeasure, replace } from "./elements.js";
import { Picture, downloadButtons } from "./picture.js";
import { themeColor } from "./theme.js";

const HEIGHT = 300;

// Series: {name, color, dash, points: [{x, y, low, high}]}; `color` is a function, for both themes.
// Returns {element, destroy()}.
export function lineChart({ title, name, xLabel, yLabel, series: wanted, signal }) {
  const isDrawn = (line) => line.points.some((point) => point.y !== null);
  const series = wanted.filter(isDrawn);
  const absent = wanted.filter((line) => !isDrawn(line)).map((line) => line.name);
  const xs = [...new Set(series.flatMap((line) => line.points.map((point) => point.x)))].sort((a, b) => a - b);
  const at = (line, key) => xs.map((x) => line.points.find((point) => point.x === x)?.[key] ?? null);
  const hasBand = (line) => line.points.some((point) => point.low !== null && point.low !== undefined);
  const columns = [xs];
  const lines = [];
  series.forEach((line) => {
    lines.push({ line, key: "y", index: columns.push(at(line, "y")) - 1 });
    if (hasBand(line)) {
      lines.push({ line, key: "high", index: columns.push(at(line, "high")) - 1 });
      lines.push({ line, key: "low", index: columns.push(at(line, "low")) - 1 });
    }
  });
  const host = el("div", {
    class: "chart", tabindex: "0", role: "application",
    "aria-label": `${title}. ${series.length} lines; the arrow keys move along ${xLabel}. The same numbers are in the table below.`,
  });
  const readout = el("output", { class: "readout", "aria-live": "polite" }, "Point at the chart, or use the arrow keys.");
  const legend = el("ul", { class: "legend" });
  let plot = null;

  function describe(index) {
    const values = series.map((line) => {
      const point = line.points.find((candidate) => candidate.x === xs[index]);
      if (!point || point.y === null) return null;
      const interval = point.low === null || point.low === undefined ? "" : ` [${formatMeasure(point.low, 3)}, ${formatMeasure(point.high, 3)}]`;
      return `${line.name} ${formatMeasure(point.y, 3)}${interval}`;
    }).filter(Boolean);
    return `${xLabel} ${xs[index]}: ${values.join(" · ")}`;
  }

  function build() {
    plot?.destroy();
    const axis = { stroke: themeColor("quiet"), grid: { stroke: themeColor("line"), width: 1 }, ticks: { stroke: themeColor("line"), width: 1 } };
    const width = Math.max(260, host.clientWidth || 600);
    plot = new uPlot({
      width, height: HEIGHT, legend: { show: false },
      cursor: { drag: { x: false, y: false }, points: { size: 7 } },
      scales: { x: { time: false, range: (u, low, high) => (low === high ? [low - 1, high + 1] : [low - (high - low) * 0.03, high + (high - low) * 0.03]) } },
      axes: [
        { ...axis, label: xLabel, labelSize: 22, size: 34, incrs: [1, 2, 5, 10, 20, 50, 100] },
        { ...axis, label: yLabel, labelSize: 22, size: 52 },
      ],
      series: [{}, ...lines.map(({ line, key }) => key === "y"
        ? { stroke: line.color(), width: 2, dash: line.dash, points: { show: xs.length < 40, size: 6, fill: line.color(), stroke: line.color() }, spanGaps: true }
        : { stroke: "transparent", width: 0, points: { show: false }, spanGaps: true })],
      bands: lines.filter(({ key }) => key === "high").map(({ line, index }) => ({ series: [index, index + 1], fill: `${line.color()}33` })),
      hooks: { setCursor: [(u) => { if (u.cursor.idx !== null && u.cursor.idx !== undefined && xs.length) readout.textContent = describe(u.cursor.idx); }] },
    }, columns, host);
    replace(legend, series.map((line) => el("li", {}, swatch(line), line.name)));
  }

  host.addEventListener("keydown", (event) => {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    event.preventDefault();
    const step = event.key === "ArrowRight" ? 1 : -1;
    const index = Math.min(xs.length - 1, Math.max(0, (plot.cursor.idx ?? (step > 0 ? -1 : xs.length)) + step));
    plot.setCursor({ left: plot.valToPos(xs[index], "x"), top: 20 });
    readout.textContent = describe(index);
  });
  const observer = new ResizeObserver(() => {
    const width = host.clientWidth;
    if (plot && width && Math.abs(width - plot.width) > 4) plot.setSize({ width, height: HEIGHT });
    else if (!plot) build();
  });
  observer.observe(host);
  window.addEventListener("themechange", build, { signal });
  const destroy = () => {
    observer.disconnect();
    plot?.destroy();
    plot = null;
  };
  signal?.addEventListener("abort", destroy);

  const rows = series.flatMap((line) => line.points.map((point) => ({ line, ...point })));
  const header = ["line", xLabel, yLabel, "low", "high"];
  const table = dataTable({
    caption: title,
    columns: header.map((heading, column) => ({
      title: heading, number: column > 0,
      cell: (row) => [row.line.name, String(row.x), formatMeasure(row.y), formatMeasure(row.low), formatMeasure(row.high)][column],
    })),
    rows,
  });
  return {
    element: el("div", {}, el("h2", { class: "chart-title" }, title), legend,
      absent.length ? el("p", { class: "quiet small" }, `Not drawn, as it is infinite or undefined there: ${absent.join(", ")}`) : null, host, readout,
      downloadButtons(name, () => chartPicture({ title, xLabel, yLabel, series }), () => [header, rows.map((row) => [row.line.name, row.x, row.y, row.low, row.high])]),
      el("details", {}, el("summary", {}, "The same as a table"), table)),
    destroy,
  };
}

// A piece of the line, as in the chart.
function swatch(line) {
  const canvas = el("canvas", { width: 28, height: 12, "aria-hidden": "true" });
  const context = canvas.getContext("2d");
  context.strokeStyle = line.color();
  context.lineWidth = 2.5;
  context.setLineDash(line.dash ?? []);
  context.beginPath();
  context.moveTo(0, 6);
  context.lineTo(28, 6);
  context.stroke();
  return canvas;
}

function ticks(low, high, wanted = 5) {
  const raw = (high - low) / wanted || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= raw);
  const values = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-9; value += step) values.push(value);
  return values;
}

export function chartPicture({ title, xLabel, yLabel, series }) {
  const [left, top, right, bottom] = [64, 34, 16, 46];
  const [width, height] = [720, 400 + 18 * Math.ceil(series.length / 2)];
  const plotHeight = 400 - top - bottom;
  const picture = new Picture(width, height, themeColor("surface"), title);
  const [text, quiet, lineColor] = [themeColor("text"), themeColor("quiet"), themeColor("line")];
  const points = series.flatMap((line) => line.points).filter((point) => point.y !== null);
  if (!points.length) return picture;
  const numbers = points.flatMap((point) => [point.y, point.low, point.high]).filter((value) => value !== null && value !== undefined);
  const [x0, x1] = [Math.min(...points.map((p) => p.x)), Math.max(...points.map((p) => p.x))];
  const [y0, y1] = [Math.min(0, ...numbers), Math.max(...numbers) * 1.04 || 1];
  const px = (x) => left + ((x - x0) / (x1 - x0 || 1)) * (width - left - right);
  const py = (y) => top + (1 - (y - y0) / (y1 - y0 || 1)) * plotHeight;
  picture.text(left, 20, title, { size: 14, weight: 600, fill: text, maxWidth: width - left - right });
  for (const y of ticks(y0, y1)) {
    picture.line([[left, py(y)], [width - right, py(y)]], { stroke: lineColor, lineWidth: 1 });
    picture.text(left - 6, py(y) + 4, formatMeasure(y, 3), { size: 11, fill: quiet, align: "right" });
  }
  for (const x of ticks(x0, x1, 8).filter((value) => Number.isInteger(value))) {
    picture.text(px(x), top + plotHeight + 17, String(x), { size: 11, fill: quiet, align: "center" });
  }
  picture.text((left + width - right) / 2, top + plotHeight + 36, xLabel, { size: 12, fill: quiet, align: "center" });
  picture.text(16, top + plotHeight / 2, yLabel, { size: 12, fill: quiet, align: "center", angle: -90 });
  series.forEach((line, number) => {
    const shown = line.points.filter((point) => point.y !== null);
    const band = shown.filter((point) => point.low !== null && point.low !== undefined);
    picture.polygon([...band.map((p) => [px(p.x), py(p.high)]), ...band.toReversed().map((p) => [px(p.x), py(p.low)])], { fill: line.color(), opacity: 0.2 });
    picture.line(shown.map((p) => [px(p.x), py(p.y)]), { stroke: line.color(), lineWidth: 2, dash: line.dash ?? [] });
    for (const p of shown) picture.circle(px(p.x), py(p.y), 3, { fill: line.color() });
    const [lx, ly] = [left + (number % 2) * 320, 400 + 18 * Math.floor(number / 2)];
    picture.line([[lx, ly - 4], [lx + 28, ly - 4]], { stroke: line.color(), lineWidth: 2, dash: line.dash ?? [] });
    picture.text(lx + 36, ly, line.name, { size: 12, fill: text, maxWidth: 270 });
  });
  return picture;
}
