// The jobs: a list that follows them, one job with its progress and log, and a form for a new one.

import { change, getJson, getText, part } from "./api.js";
import { count, dataTable, duration, el, errorBox, facts, field, loading, moment, replace, select, shortId, stateMark } from "./elements.js";
import { addressOf, repeat } from "./location.js";
import { schemaForm } from "./schema_form.js";

const isOver = (state) => ["done", "failed", "cancelled"].includes(state);
const FOLLOWED = 2;

export async function showJobs({ body, signal }) {
  const table = el("div", { class: "card" });
  replace(body, table, el("div", { class: "actions" },
    el("a", { class: "button main", href: addressOf("jobs/new") }, "Start a job")));
  const jobs = new Map();
  const followed = new Map();
  const show = () => replace(table, dataTable({
    caption: "Jobs, the newest first", empty: "No jobs yet.",
    columns: [
      { title: "job", cell: (row) => el("a", { class: "mono", href: addressOf(`jobs/${row.id}`) }, shortId(row.id)) },
      { title: "state", cell: (row) => stateMark(row.state) },
      { title: "command", cell: (row) => el("span", {}, el("strong", {}, row.command), " ", el("span", { class: "quiet small" }, argumentsText(row.arguments))) },
      { title: "progress", cell: (row) => (row.state === "running" ? progressBars(row.progress?.slice(-1)) : row.error?.message ?? "") },
      { title: "created", cell: (row) => moment(row.created) },
      { title: "took", number: true, cell: (row) => took(row) },
    ],
    rows: [...jobs.values()].sort((a, b) => timeOf(b.created) - timeOf(a.created)),
  }));
  await repeat(async () => {
    const answer = await getJson("/v1/jobs", {}, signal);
    jobs.clear();
    for (const job of answer.jobs) jobs.set(job.id, job);
    show();
    // A browser has few connections to one service: the list follows two jobs, and asks for others.
    const running = answer.jobs.filter((job) => job.state === "running").slice(0, FOLLOWED);
    for (const [id, source] of followed) {
      if (!running.some((job) => job.id === id)) {
        source.close();
        followed.delete(id);
      }
    }
    for (const job of running) {
      if (!followed.has(job.id)) {
        followed.set(job.id, followJob(job.id, signal, (event, data) => {
          const known = jobs.get(job.id);
          if (!known || event === "log") return;
          merge(known, event, data);
          show();
        }));
      }
    }
  }, 2.5, signal);
}

// Follows the events of a job while somebody sees the page: a browser has few connections to one
// service, for all its tabs together. It connects again by itself and says the last event it has.
function followJob(id, signal, onEvent) {
  let source = null;
  let last = 0;
  const open = () => {
    source = new EventSource(`/v1/jobs/${part(id)}/events?after=${last}`);
    for (const event of ["state", "progress", "log"]) {
      source.addEventListener(event, (message) => {
        last = Number(message.lastEventId) || last;
        try {
          onEvent(event, JSON.parse(message.data));
        } catch {
          // Half an event: the next one is whole.
        }
      });
    }
  };
  const leaving = new AbortController();
  const close = () => {
    leaving.abort();
    source?.close();
  };
  document.addEventListener("visibilitychange", () => {
    source?.close();
    if (!document.hidden) open();
  }, { signal: leaving.signal });
  signal.addEventListener("abort", close, { once: true });
  open();
  return { close };
}

function merge(job, event, data) {
  if (event === "state") Object.assign(job, data);
  else if (event === "progress") job.progress = data.progress ?? mergeStage(job.progress ?? [], data);
}

function mergeStage(stages, stage) {
  if (!stage.stage) return stages;
  const index = stages.findIndex((known) => known.stage === stage.stage);
  return index < 0 ? [...stages, stage] : stages.with(index, { ...stages[index], ...stage });
}

export function progressBars(stages) {
  if (!stages?.length) return el("span", { class: "quiet" }, "starting …");
  return el("div", {}, stages.map((stage) => el("div", {},
    el("progress", { max: String(stage.total || 1), value: String(Math.min(stage.done, stage.total || 1)), "aria-label": `${stage.stage}: ${stage.done} of ${stage.total}` }),
    el("div", { class: "small" }, `${stage.stage} ${count(stage.done)} / ${count(stage.total)} ${stage.unit ?? ""}`,
      stage.rate ? ` · ${count(Math.round(stage.rate * 10) / 10)} ${stage.unit ?? ""}/s` : "",
      stage.eta ? ` · ${duration(stage.eta)} left` : ""),
    stage.note ? el("div", { class: "small quiet" }, stage.note) : null)));
}

// Arguments in a line; of paths the last part.
function argumentsText(values) {
  const short = (value) => {
    const text = String(value);
    return /^[0-9a-f]{64}$/.test(text) ? shortId(text) : text.split("/").at(-1);
  };
  return Object.entries(values ?? {})
    .map(([name, value]) => `${name} ${[value].flat().map(short).join(" ")}`).join(", ").slice(0, 160);
}

const timeOf = (value) => (typeof value === "number" ? value : Date.parse(value) / 1000 || 0);

function took(job) {
  if (!job.started) return "–";
  const end = job.ended ? timeOf(job.ended) : Date.now() / 1000;
  return duration(end - timeOf(job.started));
}

export async function showJob({ body, heading, name, signal }) {
  const job = await getJson(`/v1/jobs/${part(name)}`, {}, signal);
  heading.textContent = `${job.command} – ${shortId(job.id)}`;
  const about = el("div", { class: "card" });
  const progress = el("div", { class: "card", "aria-live": "off" });
  const result = el("div", { class: "card" });
  const log = el("pre", { tabindex: "0", "aria-label": "Log of the job" });
  const problem = el("div");
  const status = el("p", { class: "hidden-text", role: "status" });
  replace(body, status, problem, el("div", { class: "columns" }, about, progress), result,
    el("div", { class: "card" }, el("h2", {}, "Log"), log));

  const cancel = async () => {
    try {
      await change("POST", `/v1/jobs/${part(job.id)}/cancel`);
      Object.assign(job, await getJson(`/v1/jobs/${part(job.id)}`, {}, signal));
      show();
    } catch (error) {
      replace(problem, errorBox(error));
    }
  };
  const again = async () => {
    try {
      const next = await change("POST", "/v1/jobs", { command: job.command, arguments: job.arguments });
      if (next.id === job.id) Object.assign(job, next);
      else location.hash = addressOf(`jobs/${next.id}`);
      show();
    } catch (error) {
      replace(problem, errorBox(error));
    }
  };
  function show() {
    status.textContent = `The job is ${job.state}.`;
    replace(about, el("h2", {}, "Job"), facts([
      ["id", el("span", { class: "mono" }, job.id)],
      ["state", stateMark(job.state)],
      ["arguments", el("span", { class: "mono" }, JSON.stringify(job.arguments))],
      ["worker", job.worker],
      ["attempts", count(job.attempts)],
      ["created", moment(job.created)],
      ["started", moment(job.started)],
      ["ended", moment(job.ended)],
      ["took", took(job)],
      ["exit code", job.exit_code],
      ["message", job.message],
    ]), el("div", { class: "actions" },
      isOver(job.state) ? null : el("button", { type: "button", class: "danger", on: { click: cancel } }, "Cancel the job"),
      ["failed", "cancelled"].includes(job.state) ? el("button", { type: "button", on: { click: again } }, "Try again") : null,
      el("a", { class: "button", href: addressOf("jobs/new", { command: job.command, arguments: JSON.stringify(job.arguments) }) }, "A job like this")));
    replace(progress, el("h2", {}, "Progress"),
      job.progress?.length ? progressBars(job.progress) : el("p", { class: "quiet" }, isOver(job.state) ? "No stages were reported." : job.state === "running" ? "Starting …" : "Waiting for its turn."));
    showResult(result, job);
  }
  const refreshLog = async () => {
    try {
      const atEnd = log.scrollTop + log.clientHeight >= log.scrollHeight - 8;
      log.textContent = (await getText(`/v1/jobs/${part(job.id)}/log`, signal)) || "Nothing was printed yet.";
      if (atEnd) log.scrollTop = log.scrollHeight;
    } catch (error) {
      if (!signal.aborted) log.textContent = error.message;
    }
  };
  show();
  await refreshLog();
  if (isOver(job.state)) return;
  const source = followJob(job.id, signal, (event, data) => {
    if (event !== "log") {
      merge(job, event, data);
      show();
    }
  });
  await repeat(async () => {
    Object.assign(job, await getJson(`/v1/jobs/${part(job.id)}`, {}, signal));
    show();
    await refreshLog();
    if (isOver(job.state)) source.close();
    return !isOver(job.state);
  }, 1.5, signal);
}

function showResult(card, job) {
  card.hidden = !isOver(job.state);
  const links = [];
  const value = job.value ?? {};
  if (value.cache) links.push(el("a", { class: "button", href: addressOf(`caches/${value.cache}`) }, "The cache"));
  if (job.command === "evaluate" && job.state === "done") links.push(el("a", { class: "button main", href: addressOf("curves", { evaluation: job.id }) }, "The curves"));
  if (/^(study|intervene) /.test(job.command) && job.state === "done") links.push(el("a", { class: "button main", href: addressOf(`studies/${shortId(job.id)}`) }, "The study"));
  const probe = typeof value.probe === "string" ? value.probe.split("/").at(-1) : null;
  if (probe && job.command === "fit basis") links.push(el("a", { class: "button main", href: addressOf(`bases/${probe}`) }, "The basis"));
  else if (probe && value.cache) links.push(el("a", { class: "button main", href: addressOf("lens", { cache: value.cache, probe }) }, "Read with it"));
  for (const file of job.files ?? []) {
    links.push(el("a", { class: "button", href: `/v1/jobs/${part(job.id)}/files/${file.split("/").map(part).join("/")}` }, file));
  }
  replace(card, el("h2", {}, "Result"),
    job.error ? errorBox(job.error) : null,
    job.text ? el("pre", { tabindex: "0", "aria-label": "What the command printed" }, job.text) : null,
    links.length ? el("div", { class: "actions" }, links) : null);
}

export async function showNewJob({ body, heading, parameters, signal }) {
  heading.textContent = "Start a job";
  const [answer, { caches }, { probes }] = await Promise.all([
    getJson("/v1/commands", {}, signal), getJson("/v1/caches", {}, signal), getJson("/v1/probes", {}, signal),
  ]);
  const commands = answer.commands ?? answer;
  const names = Object.keys(commands);
  let given = {};
  try {
    given = JSON.parse(parameters.get("arguments") ?? "{}");
  } catch {
    given = {};
  }
  if (parameters.get("cache")) given.cache = caches.find((one) => one.cache.startsWith(parameters.get("cache")))?.cache;
  const known = {
    cache: caches.map((one) => [one.cache, `${shortId(one.cache)} ${one.model ?? ""} on ${one.data ?? ""}`]),
    probes: probes.filter((one) => !["basis", "prompt"].includes(one.kind)).map((one) => [one.probe, one.probe]),
    to: caches.map((one) => [one.cache, `${shortId(one.cache)} ${one.model ?? ""} on ${one.data ?? ""}`]),
    lens: [["logit", "logit lens"], ...probes.filter((one) => ["ridge", "lens"].includes(one.kind)).map((one) => [one.probe, one.probe])],
  };
  const form = el("form");
  const problem = el("div");
  const chosen = names.includes(parameters.get("command")) ? parameters.get("command") : names[0];
  let fields = null;
  const fill = (command) => {
    const schema = commands[command].arguments ?? commands[command].schema ?? commands[command];
    fields = schemaForm(schema, known, command === chosen ? given : {});
    replace(problem);
    replace(form, el("p", {}, schema.title ?? ""), fields.element,
      el("div", { class: "actions" }, el("button", { type: "submit", class: "main" }, `Start ${command}`)));
  };
  const choose = select(names, chosen, (command) => {
    fill(command);
    history.replaceState(null, "", addressOf("jobs/new", { command }));
  });
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    replace(problem, loading("Asking the service …"));
    try {
      const job = await change("POST", "/v1/jobs", { command: choose.value, arguments: fields.read() });
      location.hash = addressOf(`jobs/${job.id}`);
    } catch (error) {
      replace(problem, errorBox(error));
    }
  });
  fill(chosen);
  replace(body, el("div", { class: "card" }, field("Command", choose)), el("div", { class: "card" }, form, problem));
}
