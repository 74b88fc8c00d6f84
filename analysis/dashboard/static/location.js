// The address after `#`: views keep what they show there, so that a link gives the same view.

export function addressOf(path, parameters = {}) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(parameters)) {
    if (value !== null && value !== undefined && value !== "") query.set(name, String(value));
  }
  const text = query.toString();
  const parts = path.split("/").map(encodeURIComponent).join("/");
  return `#/${parts}${text ? `?${text}` : ""}`;
}

// Replaces the address without showing the view anew.
export function rememberState(path, parameters) {
  history.replaceState(null, "", addressOf(path, parameters));
}

export function numberOf(parameters, name, otherwise = null) {
  const text = parameters.get(name);
  return text !== null && /^-?\d+$/.test(text) ? Number(text) : otherwise;
}

// Calls `work` now and every `seconds` after it has ended, until the view is left; not while
// nobody sees the page.
export async function repeat(work, seconds, signal) {
  while (!signal.aborted) {
    let goesOn = true;
    try {
      if (!document.hidden) goesOn = (await work()) !== false;
    } catch (error) {
      if (!signal.aborted) console.info(`not refreshed: ${error.message}`);
    }
    if (!goesOn) return;
    await new Promise((resolve) => {
      const timer = setTimeout(resolve, seconds * 1000);
      signal.addEventListener("abort", () => { clearTimeout(timer); resolve(); }, { once: true });
    });
  }
}
