// The caches: a list, and one cache with its parts, the speed of its extraction and its disk.

import { getJson, part } from "./api.js";
import { bytes, count, dataTable, duration, el, facts, measure, ranges, replace, shortId, stateMark } from "./elements.js";
import { progressBars } from "./job_views.js";
import { addressOf, repeat } from "./location.js";
import { Picture, downloadButtons, showPicture } from "./picture.js";
import { themeColor } from "./theme.js";

export async function showCaches({ body, signal }) {
  const table = el("div", { class: "card" });
  const about = el("p", { class: "quiet" });
  replace(body, about, table, el("div", { class: "actions" },
    el("a", { class: "button main", href: addressOf("jobs/new", { command: "extract" }) }, "Extract a cache"),
    el("a", { class: "button", href: "/v1/caches" }, "As JSON")));
  let before = "";
  await repeat(async () => {
    const { root, caches } = await getJson("/v1/caches", {}, signal);
    const now = JSON.stringify(caches);
    if (now === before) return;
    before = now;
    about.textContent = `${count(caches.length)} under ${root}`;
    replace(table, dataTable({
      caption: "Caches, oldest first",
      empty: "No caches yet: extract one, here or with residua extract.",
      columns: [
        { title: "cache", cell: (row) => el("a", { class: "mono", href: addressOf(`caches/${row.cache}`) }, shortId(row.cache)) },
        { title: "state", cell: (row) => stateMark(row.state) },
        { title: "model", cell: (row) => row.model },
        { title: "texts", cell: (row) => row.data },
        { title: "positions", number: true, cell: (row) => count(row.positions) },
        { title: "layers", cell: (row) => ranges(row.layers) },
        { title: "d_model", number: true, cell: (row) => count(row.d_model) },
        { title: "size", number: true, cell: (row) => bytes(row.bytes) },
      ],
      rows: caches,
    }));
  }, 3, signal);
}

export async function showCache({ body, heading, name, signal }) {
  const cache = await getJson(`/v1/caches/${part(name)}`, {}, signal);
  heading.textContent = `${cache.model} on ${cache.data}`;
  const grid = el("div", { class: "card" });
  const speed = el("div", { class: "card" });
  const disk = el("div", { class: "card" });
  const probes = el("div", { class: "card" });
  replace(body,
    el("div", { class: "columns" },
      el("div", { class: "stack" }, factsCard(cache), disk), el("div", { class: "stack" }, grid, speed)), probes,
    el("div", { class: "card" }, el("h2", {}, "Identity"),
      el("p", { class: "quiet" }, "What the id is the digest of: the same request finds this cache again."),
      el("pre", { tabindex: "0", "aria-label": "Identity of the cache" }, JSON.stringify(cache.identity, null, 2))));
  showProbes(probes, cache, signal);
  const view = partGrid(grid, cache, signal);
  await repeat(async () => {
    const parts = await getJson(`/v1/caches/${part(cache.cache)}/parts`, {}, signal);
    view(parts);
    await Promise.all([showSpeed(speed, cache, signal), showForecast(disk, parts, signal)]);
    // A complete cache may still be extended, but not many times a minute.
    if (parts.parts.every(({ state }) => state === "committed" || state === "quarantined")) {
      await new Promise((resolve) => setTimeout(resolve, 8000));
    }
  }, 2, signal);
}

function factsCard(cache) {
  const splits = Object.entries(cache.splits ?? {}).map(([name, n]) => `${name} ${count(n)}`).join(", ");
  return el("div", { class: "card" }, el("h2", {}, "Contents"),
    facts([
      ["id", el("span", { class: "mono" }, cache.cache)],
      ["state", stateMark(cache.state)],
      ["positions", count(cache.positions)],
      ["sequences", `${count(cache.sequences)} (${splits})`],
      ["layers", cache.layers.length ? `${ranges(cache.layers)} of 0-${cache.depth}` : `none is complete yet, of 0-${cache.depth}`],
      ["d_model", count(cache.d_model)],
      ["vocabulary", count(cache.vocab)],
      ["logits", cache.logits],
      ["stored as", `${[...new Set(Object.values(cache.layer_arrays ?? {}).map(({ dtype }) => dtype))].join(", ")}, ${cache.codec}`],
      ["head", cache.head ? `${cache.head.kind}, ${cache.head.norm}` : null],
      ["size", bytes(cache.bytes)],
      ["extracted", [cache.provenance?.created?.replace("T", " ").replace("Z", " UTC"), cache.provenance?.device].filter(Boolean).join(" on ")],
    ]),
    el("div", { class: "actions" },
      cache.layers.length ? el("a", { class: "button main", href: addressOf("lens", { cache: cache.cache }) }, "Read with a lens") : null,
      el("a", { class: "button", href: addressOf("jobs/new", { command: "fit ridge", cache: shortId(cache.cache) }) }, "Fit a probe"),
      el("a", { class: "button", href: `/v1/caches/${part(cache.cache)}` }, "As JSON")));
}

const STATES = ["committed", "leased", "free", "quarantined"];
const PATTERN = { committed: "good", leased: "busy", free: "free", quarantined: "bad" };

// The parts as a grid of small squares, with counts and a table; returns what shows newer parts.
function partGrid(card, cache, signal) {
  const canvas = el("canvas", { role: "img" });
  const legend = el("ul", { class: "legend" });
  const table = el("div");
  const status = el("p", { class: "quiet small" });
  let picture = null;
  let newest = null;
  const draw = () => {
    if (!newest) return;
    picture = gridPicture(newest.parts, Math.max(240, Math.min(560, card.clientWidth - 34)), `Parts of ${shortId(cache.cache)}`);
    showPicture(canvas, picture);
  };
  replace(card, el("h2", {}, "Parts"),
    el("p", { class: "quiet small" }, "A square is a part: rows of all layers that are written and committed together."),
    canvas, legend, status,
    downloadButtons(`parts-${shortId(cache.cache)}`, () => picture, () => [["part", "start", "stop", "state", "owner"], newest.parts.map((p) => [p.part, p.start, p.stop, p.state, p.owner])]),
    el("details", {}, el("summary", {}, "The same as a table"), table));
  window.addEventListener("themechange", draw, { signal });
  let before = "";
  return (parts) => {
    newest = parts;
    const now = JSON.stringify(parts.parts);
    if (now === before) return;
    before = now;
    draw();
    const counts = Object.fromEntries(STATES.map((state) => [state, parts.parts.filter((p) => p.state === state).length]));
    canvas.setAttribute("aria-label", `Grid of ${parts.parts.length} parts: ${STATES.map((state) => `${counts[state]} ${state}`).join(", ")}`);
    replace(legend, STATES.map((state) => {
      const square = el("canvas", { "aria-hidden": "true" });
      const sample = new Picture(13, 13, themeColor("surface"));
      drawPart(sample, 0, 0, 13, state);
      showPicture(square, sample);
      return el("li", {}, square, `${state} ${count(counts[state])}`);
    }));
    const owners = [...new Set(parts.parts.map((p) => p.owner).filter(Boolean))];
    status.textContent = owners.length ? `being written by ${owners.join(", ")}` : "";
    const shown = runsOfParts(parts.parts);
    replace(table, dataTable({
      caption: "Parts by state",
      columns: [
        { title: "parts", cell: (row) => (row.first === row.last ? `${row.first}` : `${row.first}-${row.last}`) },
        { title: "rows", cell: (row) => `${count(row.start)}-${count(row.stop)}` },
        { title: "state", cell: (row) => row.state },
        { title: "owner", cell: (row) => row.owner },
      ],
      rows: shown,
    }));
  };
}

function drawPart(picture, x, y, side, state) {
  picture.rect(x, y, side, side, { fill: themeColor(PATTERN[state]) });
  // Not by colour alone: a leased part has a hole, a quarantined one a cross.
  if (state === "leased") picture.rect(x + side / 3, y + side / 3, side / 3, side / 3, { fill: themeColor("surface") });
  if (state === "quarantined") {
    const stroke = themeColor("surface");
    picture.line([[x + 2, y + 2], [x + side - 2, y + side - 2]], { stroke });
    picture.line([[x + side - 2, y + 2], [x + 2, y + side - 2]], { stroke });
  }
}

function gridPicture(parts, width, title) {
  // At most 3,000 squares: of more parts, a square is several, and shows the least finished one.
  const perSquare = Math.ceil(parts.length / 3000);
  const side = parts.length > 600 ? 9 : parts.length > 60 ? 14 : 20;
  const columns = Math.max(1, Math.floor(width / (side + 2)));
  const squares = [];
  for (let i = 0; i < parts.length; i += perSquare) {
    const states = parts.slice(i, i + perSquare).map((p) => p.state);
    squares.push(["quarantined", "leased", "free", "committed"].find((state) => states.includes(state)));
  }
  const picture = new Picture(Math.max(22, Math.min(columns, squares.length) * (side + 2)), Math.ceil(squares.length / columns) * (side + 2), themeColor("surface"), title);
  squares.forEach((state, index) => {
    drawPart(picture, (index % columns) * (side + 2), Math.floor(index / columns) * (side + 2), side, state);
  });
  return picture;
}

function runsOfParts(parts) {
  const runs = [];
  for (const p of parts) {
    const last = runs.at(-1);
    if (last && last.state === p.state && last.owner === (p.owner ?? null)) Object.assign(last, { last: p.part, stop: p.stop });
    else runs.push({ first: p.part, last: p.part, start: p.start, stop: p.stop, state: p.state, owner: p.owner ?? null });
  }
  return runs.slice(0, 500);
}

// Seconds and bytes of the stages of the latest extraction of this cache, from its job.
async function showSpeed(card, cache, signal) {
  let jobs = [];
  try {
    jobs = (await getJson("/v1/jobs", {}, signal)).jobs ?? [];
  } catch (error) {
    if (signal.aborted) throw error;
  }
  const extractions = jobs.filter((job) => job.command === "extract" && ["running", "done"].includes(job.state));
  const running = extractions.find((candidate) => candidate.state === "running");
  const job = await findMeasured(extractions.filter((candidate) => candidate.state === "done"), cache, signal);
  const stages = job?.value?.stages;
  if (signal.aborted) return;
  const slowest = Math.max(...["forward", "copy", "write"].map((name) => stages?.[name]?.seconds ?? 0));
  replace(card, el("h2", {}, "Speed of the extraction"),
    running ? [el("p", {}, "An extraction runs: ", el("a", { href: addressOf(`jobs/${running.id}`) }, "the job")), progressBars(running.progress)] : null,
    stages ? [
      el("p", {}, "Bottleneck: ", el("strong", {}, stages.bottleneck ?? "none"),
        stages.bottleneck ? ` (${duration(slowest)} of ${duration(job.value.seconds)})` : "",
        stages.forward?.tokens_per_second ? `; the model read ${count(Math.round(stages.forward.tokens_per_second))} tokens a second.` : "."),
      dataTable({
        caption: "Stages overlap: their seconds may add up to more than the whole",
        columns: [
          { title: "stage", cell: (name) => ({ forward: "forward pass", copy: "copy to the host", write: "write and commit" })[name] },
          { title: "seconds", number: true, cell: (name) => measure(stages[name].seconds, 3) },
          { title: "bytes", number: true, cell: (name) => bytes(stages[name].bytes) },
          { title: "per second", number: true, cell: (name) => bytes(stages[name].bandwidth) },
          { title: "share", cell: (name) => meter(stages[name].seconds, slowest, `${name} relative to the slowest stage`) },
        ],
        rows: ["forward", "copy", "write"].filter((name) => stages[name]),
      }),
    ] : running ? null : el("p", { class: "quiet" }, "No job of this service extracted the cache: nothing was measured here."));
}

// The latest finished extraction of the cache that wrote something; results are asked for once.
const results = new Map();

async function findMeasured(jobs, cache, signal) {
  for (const job of jobs.slice(0, 20)) {
    if (!results.has(job.id)) results.set(job.id, await getJson(`/v1/jobs/${part(job.id)}`, {}, signal));
    const whole = results.get(job.id);
    if (whole.value?.cache === cache.cache && whole.value.stages) return whole;
  }
  return null;
}

function meter(value, most, label) {
  return el("meter", { min: 0, max: most || 1, value: String(value), "aria-label": label });
}

async function showForecast(card, parts, signal) {
  let free = null;
  try {
    free = (await getJson("/v1/disk", {}, signal)).free ?? null;
  } catch (error) {
    if (signal.aborted) throw error;
  }
  const missing = Math.max(0, (parts.bytes_expected ?? 0) - (parts.bytes_written ?? 0));
  replace(card, el("h2", {}, "Disk"),
    facts([
      ["written", bytes(parts.bytes_written)],
      ["when complete", bytes(parts.bytes_expected)],
      ["still to come", bytes(missing)],
      ["free on the disk", free === null ? null : bytes(free)],
    ]),
    free === null || !missing ? null : el("p", { class: missing > free ? "error" : "quiet" }, missing > free
      ? `The disk will be full: ${bytes(missing - free)} are lacking. Free them on the page on storage.`
      : `It fits: ${bytes(free - missing)} will be left.`));
}

async function showProbes(card, cache, signal) {
  const { probes } = await getJson("/v1/probes", {}, signal);
  const own = probes.filter((probe) => probe.cache === cache.cache);
  replace(card, el("h2", {}, "Probes fitted on it"), dataTable({
    caption: "Saved probes", empty: "No probe was fitted on this cache yet.",
    columns: [
      {
        title: "probe", cell: (row) => el("a", {
          class: "mono",
          href: row.kind === "basis" ? addressOf(`bases/${row.probe}`) : addressOf("lens", { cache: cache.cache, probe: row.probe }),
        }, row.probe),
      },
      { title: "kind", cell: (row) => row.kind },
      { title: "layers", cell: (row) => ranges(row.layers) },
      { title: "offsets", cell: (row) => ranges(row.offsets) },
      { title: "KL, validation", number: true, cell: (row) => (row.kl ? `${measure(row.kl.min, 3)} to ${measure(row.kl.max, 3)}` : "–") },
      { title: "size", number: true, cell: (row) => bytes(row.bytes) },
      { title: "state", cell: (row) => stateMark(row.state) },
    ],
    rows: own,
  }));
}
