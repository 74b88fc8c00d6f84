// Studies that ran as jobs: question, method, pictures, what they say, what they do not, numbers.

import { getJson, part } from "./api.js";
import { count, dataTable, el, field, measure, moment, replace, select, shortId } from "./elements.js";
import { addressOf, rememberState } from "./location.js";
import { figureCards } from "./study_figures.js";

const isStudy = (job) => /^(study|intervene) /.test(job.command) && job.state === "done";

export async function showStudies({ body, heading, name, signal, parameters }) {
  const { jobs } = await getJson("/v1/jobs", {}, signal);
  const studies = jobs.filter(isStudy);
  if (!studies.length) {
    replace(body, el("p", {}, "No study has run here yet. ", el("a", { href: addressOf("jobs/new", { command: "study all" }) }, "Start one")));
    return;
  }
  let chosen = studies.find((job) => job.id.startsWith(name ?? "-"))?.id ?? studies[0].id;
  let wanted = parameters.get("study");
  const view = el("div");
  const parts = el("div", { class: "controls" });
  const label = (job) => `${job.command.replace(/^study /, "")} of ${shortId(job.arguments.cache)} (${moment(job.ended)})`;
  replace(body, el("div", { class: "card" }, el("div", { class: "controls" },
    field("Study", select(studies.map((job) => [job.id, label(job)]), chosen, (id) => {
      chosen = id;
      wanted = null;
      show();
    }), { size: "wide" })), parts,
  el("div", { class: "actions" }, el("a", { class: "button", href: addressOf("jobs/new", { command: "study all" }) }, "Start another"))), view);

  let leaving = new AbortController();
  signal.addEventListener("abort", () => leaving.abort(), { once: true });
  async function show() {
    leaving.abort();
    leaving = new AbortController();
    const job = await getJson(`/v1/jobs/${part(chosen)}`, {}, signal);
    const found = job.value?.studies ?? (job.value?.study ? { [job.value.study]: job.value } : {});
    const names = Object.keys(found);
    if (!names.includes(wanted)) wanted = names[0] ?? null;
    rememberState(`studies/${shortId(chosen)}`, { study: wanted });
    replace(parts, names.length > 1 ? field("Part", select(names.map((one) => [one, found[one].title]), wanted, (one) => {
      wanted = one;
      show();
    }), { size: "wide" }) : null);
    const result = found[wanted];
    if (!result) {
      replace(view, el("p", {}, "This study answered nothing."), skippedCard(job.value?.skipped));
      return;
    }
    heading.textContent = result.title;
    replace(view, ...resultParts(result, job, leaving.signal), skippedCard(job.value?.skipped));
  }
  await show();
}

function resultParts(result, job, signal) {
  const { subject } = result;
  const list = (sentences) => el("ul", {}, sentences.map((sentence) => el("li", {}, sentence)));
  const figures = result.figures.map((figure) => el("section", {},
    el("h2", {}, figure.name.replaceAll("-", " ")), el("p", { class: "quiet" }, figure.caption),
    figureCards(figure, result.study, signal)));
  const files = (job.files ?? []).map((file) => el("a", {
    class: "button", href: `/v1/jobs/${part(job.id)}/files/${file.split("/").map(part).join("/")}`,
  }, file));
  return [
    el("div", { class: "card" }, el("h2", {}, "Question"), el("p", {}, result.question),
      el("h2", {}, "Method"), el("p", {}, result.method),
      el("p", { class: "quiet small" }, `${count(subject.n)} ${subject.n_of} of the ${subject.split} split of ${subject.data_name}; intervals are 95 % over ${count(subject.n_units)} ${subject.units}s.`)),
    figures[0] ?? null,
    el("div", { class: "card" }, el("h2", {}, "What it says"), list(result.says),
      el("h2", {}, "What it does not say"), list([...result.does_not_say, ...result.notes])),
    ...figures.slice(1),
    el("div", { class: "card" }, el("h2", {}, "Numbers"), Object.entries(result.tables).filter(([, rows]) => rows.length).map(tableDetails),
      files.length ? el("div", { class: "actions" }, files) : null,
      el("div", { class: "actions" }, el("a", { class: "button", href: addressOf(`jobs/${job.id}`) }, "The job"))),
  ];
}

const MOST_ROWS = 500;

function tableDetails([name, rows]) {
  const columns = Object.keys(rows[0]).map((key) => ({
    title: key.replaceAll("_", " "), number: rows.some((row) => typeof row[key] === "number"), cell: (row) => cellText(row[key]),
  }));
  const box = el("div");
  const details = el("details", {
    on: { toggle: () => details.open && !box.childElementCount && box.append(dataTable({ caption: name, columns, rows: rows.slice(0, MOST_ROWS) })) },
  }, el("summary", {}, `${name} (${count(rows.length)} rows${rows.length > MOST_ROWS ? `, the first ${MOST_ROWS} here` : ""})`), box);
  return details;
}

function cellText(value) {
  if (Array.isArray(value)) return value.every((end) => end === null) ? "–" : value.map((end) => (typeof end === "number" ? measure(end, 3) : String(end))).join(" to ");
  if (typeof value === "number") return measure(value);
  return value === null || value === undefined ? "–" : String(value);
}

function skippedCard(skipped) {
  const entries = Object.entries(skipped ?? {});
  if (!entries.length) return null;
  return el("div", { class: "card" }, el("h2", {}, "What this cache cannot answer"),
    el("dl", { class: "facts" }, entries.flatMap(([name, reason]) => [el("dt", {}, name), el("dd", {}, reason)])));
}
