"""A complete proxy in front of the sandbox, for tests of dialects and of the ledger."""

import asyncio
import base64
import io
import json
import sqlite3
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import ClientSession, TCPConnector, web
from aiohttp.test_utils import TestServer
from multidict import CIMultiDictProxy

from falproxy import create_app
from falproxy.middleware.access import Authenticator
from falproxy.sandbox import Sandbox
from falproxy.sandbox import create_app as create_sandbox
from falproxy.sandbox.state import SeenRequest
from falproxy.stores.ledger import CallRecord, UsageQuery
from falproxy.stores.ledger.writer import LEDGER_WRITER
from tests.support.empty_ledger import with_empty_ledger
from tests.support.key_search import CANARY, leak_trace
from tests.support.offline_fal import png
from tests.support.settings import make_settings
from tests.support.urls import PROXY
from tests.support.waiting import SOON

GENERATE = "/api/images/generate"
ASYNC = {"Prefer": "respond-async"}
PNG = png()


def data_uri(content: bytes = PNG) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    document: Any
    headers: CIMultiDictProxy[str]

    @property
    def error(self) -> tuple[int, str]:
        """Status and code of an error in the default format."""
        assert set(self.document) == {"error"}, self.document
        assert set(self.document["error"]) == {"code", "message"}
        assert self.message.endswith(".")
        return self.status, self.document["error"]["code"]

    @property
    def message(self) -> str:
        return str(self.document["error"]["message"])


@dataclass(frozen=True, slots=True)
class SandboxProxy:
    """A proxy that uses the sandbox as fal, and a client session.

    origin, fal_origin: URLs of the proxy and of the sandbox.
    """

    app: web.Application
    origin: str
    fal_origin: str
    sandbox: Sandbox
    session: ClientSession
    data_dir: Path

    async def request(self, method: str, path: str, **options: Any) -> Reply:
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
        return await self.request("POST", GENERATE, json=body, headers=headers)

    async def call_target(self, target: str, body: object = None, **options: Any) -> Reply:
        """Call a URL of fal by the header route, with POST if there is a body."""
        headers = {"x-fal-target-url": target, **options.pop("headers", {})}
        method = options.pop("method", "GET" if body is None else "POST")
        return await self.request(method, PROXY, json=body, headers=headers, **options)

    async def job(self, job_id: str, headers: Any = None) -> Reply:
        return await self.request("GET", f"/api/images/jobs/{job_id}", headers=headers)

    async def wait_finished(self, job_id: str, headers: Any = None) -> Any:
        """Return a job when it has ended."""
        async with asyncio.timeout(SOON):
            while True:
                reply = await self.job(job_id, headers)
                assert reply.status == 200, reply
                if reply.document["status"] not in ("queued", "running"):
                    return reply.document
                await asyncio.sleep(0.02)

    def add_file(self, content: bytes = PNG) -> str:
        """Store an image in the sandbox, and return its URL."""
        key = self.sandbox.files.new_key("in.png")
        self.sandbox.files.put(key, io.BytesIO(content), "image/png")
        return self.sandbox.file_url(key)

    @property
    def model_requests(self) -> list[SeenRequest]:
        """Requests to models, including failed ones."""
        return [seen for seen in self.sandbox.seen if seen.host in ("fal.run", "queue.fal.run")]

    @property
    def submits(self) -> int:
        return sum(seen.method == "POST" for seen in self.model_requests)

    @property
    def cancels(self) -> list[int]:
        return [seen.status for seen in self.model_requests if seen.path.endswith("/cancel")]

    @property
    def inputs(self) -> list[Any]:
        """Inputs of the paid jobs."""
        return [paid.input for paid in self.sandbox.paid]

    def jobs(self) -> list[dict[str, Any]]:
        """Rows of all jobs in the ledger, oldest first."""
        return select_rows(self.data_dir, "SELECT * FROM falproxy_jobs ORDER BY created_at")

    async def records(self) -> list[CallRecord]:
        """All records in the ledger, newest first."""
        writer = self.app[LEDGER_WRITER]
        while writer.pending_rows:
            writer._batch_full.set()  # without waiting for more rows
            await asyncio.sleep(0.005)
        return await writer.ledger.latest(UsageQuery())

    async def wait_settled(self) -> list[int | None]:
        """Wait until the cost of the latest call is known. Return those of all, newest first."""
        async with asyncio.timeout(SOON):
            while not (records := await self.records()) or records[0].settled is None:
                await asyncio.sleep(0.02)
        return [record.settled for record in records]


def select_rows(data_dir: Path, statement: str) -> list[dict[str, Any]]:
    with closing(sqlite3.connect(data_dir / "ledger.sqlite")) as file:
        file.row_factory = sqlite3.Row
        return [dict(row) for row in file.execute(statement)]


@asynccontextmanager
async def open_sandbox_proxy(
    data_dir: Path,
    speed: float = 1000,
    authenticate: Authenticator | None = None,
    **settings: Any,
) -> AsyncIterator[SandboxProxy]:
    """speed: factor of the sandbox's clock. authenticate: a hook. settings: those of the proxy, by
    flat names."""
    sandbox = Sandbox(speed=speed)
    client = ClientSession(connector=TCPConnector(limit=0), trace_configs=[leak_trace()])
    async with TestServer(create_sandbox(sandbox)) as server, client as session:
        fal_origin = sandbox.public_url = f"http://127.0.0.1:{server.port}"
        defaults: dict[str, Any] = {
            "fal_key": CANARY,
            "upstream_origin": fal_origin,
            "data_dir": data_dir,
        }
        made = with_empty_ledger(make_settings(**(defaults | settings)))
        app = create_app(made, authenticate=authenticate)
        async with TestServer(app) as proxy_server:
            origin = f"http://127.0.0.1:{proxy_server.port}"
            yield SandboxProxy(app, origin, fal_origin, sandbox, session, data_dir)
    for seen in sandbox.seen:
        is_local = seen.host.startswith("127.0.0.1")
        is_public = is_local or seen.path.endswith(("/openapi.json", "/v1/models"))
        keys = seen.headers.getall("Authorization", [])
        assert keys == ([] if is_public else [f"Key {CANARY}"]), seen.path
