"""Local pages of the sandbox: a description, and the counters."""

from aiohttp import web

from falproxy.sandbox.models import MODELS
from falproxy.sandbox.request import FalRequest
from falproxy.sandbox.responses import FalResponse
from falproxy.sandbox.state import MICROS_PER_USD

INDEX = """This is the falproxy SANDBOX: an offline fal emulator.

It runs no models and costs nothing. It serves all hosts of fal, by the Host
header or the first segment of the path:

  curl -H 'Authorization: Key any:key' -H 'Content-Type: application/json' \\
       -d '{"prompt": "a lighthouse"}' %(url)s/fal.run/fal-ai/flux/schnell

Request errors in the prompt: "!error 422 content_policy_violation", "!error 503 times=2",
"!error 429 concurrent_requests_limit at=submit", "!delay 3". Counters: %(url)s/sandbox/state

Models:
  %(models)s
"""


async def index(request: FalRequest) -> web.StreamResponse:
    url = request.sandbox.public_url.rstrip("/")
    return web.Response(text=INDEX % {"url": url, "models": "\n  ".join(MODELS)})


async def counters(request: FalRequest) -> web.StreamResponse:
    """GET /sandbox/state: the counters since the start or the last reset."""
    sandbox = request.sandbox
    document: dict[str, object] = {
        "jobs": sandbox.jobs,
        "spent": float(sandbox.cost),
        "calls": sandbox.calls,
        "jobs_by_endpoint": dict(sandbox.jobs_by_endpoint),
    }
    if sandbox.cost_by_tag:
        by_tag = {tag: cost / MICROS_PER_USD for tag, cost in sandbox.cost_by_tag.items()}
        document["spent_by_tag"] = by_tag
    if sandbox.balance is not None:
        document["balance"] = float(sandbox.balance)
    return FalResponse(200, document).to_web_response()
