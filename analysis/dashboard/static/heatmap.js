// A lens map as a picture that is read with the mouse, the keyboard or as a table.

import { dataTable, el, measure as formatMeasure, replace } from "./elements.js";
import { MONO, Picture, downloadButtons, showPicture } from "./picture.js";
import { cellColor, differenceColor, textOn, themeColor } from "./theme.js";

const LEFT = 62;
const CELL = { width: 66, height: 24 };
const HEAD = 74;
const FOOT = 44;

export const MEASURES = [
  ["probability", "probability"],
  ["rank", "rank"],
  ["kl", "KL to the model (nats)"],
  ["entropy", "entropy (nats)"],
];

// The measure as a share from 0 to 1 for its colour, with the ends for the legend.
function scaleOf(map, measure) {
  const values = map.values[measure].flat().filter((value) => value !== null);
  if (map.isDifference) {
    const most = Math.max(1e-9, ...values.map(Math.abs));
    return { share: (value) => value / most, low: -most, high: most };
  }
  if (measure === "probability") return { share: (value) => value, low: 0, high: 1 };
  if (measure === "rank") {
    // By orders of magnitude: rank 1 is the darkest.
    const most = Math.max(10, map.vocab ?? 10, ...values);
    return { share: (value) => 1 - Math.log(value) / Math.log(most), low: most, high: 1 };
  }
  const most = Math.max(1e-9, ...values);
  return { share: (value) => value / most, low: 0, high: most };
}

function cellText(map, measure, row, column) {
  const value = map.values[measure][row][column];
  if (map.isDifference) return formatMeasure(value, 2);
  if (!map.tracked) return map.top[row][column][0];
  if (value === null) return "–";
  return measure === "probability" ? `${(100 * value).toPrecision(2)} %` : formatMeasure(value, 3);
}

// The whole picture: title, tokens, the model's own tokens, cells and legend.
export function heatmapPicture(map, measure, title) {
  const [columns, rows] = [map.tokens.length, map.layers.length];
  const width = Math.max(LEFT + columns * CELL.width + 10, 330);
  const picture = new Picture(width, HEAD + rows * CELL.height + FOOT, themeColor("surface"), title);
  const [text, quiet] = [themeColor("text"), themeColor("quiet")];
  const scale = scaleOf(map, measure);
  const color = map.isDifference ? differenceColor : cellColor;
  picture.text(LEFT, 18, title, { size: 13, fill: text, weight: 600, maxWidth: width - LEFT - 8 });
  picture.text(LEFT - 8, 42, "token", { size: 12, fill: quiet, align: "right" });
  picture.text(LEFT - 8, 64, map.offset ? `model +${map.offset}` : "model", { size: 12, fill: quiet, align: "right" });
  const label = { size: 11.5, font: MONO, maxWidth: CELL.width - 6 };
  for (let column = 0; column < columns; column += 1) {
    const x = LEFT + column * CELL.width;
    picture.text(x + 3, 42, map.tokens[column], { ...label, fill: text, weight: 600 });
    picture.text(x + 3, 64, map.targets[column], { ...label, fill: quiet });
  }
  for (let row = 0; row < rows; row += 1) {
    const y = HEAD + (rows - 1 - row) * CELL.height;
    picture.text(LEFT - 8, y + 16, `layer ${map.layers[row]}`, { size: 12, fill: quiet, align: "right" });
    for (let column = 0; column < columns; column += 1) {
      const x = LEFT + column * CELL.width;
      const value = map.values[measure][row][column];
      const fill = value === null ? null : color(scale.share(value));
      picture.rect(x, y, CELL.width - 1, CELL.height - 1, { fill: fill ?? themeColor("surface") });
      if (map.agrees[row][column]) {
        picture.rect(x + 1.5, y + 1.5, CELL.width - 4, CELL.height - 4, { stroke: fill ? textOn(fill) : text, lineWidth: 1 });
      }
      picture.text(x + 5, y + 16, cellText(map, measure, row, column), {
        ...label, maxWidth: CELL.width - 10, fill: fill ? textOn(fill) : quiet,
      });
    }
  }
  // The legend: the scale and what the outline means.
  const y = HEAD + rows * CELL.height + 14;
  for (let step = 0; step < 60; step += 1) {
    const share = map.isDifference ? step / 29.5 - 1 : step / 59;
    picture.rect(LEFT + step * 2, y, 2.2, 12, { fill: color(share) });
  }
  const name = MEASURES.find(([key]) => key === measure)[1];
  picture.text(LEFT, y + 25, formatMeasure(scale.low, 3), { size: 11, fill: quiet });
  picture.text(LEFT + 120, y + 25, formatMeasure(scale.high, 3), { size: 11, fill: quiet, align: "right" });
  picture.text(LEFT + 128, y + 10, map.tracked ? `${name} of ${map.tracked}` : name, { size: 12, fill: text, maxWidth: width - LEFT - 136 });
  picture.text(LEFT + 128, y + 25, map.isDifference ? "outlined: both say the same" : "outlined: the model's token", { size: 11, fill: quiet, maxWidth: width - LEFT - 136 });
  return picture;
}

export function heatmapCsv(map) {
  const rows = [];
  map.layers.forEach((layer, row) => map.tokens.forEach((token, column) => {
    rows.push([map.lens, map.offset, layer, (map.first ?? 0) + column, token, map.targets[column],
      map.top[row][column][0], map.agrees[row][column],
      ...MEASURES.map(([name]) => map.values[name][row][column])]);
  }));
  return [["lens", "offset", "layer", "index", "token", "target", "top", "agrees", ...MEASURES.map(([name]) => name)], rows];
}

// Shows `map` in a card; `onOpen(layer, index)` is called for a click or Enter on a cell.
// Returns {element, show(measure), select(layer, index), redraw()}.
export function heatmapCard(map, title, name, onOpen) {
  let measure = "probability";
  let picture = null;
  let cell = null;
  const layers = el("canvas", { class: "map-layers", "aria-hidden": "true" });
  const cells = el("canvas", { class: "map-cells", "aria-hidden": "true" });
  const readout = el("output", { class: "readout", "aria-live": "polite" }, "Point at a cell, or use the arrow keys and Enter.");
  const box = el("div", {
    class: "map", tabindex: "0", role: "application",
    "aria-label": `${title}. ${map.layers.length} layers by ${map.tokens.length} tokens. Arrow keys move, Enter opens a cell. The same numbers are in the table below.`,
  }, layers, cells);
  const tableBox = el("div");
  const details = el("details", { on: { toggle: () => details.open && fillTable() } },
    el("summary", {}, "The same as a table"), tableBox);

  function fillTable() {
    const shown = [...map.layers.keys()].reverse();
    replace(tableBox, dataTable({
      caption: `${title}: ${MEASURES.find(([key]) => key === measure)[1]}; a row per layer, a column per token`,
      columns: [
        { title: "layer", cell: (row) => String(map.layers[row]) },
        ...map.tokens.map((token, column) => ({
          title: token,
          cell: (row) => map.isDifference
            ? formatMeasure(map.values[measure][row][column], 3)
            : `${map.top[row][column][0]} (${formatMeasure(map.values[measure][row][column], 3)})`,
        })),
      ],
      rows: shown,
    }));
  }

  function redraw() {
    picture = heatmapPicture(map, measure, title);
    showPicture(layers, picture, { width: LEFT });
    paintCells();
    if (details.open) fillTable();
  }

  function paintCells() {
    showPicture(cells, picture, { shiftX: LEFT });
    if (cell) markCell();
  }

  function markCell() {
    const context = cells.getContext("2d");
    const y = HEAD + (map.layers.length - 1 - cell.row) * CELL.height;
    // Orange between black lines: seen on every colour of a cell.
    for (const [color, width] of [["#000000", 5], ["#ff9d00", 3]]) {
      context.strokeStyle = color;
      context.lineWidth = width;
      context.strokeRect(cell.column * CELL.width + 0.5, y + 0.5, CELL.width - 2, CELL.height - 2);
    }
  }

  function describe({ row, column }) {
    const top = map.top[row][column].slice(0, 3).join(" · ");
    const values = MEASURES.map(([key]) => `${key} ${formatMeasure(map.values[key][row][column], 3)}`).join(", ");
    return `layer ${map.layers[row]}, token ${(map.first ?? 0) + column} ${map.tokens[column]}: ${top} — ${values}`;
  }

  function moveTo(next, scroll = true) {
    cell = {
      row: Math.min(map.layers.length - 1, Math.max(0, next.row)),
      column: Math.min(map.tokens.length - 1, Math.max(0, next.column)),
    };
    readout.textContent = describe(cell);
    paintCells();
    const x = cell.column * CELL.width;
    if (scroll && (x < box.scrollLeft || x + CELL.width + LEFT > box.scrollLeft + box.clientWidth)) {
      box.scrollLeft = Math.max(0, x - box.clientWidth / 2);
    }
  }

  function cellAt(event) {
    const area = cells.getBoundingClientRect();
    const column = Math.floor((event.clientX - area.left) / CELL.width);
    const row = map.layers.length - 1 - Math.floor((event.clientY - area.top - HEAD) / CELL.height);
    const inside = row >= 0 && row < map.layers.length && column >= 0 && column < map.tokens.length;
    return inside ? { row, column } : null;
  }

  const open = () => onOpen?.(map.layers[cell.row], (map.first ?? 0) + cell.column);
  cells.addEventListener("mousemove", (event) => {
    const at = cellAt(event);
    if (at) readout.textContent = describe(at);
  });
  cells.addEventListener("click", (event) => {
    const at = cellAt(event);
    if (!at) return;
    moveTo(at, false);
    open();
  });
  box.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [1, 0], ArrowDown: [-1, 0] };
    const at = cell ?? { row: map.layers.length - 1, column: 0 };
    if (event.key in steps) {
      const [row, column] = steps[event.key];
      moveTo(cell ? { row: at.row + row, column: at.column + column } : at);
    } else if (event.key === "Home") moveTo({ ...at, column: 0 });
    else if (event.key === "End") moveTo({ ...at, column: map.tokens.length - 1 });
    else if (event.key === "Enter" && cell) open();
    else return;
    event.preventDefault();
  });
  redraw();
  return {
    element: el("div", {}, box, readout, downloadButtons(name, () => picture, () => heatmapCsv(map)), details),
    show(next) {
      measure = next;
      redraw();
    },
    select(layer, index) {
      const row = map.layers.indexOf(layer);
      const column = index - (map.first ?? 0);
      if (row >= 0 && column >= 0 && column < map.tokens.length) moveTo({ row, column });
    },
    redraw,
  };
}

// The map of `a` less that of `b`, at the layers that both have; null with a reason where the
// tokens differ.
export function differenceMap(a, b) {
  if (a.offset !== b.offset || a.tokens.join("\u0000") !== b.tokens.join("\u0000")) {
    return [null, "The two maps read different tokens or offsets: there is no difference to show."];
  }
  const layers = a.layers.filter((layer) => b.layers.includes(layer));
  if (!layers.length) return [null, "The two lenses have no layer in common."];
  const rowsA = layers.map((layer) => a.layers.indexOf(layer));
  const rowsB = layers.map((layer) => b.layers.indexOf(layer));
  const values = {};
  for (const [name] of MEASURES) {
    values[name] = rowsA.map((i, row) => a.values[name][i].map((value, column) => {
      const other = b.values[name][rowsB[row]][column];
      return value === null || other === null ? null : value - other;
    }));
  }
  const top = rowsA.map((i, row) => a.top[i].map((labels, column) => [labels[0], b.top[rowsB[row]][column][0]]));
  return [{
    ...a, lens: `${a.lens} - ${b.lens}`, layers, values, top, isDifference: true,
    agrees: top.map((row) => row.map(([one, other]) => one === other)),
  }, null];
}
