// The gateway. Every answer is JSON; what goes wrong is an ApiError with the code and the words of the gateway.

const KEY = "pgpark.token";

export class ApiError extends Error {
  constructor(status, code, message, hint, retryAfter) {
    super(message);
    Object.assign(this, { status, code, hint, retryAfter });
  }
}

export const token = {
  get: () => sessionStorage.getItem(KEY),
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

const PATIENCE_MS = 10_000;

/** status 0: nobody answered. */
export async function call(method, path, body) {
  const headers = { Accept: "application/json" };
  if (token.get()) headers.Authorization = `Bearer ${token.get()}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let answer;
  let given;
  try {
    answer = await fetch(path, {
      method, headers, body: body === undefined ? undefined : JSON.stringify(body), cache: "no-store",
      signal: AbortSignal.timeout(PATIENCE_MS),
    });
    given = answer.status === 204 ? null : await answer.json().catch(() => null);
  } catch {
    throw new ApiError(0, "unreachable", "the gateway does not answer", "", null);
  }
  if (!answer.ok) {
    const error = given?.error ?? {};
    const after = Number(answer.headers.get("Retry-After"));
    throw new ApiError(answer.status, error.code ?? "error", error.message ?? `the gateway answered ${answer.status}`, error.hint ?? "", after || null);
  }
  return given;
}

const at = (pool, rest = "") => `/pools/${encodeURIComponent(pool)}${rest}`;

export const lots = () => call("GET", "/lots");
export const lot = (pool) => call("GET", at(pool, "/lot?max_tasks=100"));
export const history = (pool) => call("GET", at(pool, "/history?period=3600&step=60"));
export const setState = (pool, state) => call("POST", at(pool, "/state"), { state });
export const resize = (pool, max_units) => call("PATCH", at(pool), { max_units });
export const cancel = (pool, id) => call("DELETE", at(pool, `/tasks/${id}`));
export const retry = (pool, id) => call("POST", at(pool, `/tasks/${id}/retry`));
