/** A sleep that ends early when there is a reason to poll again. */

/**
 * @param {number} ms
 * @param {AbortSignal} [signal] rejects the promise when aborted
 * @returns {Promise<void>}
 */
export function interruptibleSleep(ms, signal) {
  return new Promise((resolve, reject) => {
    const events = ["falproxy:wake", "falproxy:key"];
    const timer = setTimeout(finish, ms);
    function finish() {
      clearTimeout(timer);
      events.forEach((name) => window.removeEventListener(name, finish));
      signal?.removeEventListener("abort", finish);
      if (signal?.aborted) {
        reject(signal.reason);
      } else {
        resolve();
      }
    }
    events.forEach((name) => window.addEventListener(name, finish));
    signal?.addEventListener("abort", finish);
    if (signal?.aborted) {
      finish();
    }
  });
}
