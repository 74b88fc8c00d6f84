// The disk: what caches, probes and leftovers take, what could go, and what is pinned.

import { getJson } from "./api.js";
import { el, replace } from "./elements.js";

export async function showStorage({ body, signal }) {
  const disk = await getJson("/v1/disk", {}, signal);
  replace(body, el("pre", { tabindex: "0", "aria-label": "Use of the disk" }, JSON.stringify(disk, null, 2)));
}
