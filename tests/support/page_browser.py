"""A person at the page in Chromium, a proxy that can be stopped, the offline fal behind it."""

import io
import os
import random
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer, unused_port
from PIL import Image

import falproxy
from falproxy import Settings
from falproxy.app import HANDLER_ARGS
from falproxy.media.fetch import FETCHER
from falproxy.sandbox import Sandbox
from falproxy.sandbox import create_app as create_sandbox
from tests.end_to_end.test_js_browser import Chromium
from tests.end_to_end.test_js_node import JS, PLAY_TIMEOUT, need
from tests.support.key_search import CANARY

KONTEXT = "fal-ai/flux-pro/kontext"


@dataclass(slots=True)
class Visitor:
    """One visit of the page. Each method is an act of page_acts.mjs; unknown names go there too."""

    driver: "Driver"
    name: str
    base: str
    artefacts: Path

    async def act(self, name: str, /, **given: object) -> Any:
        return await self.driver.play(visit=self.name, act=name, **given)

    async def arrive(self, **given: object) -> None:
        await self.act("goto", url=self.base, **given)

    async def click(self, name: str, role: str = "button", **given: object) -> None:
        await self.act("click", role=role, name=name, **given)

    async def wait(self, selector: str, **given: object) -> None:
        await self.act("wait", selector=selector, **given)

    async def texts(self, selector: str, **given: object) -> list[str]:
        found: list[str] = await self.act("texts", selector=selector, **given)
        return found

    async def text(self, selector: str, **given: object) -> str:
        return "\n".join(await self.texts(selector, **given))

    async def run(self, code: str, given: object = None, **more: object) -> Any:
        return await self.act("run", code=code, given=given, **more)

    async def until(self, code: str, given: object = None, **more: object) -> None:
        await self.act("until", code=code, given=given, **more)

    async def says(self, selector: str, text: str, **more: object) -> None:
        """Returns when one of the elements has the text in it."""
        code = """([selector, text]) => [...document.querySelectorAll(selector)]
            .some((one) => one.innerText.includes(text))"""
        await self.until(code, [selector, text], **more)

    async def says_nothing(self, selector: str) -> None:
        """Returns when the element has no text in it."""
        code = "([selector]) => document.querySelector(selector).innerText === ''"
        await self.until(code, [selector])

    async def wish(
        self, prompt: str, model: str | None = None, picture: Path | None = None
    ) -> None:
        """Fills in the form, and submits it."""
        if model is not None:
            await self.act("choose", label="Model", option=model)
            await self.says("#model option:checked", "")
        if picture is not None:
            await self.act("wait", selector="#slots input[type=file]", state="attached")
            await self.act("files", paths=[str(picture)])
            await self.wait(".chosen li")
        await self.act("fill", label="Prompt", text=prompt)
        await self.click("Make picture")

    async def made(self, number: int, **more: object) -> None:
        """Returns when so many results are in the history."""
        code = "(number) => document.querySelectorAll('.thumbs li').length === number"
        await self.until(code, number, **more)

    async def look(self, name: str) -> None:
        """Keeps screenshots, light and dark, wide and narrow, and has axe-core look at each."""
        for width in (1440, 360):
            await self.act("resize", width=width)
            for scheme in ("light", "dark"):
                await self.act("scheme", **{"is": scheme})
                path = self.artefacts / f"page-{name}-{scheme}-{width}.png"
                await self.act("shoot", path=str(path))
                assert await self.act("axe") == [], f"{name}, {scheme}, {width} px"
            wide = await self.run("() => document.documentElement.scrollWidth")
            assert wide <= width, f"{name} is {wide} px wide on a screen of {width}"
        await self.act("resize", width=1440)
        await self.act("scheme", **{"is": "light"})


@dataclass(frozen=True, slots=True)
class Driver(Chromium):
    """page_browser.mjs: one Chromium for all tests of a module."""

    artefacts: Path
    numbers: "count[int]" = field(default_factory=count)

    @asynccontextmanager
    async def visit(self, base: str, **options: object) -> AsyncIterator[Visitor]:
        visitor = Visitor(self, str(next(self.numbers)), base, self.artefacts)
        await visitor.act("open", **options)
        try:
            yield visitor
        finally:
            crashes = await visitor.act("leave")
        assert crashes == []


def launch(artefacts: Path) -> Driver:
    need(Path("node"), JS / "node_modules" / "axe-core")
    need(Path(os.environ.get("CHROMIUM", "/usr/bin/chromium")))
    command = ["node", str(JS / "page_browser.mjs")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return Driver(process, artefacts)


@dataclass(slots=True)
class Place:
    """A proxy at one address, which can be stopped and started again, and its offline fal."""

    sandbox: Sandbox
    fal: str
    port: int
    prefix: str
    settings: Settings
    server: TestServer | None = None

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.port}{self.prefix}/"

    async def start(self) -> None:
        app = web.Application(handler_args=HANDLER_ARGS)
        if self.prefix:
            falproxy.setup(app, self.settings, prefix=self.prefix)
        else:
            app = falproxy.create_app(self.settings)
        self.server = TestServer(app, port=self.port)
        await self.server.start_server()
        app[FETCHER].trust(f"{self.sandbox.public_url}/")

    async def stop(self) -> None:
        if self.server is not None:
            await self.server.close()
            self.server = None

    def submits(self) -> list[str]:
        """The endpoints of all jobs that fal was asked for."""
        return [
            seen.path.strip("/")
            for seen in self.sandbox.seen
            if seen.method == "POST" and seen.host == "queue.fal.run"
        ]

    @asynccontextmanager
    async def busy(self) -> AsyncIterator[None]:
        """Meanwhile each of fal's runners has a long job, and one more waits in the queue."""
        queue = f"{self.fal}/queue.fal.run/fal-ai/flux"
        headers = {"Authorization": f"Key {CANARY}"}
        jobs = []
        async with ClientSession(headers=headers) as session:
            for _ in range(5):
                body = {"prompt": f"!delay {PLAY_TIMEOUT} somebody else's picture"}
                async with session.post(f"{queue}/dev", json=body) as response:
                    jobs.append((await response.json())["request_id"])
            yield
            for job in jobs:
                await session.put(f"{queue}/requests/{job}/cancel")


@asynccontextmanager
async def open_place(data_dir: Path, prefix: str = "", **given: Any) -> AsyncIterator[Place]:
    sandbox = Sandbox(speed=50)
    async with TestServer(create_sandbox(sandbox)) as fal:
        sandbox.public_url = f"http://127.0.0.1:{fal.port}"
        named: dict[str, Any] = {"upstream_origin": sandbox.public_url, "data_dir": data_dir}
        settings = Settings(fal_key=CANARY, **(named | {"rehost": "disk", "sandbox": True} | given))
        place = Place(sandbox, sandbox.public_url, unused_port(), prefix, settings)
        await place.start()
        try:
            yield place
        finally:
            await place.stop()


def picture(path: Path, size: tuple[int, int] = (320, 240), *, seed: int = 1) -> Path:
    """A picture of a kind that its name says; noise, so that no two are alike."""
    noise = random.Random(seed).randbytes(48 * 36 * 3)
    image = Image.frombytes("RGB", (48, 36), noise).resize(size)
    file = io.BytesIO()
    image.save(file, path.suffix[1:].upper().replace("JPG", "JPEG"))
    path.write_bytes(file.getvalue())
    return path
