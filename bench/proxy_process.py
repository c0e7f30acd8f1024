"""A `falproxy serve` that a measurement starts, on a free port."""

import asyncio
import os
import re
import sys
from pathlib import Path

LISTENS = re.compile(rb"listens on http://127\.0\.0\.1:(\d+)")


async def start_proxy(
    folder: Path, upstream_origin: str, **env: str
) -> tuple[asyncio.subprocess.Process, int]:
    """Start a proxy. Returns its process and its port, once it accepts calls.

    folder: for its data and its log.
    env: further variables.
    """
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "falproxy", "serve", "--port", "0"),
        stderr=log,
        env={
            "PATH": os.environ["PATH"],
            "FAL_KEY": "id:secret",
            "FALPROXY_DATA_DIR": str(folder / "data"),
            "FALPROXY_UPSTREAM_ORIGIN": upstream_origin,
            **env,
        },
    )
    os.close(log)
    while not (match := LISTENS.search((folder / "log").read_bytes())):
        await asyncio.sleep(0.05)
    return process, int(match[1])
