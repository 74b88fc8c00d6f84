// Curves of evaluations: KL, precision@k and others by layer or offset, several probes at once.

import { getJson, part } from "./api.js";
import { lineChart } from "./chart.js";
import { count, el, errorBox, field, loading, moment, replace, select, setOptions, shortId } from "./elements.js";
import { addressOf, numberOf, rememberState } from "./location.js";
import { DASHES, probeColor } from "./theme.js";

const MEASURES = [
  ["kl", "KL(model || probe), nats"], ["kl_reverse", "KL(probe || model), nats"],
  ["precision_at_1", "precision@1"], ["precision_at_5", "precision@5"], ["precision_at_10", "precision@10"],
  ["nll", "nll of the model's token, nats"], ["surprisal", "surprisal of the probe's token, nats"],
  ["nll_text", "nll of the text's token, nats"], ["precision_at_1_text", "precision@1 of the text"],
];

export async function showCurves({ body, parameters, signal }) {
  const [{ evaluations }, { caches }] = await Promise.all([getJson("/v1/evaluations", {}, signal), getJson("/v1/caches", {}, signal)]);
  const modelOf = (one) => caches.find((cache) => cache.cache === one.cache)?.model ?? shortId(one.cache);
  if (!evaluations.length) {
    replace(body, el("p", {}, "No evaluation has run here yet. ", el("a", { href: addressOf("jobs/new", { command: "evaluate" }) }, "Evaluate probes")));
    return;
  }
  const ids = evaluations.map((one) => one.job);
  const find = (name) => evaluations.find((one) => one.job.startsWith(parameters.get(name) || "-"))?.job;
  const state = {
    evaluation: find("evaluation") ?? ids[0], beside: find("beside") ?? "",
    measure: parameters.get("measure") ?? "kl", x: parameters.get("x") ?? "layer",
    offset: numberOf(parameters, "offset", 0), layer: numberOf(parameters, "layer"), hidden: parameters.get("hidden") ?? "",
  };
  const label = (one) => `${shortId(one.job)} ${one.probes.join(", ")} on ${modelOf(one)} (${moment(one.ended)})`;
  const options = evaluations.map((one) => [one.job, label(one)]);
  const charts = el("div", { class: "columns" });
  const probesBox = el("fieldset");
  const notes = el("div");
  const fixed = el("select");
  const fixedField = field("at", fixed, { size: "narrow" });
  const set = (name, value) => {
    state[name] = value;
    return show();
  };
  fixed.addEventListener("change", () => set(state.x === "layer" ? "offset" : "layer", Number(fixed.value)));
  replace(body, el("div", { class: "card" }, el("div", { class: "controls" },
    field("Evaluation", select(options, state.evaluation, (value) => set("evaluation", value)), { size: "wide" }),
    field("Beside", select([["", "nothing"], ...options], state.beside, (value) => set("beside", value)), { size: "wide" }),
    field("Measure", select(MEASURES, state.measure, (value) => set("measure", value))),
    field("Against", select([["layer", "layer"], ["offset", "offset N"]], state.x, (value) => set("x", value)), { size: "narrow" }),
    fixedField), probesBox), charts, notes);

  let drawn = [];
  async function show() {
    rememberState("curves", state);
    for (const chart of drawn) chart.destroy();
    drawn = [];
    try {
      const chosen = [state.evaluation, state.beside].filter(Boolean);
      const found = await Promise.all(chosen.map((job) => getJson(`/v1/evaluations/${part(job)}`, {}, signal)));
      draw(found);
    } catch (error) {
      if (!signal.aborted) replace(charts, errorBox(error));
    }
  }

  function draw(found) {
    const rows = found.flatMap((one) => one.rows);
    const other = state.x === "layer" ? "offset" : "layer";
    const values = [...new Set(rows.map((row) => row[other]).filter((value) => value !== null))].sort((a, b) => a - b);
    if (!values.includes(state[other])) state[other] = values[other === "layer" ? values.length >> 1 : 0] ?? 0;
    setOptions(fixed, values, state[other]);
    fixedField.querySelector("label").textContent = other === "layer" ? "at layer" : "at offset N";
    const names = [...new Set(rows.map((row) => row.probe))];
    const hidden = new Set(state.hidden.split(",").filter(Boolean));
    replace(probesBox, el("legend", {}, "Probes"), el("div", { class: "choices" }, names.map((name) => el("label", {},
      el("input", {
        type: "checkbox", checked: !hidden.has(name),
        on: {
          change: (event) => {
            if (event.target.checked) hidden.delete(name);
            else hidden.add(name);
            set("hidden", [...hidden].join(","));
          },
        },
      }), name))));
    const measureLabel = MEASURES.find(([key]) => key === state.measure)?.[1] ?? state.measure;
    drawn = found.map((one) => lineChart({
      title: `${measureLabel} at ${other} ${state[other]} – ${modelOf(one)}, ${one.split ?? "test"} split`,
      name: `${state.measure}-${shortId(one.job)}`, xLabel: state.x === "layer" ? "layer" : "offset N", yLabel: measureLabel,
      series: seriesOf(one.rows, names.filter((name) => !hidden.has(name)), state, other), signal,
    }));
    replace(charts, drawn.map((chart) => el("div", { class: "card" }, chart.element)));
    replace(notes, found.map((one) => el("div", { class: "card" },
      el("h2", {}, `How it was measured: ${shortId(one.job)}`),
      el("p", {}, `${count(one.n)} positions in ${count(one.sequences)} sequences of the ${one.split} split; intervals are 95 % over ${count(one.units)} ${one.unit}s.`),
      (one.notes ?? []).map((note) => el("p", { class: "quiet small" }, note)),
      el("div", { class: "actions" }, el("a", { class: "button", href: addressOf(`jobs/${one.job}`) }, "The job"),
        el("a", { class: "button", href: addressOf(`caches/${one.cache}`) }, "The cache")))));
  }
  replace(charts, loading());
  await show();
}

// A line per probe; a baseline, which reads no layer, is level in a chart by layer.
function seriesOf(rows, names, state, other) {
  const layers = [...new Set(rows.map((row) => row.layer).filter((layer) => layer !== null))].sort((a, b) => a - b);
  const kinds = new Map();
  return names.map((name, number) => {
    const own = rows.filter((row) => row.probe === name && (row[other] === state[other] || (other === "layer" && row.layer === null)));
    const point = (x, row) => ({ x, y: row[state.measure] ?? null, low: row[`${state.measure}_low`] ?? null, high: row[`${state.measure}_high`] ?? null });
    const isLevel = state.x === "layer" && own.length > 0 && own[0].layer === null;
    const points = isLevel ? [layers[0], layers.at(-1)].map((x) => point(x, own[0])) : own.map((row) => point(row[state.x], row));
    const kind = name.split(/[ /]/)[0];
    const nth = kinds.get(kind) ?? 0;
    kinds.set(kind, nth + 1);
    return { name, color: () => probeColor(kind, number), dash: isLevel ? [3, 4] : DASHES[nth % DASHES.length], points: points.sort((a, b) => a.x - b.x) };
  }).filter((line) => line.points.length);
}
