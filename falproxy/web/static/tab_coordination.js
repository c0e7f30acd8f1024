/** Coordination between tabs: change notifications, and a lock so that one tab alone runs a job. */

const SCOPE = `falproxy:${new URL(".", document.baseURI).pathname}`;
const channel = "BroadcastChannel" in window ? new BroadcastChannel(SCOPE) : null;

/** Notify other tabs of changed or removed jobs. @param {string[]} ids */
export function broadcastChanges(ids) {
  channel?.postMessage(ids);
}

/** @param {(ids: string[]) => void} onChange receives the job ids that other tabs have broadcast */
export function onChangesInOtherTabs(onChange) {
  channel?.addEventListener("message", ({ data }) => onChange(data));
}

/** Whether the browser has locks (https or localhost). */
export const hasTabLocks = Boolean(navigator.locks);

/**
 * Run a function while holding the lock of a job. If the tab that holds it is closed, the next one
 * gets it. Without locks every tab runs the function.
 *
 * @param {string} id
 * @param {() => Promise<void>} run
 */
export async function withTabLock(id, run) {
  await (hasTabLocks ? navigator.locks.request(`${SCOPE}${id}`, run) : run());
}
