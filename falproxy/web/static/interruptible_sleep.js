/** Waiting that ends early when there is reason to look. */

/**
 * @param {number} ms
 * @param {AbortSignal} [signal] rejects when it is aborted
 * @returns {Promise<void>}
 */
export function pause(ms, signal) {
  return new Promise((resolve, reject) => {
    const events = ["falproxy:wake", "falproxy:key"];
    const timer = setTimeout(end, ms);
    function end() {
      clearTimeout(timer);
      events.forEach((name) => window.removeEventListener(name, end));
      signal?.removeEventListener("abort", end);
      if (signal?.aborted) {
        reject(signal.reason);
      } else {
        resolve();
      }
    }
    events.forEach((name) => window.addEventListener(name, end));
    signal?.addEventListener("abort", end);
    if (signal?.aborted) {
      end();
    }
  });
}
