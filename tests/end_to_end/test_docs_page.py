"""`/docs`: the page in Chromium, its files, and the page without Swagger UI."""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.pytest_plugin import AiohttpClient

from falproxy.dialects import default_error, handle_errors
from falproxy.web.docs import FILES, PATH, Docs
from tests.support.js_world import JS, PLAY_TIMEOUT, need
from tests.support.paths import CHROMIUM
from tests.support.running_proxy import RunningProxy, open_running_proxy

pytestmark = pytest.mark.slow(seconds=2)

CONTENT_TYPES = {
    "/docs": "text/html",
    "/docs/docs.js": "text/javascript",
    "/docs/docs.css": "text/css",
    "/docs/swagger-ui-bundle.js": "text/javascript",
    "/docs/swagger-ui.css": "text/css",
}


@pytest.fixture(params=["", "/deep/er"], ids=["at the root", "below a prefix"])
async def place(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[RunningProxy]:
    async with open_running_proxy(tmp_path, request.param) as opened:
        yield opened


async def visit(origin: str) -> Any:
    """Return what the page shows and the statuses of its example requests."""
    need(Path("node"), JS / "node_modules", CHROMIUM)
    process = await asyncio.create_subprocess_exec(
        "node",
        str(JS / "docs.mjs"),
        origin,
        *filter(None, [os.environ.get("ARTEFACTS")]),
        env={**os.environ, "CHROMIUM": str(CHROMIUM)},
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(PLAY_TIMEOUT):
            output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0
    return json.loads(output)


async def test_the_page_lists_all_operations_and_sends_requests(place: RunningProxy) -> None:
    shown = await visit(place.origin)
    paths = (await place.document())["paths"]
    assert sorted(shown["operations"]) == sorted(path for path in paths for _ in paths[path])
    assert shown["server"] == place.origin
    assert set(shown["statuses"]) == {
        "edit", "createImage", "createImageEdit", "generate", "generateByTemplate",
    }  # fmt: skip
    assert set(shown["statuses"].values()) == {200}
    assert shown["header"] == ["Create", "Edit", "Animate", "Speak", "Dashboard", "API"]
    assert shown["currentPage"] == "API"
    width, screen = shown["widths"]
    assert width <= screen == 360
    assert shown["consoleErrors"] == []
    # All requests go to the proxy.
    assert place.origin.startswith(shown["origins"][0])
    assert len(shown["origins"]) == 1


@pytest.mark.parametrize("path", CONTENT_TYPES)
async def test_files_have_their_content_type_and_a_strict_csp(
    place: RunningProxy, path: str
) -> None:
    async with place.session.get(place.origin + path) as response:
        assert (response.status, response.content_type) == (200, CONTENT_TYPES[path])
        policy = response.headers["Content-Security-Policy"]
        assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert "default-src 'none'; script-src 'self'; connect-src 'self'" in policy


@pytest.mark.parametrize("name", ["nothing.js", "swagger-editor.js", "..%2Fcore.py", "page.html"])
async def test_other_files_are_not_served(tmp_path: Path, name: str) -> None:
    async with (
        open_running_proxy(tmp_path) as place,
        place.session.get(f"{place.origin}/docs/{name}") as response,
    ):
        assert response.status == 404


async def test_without_swagger_ui_the_page_explains_how_to_install_it(
    aiohttp_client: AiohttpClient,
) -> None:
    app, page = web.Application(middlewares=[handle_errors(default_error)]), Docs("not_installed")
    app.router.add_get(PATH, page.show_page)
    app.router.add_get(FILES, page.show_file)
    client = await aiohttp_client(app)
    response = await client.get(PATH)
    text = await response.text()
    assert (response.status, response.content_type) == (200, "text/html")
    assert 'href="openapi.json"' in text
    assert "pip install 'falproxy[docs]'" in text
    assert "<script" not in text
    assert "web/" not in text  # this application has no pages
    assert (await client.get("/docs/swagger-ui.css")).status == 404
    assert (await client.get("/docs/docs.css")).status == 200
