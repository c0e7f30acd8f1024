"""The sandbox's own pages: what it is, and what it has counted."""

from aiohttp import web

from falproxy.sandbox.models import MODELS
from falproxy.sandbox.request import Visit
from falproxy.sandbox.responses import Answer

HELLO = """This is the falproxy SANDBOX: an offline fal. Nothing here is real, and nothing is paid.

Every host of fal answers here, by its name in the Host header or as the first part of the path:

  curl -H 'Authorization: Key any:key' -H 'Content-Type: application/json' \\
       -d '{"prompt": "a lighthouse"}' %(url)s/fal.run/fal-ai/flux/schnell

Ask for errors in the prompt: "!error 422 content_policy_violation", "!error 503 times=2",
"!error 429 concurrent_requests_limit at=submit", "!delay 3". Counters: %(url)s/sandbox/state

Models:
  %(models)s
"""


async def hello(visit: Visit) -> web.StreamResponse:
    url = visit.sandbox.public_url.rstrip("/")
    return web.Response(text=HELLO % {"url": url, "models": "\n  ".join(MODELS)})


async def state(visit: Visit) -> web.StreamResponse:
    """GET /sandbox/state: what was counted since the start or the last reset."""
    sandbox = visit.sandbox
    counters = {
        "jobs": sandbox.jobs,
        "spent": float(sandbox.spent),
        "calls": sandbox.calls,
        "jobs_by_endpoint": dict(sandbox.jobs_by_endpoint),
    }
    return Answer(200, counters).response()
