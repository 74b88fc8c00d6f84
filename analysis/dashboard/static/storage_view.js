// The disk: what caches, probes and leftovers take, what could go, and what is pinned.

import { change, getJson, part } from "./api.js";
import { bytes, count, dataTable, el, errorBox, facts, field, moment, replace, shortId, stateMark } from "./elements.js";
import { addressOf } from "./location.js";
import { downloadButtons } from "./picture.js";

const CATEGORIES = {
  leftovers: "left by killed work: unfinished files, stopped copies, checkpoints of saved probes",
  "unused-caches": "caches that no probe, job, pin or kept cache names",
  checkpoints: "checkpoints of unfinished fits, which the same command would go on from",
  moments: "moments kept with caches, which the next fit sums again",
  jobs: "folders of jobs that have ended",
  "lost-parts": "shards that no record names, which residua repair may still save",
};

export async function showStorage({ body, signal }) {
  const problem = el("div");
  const view = el("div");
  replace(body, problem, view);

  // What was asked of the service, then the disk as it is afterwards.
  async function act(work) {
    replace(problem);
    try {
      await work();
      await show();
    } catch (error) {
      if (!signal.aborted) replace(problem, errorBox(error));
    }
  }

  async function show() {
    const disk = await getJson("/v1/disk", {}, signal);
    const pins = new Map(disk.pins.map((pin) => [pin.name, pin]));
    replace(view,
      el("div", { class: "columns" }, summaryCard(disk), collectCard(disk, signal, act)),
      itemsCard(disk, pins, act));
  }
  await show();
}

function summaryCard(disk) {
  const kinds = [...new Set(disk.items.map((item) => item.kind))];
  return el("div", { class: "card" }, el("h2", {}, "Use of the disk"),
    facts([["under", disk.root], ["in all", bytes(disk.bytes)], ["free on the disk", disk.free === null ? null : bytes(disk.free)]]),
    dataTable({
      caption: "By kind; a file with several names counts once",
      columns: [
        { title: "kind", cell: (kind) => kind },
        { title: "number", number: true, cell: (kind) => count(disk.items.filter((item) => item.kind === kind).length) },
        { title: "size", number: true, cell: (kind) => bytes(disk.items.filter((item) => item.kind === kind).reduce((sum, item) => sum + item.bytes, 0)) },
      ],
      rows: kinds,
    }),
    (disk.unreadable ?? []).map((folder) => el("p", { class: "note" }, `cannot be read: ${folder}`)));
}

// Collection in two steps: first what would go, then its removal.
function collectCard(disk, signal, act) {
  const plan = el("div", { "aria-live": "polite" });
  const boxes = Object.entries(CATEGORIES).map(([name, summary]) => {
    const box = el("input", { type: "checkbox", value: name, checked: name === "leftovers" });
    return [box, el("div", { class: "option" }, el("label", {}, box, " ", el("strong", {}, name), ` ${bytes(disk.would_free[name] ?? 0)}`), el("div", { class: "small quiet" }, summary))];
  });
  const days = el("input", { type: "number", min: 0, max: 10000 });
  const request = (dryRun) => {
    const ask = { categories: boxes.filter(([box]) => box.checked).map(([box]) => box.value), dry_run: dryRun };
    if (days.value !== "") ask.older_than = Number(days.value) * 86400;
    return change("POST", "/v1/disk/collect", ask);
  };
  const form = el("form", {
    on: {
      submit: async (event) => {
        event.preventDefault();
        try {
          const found = await request(true);
          if (signal.aborted) return;
          replace(plan, planOf(found, () => act(() => request(false))));
        } catch (error) {
          replace(plan, errorBox(error));
        }
      },
    },
  }, el("fieldset", {}, el("legend", {}, "What may go"), boxes.map(([, label]) => label)),
  field("Only what nobody has used for so many days", days), el("div", { class: "actions" }, el("button", { type: "submit" }, "Show what would go")));
  return el("div", { class: "card" }, el("h2", {}, "Collection"),
    el("p", { class: "quiet small" }, "Nothing goes that a probe, a job, a pin or an extending cache names."), form, plan);
}

function planOf(found, onRemove) {
  if (!found.items.length) {
    return [el("p", {}, "Nothing of this would go."), keptTable(found.kept)];
  }
  return [
    el("p", {}, el("strong", {}, `${bytes(found.freed)} would go free.`)),
    dataTable({
      caption: "Would be removed",
      columns: [
        { title: "kind", cell: (item) => item.kind },
        { title: "name", cell: (item) => el("span", { class: "mono" }, nameOf(item)) },
        { title: "frees", number: true, cell: (item) => bytes(item.freed) },
      ],
      rows: found.items,
    }),
    keptTable(found.kept),
    el("div", { class: "actions" }, el("button", { type: "button", class: "danger", on: { click: onRemove } }, `Remove these ${count(found.items.length)}`)),
  ];
}

function keptTable(kept) {
  return kept.length ? dataTable({
    caption: "Stays",
    columns: [
      { title: "kind", cell: (item) => item.kind },
      { title: "name", cell: (item) => el("span", { class: "mono" }, nameOf(item)) },
      { title: "reason", cell: (item) => item.reason },
    ],
    rows: kept,
  }) : null;
}

// Names with ids cut to their first letters, in paths too.
const nameOf = (item) => item.name.replace(/[0-9a-f]{64}/g, shortId);

function itemsCard(disk, pins, act) {
  const header = ["kind", "name", "files", "bytes", "freed", "shared", "state", "last_used", "named_by"];
  return el("div", { class: "card" }, el("h2", {}, "Everything under the root"), dataTable({
    caption: "By kind, the largest first; shared bytes belong to other items as well",
    columns: [
      { title: "name", cell: (item) => itemLink(item) },
      { title: "kind", cell: (item) => item.kind },
      { title: "size", number: true, cell: (item) => bytes(item.bytes) },
      { title: "frees", number: true, cell: (item) => bytes(item.freed) },
      { title: "state", cell: (item) => (item.kind === "cache" ? stateMark(item.state) : item.state) },
      { title: "last used", cell: (item) => moment(item.last_used) },
      { title: "named by", cell: (item) => usersOf(item) },
      { title: "", cell: (item) => (["cache", "probe"].includes(item.kind) ? itemActions(item, pins.get(item.name), act) : "") },
    ],
    rows: disk.items,
  }), downloadButtons("disk-use", null, () => [header, disk.items.map((item) => header.map((name) => (name === "named_by" ? item.named_by.map((user) => user.name).join(" ") : item[name])))]));
}

function itemLink(item) {
  const href = { cache: addressOf(`caches/${item.name}`), job: addressOf(`jobs/${item.name.split("/").at(-1)}`) }[item.kind];
  return href ? el("a", { class: "mono", href }, shortId(item.name.split("/").at(-1))) : el("span", { class: "mono breaks" }, nameOf(item));
}

function usersOf(item) {
  const names = item.named_by.map((user) => `${user.kind} ${/^[0-9a-f]{32,64}$/.test(user.name) ? shortId(user.name) : user.name}`);
  return names.length > 3 ? `${names.slice(0, 3).join(", ")} and ${names.length - 3} more` : names.join(", ");
}

function itemActions(item, pin, act) {
  const shown = nameOf(item);
  const toggle = pin
    ? el("button", { type: "button", "aria-label": `Unpin ${shown}`, title: pin.reason, on: { click: () => act(() => change("DELETE", `/v1/pins/${part(item.name)}`)) } }, "unpin")
    : el("button", { type: "button", "aria-label": `Pin ${shown}`, on: { click: () => act(() => change("PUT", `/v1/pins/${part(item.name)}`, { reason: "pinned in the dashboard" })) } }, "pin");
  const remove = el("button", {
    type: "button", class: "danger", "aria-label": `Remove ${shown}`,
    on: {
      click: () => {
        if (remove.dataset.asked) {
          act(() => change("DELETE", `/v1/${item.kind}s/${part(item.name)}`));
          return;
        }
        remove.dataset.asked = "yes";
        remove.textContent = `remove ${bytes(item.freed)}?`;
      },
    },
  }, "remove");
  return el("span", { class: "choices" }, toggle, remove);
}
