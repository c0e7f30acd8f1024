"""Who is compared, and how each is started: as its own README says, one process or worker each."""

import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from compare.process import Tree, running
from compare.upstream import fill, until_it_listens

BENCH = Path(__file__).parent.parent
PEERS = BENCH / "peers"
FALPROXY = BENCH.parent / ".venv" / "bench-falproxy" / "bin" / "falproxy"
FAL_KEY = "00000000-0000-4000-8000-000000000000:0123456789abcdef0123456789abcdef"
SECRET = "secret-of-the-bench-that-is-long-enough"
ORIGIN = "https://app.example.com"
# Each has room for a second port, and starts anew on the same ones.
FIRST_PORT = 8100

EVERY_OPTION = {
    "FALPROXY_ACCESS_KEYS": f"bench:{SECRET}",
    "FALPROXY_ALLOWED_ENDPOINTS": "fal-ai/**",
    "FALPROXY_ALLOWED_ORIGINS": ORIGIN,
    "FALPROXY_CHECK_REMOTE_IMAGES": "1",
    "FALPROXY_REHOST": "disk",
}


@dataclass(frozen=True, slots=True)
class Contestant:
    """command: made from port and folder. needs: a program that must be there. env, headers: what
    it, and what requests to it, have beside those of all others. part: the cores it may use."""

    name: str
    title: str
    command: Callable[[int, Path], list[str]]
    needs: str
    env: dict[str, str] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    part: str = "proxy"

    @property
    def is_there(self) -> bool:
        return shutil.which(self.needs) is not None


@dataclass(frozen=True, slots=True)
class Started:
    """A contestant that runs. stream_port: where it takes calls whose answers are events."""

    contestant: Contestant
    tree: Tree
    port: int
    stream_port: int
    folder: Path


def nginx(port: int, folder: Path) -> list[str]:
    words = {
        "FOLDER": folder,
        "PORT": port,
        "STREAM_PORT": port + 1,
        "FAL_KEY": FAL_KEY,
        "CA": folder.parent / "ca.pem",
    }
    config = folder / "nginx.conf"
    config.write_text(fill(PEERS / "nginx.conf", words))
    return ["nginx", "-e", str(folder / "error.log"), "-p", str(folder), "-c", str(config)]


def falproxy(port: int, folder: Path) -> list[str]:
    return [str(FALPROXY), "serve", "--host", "127.0.0.1", "--port", str(port)]


def two_workers(port: int, folder: Path) -> list[str]:
    return [*falproxy(port, folder), "--workers", "2"]


def node(name: str) -> Callable[[int, Path], list[str]]:
    return lambda port, folder: ["node", str(PEERS / name)]


def fastapi(port: int, folder: Path) -> list[str]:
    words = ["-m", "uvicorn", "--app-dir", str(PEERS), "--host", "127.0.0.1", "--port", str(port)]
    words += ["--loop", "uvloop", "--http", "httptools", "--workers", "1"]
    return [sys.executable, *words, "fastapi_httpx:app"]


def plain_aiohttp(port: int, folder: Path) -> list[str]:
    return [sys.executable, str(PEERS / "plain_aiohttp.py")]


CONTESTANTS = (
    Contestant("nginx", "nginx", nginx, "nginx"),
    Contestant("falproxy", "falproxy", falproxy, str(FALPROXY)),
    Contestant(
        "falproxy-all",
        "falproxy, every option on",
        falproxy,
        str(FALPROXY),
        EVERY_OPTION,
        {"x-falproxy-key": SECRET, "origin": ORIGIN},
    ),
    Contestant("express", "server-proxy on Express", node("express.mjs"), "node"),
    Contestant("hono", "server-proxy on Hono", node("hono.mjs"), "node"),
    Contestant("fastapi", "FastAPI + httpx", fastapi, sys.executable),
    Contestant("aiohttp", "plain aiohttp", plain_aiohttp, sys.executable),
)
TWO_WORKERS = Contestant(
    "falproxy-2", "falproxy, 2 workers", two_workers, str(FALPROXY), part="pair"
)


def has_workers() -> bool:
    """Whether this falproxy can have several workers."""
    asked = subprocess.run(
        (FALPROXY, "serve", "--help"), capture_output=True, text=True, check=False
    )
    return "--workers" in asked.stdout


def ports(contestant: Contestant) -> tuple[int, int]:
    names = [known.name for known in (*CONTESTANTS, TWO_WORKERS)]
    port = FIRST_PORT + 10 * names.index(contestant.name)
    return port, port + (contestant.name == "nginx")


def environment(port: int, folder: Path) -> dict[str, str]:
    """All that a contestant sees of ours. Each kind of program has its own word for the CA."""
    authority = str(folder.parent / "ca.pem")
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "PORT": str(port),
        "FAL_KEY": FAL_KEY,
        "NODE_ENV": "production",
        "SSL_CERT_FILE": authority,
        "NODE_EXTRA_CA_CERTS": authority,
    }


@asynccontextmanager
async def launched(contestant: Contestant, folder: Path) -> AsyncIterator[Started]:
    """A contestant from the moment of its exec. folder: has ca.pem, and gets a folder for it."""
    port, stream_port = ports(contestant)
    own = folder / f"{contestant.name}-{len(list(folder.iterdir()))}"
    own.mkdir()
    env = environment(port, own) | contestant.env
    command = contestant.command(port, own)
    async with running(command, own, env, part=contestant.part) as tree:
        yield Started(contestant, tree, port, stream_port, own)


@asynccontextmanager
async def started(contestant: Contestant, folder: Path) -> AsyncIterator[Started]:
    """A contestant that takes calls."""
    async with launched(contestant, folder) as it:
        await until_it_listens("127.0.0.1", it.port, it.folder / "log")
        yield it
