"""What a team writes in an afternoon with aiohttp alone: one session, bodies streamed."""

import os
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

from aiohttp import ClientSession, ClientTimeout, TCPConnector, web

HOSTS = {"fal.run", "queue.fal.run"}
UP = ("accept", "content-type", "content-length", "user-agent")
NOT_DOWN = {"connection", "keep-alive", "transfer-encoding"}
KEY = f"Key {os.environ['FAL_KEY']}"
SESSION = web.AppKey("session", ClientSession)


async def session(app: web.Application) -> AsyncIterator[None]:
    timeout = ClientTimeout(total=None, connect=5, sock_read=3600)
    async with ClientSession(
        auto_decompress=False, connector=TCPConnector(limit=0), timeout=timeout
    ) as opened:
        app[SESSION] = opened
        yield


async def proxy(request: web.Request) -> web.StreamResponse:
    target = request.headers.get("x-fal-target-url", "")
    parts = urlsplit(target)
    if parts.scheme != "https" or parts.hostname not in HOSTS:
        raise web.HTTPPreconditionFailed(text="The target must be a fal.ai URL.")
    headers = {name: value for name in UP if (value := request.headers.get(name))}
    body = request.content if request.can_read_body else None
    async with request.app[SESSION].request(
        request.method, target, headers=headers | {"authorization": KEY}, data=body
    ) as answer:
        down = {n: v for n, v in answer.headers.items() if n.lower() not in NOT_DOWN}
        response = web.StreamResponse(status=answer.status, headers=down)
        await response.prepare(request)
        async for chunk in answer.content.iter_any():
            await response.write(chunk)
        await response.write_eof()
    return response


app = web.Application()
app.cleanup_ctx.append(session)
app.router.add_route("*", "/api/fal/proxy", proxy)

if __name__ == "__main__":
    web.run_app(app, host="127.0.0.1", port=int(os.environ["PORT"]), print=None)
