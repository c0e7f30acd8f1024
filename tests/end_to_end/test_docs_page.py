"""`/docs`: the page in Chromium, and what is there without Swagger UI."""

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
from tests.end_to_end.test_js_node import JS, PLAY_TIMEOUT, need
from tests.web.test_openapi import Place, open_place

EXPECTED_KINDS = {
    "/docs": "text/html",
    "/docs/docs.js": "text/javascript",
    "/docs/docs.css": "text/css",
    "/docs/swagger-ui-bundle.js": "text/javascript",
    "/docs/swagger-ui.css": "text/css",
}


@pytest.fixture(params=["", "/deep/er"], ids=["at the root", "below a prefix"])
async def place(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Place]:
    async with open_place(tmp_path, request.param) as opened:
        yield opened


async def visit(origin: str) -> Any:
    """What a person sees who opens the page and tries it out."""
    need(Path("node"), JS / "node_modules", Path(os.environ.get("CHROMIUM", "/usr/bin/chromium")))
    process = await asyncio.create_subprocess_exec(
        "node",
        str(JS / "docs.mjs"),
        origin,
        *filter(None, [os.environ.get("ARTEFACTS")]),
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


async def test_the_page_shows_all_and_tries_it_out(place: Place) -> None:
    seen = await visit(place.origin)
    assert seen["operations"] == list((await place.document())["paths"])
    assert seen["server"] == place.origin
    assert set(seen["tried"]) == {
        "edit", "createImage", "createImageEdit", "generate", "generateByTemplate",
    }  # fmt: skip
    assert set(seen["tried"].values()) == {200}
    assert seen["complaints"] == []
    # Nothing comes from elsewhere.
    assert place.origin.startswith(seen["origins"][0])
    assert len(seen["origins"]) == 1


@pytest.mark.parametrize("path", EXPECTED_KINDS)
async def test_its_files_are_of_their_kinds_and_run_nothing_else(place: Place, path: str) -> None:
    async with place.session.get(place.origin + path) as response:
        assert (response.status, response.content_type) == (200, EXPECTED_KINDS[path])
        policy = response.headers["Content-Security-Policy"]
        assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert "default-src 'none'; script-src 'self'; connect-src 'self'" in policy


@pytest.mark.parametrize("name", ["nothing.js", "swagger-editor.js", "..%2Fcore.py", "page.html"])
async def test_there_are_no_other_files(tmp_path: Path, name: str) -> None:
    async with (
        open_place(tmp_path) as place,
        place.session.get(f"{place.origin}/docs/{name}") as response,
    ):
        assert response.status == 404


async def test_without_swagger_ui_the_page_says_how_to_get_it(
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
    assert (await client.get("/docs/swagger-ui.css")).status == 404
    assert (await client.get("/docs/docs.css")).status == 200
