"""Frame, style sheet and scripts of HTML pages; texts are in html_page.py.

A page needs no network. It has a light and a dark form, which the reader's system chooses, and
panels that stand one below the other where the window is narrow.
"""

from html import escape

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none';
 script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:">
<title>{title}</title>
<style>{style}</style>
<script>{plotly}</script>
</head>
<body>
<main>
{body}
</main>
<script>{script}</script>
</body>
</html>
"""
STYLE = """
:root { --ink: #1c2733; --soft: #44525f; --faint: #5b6a78; --page: #fff; --panel: #f1f5f9;
  --stripe: #f8fafc; --rule: #d8dee5; --mark: #dbeafe;
  --link: #0072b2; --passage: #fde68a; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e3e9ef; --soft: #b9c4cf; --faint: #9fadba; --page: #12181f; --panel: #1d2630;
    --stripe: #171f27; --rule: #34414d; --mark: #1e3a5f;
    --link: #6fb7ef; --passage: #6b5510; }
}
body { margin: 0; color: var(--ink); background: var(--page);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 24px 28px 64px; }
h1 { font-size: 27px; line-height: 1.25; margin: 8px 0 18px; }
h2 { font-size: 20px; margin: 40px 0 6px; padding-top: 14px; border-top: 1px solid var(--rule); }
h3 { font-size: 16px; margin: 22px 0 4px; }
p { margin: 4px 0 12px; max-width: 76ch; color: var(--soft); }
code { font: 13px/1.4 ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
.facts { border-collapse: collapse; }
.facts th { text-align: left; font-weight: 500; color: var(--faint); padding: 1px 20px 1px 0;
  vertical-align: top; white-space: nowrap; }
.facts td { overflow-wrap: anywhere; }
.notes { color: var(--soft); font-size: 14px; padding-left: 20px; }
.headlines { padding: 14px 18px 14px 36px; background: var(--panel); border-radius: 6px; }
.scroll { overflow: auto; max-height: 560px; border: 1px solid var(--rule); border-radius: 6px; }
.numbers { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
.numbers th { position: sticky; top: 0; background: var(--panel); cursor: pointer;
  padding: 6px 9px; text-align: right; white-space: nowrap; }
.numbers td { padding: 3px 9px; text-align: right; white-space: nowrap; }
.numbers .name, .numbers th:first-child { text-align: left; }
.numbers tbody tr:nth-child(even) { background: var(--stripe); }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr));
  gap: 10px 22px; }
.panels[hidden], .choice-of[hidden] { display: none; }
.panel { margin: 0; min-width: 0; }
.panel figcaption { font-size: 14px; color: var(--soft); margin: 8px 0 0; }
.wide { overflow-x: auto; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; padding: 0; margin: 8px 0;
  list-style: none; font-size: 14px; }
.legend button { display: flex; align-items: center; gap: 7px; border: 0; padding: 3px 0;
  font: inherit; color: inherit; background: none; cursor: pointer; text-align: left; }
.legend button[aria-pressed="false"] { opacity: 0.4; text-decoration: line-through; }
.legend svg { flex: none; }
.choice { display: flex; flex-wrap: wrap; align-items: center; gap: 6px 10px; margin: 8px 0;
  font-size: 14px; }
.choice button, .choice select { font: inherit; color: inherit; max-width: 100%;
  background: var(--panel); border: 1px solid var(--rule); border-radius: 5px; padding: 4px 11px; }
.choice button[aria-pressed="true"] { background: var(--mark); font-weight: 600; }
.examples { border-collapse: collapse; font-size: 14px; width: 100%; }
.examples th { text-align: left; font-weight: 500; color: var(--faint); padding: 4px 14px 4px 0;
  border-bottom: 1px solid var(--rule); }
.examples td { vertical-align: top; padding: 5px 14px 5px 0; border-bottom: 1px solid var(--rule); }
.examples .text { overflow-wrap: anywhere; white-space: pre-wrap; min-width: 16em; }
.examples .text span { color: var(--faint); }
.examples .kl { text-align: right; font-variant-numeric: tabular-nums; }
.examples .says { white-space: nowrap; }
dt { font-weight: 600; margin-top: 8px; }
dd { margin: 0 0 0 20px; max-width: 76ch; color: var(--soft); }
@media (max-width: 640px) {
  main { padding: 14px 14px 48px; }
  h1 { font-size: 22px; }
  .facts th { padding-right: 12px; }
  .headlines { padding: 12px 12px 12px 28px; }
  .examples, .examples tbody, .examples tr, .examples td { display: block; border: 0; }
  .examples thead { display: none; }
  .examples tr { border-bottom: 1px solid var(--rule); padding: 8px 0; }
  .examples td { padding: 1px 0; }
  .examples .kl { text-align: left; }
  .examples td::before { content: attr(data-name) " "; color: var(--faint); }
  .examples .says { white-space: normal; }
}
"""
SCRIPT = """
const plots = () => document.querySelectorAll(".js-plotly-plot");

// Tables: a click on a heading sorts.
document.querySelectorAll(".numbers th").forEach(head => {
  const column = head.cellIndex;
  let down = false;
  head.addEventListener("click", () => {
    const body = head.closest("table").tBodies[0];
    const value = row => row.cells[column].dataset.v;
    const compare = (a, b) => {
      const x = value(a), y = value(b);
      if (x === "" || y === "") return (x === "") - (y === "");
      const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
      return down ? -order : order;
    };
    [...body.rows].sort(compare).forEach(row => body.append(row));
    down = !down;
  });
});

// Choices: a control shows one of the parts of its section.
const choose = (section, value) => {
  section.querySelectorAll("[data-part]").forEach(part => {
    part.hidden = part.dataset.part !== value;
    if (!part.hidden) part.querySelectorAll(".js-plotly-plot").forEach(plot => {
      if (plot.layout.autosize !== false) Plotly.Plots.resize(plot);
    });
  });
};
document.querySelectorAll(".choice").forEach(choice => {
  const section = choice.parentElement;
  choice.querySelectorAll("select").forEach(list =>
    list.addEventListener("change", () => choose(section, list.value)));
  const buttons = choice.querySelectorAll("button");
  buttons.forEach(button => button.addEventListener("click", () => {
    buttons.forEach(other => other.setAttribute("aria-pressed", other === button));
    choose(section, button.value);
  }));
});

// Legends: a click hides or shows a probe in all panels of the section.
const toggle = button => {
  const shown = button.getAttribute("aria-pressed") !== "true";
  button.setAttribute("aria-pressed", shown);
  button.closest(".legend").parentElement.querySelectorAll(".js-plotly-plot").forEach(plot => {
    const traces = [...plot.data.keys()].filter(n => plot.data[n].legendgroup === button.value);
    if (traces.length) Plotly.restyle(plot, {visible: shown}, traces);
  });
};
document.querySelectorAll(".legend button").forEach(button =>
  button.addEventListener("click", () => toggle(button)));

// Colours of figures follow the page. Dark colours of lines are mixed with white on a dark page.
const dark = matchMedia("(prefers-color-scheme: dark)");
const luminance = hex => [1, 3, 5].map(at => parseInt(hex.slice(at, at + 2), 16) / 255)
  .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
  .reduce((sum, c, n) => sum + c * [0.2126, 0.7152, 0.0722][n], 0);
const readable = hex => {
  if (!dark.matches || !/^#[0-9a-f]{6}$/i.test(hex)) return hex;
  let mixed = hex;
  for (let part = 0; part <= 1 && luminance(mixed) < 0.22; part += 0.1)
    mixed = "#" + [1, 3, 5].map(at => parseInt(hex.slice(at, at + 2), 16))
      .map(c => Math.round(c + (255 - c) * part).toString(16).padStart(2, "0")).join("");
  return mixed;
};
const paint = () => {
  const style = getComputedStyle(document.documentElement);
  const value = name => style.getPropertyValue(name).trim();
  const [ink, rule, page] = ["--ink", "--rule", "--page"].map(value);
  document.querySelectorAll(".legend svg").forEach(sign => {
    sign.style.color = readable(sign.dataset.color);
  });
  plots().forEach(plot => {
    const layout = {"font.color": ink, "hoverlabel.bgcolor": page, "hoverlabel.font.color": ink,
      "modebar.bgcolor": "rgba(0,0,0,0)", "modebar.color": rule, "modebar.activecolor": ink};
    Object.keys(plot.layout).filter(name => /^[xy]axis[0-9]*$/.test(name)).forEach(name => {
      for (const part of ["gridcolor", "linecolor", "zerolinecolor"])
        layout[name + "." + part] = rule;
    });
    Plotly.relayout(plot, layout);
    plot.lightColors ??= plot.data.map(trace => trace.type === "scatter" && trace.mode !== "text"
      ? [trace.line?.color, trace.marker?.color, trace.fillcolor]
      : trace.type === "bar" ? [null, trace.marker?.color, null] : []);
    plot.lightColors.forEach((colors, n) => {
      const update = {};
      ["line.color", "marker.color", "fillcolor"].forEach((name, at) => {
        if (typeof colors[at] === "string") update[name] = readable(colors[at]);
      });
      if (Object.keys(update).length) Plotly.restyle(plot, update, [n]);
    });
  });
};
dark.addEventListener("change", paint);
paint();
// A panel was drawn before the next ones took their share of the width.
plots().forEach(plot => {
  if (plot.layout.autosize !== false && plot.offsetParent) Plotly.Plots.resize(plot);
});
"""


def fill_page(title: str, body: str, plotly: str, style: str = STYLE) -> str:
    """The HTML page of a `body`; `plotly` is the library's source, `title` plain text."""
    return PAGE.format(title=escape(title), style=style, plotly=plotly, body=body, script=SCRIPT)
