"""What it was measured on and with: the machine, and the versions of all that took part."""

import json
import os
import platform
import re
import ssl
import subprocess
from importlib.metadata import version
from pathlib import Path

from compare.contestants import FALPROXY, PEERS

PYTHON_PACKAGES = ("fastapi", "httpx", "uvicorn", "httptools", "aiohttp", "uvloop")


def machine() -> str:
    text = Path("/proc/cpuinfo").read_text()
    model = re.search(r"model name\s*: (.+)", text)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{os.cpu_count()} cores ({model[1].strip() if model else platform.machine()}), "
        f"{memory:.0f} GiB, Linux {platform.release()}"
    )


def versions() -> dict[str, str]:
    found = {
        "falproxy": said((str(FALPROXY.parent / "python"), "-c", FALPROXY_VERSION)),
        "nginx": said(("nginx", "-v")),
        "wrk": said(("wrk", "-v")),
        "Node": said(("node", "--version")),
        "Python": platform.python_version(),
        "OpenSSL": ssl.OPENSSL_VERSION.split()[1],
    }
    found |= {name: version(name) for name in PYTHON_PACKAGES}
    found |= json.loads((PEERS / "package.json").read_text())["dependencies"]
    return {name: text for name, text in found.items() if text}


FALPROXY_VERSION = "from falproxy.version import __version__; print(__version__)"


def said(command: tuple[str, ...]) -> str:
    """The first version number in what a program says of itself; empty where there is none."""
    try:
        asked = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except FileNotFoundError:
        return ""
    match = re.search(r"\d+\.\d+(?:\.\d+)?", asked.stdout + asked.stderr)
    return match[0] if match else ""
