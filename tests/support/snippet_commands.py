"""Commands that shell snippets of the documentation call, as `snippet_commands.py NAME ARGUMENTS`.

falproxy serve: starts the proxy on a free port, with the sandbox, and returns when it listens.
curl: uses the origin of that proxy for http://localhost:8080, and fails on error statuses.
pip: checks that the extras exist, and installs nothing.
make: checks the command that the Makefile would run, and runs it without the installation.
docker: checks the services and variables of a `docker compose` command, and starts nothing.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
NAMES = ("falproxy", "curl", "pip", "make", "docker")
REAL_NAMES = ("curl", "make")  # that are called
STATE = "SNIPPET_STATE"  # variable: folder for the origin, and for the ids of started processes
PORT = "http://localhost:8080"
LISTENS = re.compile(r"listens on (http://\S+?)[ .](?=\D)")
START_TIMEOUT = 20.0  # seconds


def write_commands(folder: Path) -> None:
    """Write programs with the names into a folder for PATH."""
    real = " ".join(f'REAL_{name.upper()}="{shutil.which(name) or name}"' for name in REAL_NAMES)
    for name in NAMES:
        program = folder / name
        options = "-P" if name == "falproxy" else "-I -S"  # the others need no packages
        command = f'"{sys.executable}" {options} "{Path(__file__)}" {name} "$@"'
        program.write_text(f'#!/bin/sh\n{real} PYTHONPATH="{ROOT}" exec {command}\n')
        program.chmod(0o755)


def falproxy(arguments: list[str]) -> int:
    if arguments[0] == "serve":
        return serve([sys.executable, "-m", "falproxy", *arguments])
    from falproxy.cli.main import main

    return main(arguments)


def serve(command: list[str]) -> int:
    state = Path(os.environ[STATE])
    env = dict(os.environ)
    if "FALPROXY_UPSTREAM_ORIGIN" not in env:
        env["FALPROXY_SANDBOX"] = "1"
    log = state / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "--port", "0"], env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=file
        )
    with (state / "pids").open("a") as pids:
        pids.write(f"{process.pid}\n")
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline and process.poll() is None:
        if match := LISTENS.search(log.read_text()):
            (state / "origin").write_text(match[1])
            return 0
        time.sleep(0.02)
    sys.stderr.write(log.read_text())
    return 1


def curl(arguments: list[str]) -> int:
    origin = (Path(os.environ[STATE]) / "origin").read_text()
    replaced = [argument.replace(PORT, origin) for argument in arguments]
    return subprocess.call([os.environ["REAL_CURL"], "--fail-with-body", *replaced])


def pip(arguments: list[str]) -> int:
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    for extras in re.findall(r"falproxy\[([\w,]+)\]", " ".join(arguments)):
        for extra in extras.split(","):
            if extra not in config["options.extras_require"]:
                sys.stderr.write(f"no extra {extra}\n")
                return 1
    return 0


def make(arguments: list[str]) -> int:
    command = [os.environ["REAL_MAKE"], "--dry-run", "--directory", str(ROOT), *arguments]
    lines = subprocess.check_output(command, text=True).splitlines()
    last = [line for line in lines if not line.startswith("make")][-1].split()
    if not last[0].endswith("/falproxy"):
        sys.stderr.write(f"no command of falproxy: {last}\n")
        return 1
    return serve([sys.executable, "-m", "falproxy", *last[1:]])


def docker(arguments: list[str]) -> int:
    """Check the file of a `docker compose` command: its required variables are in the environment
    or in the `.env` file beside it, and the services that are named exist."""
    if arguments[0] != "compose":
        sys.stderr.write(f"docker {arguments[0]} is not imitated\n")
        return 1
    has_file = arguments[1] == "--file"
    file = arguments[2] if has_file else "docker-compose.yml"
    verb, *options = arguments[3 if has_file else 1 :]
    text = (ROOT / file).read_text()
    dotenv = Path(file).with_name(".env")
    lines = dotenv.read_text().splitlines() if dotenv.exists() else []
    values = {**dict(line.partition("=")[::2] for line in lines), **os.environ}
    missing = [name for name in re.findall(r"\$\{(\w+):\?", text) if not values.get(name)]
    if not (values.get("FAL_KEY") or values.get("FALPROXY_SANDBOX")):
        missing.append("FAL_KEY")
    services = re.findall(r"^  ([\w-]+):", text.partition("\nvolumes:")[0], re.MULTILINE)
    unknown = [name for name in options if not name.startswith("-") and name not in services]
    if missing or unknown or verb not in ("up", "build"):
        sys.stderr.write(f"missing: {missing}, unknown: {unknown}, command: {verb}\n")
        return 1
    return 0


if __name__ == "__main__":
    COMMANDS = {
        "falproxy": falproxy,
        "curl": curl,
        "pip": pip,
        "make": make,
        "docker": docker,
    }
    sys.exit(COMMANDS[sys.argv[1]](sys.argv[2:]))
