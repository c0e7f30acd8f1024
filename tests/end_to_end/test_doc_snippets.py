"""The code blocks of the README and of docs/ run unchanged."""

import asyncio
import base64
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from falproxy.fal.registry import read_registry
from tests.support.cli_process import base_environment, run_command
from tests.support.doc_snippets import Run, Snippet, find, run_of, runnable
from tests.support.js_world import JS, need
from tests.support.offline_fal import png
from tests.support.paths import ROOT
from tests.support.snippet_commands import PORT, STATE, write_commands

pytestmark = pytest.mark.slow(seconds=2)

TIMEOUT = 90.0  # seconds for one snippet
PROXY_URL = '"/api/fal/proxy"'
# The part of a configuration around a snippet that is only a part of one.
NGINX = "pid nginx.pid; error_log stderr; events {{}} http {{ access_log off; server {{ {} }} }}"


@dataclass(slots=True)
class Place:
    """Where a snippet runs. folder: its working directory. origin: that of a running proxy."""

    folder: Path
    origin: str
    env: dict[str, str] = field(default_factory=dict)

    async def run(self, *command: str, stdin: str = "", cwd: Path | None = None) -> str:
        """Run a program to its end, and return its output. Without a `stdin`, it has an empty
        one: a program that does not read it may have ended before anything can be written."""
        process = await asyncio.create_subprocess_exec(
            *command,
            cwd=cwd or self.folder,
            env=self.env,
            stdin=asyncio.subprocess.PIPE if stdin else asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(TIMEOUT):
                out, err = await process.communicate(stdin.encode() or None)
        finally:
            with suppress(ProcessLookupError):
                process.kill()
        assert process.returncode == 0, out.decode() + err.decode()
        return out.decode()


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Path]:
    """Folder of the state of snippet_commands.py. Processes that it started are stopped."""
    folder = tmp_path / "state"
    folder.mkdir()
    yield folder
    pids = folder / "pids"
    for pid in pids.read_text().split() if pids.exists() else []:
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


@pytest.fixture
async def place(tmp_path: Path, state: Path) -> AsyncIterator[Place]:
    """A proxy with the sandbox, as `make run` starts it, and the files that snippets name."""
    programs, folder = tmp_path / "programs", tmp_path / "work"
    programs.mkdir()
    folder.mkdir()
    write_commands(programs)
    (folder / "photo.png").write_bytes(png())
    image = f"data:image/png;base64,{base64.b64encode(png()).decode()}"
    call = {"endpoint": "fal-ai/flux-pro/kontext", "input": {"prompt": "x", "image_url": image}}
    (folder / "call.json").write_text(json.dumps(call))
    async with run_command("serve", "--sandbox", "auto", CWD=str(folder)) as proxy:
        (state / "origin").write_text(proxy.origin)
        env = base_environment() | {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "FAL_KEY": "id:secret",
            STATE: str(state),
        }
        yield Place(folder, proxy.origin, env)


async def run_shell(place: Place, text: str, run: Run) -> str:
    return await place.run("sh", "-e", "-u", "-c", text)


async def run_python(place: Place, text: str, run: Run) -> str:
    program = place.folder / "snippet.py"
    program.write_text(text.replace(PORT, place.origin))
    start = "import runpy; runpy.run_path('snippet.py', run_name='snippet')"
    return await place.run(sys.executable, "-c", start)


async def run_javascript(place: Place, text: str, run: Run) -> str:
    need(Path("node"), JS / "node_modules" / "@ai-sdk" / "fal")
    always = json.dumps({"url": f"{place.origin}/api/fal/proxy", "when": "always"})
    program = text.replace(PROXY_URL, always).replace(PORT, place.origin)
    return await place.run("node", "--input-type=module", stdin=program, cwd=JS)


async def run_toml(place: Place, text: str, run: Run) -> str:
    """Read a file of models, and build the body of a request to one of them."""
    own = place.folder / "my-models.toml"
    own.write_text(text)
    model = read_registry(own).model("house-style")
    body = model.build_body({"prompt": "a cat", "lora_url": "https://a.example/b"})
    assert body["loras"]
    return ""


async def run_nginx(place: Place, text: str, run: Run) -> str:
    need(Path("nginx"))
    config = place.folder / "nginx.conf"
    config.write_text(NGINX.format(text))
    return await place.run("nginx", "-t", "-p", str(place.folder), "-c", str(config))


async def run_caddy(place: Place, text: str, run: Run) -> str:
    need(Path("caddy"))
    (place.folder / "Caddyfile").write_text(text)
    return await place.run("caddy", "adapt", "--config", "Caddyfile", "--adapter", "caddyfile")


RUNNERS = {
    "sh": run_shell,
    "python": run_python,
    "js": run_javascript,
    "toml": run_toml,
    "nginx": run_nginx,
    "caddy": run_caddy,
}


@pytest.mark.parametrize("snippet", runnable(), ids=lambda snippet: snippet.name)
async def test_a_snippet_runs(snippet: Snippet, place: Place) -> None:
    run = run_of(snippet)
    place.env |= run.env
    first = find(snippet.document, run.after).text if run.after else ""
    text = f"{run.before}{first}\n{snippet.text}{run.then}"
    out = await RUNNERS[snippet.language](place, text, run)
    assert re.search(run.output, out), out
