/**
 * A session of live video: three calls of fal through the proxy, and the video by WebRTC. fal's
 * `fal.realtime.open` makes the same calls.
 */
const PROXY_URL = "/api/fal/proxy";
const LIVE_URL = "https://wma.fal.run";
const SESSION_TIMEOUT = 120_000; // milliseconds, as all durations
const GATHERING_TIMEOUT = 5_000;
const HEARTBEAT_INTERVAL = 5_000;
const HEARTBEAT_TIMEOUT = 4_000;
const HEARTBEAT_FAILURES_MAX = 3;

/**
 * Open a session. Rejects with an error if it cannot be opened.
 *
 * onStream: receives the MediaStream of the model.
 * onEnd: called once, with a sentence, when the session has ended without `close`.
 *
 * Returns `{sendPrompt, close}`.
 */
export async function openLiveSession({ endpoint, onStream, onEnd }) {
  const connection = new RTCPeerConnection({ iceServers: await fetchIceServers(endpoint) });
  let heartbeats = 0;
  const close = () => {
    clearTimeout(heartbeats);
    heartbeats = null;
    connection.close();
  };
  const end = (reason) => {
    if (heartbeats !== null) {
      close();
      onEnd(reason);
    }
  };

  try {
    const video = connection.addTransceiver("video", { direction: "recvonly" });
    connection.addEventListener("track", ({ streams, track }) => {
      onStream(streams[0] ?? new MediaStream([track]));
    });
    const control = connection.createDataChannel("control");
    await connection.setLocalDescription();
    await waitForCandidates(connection);

    // Every call of /session opens a session that is paid for. It is never repeated: if the
    // response is lost, the session ends by itself, since it has no heartbeats.
    const { sdp, type } = connection.localDescription;
    const session = await post(
      `${LIVE_URL}/session`,
      { app_id: endpoint, sdp, type },
      SESSION_TIMEOUT,
    );
    await connection.setRemoteDescription({ type: session.type, sdp: session.sdp });
    if (video.currentDirection !== "recvonly") {
      throw new Error("The model sends no video.");
    }
    connection.addEventListener("connectionstatechange", () => {
      if (connection.connectionState === "failed") {
        end("The connection to the model was lost.");
      }
    });
    sendHeartbeats(session.session_id);
    return { sendPrompt: (prompt) => send(control, { prompt }), close };
  } catch (error) {
    close();
    throw error;
  }

  function sendHeartbeats(sessionId, failures = 0) {
    heartbeats = setTimeout(async () => {
      let failed = 0;
      try {
        const body = { session_id: sessionId };
        const { alive } = await post(`${LIVE_URL}/session/heartbeat`, body, HEARTBEAT_TIMEOUT);
        if (!alive) {
          end("The session has ended.");
        }
      } catch {
        failed = failures + 1;
        if (failed === HEARTBEAT_FAILURES_MAX) {
          end("The proxy does not respond.");
        }
      }
      if (heartbeats !== null) {
        sendHeartbeats(sessionId, failed);
      }
    }, HEARTBEAT_INTERVAL);
  }
}

async function fetchIceServers(endpoint) {
  const servers = await post(`${LIVE_URL}/ice`, { app_id: endpoint });
  if (servers.status !== "app_managed") {
    return servers.ice_servers;
  }
  return (await post(`https://fal.run/${endpoint}/ice`, {})).ice_servers;
}

/** Wait until all addresses of this browser are in the offer, since none can be added later. */
function waitForCandidates(connection) {
  return new Promise((resolve) => {
    const check = () => {
      if (connection.iceGatheringState === "complete") {
        resolve();
      }
    };
    connection.addEventListener("icegatheringstatechange", check);
    setTimeout(resolve, GATHERING_TIMEOUT);
    check();
  });
}

function send(channel, message) {
  if (channel.readyState === "open") {
    channel.send(JSON.stringify(message));
  } else if (channel.readyState === "connecting") {
    channel.addEventListener("open", () => channel.send(JSON.stringify(message)), { once: true });
  }
}

/** Return the JSON document of fal's response. Rejects with an error if it is none. */
async function post(target, body, timeout = SESSION_TIMEOUT) {
  const response = await fetch(PROXY_URL, {
    method: "POST",
    headers: { "Content-Type": "application/json", "x-fal-target-url": target },
    body: JSON.stringify(body),
    signal: AbortSignal.timeout(timeout),
  });
  const text = await response.text();
  if (!response.ok) {
    throw new Error(errorMessage(text) || `The response was ${response.status}.`);
  }
  return JSON.parse(text);
}

function errorMessage(text) {
  try {
    const { message, detail } = JSON.parse(text);
    return message ?? (typeof detail === "string" ? detail : "");
  } catch {
    return text.slice(0, 200);
  }
}
