// Causal bases: the KL of ablating their directions, and what each direction means.

import { getJson, part } from "./api.js";
import { lineChart } from "./chart.js";
import { count, dataTable, el, errorBox, facts, field, loading, measure, ranges, replace, select, shortId } from "./elements.js";
import { addressOf, numberOf, rememberState } from "./location.js";
import { DASHES, probeColor } from "./theme.js";

export async function showBases({ body, heading, name, parameters, signal }) {
  const { probes } = await getJson("/v1/probes", {}, signal);
  const bases = probes.filter((probe) => probe.kind === "basis");
  if (!bases.length) {
    replace(body, el("p", {}, "There is no causal basis yet. ", el("a", { href: addressOf("jobs/new", { command: "fit basis" }) }, "Fit one")));
    return;
  }
  let chosen = bases.find((basis) => basis.probe.startsWith(name ?? "-"))?.probe ?? bases[0].probe;
  let layer = numberOf(parameters, "layer");
  const view = el("div");
  const layerSelect = el("select");
  layerSelect.addEventListener("change", () => {
    layer = Number(layerSelect.value);
    show();
  });
  replace(body, el("div", { class: "card" }, el("div", { class: "controls" },
    field("Basis", select(bases.map((basis) => [basis.probe, `${basis.probe} (layers ${ranges(basis.layers)})`]), chosen, (value) => {
      chosen = value;
      layer = null;
      show();
    }), { size: "wide" }), field("Layer", layerSelect, { size: "narrow" }))), view);

  let charts = [];
  async function show() {
    for (const chart of charts) chart.destroy();
    charts = [];
    replace(view, loading("Reading the directions …"));
    try {
      const spectra = await getJson(`/v1/bases/${part(chosen)}`, {}, signal);
      layer ??= spectra.layers[spectra.layers.length >> 1];
      replace(layerSelect, spectra.layers.map((one) => el("option", { value: one }, String(one))));
      layerSelect.value = String(layer);
      rememberState(`bases/${chosen}`, { layer });
      heading.textContent = `Causal basis of layer ${layer}`;
      const row = spectra.metrics.find((candidate) => candidate.layer === layer);
      charts = [spanChart(row, layer, signal), layerChart(spectra.metrics, signal), directionChart(row, layer, signal)];
      const directions = el("div", {}, loading("Reading tokens and passages …"));
      replace(view, el("div", { class: "columns" }, charts.map((chart) => el("div", { class: "card" }, chart.element)), aboutCard(spectra, row)), directions);
      const detailed = await getJson(`/v1/bases/${part(chosen)}`, { layer }, signal);
      replace(directions, detailed.note ? el("p", { class: "note" }, detailed.note) : null, directionCards(detailed.readings));
    } catch (error) {
      if (!signal.aborted) replace(view, errorBox(error));
    }
  }
  await show();
}

const KINDS = [["span", "causal basis", "basis"], ["pca", "largest variance", "pca"], ["random", "random directions", "random"]];

function spanChart(row, layer, signal) {
  return lineChart({
    title: `KL when the first directions of layer ${layer} are ablated together`, name: `basis-span-layer-${layer}`,
    xLabel: "number of directions", yLabel: "KL, nats", signal,
    series: KINDS.filter(([key]) => row[key]).map(([key, name, kind], number) => ({
      name, color: () => probeColor(kind), dash: DASHES[number],
      points: Object.entries(row[key]).map(([k, { kl, low, high }]) => ({ x: Number(k), y: kl, low, high })),
    })),
  });
}

function layerChart(rows, signal) {
  return lineChart({
    title: "KL when all directions are ablated, by layer", name: "basis-by-layer", xLabel: "layer", yLabel: "KL, nats", signal,
    series: KINDS.filter(([key]) => rows[0]?.[key]).map(([key, name, kind], number) => ({
      name, color: () => probeColor(kind), dash: DASHES[number],
      points: rows.map((row) => {
        const { kl, low, high } = row[key]?.[String(row.k)] ?? {};
        return { x: row.layer, y: kl ?? null, low: low ?? null, high: high ?? null };
      }),
    })),
  });
}

function directionChart(row, layer, signal) {
  const series = [["energies", "on the rows of the fit", "basis"], ["influences", "on held-out rows", "lens"]];
  return lineChart({
    title: `KL when one direction of layer ${layer} is ablated alone`, name: `basis-directions-layer-${layer}`,
    xLabel: "direction", yLabel: "KL, nats", signal,
    series: series.filter(([key]) => row[key]).map(([key, name, kind], number) => ({
      name, color: () => probeColor(kind), dash: DASHES[number], points: row[key].map((y, x) => ({ x, y })),
    })),
  });
}

function aboutCard(spectra, row) {
  const { params } = spectra;
  return el("div", { class: "card" }, el("h2", {}, "The basis"), facts([
    ["lens", spectra.lens], ["directions", count(row.k)], ["method", params.method], ["metric", params.metric],
    ["reference", params.reference], ["offset N", params.offset], ["rows of the fit", count(row.n)], ["held-out rows", count(row.n_test)],
    ["cache", el("a", { class: "mono", href: addressOf(`caches/${spectra.cache}`) }, shortId(spectra.cache))],
  ]));
}

function directionCards(readings) {
  if (!readings) return null;
  const tokens = (title, changes) => el("div", {}, el("h3", {}, title),
    el("p", { class: "tokens" }, changes.flatMap((change) => [el("span", { class: "token", title: `${measure(change.change, 3)} nats` }, change.label), " "])));
  const passages = (title, places) => (places.length ? dataTable({
    caption: title,
    columns: [
      { title: "deviations", number: true, cell: (place) => measure(place.coordinate, 3) },
      { title: "passage", cell: (place) => el("span", { class: "match" }, place.before, el("mark", {}, place.token), place.after) },
    ],
    rows: places,
  }) : null);
  return [
    el("h2", {}, "Directions"),
    el("div", { class: "columns" }, readings.directions.map((direction) => el("section", { class: "card" },
      el("h2", {}, `Direction ${direction.direction}`),
      el("p", { class: "quiet small" }, `KL alone ${measure(direction.influence ?? direction.energy, 3)} nats; tokens whose log-probability changes most from one standard deviation below to one above`),
      tokens("Rises", direction.promoted), tokens("Falls", direction.suppressed),
      passages("Highest coordinates", direction.highest), passages("Lowest coordinates", direction.lowest)))),
  ];
}
