// Pictures as lists of shapes, drawn on a canvas or written as SVG; downloads of pictures and CSV.

import { el } from "./elements.js";

export const SANS = "system-ui, sans-serif";
export const MONO = 'ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace';

const measuring = document.createElement("canvas").getContext("2d");

export class Picture {
  constructor(width, height, background, title = "") {
    this.width = width;
    this.height = height;
    this.background = background;
    this.title = title;
    this.shapes = [];
  }

  rect(x, y, width, height, { fill = null, stroke = null, lineWidth = 1 } = {}) {
    this.shapes.push({ kind: "rect", x, y, width, height, fill, stroke, lineWidth });
  }

  // Text that is cut to `maxWidth` with an ellipsis.
  text(x, y, text, options = {}) {
    const { size = 12, fill = "#000", align = "left", font = SANS, weight = 400, maxWidth = null, angle = 0 } = options;
    const shown = maxWidth === null ? String(text) : fitText(String(text), maxWidth, size, font, weight);
    this.shapes.push({ kind: "text", x, y, text: shown, size, fill, align, font, weight, angle });
  }

  line(points, { stroke, lineWidth = 1.5, dash = [] }) {
    if (points.length > 1) this.shapes.push({ kind: "line", points, stroke, lineWidth, dash });
  }

  polygon(points, { fill, opacity = 1 }) {
    if (points.length > 2) this.shapes.push({ kind: "polygon", points, fill, opacity });
  }

  circle(x, y, radius, { fill }) {
    this.shapes.push({ kind: "circle", x, y, radius, fill });
  }

  draw(context, shiftX = 0) {
    context.save();
    context.translate(-shiftX, 0);
    context.fillStyle = this.background;
    context.fillRect(0, 0, this.width, this.height);
    for (const shape of this.shapes) drawShape(context, shape);
    context.restore();
  }

  toSvg() {
    const body = this.shapes.map(svgShape).join("\n");
    return `<?xml version="1.0" encoding="UTF-8"?>
<svg xmlns="http://www.w3.org/2000/svg" width="${this.width}" height="${this.height}" viewBox="0 0 ${this.width} ${this.height}">
<title>${escapeXml(this.title)}</title>
<rect width="${this.width}" height="${this.height}" fill="${this.background}"/>
${body}
</svg>
`;
  }

  toPng(scale = 2) {
    const canvas = document.createElement("canvas");
    // Canvases end at some 16,000 pixels a side.
    const factor = Math.min(scale, 16000 / Math.max(this.width, this.height));
    canvas.width = Math.round(this.width * factor);
    canvas.height = Math.round(this.height * factor);
    const context = canvas.getContext("2d");
    context.scale(factor, factor);
    this.draw(context);
    return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  }
}

// Draws a picture, or the part of it from x = `shiftX` on, on a canvas at the screen's density.
export function showPicture(canvas, picture, { shiftX = 0, width = picture.width - shiftX } = {}) {
  // Canvases end at some 16,000 pixels a side.
  const density = Math.min(window.devicePixelRatio || 1, 16000 / Math.max(width, picture.height));
  canvas.width = Math.round(width * density);
  canvas.height = Math.round(picture.height * density);
  canvas.style.width = `${width}px`;
  canvas.style.height = `${picture.height}px`;
  const context = canvas.getContext("2d");
  context.scale(density, density);
  picture.draw(context, shiftX);
}

export function fitText(text, maxWidth, size, font = SANS, weight = 400) {
  measuring.font = `${weight} ${size}px ${font}`;
  if (measuring.measureText(text).width <= maxWidth) return text;
  const letters = [...text.slice(0, 200)];
  let low = 0;
  let high = letters.length;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    const width = measuring.measureText(`${letters.slice(0, middle).join("")}…`).width;
    if (width <= maxWidth) low = middle;
    else high = middle - 1;
  }
  return `${letters.slice(0, low).join("")}…`;
}

function drawShape(context, shape) {
  if (shape.kind === "rect") {
    if (shape.fill) {
      context.fillStyle = shape.fill;
      context.fillRect(shape.x, shape.y, shape.width, shape.height);
    }
    if (shape.stroke) {
      context.strokeStyle = shape.stroke;
      context.lineWidth = shape.lineWidth;
      context.strokeRect(shape.x, shape.y, shape.width, shape.height);
    }
  } else if (shape.kind === "text") {
    context.save();
    context.translate(shape.x, shape.y);
    context.rotate((shape.angle * Math.PI) / 180);
    context.font = `${shape.weight} ${shape.size}px ${shape.font}`;
    context.textAlign = shape.align;
    context.textBaseline = "alphabetic";
    context.fillStyle = shape.fill;
    context.fillText(shape.text, 0, 0);
    context.restore();
  } else if (shape.kind === "circle") {
    context.fillStyle = shape.fill;
    context.beginPath();
    context.arc(shape.x, shape.y, shape.radius, 0, 2 * Math.PI);
    context.fill();
  } else {
    context.beginPath();
    shape.points.forEach(([x, y], index) => (index ? context.lineTo(x, y) : context.moveTo(x, y)));
    if (shape.kind === "line") {
      context.strokeStyle = shape.stroke;
      context.lineWidth = shape.lineWidth;
      context.setLineDash(shape.dash);
      context.stroke();
      context.setLineDash([]);
    } else {
      context.globalAlpha = shape.opacity;
      context.fillStyle = shape.fill;
      context.fill();
      context.globalAlpha = 1;
    }
  }
}

function svgShape(shape) {
  const round = (x) => Number(x.toFixed(2));
  if (shape.kind === "rect") {
    const stroke = shape.stroke ? ` stroke="${shape.stroke}" stroke-width="${shape.lineWidth}"` : "";
    return `<rect x="${round(shape.x)}" y="${round(shape.y)}" width="${round(shape.width)}" height="${round(shape.height)}" fill="${shape.fill ?? "none"}"${stroke}/>`;
  }
  if (shape.kind === "text") {
    const anchor = { left: "start", center: "middle", right: "end" }[shape.align];
    const turn = shape.angle ? ` transform="rotate(${shape.angle} ${round(shape.x)} ${round(shape.y)})"` : "";
    return `<text x="${round(shape.x)}" y="${round(shape.y)}" font-family="${escapeXml(shape.font)}" font-size="${shape.size}" font-weight="${shape.weight}" fill="${shape.fill}" text-anchor="${anchor}"${turn} xml:space="preserve">${escapeXml(shape.text)}</text>`;
  }
  if (shape.kind === "circle") {
    return `<circle cx="${round(shape.x)}" cy="${round(shape.y)}" r="${shape.radius}" fill="${shape.fill}"/>`;
  }
  const points = shape.points.map(([x, y]) => `${round(x)},${round(y)}`).join(" ");
  if (shape.kind === "line") {
    const dash = shape.dash.length ? ` stroke-dasharray="${shape.dash.join(" ")}"` : "";
    return `<polyline points="${points}" fill="none" stroke="${shape.stroke}" stroke-width="${shape.lineWidth}"${dash}/>`;
  }
  return `<polygon points="${points}" fill="${shape.fill}" fill-opacity="${shape.opacity}"/>`;
}

function escapeXml(text) {
  return String(text)
    // Letters that XML 1.0 lacks.
    .replace(/[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\u{10000}-\u{10ffff}]/gu, "\ufffd")
    .replace(/[&<>"]/g, (letter) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[letter]);
}

// Downloads

export function csv(header, rows) {
  const cell = (value) => {
    const text = value === null || value === undefined ? "" : String(value);
    return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return [header, ...rows].map((row) => row.map(cell).join(",")).join("\r\n") + "\r\n";
}

function saveFile(name, blob) {
  const link = el("a", { href: URL.createObjectURL(blob), download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

// Buttons for SVG, PNG and CSV. `picture` and `table` are functions, so that the newest is saved.
export function downloadButtons(name, picture, table) {
  const what = name.replaceAll("-", " ");
  const save = (kind, blob) => saveFile(`${name}.${kind}`, blob);
  const button = (kind, make) => el("button", {
    type: "button", "aria-label": `Download ${what} as ${kind.toUpperCase()}`,
    on: { click: async () => save(kind, await make()) },
  }, kind.toUpperCase());
  return el("div", { class: "actions" },
    el("span", { class: "quiet small" }, "Download"),
    picture ? button("svg", () => new Blob([picture().toSvg()], { type: "image/svg+xml" })) : null,
    picture ? button("png", () => picture().toPng()) : null,
    table ? button("csv", () => new Blob([csv(...table())], { type: "text/csv" })) : null);
}
