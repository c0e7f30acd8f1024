"""fal's signalling of live video (fal-api.md, 3.8), on a fake of fal."""

import asyncio
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
from aiohttp import ClientResponse, web

from falproxy.app import live_pipeline
from falproxy.stores.live_sessions import LiveSessions
from tests.support.fake_clock import FakeClock
from tests.support.fake_fal import FakeFal, Seen
from tests.support.gateway import Gateway

HOST = "wma.fal.run"
ICE, SESSION = f"https://{HOST}/ice", f"https://{HOST}/session"
HEARTBEAT = f"{SESSION}/heartbeat"
DIRECTOR = "minimax/h3-max/director"
OFFER = {"app_id": DIRECTOR, "sdp": "v=0\r\no=- 1 2 IN IP4 0.0.0.0\r\n", "type": "offer"}


@dataclass(slots=True)
class FakeLive:
    """Numbers the sessions that it opens.

    clock: of the proxy's sessions: no time passes for them but what a test lets pass.
    over: sessions whose heartbeats it responds to with `{"alive": false}`.
    delay: set to hold back the response to a session.
    price: USD for a unit; None for no price.
    """

    fake: FakeFal
    monkeypatch: pytest.MonkeyPatch
    clock: FakeClock = field(default_factory=lambda: FakeClock(1_800_000_000.0))
    opened: int = 0
    over: set[str] = field(default_factory=set)
    status: int = 200
    delay: asyncio.Event | None = None
    price: float | None = None
    unit: str = "second"

    def __post_init__(self) -> None:
        self.fake.respond = self.respond
        sessions = partial(LiveSessions, clock=self.clock)
        self.monkeypatch.setattr(live_pipeline, "LiveSessions", sessions)

    async def respond(self, request: web.Request) -> web.StreamResponse:
        if request.host == "api.fal.ai":
            return self._price_list(request)
        if request.host == "fal.ai":  # the schema of a model
            return web.json_response(None, status=404)
        assert request.host == HOST or request.path.endswith("/ice"), request.path
        path = request.path.rstrip("/")
        body: Any = await request.json()
        if path.endswith("/ice"):
            return web.json_response({"ice_servers": [{"urls": "stun:stun.example.com:3478"}]})
        if path == "/session":
            if "app_id" not in body:
                return web.Response(status=422, text="app_id is missing")
            self.opened += 1
            if self.delay is not None:
                await self.delay.wait()
            session = {"session_id": f"live-{self.opened}", "sdp": "v=0\r\n", "type": "answer"}
            return web.json_response(session, status=self.status)
        assert path == "/session/heartbeat", path
        return web.json_response({"alive": body.get("session_id") not in self.over})

    def _price_list(self, request: web.Request) -> web.Response:
        if self.price is None:
            return web.json_response({"prices": []})
        names = {"endpoint_id": request.query["endpoint_id"], "currency": "USD"}
        return web.json_response(
            {"prices": [{**names, "unit_price": self.price, "unit": self.unit}]}
        )

    @property
    def calls(self) -> list[Seen]:
        """The calls so far, without those of other hosts."""
        return [seen for seen in self.fake.seen if seen.header("host") == HOST]

    @property
    def paths(self) -> list[str]:
        return [seen.target for seen in self.calls]


async def open_session(
    gateway: Gateway, *headers: tuple[str, str], app: str = DIRECTOR
) -> ClientResponse:
    response = await gateway.call(SESSION, json=OFFER | {"app_id": app}, headers=headers)
    await response.read()
    return response


async def opened_session(gateway: Gateway, *headers: tuple[str, str], app: str = DIRECTOR) -> str:
    response = await open_session(gateway, *headers, app=app)
    document = await response.json()
    assert response.status == 200, document
    return str(document["session_id"])


async def beat(gateway: Gateway, session: str, *headers: tuple[str, str]) -> bool:
    """Send a heartbeat. Return whether the session is alive."""
    response = await gateway.call(HEARTBEAT, json={"session_id": session}, headers=headers)
    assert response.status == 200, await response.text()
    return bool((await response.json())["alive"])
