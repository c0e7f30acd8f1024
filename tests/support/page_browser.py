"""Driver of the page in Chromium, and a restartable proxy with the sandbox behind it."""

import io
import os
import random
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer
from PIL import Image

import falproxy
from falproxy import Settings
from falproxy.app import HANDLER_ARGS
from falproxy.media.fetch import FETCHER
from falproxy.sandbox import Sandbox
from falproxy.sandbox import create_app as create_sandbox
from tests.support.chromium import Chromium
from tests.support.js_world import JS, PLAY_TIMEOUT, need
from tests.support.key_search import CANARY
from tests.support.paths import CHROMIUM
from tests.support.ports import free_port
from tests.support.settings import make_settings

BOTH = ("light", "dark")
WIDTHS = (1440, 768, 360)
KONTEXT = "fal-ai/flux-pro/kontext"
# Adds a job with a result for each prompt, the oldest first.
FILL_HISTORY = """async ([prompts, url]) => {
  const db = await new Promise((resolve) => {
    const request = indexedDB.open('falproxy:/');
    request.onsuccess = () => resolve(request.result);
  });
  const store = db.transaction('jobs', 'readwrite').objectStore('jobs');
  prompts.forEach((prompt, number) =>
    store.put({
      id: `old-${number}`, state: 'done', created: 1e12 + number * 1000, prompt,
      endpoint: 'fal-ai/flux/dev', model: 'FLUX.1 [dev]',
      images: [{ url, kind: number % 10 ? 'image' : 'video' }],
    }),
  );
  await new Promise((resolve) => (store.transaction.oncomplete = resolve));
  db.close();
}"""

# Flaws of the open dialog: it scrolls sideways, or one of its controls is outside or covered.
DIALOG_FLAWS = """() => {
  const dialog = document.querySelector('dialog:modal');
  if (dialog === null) return [];
  const flaws = [];
  const { left, right, top, bottom } = dialog.getBoundingClientRect();
  if (left < 0 || top < 0 || right > innerWidth || bottom > innerHeight) {
    flaws.push('the dialog is larger than the screen');
  }
  if (dialog.scrollWidth > dialog.clientWidth) flaws.push('the dialog scrolls sideways');
  for (const control of dialog.querySelectorAll('a, button, input, select, summary, textarea')) {
    if (!control.checkVisibility()) continue;
    control.scrollIntoView({ block: 'nearest', inline: 'nearest' });
    const box = control.getBoundingClientRect();
    const hit = document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2);
    if (box.left < left || box.right > right || !control.contains(hit)) {
      flaws.push(`not reachable: ${control.outerHTML.slice(0, 120)}`);
    }
  }
  dialog.scrollTop = 0;
  return flaws;
}"""
FOCUS = """() => {
  const { outlineStyle, outlineWidth } = getComputedStyle(document.activeElement);
  const isOutside = document.activeElement === document.body; // the browser's own controls
  const isVisible =
    isOutside || (outlineStyle !== 'none' && Number.parseFloat(outlineWidth) >= 2);
  return [document.activeElement.outerHTML.slice(0, 120), isVisible];
}"""


@dataclass(slots=True)
class Visitor:
    """A browser session on the page.

    act(name, ...) performs an action of page_actions.mjs; the other methods are shortcuts for them.
    base: the page's URL.
    """

    driver: "Driver"
    session: str
    base: str
    artefacts: Path | None

    async def act(self, action: str, /, **options: object) -> Any:
        return await self.driver.play(session=self.session, action=action, **options)

    async def open_page(self, **options: object) -> None:
        await self.act("goto", url=self.base, **options)

    async def click(self, name: str, role: str = "button", **options: object) -> None:
        await self.act("click", role=role, name=name, **options)

    async def wait_for(self, selector: str, **options: object) -> None:
        await self.act("waitFor", selector=selector, **options)

    async def texts(self, selector: str, **options: object) -> list[str]:
        texts: list[str] = await self.act("texts", selector=selector, **options)
        return texts

    async def text(self, selector: str, **options: object) -> str:
        return "\n".join(await self.texts(selector, **options))

    async def evaluate(self, code: str, argument: object = None, **options: object) -> Any:
        return await self.act("evaluate", code=code, argument=argument, **options)

    async def wait_until(self, code: str, argument: object = None, **options: object) -> None:
        await self.act("waitUntil", code=code, argument=argument, **options)

    async def wait_for_text(self, selector: str, text: str, **options: object) -> None:
        """Wait until one of the elements contains the text."""
        code = """([selector, text]) => [...document.querySelectorAll(selector)]
            .some((element) => element.innerText.includes(text))"""
        await self.wait_until(code, [selector, text], **options)

    async def wait_for_no_text(self, selector: str) -> None:
        """Wait until the element is empty."""
        code = "([selector]) => document.querySelector(selector).innerText === ''"
        await self.wait_until(code, [selector])

    async def choose_model(self, endpoint: str, tab: int = 0) -> None:
        """Choose a model, and wait for its form."""
        await self.act("chooseModel", endpoint=endpoint, tab=tab)

    async def submit_job(
        self, prompt: str, model: str | None = None, image: Path | None = None
    ) -> None:
        """Fill in the form and submit it."""
        await self.fill_form(prompt, model, image)
        await self.act("click", selector="#submit")

    async def fill_form(
        self, prompt: str, model: str | None = None, image: Path | None = None
    ) -> None:
        if model is not None:
            await self.choose_model(model)
        elif image is not None:
            await self.choose_model(KONTEXT)
        if image is not None:
            await self.wait_for("#image-inputs input[type=file]", state="attached")
            await self.act("setFiles", paths=[str(image)])
            await self.wait_for(".chosen-images li")
        await self.act("fill", label="Prompt", text=prompt)

    async def wait_for_results(self, count: int, **options: object) -> None:
        """Wait until the history has this number of results."""
        code = "(count) => document.querySelectorAll('.thumbnails li').length === count"
        await self.wait_until(code, count, **options)

    async def fill_history(self, prompts: Sequence[str], image_url: str) -> None:
        """Add results, the oldest first, which are shown after a reload; every tenth is a video."""
        await self.evaluate(FILL_HISTORY, [prompts, image_url])

    async def check_appearance(self, name: str, prepare: str | None = None) -> None:
        """Fail if `find_flaws` finds any."""
        assert await self.find_flaws(name, prepare) == []

    async def find_invisible_focus(self, count: int) -> list[str]:
        """Press Tab `count` times. Return the elements that do not show that they are focused."""
        found = []
        for _ in range(count):
            await self.act("press", key="Tab")
            element, is_visible = await self.evaluate(FOCUS)
            if not is_visible:
                found.append(element)
        return found

    async def find_flaws(self, name: str, prepare: str | None = None) -> list[str]:
        """Return the findings of axe-core, light and dark, wide and narrow, whether the page is
        wider than the screen, and the flaws of an open dialog. Takes screenshots if there is a
        directory for them.

        prepare: a function of the page, called after each change of the width, such as one that
        opens a menu.
        """
        flaws = []
        for width in WIDTHS:
            await self.act("resize", width=width)
            if prepare is not None:
                await self.evaluate(prepare)
            for scheme in BOTH:
                await self.act("setColorScheme", colorScheme=scheme)
                if self.artefacts is not None:
                    path = self.artefacts / f"page-{name}-{scheme}-{width}.png"
                    await self.act("screenshot", path=str(path))
                violations = await self.act("axeViolations")
                flaws += [f"{name}, {scheme}, {width} px: {each}" for each in violations]
            page_width = await self.evaluate("() => document.documentElement.scrollWidth")
            if page_width > width:
                flaws.append(f"{name} is {page_width} px wide on a screen of {width}")
            dialog_flaws = await self.evaluate(DIALOG_FLAWS)
            flaws += [f"{name}, {width} px: {each}" for each in dialog_flaws]
        await self.act("resize", width=WIDTHS[0])
        await self.act("setColorScheme", colorScheme="light")
        if self.artefacts is not None:
            (self.artefacts / f"page-{name}.txt").write_text("\n".join(flaws))
        return flaws


@dataclass(frozen=True, slots=True)
class Driver(Chromium):
    """The process of page_browser.mjs: one Chromium for all tests of a module."""

    artefacts: Path | None
    session_numbers: "count[int]" = field(default_factory=count)

    @asynccontextmanager
    async def visit(self, base: str, **options: object) -> AsyncIterator[Visitor]:
        """Open a session. Fails if the page has uncaught errors."""
        visitor = Visitor(self, str(next(self.session_numbers)), base, self.artefacts)
        await visitor.act("open", **options)
        try:
            yield visitor
        finally:
            page_errors = await visitor.act("close")
        assert page_errors == []


def launch(artefacts: Path | None) -> Driver:
    need(Path("node"), JS / "node_modules" / "axe-core")
    need(CHROMIUM)
    command = ["node", str(JS / "page_browser.mjs")]
    env = {**os.environ, "CHROMIUM": str(CHROMIUM)}
    process = subprocess.Popen(
        command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    return Driver(process, artefacts)


@dataclass(slots=True)
class RestartableProxy:
    """A proxy on a fixed port, with the sandbox behind it. fal: the sandbox's origin."""

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
        """Return the endpoints of all submits that fal has received."""
        return [
            seen.path.strip("/")
            for seen in self.sandbox.seen
            if seen.method == "POST" and seen.host == "queue.fal.run"
        ]

    @asynccontextmanager
    async def busy(self) -> AsyncIterator[None]:
        """Keep each of fal's runners busy, with one more job in the queue."""
        queue = f"{self.fal}/queue.fal.run/fal-ai/flux"
        headers = {"Authorization": f"Key {CANARY}"}
        request_ids = []
        async with ClientSession(headers=headers) as session:
            for _ in range(5):
                body = {"prompt": f"!delay {PLAY_TIMEOUT} an image of another user"}
                async with session.post(f"{queue}/dev", json=body) as response:
                    request_ids.append((await response.json())["request_id"])
            yield
            for request_id in request_ids:
                await session.put(f"{queue}/requests/{request_id}/cancel")


@asynccontextmanager
async def open_proxy(
    data_dir: Path, prefix: str = "", **options: Any
) -> AsyncIterator[RestartableProxy]:
    sandbox = Sandbox(speed=50)
    async with TestServer(create_sandbox(sandbox)) as fal:
        sandbox.public_url = f"http://127.0.0.1:{fal.port}"
        defaults: dict[str, Any] = {
            "upstream_origin": sandbox.public_url,
            "data_dir": data_dir,
            "rehost": "disk",
            "sandbox": True,
        }
        settings = make_settings(fal_key=CANARY, **(defaults | options))
        port = free_port()
        proxy = RestartableProxy(sandbox, sandbox.public_url, port, prefix, settings)
        await proxy.start()
        try:
            yield proxy
        finally:
            await proxy.stop()


def create_image(path: Path, size: tuple[int, int] = (320, 240), *, seed: int = 1) -> Path:
    """Write an image of noise, in the format of the file's extension."""
    noise = random.Random(seed).randbytes(48 * 36 * 3)
    image = Image.frombytes("RGB", (48, 36), noise).resize(size)
    file = io.BytesIO()
    image.save(file, path.suffix[1:].upper().replace("JPG", "JPEG"))
    path.write_bytes(file.getvalue())
    return path
