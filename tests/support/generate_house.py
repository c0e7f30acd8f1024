"""The whole proxy before the offline fal, for tests of what its facades and its ledger do."""

import asyncio
import base64
import io
import json
import sqlite3
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import ClientSession, TCPConnector, web
from aiohttp.test_utils import TestServer
from multidict import CIMultiDictProxy

from falproxy import create_app
from falproxy.sandbox import Sandbox
from falproxy.sandbox import create_app as create_sandbox
from falproxy.sandbox.state import SeenRequest
from falproxy.stores.ledger import CallRecord, UsageQuery
from falproxy.stores.ledger.writer import LEDGER_WRITER
from tests.support.key_search import CANARY, search_answers
from tests.support.offline_fal import png
from tests.support.settings import make_settings
from tests.support.urls import PROXY

GENERATE = "/api/images/generate"
ASYNC = {"Prefer": "respond-async"}
SOON = 10.0  # seconds in which whatever is waited for has happened
PNG = png()


def uri(content: bytes = PNG) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


async def until(condition: Callable[[], object]) -> None:
    """Returns when it holds. Raises: TimeoutError."""
    async with asyncio.timeout(SOON):
        while not condition():
            await asyncio.sleep(0.005)


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    document: Any
    headers: CIMultiDictProxy[str]

    @property
    def refusal(self) -> tuple[int, str]:
        """Status and code of an error in the plain shape."""
        assert set(self.document) == {"error"}, self.document
        assert set(self.document["error"]) == {"code", "message"}
        assert self.message.endswith(".")
        return self.status, self.document["error"]["code"]

    @property
    def message(self) -> str:
        return str(self.document["error"]["message"])


@dataclass(frozen=True, slots=True)
class House:
    """A proxy, the offline fal behind it, and a client. origin, fal: where the two listen."""

    app: web.Application
    origin: str
    fal: str
    sandbox: Sandbox
    session: ClientSession
    data_dir: Path

    async def ask(self, method: str, path: str, **options: Any) -> Reply:
        async with (
            asyncio.timeout(SOON),
            self.session.request(method, self.origin + path, **options) as response,
        ):
            text = await response.text()
            is_json = response.content_type == "application/json"
            document = json.loads(text) if is_json and text else None
            return Reply(response.status, document, response.headers)

    async def generate(
        self, model: str, inputs: Mapping[str, object], headers: Any = None, **more: object
    ) -> Reply:
        body = {"model": model, "inputs": inputs, **more}
        return await self.ask("POST", GENERATE, json=body, headers=headers)

    async def through(self, target: str, body: object = None, **options: Any) -> Reply:
        """A call by the header route; a POST if there is a body."""
        headers = {"x-fal-target-url": target, **options.pop("headers", {})}
        method = options.pop("method", "GET" if body is None else "POST")
        return await self.ask(method, PROXY, json=body, headers=headers, **options)

    async def job(self, job_id: str, headers: Any = None) -> Reply:
        return await self.ask("GET", f"/api/images/jobs/{job_id}", headers=headers)

    async def ended(self, job_id: str, headers: Any = None) -> Any:
        """A job at its end."""
        async with asyncio.timeout(SOON):
            while True:
                reply = await self.job(job_id, headers)
                assert reply.status == 200, reply
                if reply.document["status"] not in ("queued", "running"):
                    return reply.document
                await asyncio.sleep(0.02)

    def file(self, content: bytes = PNG) -> str:
        """The address of a picture that fal keeps."""
        key = self.sandbox.files.new_key("in.png")
        self.sandbox.files.put(key, io.BytesIO(content), "image/png")
        return self.sandbox.file_url(key)

    @property
    def sent(self) -> list[SeenRequest]:
        """What of fal's models was asked, whatever came of it."""
        return [seen for seen in self.sandbox.seen if seen.host in ("fal.run", "queue.fal.run")]

    @property
    def submits(self) -> int:
        return sum(seen.method == "POST" for seen in self.sent)

    @property
    def cancels(self) -> list[int]:
        return [seen.status for seen in self.sent if seen.path.endswith("/cancel")]

    @property
    def inputs(self) -> list[Any]:
        """What the jobs were asked that were paid."""
        return [paid.input for paid in self.sandbox.paid]

    def jobs(self) -> list[dict[str, Any]]:
        """All jobs in the ledger, the oldest first."""
        return rows_of(self.data_dir, "SELECT * FROM falproxy_jobs ORDER BY created_at")

    async def entries(self) -> list[CallRecord]:
        """All calls in the ledger, the newest first."""
        book = self.app[LEDGER_WRITER]
        await until(lambda: not book.pending_rows)
        return await book.ledger.latest(UsageQuery())


def rows_of(data_dir: Path, statement: str) -> list[dict[str, Any]]:
    with closing(sqlite3.connect(data_dir / "ledger.sqlite")) as file:
        file.row_factory = sqlite3.Row
        return [dict(row) for row in file.execute(statement)]


@asynccontextmanager
async def open_house(data_dir: Path, speed: float = 1000, **given: Any) -> AsyncIterator[House]:
    """given: settings of the proxy."""
    sandbox = Sandbox(speed=speed)
    client = ClientSession(connector=TCPConnector(limit=0), trace_configs=[search_answers()])
    async with TestServer(create_sandbox(sandbox)) as server, client as session:
        fal = sandbox.public_url = f"http://127.0.0.1:{server.port}"
        named: dict[str, Any] = {
            "fal_key": CANARY,
            "upstream_origin": fal,
            "data_dir": data_dir,
        } | given
        app = create_app(make_settings(**named))
        async with TestServer(app) as proxy:
            origin = f"http://127.0.0.1:{proxy.port}"
            yield House(app, origin, fal, sandbox, session, data_dir)
    for seen in sandbox.seen:
        is_file = seen.host.startswith("127.0.0.1")
        keys = seen.headers.getall("Authorization", [])
        assert keys == ([] if is_file else [f"Key {CANARY}"]), seen.path
