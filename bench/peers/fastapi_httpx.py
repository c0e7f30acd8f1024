"""What a team writes in an afternoon with FastAPI and httpx: one client, bodies streamed."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import httpx
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import StreamingResponse
from starlette.background import BackgroundTask

HOSTS = {"fal.run", "queue.fal.run"}
UP = ("accept", "content-type", "content-length", "user-agent")
NOT_DOWN = {"connection", "keep-alive", "transfer-encoding"}
KEY = f"Key {os.environ['FAL_KEY']}"


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
    async with httpx.AsyncClient(limits=limits, timeout=httpx.Timeout(5, read=3600)) as client:
        app.state.client = client
        yield


app = FastAPI(lifespan=lifespan)


@app.api_route("/api/fal/proxy", methods=["GET", "POST"])
async def proxy(request: Request) -> StreamingResponse:
    target = request.headers.get("x-fal-target-url", "")
    parts = urlsplit(target)
    if parts.scheme != "https" or parts.hostname not in HOSTS:
        raise HTTPException(412, "The target must be a fal.ai URL.")
    client: httpx.AsyncClient = request.app.state.client
    headers = {name: value for name in UP if (value := request.headers.get(name))}
    body = request.stream() if request.method == "POST" else None
    call = client.build_request(
        request.method, target, headers=headers | {"authorization": KEY}, content=body
    )
    answer = await client.send(call, stream=True)
    down = {name: value for name, value in answer.headers.items() if name not in NOT_DOWN}
    return StreamingResponse(
        answer.aiter_raw(), answer.status_code, down, background=BackgroundTask(answer.aclose)
    )
