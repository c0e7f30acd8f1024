/** Other tabs with the same page: they hear of each change, and one of them sees to a job. */

const SCOPE = `falproxy:${new URL(".", document.baseURI).pathname}`;
const channel = "BroadcastChannel" in window ? new BroadcastChannel(SCOPE) : null;

/** Tells the other tabs that jobs have changed. @param {string[]} ids */
export function tell(ids) {
  channel?.postMessage(ids);
}

/** @param {(ids: string[]) => void} heard is called with what other tabs tell */
export function listen(heard) {
  channel?.addEventListener("message", ({ data }) => heard(data));
}

/** Whether this tab can know that no other one does the same. */
export const canBeAlone = Boolean(navigator.locks);

/**
 * Does something that only one tab may do at a time. When the tab that does it is closed, the next one
 * takes over. Without locks (a page that is not on https) every tab does it.
 *
 * @param {string} id
 * @param {() => Promise<void>} work
 */
export async function alone(id, work) {
  await (canBeAlone ? navigator.locks.request(`${SCOPE}${id}`, work) : work());
}
