"""The proxies that are compared, each started as in its own README, one process or worker."""

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
# Each candidate has ten ports and keeps them when it is restarted.
FIRST_PORT = 8100

EVERY_OPTION = {
    "FALPROXY_ACCESS_KEYS": f"bench:{SECRET}",
    "FALPROXY_ALLOWED_ENDPOINTS": "fal-ai/**",
    "FALPROXY_ALLOWED_ORIGINS": ORIGIN,
    "FALPROXY_CHECK_REMOTE_IMAGES": "1",
    "FALPROXY_REHOST": "disk",
}
# Submits wait for the owner of the request, the rate and the budgets.
LIMITED = {
    "FALPROXY_ACCESS_KEYS": f"bench:{SECRET}",
    "FALPROXY_RATE_LIMIT": "900000000/day",
    "FALPROXY_BUDGET": "100000000/day",
    "FALPROXY_TOTAL_BUDGET": "100000000/day",
}


@dataclass(frozen=True, slots=True)
class Candidate:
    """A proxy that is measured.

    command: built from port and folder.
    needs: a program that must be installed.
    env, headers: of its process and of requests to it, beside the common ones.
    part: the cores that it may use.
    """

    name: str
    title: str
    command: Callable[[int, Path], list[str]]
    needs: str
    env: dict[str, str] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    part: str = "proxy"

    @property
    def is_installed(self) -> bool:
        return shutil.which(self.needs) is not None


@dataclass(frozen=True, slots=True)
class Started:
    """A running candidate.

    stream_port: for calls with event streams.
    """

    candidate: Candidate
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


CANDIDATES = (
    Candidate("nginx", "nginx", nginx, "nginx"),
    Candidate("falproxy", "falproxy", falproxy, str(FALPROXY)),
    Candidate(
        "falproxy-all",
        "falproxy, every option on",
        falproxy,
        str(FALPROXY),
        EVERY_OPTION,
        {"x-falproxy-key": SECRET, "origin": ORIGIN},
    ),
    Candidate("express", "server-proxy on Express", node("express.mjs"), "node"),
    Candidate("hono", "server-proxy on Hono", node("hono.mjs"), "node"),
    Candidate("fastapi", "FastAPI + httpx", fastapi, sys.executable),
    Candidate("aiohttp", "plain aiohttp", plain_aiohttp, sys.executable),
)
TWO_WORKERS = Candidate(
    "falproxy-2", "falproxy, 2 workers", two_workers, str(FALPROXY), part="pair"
)


def has_workers() -> bool:
    """Return whether this falproxy supports several workers."""
    done = subprocess.run(
        (FALPROXY, "serve", "--help"), capture_output=True, text=True, check=False
    )
    return "--workers" in done.stdout


def ports(candidate: Candidate) -> tuple[int, int]:
    names = [candidate.name for candidate in (*CANDIDATES, TWO_WORKERS)]
    port = FIRST_PORT + 10 * names.index(candidate.name)
    return port, port + (candidate.name == "nginx")


def environment(port: int, folder: Path) -> dict[str, str]:
    """Return the environment of a candidate. Each program has its own variable for the CA."""
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
async def launched(candidate: Candidate, folder: Path) -> AsyncIterator[Started]:
    """Context manager: start a candidate and return at once.

    folder: holds ca.pem, and gets a folder for the candidate.
    """
    port, stream_port = ports(candidate)
    work = folder / f"{candidate.name}-{len(list(folder.iterdir()))}"
    work.mkdir()
    env = environment(port, work) | candidate.env
    command = candidate.command(port, work)
    async with running(command, work, env, part=candidate.part) as tree:
        yield Started(candidate, tree, port, stream_port, work)


@asynccontextmanager
async def started(candidate: Candidate, folder: Path) -> AsyncIterator[Started]:
    """Context manager: start a candidate and return when it accepts calls."""
    async with launched(candidate, folder) as it:
        await until_it_listens("127.0.0.1", it.port, it.folder / "log")
        yield it
