"""Headers that the proxy adds and removes."""

# What the proxy adds to an answer; everything else is fal's, in fal's order.
ADDED = {"x-request-id", "server-timing"}
# What belongs to one connection, and the clock: aiohttp dates an answer that fal did not.
OF_THE_CONNECTION = {"connection", "keep-alive", "transfer-encoding", "date"}
# What speaks for fal's origin or is a credential of fal's own apps.
KEPT_BACK = {
    "alt-svc",
    "access-control-allow-origin",
    "access-control-allow-credentials",
    "x-fal-cdn-token",
}
