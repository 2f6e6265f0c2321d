// Requests to our own server, with errors a reader understands.

// Milliseconds until an answer counts as missing. A burst queues in the browser.
const PATIENCE = { predict: 60_000, stats: 10_000 };

export function predict(path, pixels) {
  return ask(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ pixels }),
    signal: AbortSignal.timeout(PATIENCE.predict),
  });
}

export function stats() {
  return ask("stats", {
    cache: "no-store",
    signal: AbortSignal.timeout(PATIENCE.stats),
  });
}

async function ask(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    const late = error.name === "TimeoutError";
    throw new Error(late ? "The server takes too long." : "The server is not reachable.");
  }
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) {
    throw new Error(`The server answered ${response.status} (${answer.error ?? "no reason"}).`);
  }
  return answer;
}
