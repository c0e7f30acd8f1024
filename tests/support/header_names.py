"""Headers that the proxy adds and removes."""

# Headers that the proxy adds to a response; all others are fal's, in fal's order.
ADDED = {
    "x-request-id",
    "server-timing",
    "x-content-type-options",
    "x-falproxy-cost",
    "x-falproxy-saved",
}
# Hop-by-hop headers, and `Date`, which aiohttp adds if fal did not send it.
OF_THE_CONNECTION = {"connection", "keep-alive", "transfer-encoding", "date"}
# Headers that concern fal's origin or are credentials of fal's own apps.
KEPT_BACK = {
    "alt-svc",
    "access-control-allow-origin",
    "access-control-allow-credentials",
    "x-accel-buffering",
    "x-fal-cdn-token",
}
