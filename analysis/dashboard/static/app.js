// The dashboard: one view per address after `#`, such as #/lens?cache=3f2a&probe=ridge-3f2a.

import { getJson, onTokenNeeded, signIn } from "./api.js";
import { showBases } from "./basis_view.js";
import { showCache, showCaches } from "./cache_views.js";
import { showCurves } from "./curves_view.js";
import { el, errorBox, field, loading, replace } from "./elements.js";
import { showJob, showJobs, showNewJob } from "./job_views.js";
import { showLens } from "./lens_view.js";
import { showStorage } from "./storage_view.js";
import { showStudies } from "./study_view.js";
import { startTheme } from "./theme.js";

const VIEWS = [
  ["caches", "Caches"], ["jobs", "Jobs"], ["lens", "Lenses"], ["curves", "Curves"],
  ["bases", "Bases"], ["studies", "Studies"], ["storage", "Storage"],
];

const main = document.getElementById("main");
let leaving = new AbortController();

function viewOf(parts) {
  const [view, name] = parts;
  if (view === "caches") return name ? [showCache, name] : [showCaches];
  if (view === "jobs") return name === "new" ? [showNewJob] : name ? [showJob, name] : [showJobs];
  return { lens: [showLens], curves: [showCurves], bases: [showBases, name], studies: [showStudies, name], storage: [showStorage] }[view] ?? null;
}

// Shows the view of the address; the one before gets its signal, and stops what it watches.
async function route({ focus = true } = {}) {
  leaving.abort();
  leaving = new AbortController();
  const { signal } = leaving;
  const [path, query = ""] = location.hash.replace(/^#\/?/, "").split("?");
  const parts = (path || "caches").split("/").map(decodeURIComponent);
  const found = viewOf(parts);
  const title = VIEWS.find(([name]) => name === parts[0])?.[1] ?? "Not found";
  document.title = `${title} – residua`;
  for (const link of document.querySelectorAll("#views a")) {
    if (link.dataset.view === parts[0]) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const heading = el("h1", { tabindex: "-1" }, title);
  const body = el("div", {}, loading());
  replace(main, heading, body);
  if (focus) heading.focus({ preventScroll: true });
  if (!found) {
    replace(body, el("p", {}, "There is no such view. ", el("a", { href: "#/caches" }, "To the caches")));
    return;
  }
  const [show, name] = found;
  try {
    await show({ body, heading, name, parameters: new URLSearchParams(query), signal, path: parts[0] });
  } catch (error) {
    if (!signal.aborted) replace(body, errorBox(error));
  }
}

// The token: asked for where the service wants one, kept as a cookie that scripts cannot read.
const dialog = document.getElementById("token-dialog");
const sessionButton = document.getElementById("session");

// One dialog for all requests that wait for the token.
let asking = null;

function askForToken() {
  asking ??= showTokenDialog().finally(() => { asking = null; });
  return asking;
}

function showTokenDialog() {
  return new Promise((resolve) => {
    const input = el("input", { type: "password", autocomplete: "current-password", required: true });
    const problem = el("div");
    const close = (answer) => {
      dialog.close();
      resolve(answer);
    };
    const form = el("form", {
      on: {
        submit: async (event) => {
          event.preventDefault();
          try {
            await signIn(input.value.trim());
            await showSession();
            close(true);
          } catch (error) {
            replace(problem, errorBox(error));
          }
        },
      },
    },
    el("h2", { id: "token-title" }, "Token of this service"),
    el("p", { class: "quiet" }, "What changes something needs the token that residua serve printed when it first started."),
    field("Token", input, { size: "wide" }), problem,
    el("div", { class: "actions" },
      el("button", { type: "submit", class: "main" }, "Sign in"),
      el("button", { type: "button", on: { click: () => close(false) } }, "Cancel")));
    replace(dialog, form);
    dialog.oncancel = () => resolve(false);
    dialog.showModal();
    input.focus();
  });
}

async function showSession() {
  try {
    const { scope } = await getJson("/v1/session");
    sessionButton.textContent = scope ? `Signed in (${scope})` : "Sign in";
  } catch {
    sessionButton.textContent = "Sign in";
  }
}

replace(document.getElementById("views"), VIEWS.map(([name, label]) =>
  el("li", {}, el("a", { href: `#/${name}`, "data-view": name }, label))));
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  main.focus();
});
startTheme(document.getElementById("theme"));
onTokenNeeded(askForToken);
sessionButton.addEventListener("click", askForToken);
window.addEventListener("hashchange", () => route());
showSession();
route({ focus: false });
