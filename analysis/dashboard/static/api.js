// Requests to the service. Errors of the service keep its message, class and code.

export class ServiceError extends Error {
  constructor(status, body) {
    super(body?.message ?? `the service answered with status ${status}`);
    this.status = status;
    this.code = body?.code ?? null;
  }
}

// Asks for the token; set by app.js, resolves to whether somebody gave a good one.
let askForToken = async () => false;

export function onTokenNeeded(ask) {
  askForToken = ask;
}

async function send(path, options) {
  let response;
  try {
    response = await fetch(path, { credentials: "same-origin", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("the service cannot be reached; is it still running?");
  }
  if (response.ok) return response;
  let body = null;
  try {
    body = await response.json();
  } catch {
    body = null;
  }
  throw new ServiceError(response.status, body);
}

// Asks for the token once where the service wants it: to change something, and in a private
// service to read.
async function sendWithToken(path, options) {
  try {
    return await send(path, options);
  } catch (error) {
    if (!(error instanceof ServiceError) || error.status !== 401 || !(await askForToken())) throw error;
    return send(path, options);
  }
}

export async function getJson(path, parameters = {}, signal = undefined) {
  return (await sendWithToken(withQuery(path, parameters), { signal })).json();
}

export async function getText(path, signal = undefined) {
  return (await sendWithToken(path, { signal })).text();
}

export async function change(method, path, body = undefined) {
  const options = { method, headers: { "Content-Type": "application/json" } };
  if (body !== undefined) options.body = JSON.stringify(body);
  return readBody(await sendWithToken(path, options));
}

async function readBody(response) {
  const text = await response.text();
  return text ? JSON.parse(text) : null;
}

export async function signIn(token) {
  await send("/v1/session", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ token }),
  });
}

export function withQuery(path, parameters) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(parameters)) {
    if (value !== null && value !== undefined && value !== "") query.set(name, String(value));
  }
  const text = query.toString();
  return text ? `${path}?${text}` : path;
}

export const part = (text) => encodeURIComponent(text);
