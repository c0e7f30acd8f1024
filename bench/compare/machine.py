"""The machine, and the versions of all programs that took part."""

import json
import os
import platform
import re
import ssl
import subprocess
from importlib.metadata import version
from pathlib import Path

from compare.candidates import FALPROXY, PEERS

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
    programs = {
        "falproxy": program_version((str(FALPROXY.parent / "python"), "-c", FALPROXY_VERSION)),
        "nginx": program_version(("nginx", "-v")),
        "wrk": program_version(("wrk", "-v")),
        "Node": program_version(("node", "--version")),
        "Python": platform.python_version(),
        "OpenSSL": ssl.OPENSSL_VERSION.split()[1],
    }
    programs |= {name: version(name) for name in PYTHON_PACKAGES}
    programs |= json.loads((PEERS / "package.json").read_text())["dependencies"]
    return {name: text for name, text in programs.items() if text}


FALPROXY_VERSION = "from falproxy.version import __version__; print(__version__)"


def program_version(command: tuple[str, ...]) -> str:
    """Return the first version number in the output of a program, empty without one."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except FileNotFoundError:
        return ""
    match = re.search(r"\d+\.\d+(?:\.\d+)?", done.stdout + done.stderr)
    return match[0] if match else ""
