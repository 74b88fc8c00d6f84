// Lens maps: any passage of any cache, read with one lens or two side by side, a token tracked.

import { getJson, part } from "./api.js";
import { dataTable, el, errorBox, field, loading, measure as formatMeasure, replace, select, setOptions, shortId } from "./elements.js";
import { MEASURES, differenceMap, heatmapCard } from "./heatmap.js";
import { numberOf, rememberState } from "./location.js";

// Kinds that predict tokens from layers; bases and counting baselines have no map.
const WITHOUT_MAP = ["basis", "bigram", "unigram", "trigram", "marginal_bigram", "chain_bigram", "lagged_bigram"];

export async function showLens({ body, parameters, signal }) {
  const [{ caches }, { probes }] = await Promise.all([getJson("/v1/caches", {}, signal), getJson("/v1/probes", {}, signal)]);
  const readable = caches.filter((cache) => cache.layers.length);
  if (!readable.length) {
    replace(body, el("p", {}, "There is no complete cache to read yet. ", el("a", { href: "#/jobs/new?command=extract" }, "Extract one")));
    return;
  }
  const state = {
    cache: readable.find((cache) => cache.cache.startsWith(parameters.get("cache") || "-"))?.cache ?? readable[0].cache,
    probe: parameters.get("probe"),
    cache2: parameters.get("cache2") ?? "", probe2: parameters.get("probe2") ?? "",
    sequence: numberOf(parameters, "sequence"), first: numberOf(parameters, "first", 0),
    tokens: numberOf(parameters, "tokens", 24), layers: parameters.get("layers") ?? "",
    offset: numberOf(parameters, "offset"), measure: parameters.get("measure") ?? "probability",
    track: parameters.get("track") ?? "", cell: parameters.get("cell") ?? "",
  };
  const remember = () => rememberState("lens", state);
  const probesOf = (cache) => [["logit", "logit lens"], ...probes
    .filter((probe) => probe.cache === cache && !WITHOUT_MAP.includes(probe.kind) && probe.layers.length)
    .map((probe) => [probe.probe, probe.probe])];
  state.probe ??= probesOf(state.cache).find(([name]) => name.startsWith("ridge"))?.[0] ?? "logit";

  // Controls
  const cacheOptions = readable.map((cache) => [cache.cache, `${shortId(cache.cache)} ${cache.model} on ${cache.data}`]);
  const choose = (name, value) => {
    state[name] = value;
    state.cell = "";
    return load();
  };
  const probeSelect = select(probesOf(state.cache), state.probe, (value) => { state.offset = null; choose("probe", value); });
  const cacheSelect = select(cacheOptions, state.cache, (value) => {
    Object.assign(state, { cache: value, sequence: null, first: 0, offset: null, track: "" });
    setOptions(probeSelect, probesOf(value));
    fillSecond();
    choose("probe", probeSelect.value);
  });
  const second = el("select");
  const secondOptions = () => cacheOptions.flatMap(([cache, label]) => probesOf(cache)
    .filter(([probe]) => cache !== state.cache || probe !== state.probe)
    .map(([probe, name]) => [`${cache}/${probe}`, cache === state.cache ? name : `${name} of ${label}`]));
  function fillSecond() {
    const chosen = state.probe2 ? `${state.cache2 || state.cache}/${state.probe2}` : "";
    setOptions(second, [["", "nothing"], ...secondOptions()], chosen);
    if (second.value !== chosen) Object.assign(state, { cache2: "", probe2: "" });
  }
  second.addEventListener("change", () => {
    const slash = second.value.indexOf("/");
    state.cache2 = second.value.slice(0, Math.max(0, slash));
    choose("probe2", slash < 0 ? "" : second.value.slice(slash + 1));
  });
  const offsetSelect = select([], null, (value) => choose("offset", Number(value)));
  const measureSelect = select(MEASURES, state.measure, (value) => {
    state.measure = value;
    remember();
    for (const card of cards) card.show(value);
  });
  const numberInput = (name, low, high) => el("input", {
    type: "number", min: low, max: high, value: state[name] ?? "",
    on: { change: (event) => choose(name, event.target.value === "" ? null : Number(event.target.value)) },
  });
  const sequenceInput = numberInput("sequence", 0, 1e9);
  const firstInput = numberInput("first", 0, 1e9);
  const tokensInput = numberInput("tokens", 1, 128);
  const layersInput = el("input", { type: "text", value: state.layers, placeholder: "all", on: { change: (event) => choose("layers", event.target.value.trim()) } });
  const trackInput = el("input", { type: "text", value: state.track, placeholder: "a word such as Paris", on: { change: (event) => track(event.target.value) } });
  const untrack = el("button", { type: "button", on: { click: () => track("") } }, "Stop tracking");

  function track(value) {
    // Of a tracked token the rank says most: it tells tokens apart that are all improbable.
    if (value && !state.track) {
      state.measure = "rank";
      measureSelect.value = "rank";
    }
    state.track = value;
    trackInput.value = value;
    return load();
  }

  // Search
  const results = el("div");
  const searchInput = el("input", { type: "search", maxlength: 200 });
  const search = el("form", {
    class: "controls", role: "search",
    on: {
      submit: async (event) => {
        event.preventDefault();
        if (!searchInput.value.trim()) return replace(results);
        replace(results, loading("Searching …"));
        try {
          const found = await getJson(`/v1/caches/${part(state.cache)}/passages`, { search: searchInput.value }, signal);
          replace(results, matchList(found, (match) => {
            state.sequence = match.sequence;
            state.first = Math.max(0, match.first - 4);
            sequenceInput.value = state.sequence;
            firstInput.value = state.first;
            choose("cell", "");
          }));
        } catch (error) {
          if (!signal.aborted) replace(results, errorBox(error));
        }
        return null;
      },
    },
  }, field("Search the texts of the cache", searchInput, { size: "wide" }), el("button", { type: "submit" }, "Search"));

  const maps = el("div");
  const detail = el("div", { class: "card", hidden: true });
  let cards = [];
  replace(body,
    el("div", { class: "card" },
      el("div", { class: "controls" },
        field("Cache", cacheSelect, { size: "wide" }), field("Lens", probeSelect, { size: "wide" }), field("Beside", second, { size: "wide" }),
        field("Offset N", offsetSelect, { size: "narrow" }), field("Layers", layersInput, { size: "narrow" }),
        field("Colour", measureSelect), field("Sequence", sequenceInput, { size: "narrow" }), field("First token", firstInput, { size: "narrow" }),
        field("Tokens", tokensInput, { size: "narrow" }), field("Track a token", trackInput), untrack),
      search, results),
    maps, detail);

  const query = (probe, cache) => ({
    cache, probe, sequence: state.sequence, first: state.sequence === null ? null : state.first, tokens: state.tokens,
    layers: state.layers, offset: state.offset, ...trackParameters(),
  });
  // `#12` is a token by its number, as the lists of tokens give it.
  const trackParameters = () => (/^#\d+$/.test(state.track) ? { track_id: state.track.slice(1) } : { track: state.track });

  let loads = 0;
  async function load() {
    loads += 1;
    const mine = loads;
    untrack.hidden = !state.track;
    fillSecond();
    remember();
    if (!cards.length) replace(maps, loading("Reading the passage …"));
    maps.setAttribute("aria-busy", "true");
    try {
      const one = await getJson("/v1/lens-map", query(state.probe, state.cache), signal);
      // The second lens reads the passage that the service chose for the first.
      Object.assign(state, { sequence: one.sequence, first: one.first, offset: one.offset });
      const two = state.probe2 ? await getJson("/v1/lens-map", query(state.probe2, state.cache2 || state.cache), signal) : null;
      if (mine !== loads) return;
      sequenceInput.value = state.sequence;
      firstInput.value = state.first;
      setOptions(offsetSelect, one.available.offsets, state.offset);
      remember();
      showMaps(one, two);
      if (state.cell) openCell(...state.cell.split(",").map(Number), { select: true });
      else detail.hidden = true;
    } catch (error) {
      if (signal.aborted || mine !== loads) return;
      cards = [];
      detail.hidden = true;
      replace(maps, errorBox(error));
    } finally {
      maps.removeAttribute("aria-busy");
    }
  }

  function titleOf(map) {
    const what = state.track ? `, tracking ${map.tracked}` : "";
    return `${map.probe}, N = ${map.offset}, sequence ${map.sequence} from token ${map.first}${what}`;
  }

  function showMaps(one, two) {
    const shown = [[one, titleOf(one), `lens-${one.probe}`]];
    let reason = null;
    if (two) {
      shown.push([two, titleOf(two), `lens-${two.probe}`]);
      const [difference, why] = differenceMap(one, two);
      reason = why;
      if (difference) shown.push([difference, `difference: ${one.probe} less ${two.probe}`, "lens-difference"]);
    }
    cards = shown.map(([map, title, name], index) =>
      heatmapCard(map, title, `${name}-${map.sequence}-${map.first}`, (layer, token) => openCell(layer, token, { beside: index === 1 })));
    for (const card of cards) card.show(state.measure);
    replace(maps, cards.map((card) => el("div", { class: "card" }, card.element)), reason ? el("p", { class: "note" }, reason) : null);
  }

  async function openCell(layer, token, { select: selects = false, beside = false } = {}) {
    if (!Number.isInteger(layer) || !Number.isInteger(token)) return;
    state.cell = `${layer},${token}`;
    remember();
    if (selects) cards[0]?.select(layer, token);
    detail.hidden = false;
    if (!detail.childElementCount) replace(detail, loading("Reading the cell …"));
    try {
      const [probe, cache] = beside ? [state.probe2, state.cache2 || state.cache] : [state.probe, state.cache];
      const cell = await getJson("/v1/lens-cell", {
        cache, probe, sequence: state.sequence, first: token, layer, offset: state.offset, ...trackParameters(),
      }, signal);
      replace(detail, cellDetail(cell, (entry) => track(`#${entry.token}`)));
    } catch (error) {
      if (!signal.aborted) replace(detail, errorBox(error));
    }
  }

  window.addEventListener("themechange", () => { for (const card of cards) card.redraw(); }, { signal });
  await load();
}

function matchList(found, onChoose) {
  const more = found.searched < found.sequences ? ` in the first ${found.searched} of ${found.sequences} sequences` : "";
  return el("div", {},
    el("p", { class: "quiet small", role: "status" }, `${found.matches.length} places${more}`),
    el("ul", { class: "matches" }, found.matches.map((match) => el("li", {},
      el("button", { type: "button", class: "match", on: { click: () => onChoose(match) } },
        el("span", { class: "quiet small" }, `${match.sequence}:${match.first} ${match.split} `), match.before, el("mark", {}, match.matched), match.after)))));
}

function cellDetail(cell, onTrack) {
  const most = Math.max(...[...cell.top, ...cell.model_top].map((entry) => entry.probability));
  const table = (caption, entries) => dataTable({
    caption, empty: "The logits are no distribution here.",
    columns: [
      { title: "", cell: (entry) => String(entry.rank) },
      { title: "token", cell: (entry) => el("span", { class: "token" }, entry.label) },
      {
        title: "probability", cell: (entry) => el("span", { class: "bar-cell" },
          el("meter", { min: 0, max: most, value: String(entry.probability), "aria-label": `probability of ${entry.label}` }), ` ${formatMeasure(entry.probability, 3)}`),
      },
      { title: "", cell: (entry) => el("button", { type: "button", "aria-label": `Track ${entry.label}`, on: { click: () => onTrack(entry) } }, "track") },
    ],
    rows: entries,
  });
  return [
    el("h2", {}, `Layer ${cell.layer}, token ${cell.index} `, el("span", { class: "token" }, cell.token)),
    el("p", { class: "quiet" }, `${cell.lens}, N = ${cell.offset}: KL to the model ${formatMeasure(cell.kl, 3)} nats, entropy ${formatMeasure(cell.entropy, 3)} nats`,
      cell.tracked ? `; ${cell.tracked.label} has rank ${formatMeasure(cell.tracked.rank)} and probability ${formatMeasure(cell.tracked.probability, 3)}` : ""),
    el("div", { class: "columns" }, table("The lens's likeliest tokens", cell.top), table("The model's own", cell.model_top)),
  ];
}

