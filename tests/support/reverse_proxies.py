"""nginx and Caddy with the configuration files of `deploy`, on free ports and without TLS."""

import asyncio
import re
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from tests.support.js_world import need
from tests.support.paths import ROOT
from tests.support.ports import free_port

NGINX = """daemon off;
user root;
pid {folder}/nginx.pid;
error_log stderr;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    {servers}
}}
"""
SERVER = re.compile(r"^    server 127\.0\.0\.1:8080(.*);$", re.MULTILINE)


def nginx_config(folder: Path, port: int, proxies: Sequence[int]) -> str:
    text = (ROOT / "deploy/nginx/falproxy.conf").read_text()
    text = re.sub(r"\n    ssl_certificate.*", "", text)
    text = text.replace("listen 443 ssl http2;", f"listen 127.0.0.1:{port};")
    options = SERVER.search(text)
    assert options is not None
    servers = (f"    server 127.0.0.1:{proxy}{options[1]};" for proxy in proxies)
    text = SERVER.sub("\n".join(servers), text)
    return NGINX.format(folder=folder, servers=text)


@asynccontextmanager
async def nginx(folder: Path, *proxies: int) -> AsyncIterator[str]:
    """Context: the origin of an nginx in front of the proxies at these ports."""
    need(Path("nginx"))
    port, file = free_port(), folder / "nginx.conf"
    file.write_text(nginx_config(folder, port, proxies))
    async with running(port, "nginx", "-e", "stderr", "-c", str(file)) as origin:
        yield origin


@asynccontextmanager
async def caddy(folder: Path, *proxies: int) -> AsyncIterator[str]:
    """Context: the origin of a Caddy in front of the proxies at these ports."""
    need(Path("caddy"))
    port, file = free_port(), folder / "Caddyfile"
    options = "{\n\tadmin off\n\tauto_https off\n}\n"
    text = (ROOT / "deploy/caddy/Caddyfile").read_text()
    file.write_text(options + text)
    env = {
        "DOMAIN": f"http://127.0.0.1:{port}",
        "PROXIES": " ".join(f"127.0.0.1:{proxy}" for proxy in proxies),
        "HOME": str(folder),
    }
    command = ("caddy", "run", "--config", str(file), "--adapter", "caddyfile")
    async with running(port, *command, env=env) as origin:
        yield origin


@asynccontextmanager
async def running(
    port: int, *command: str, env: dict[str, str] | None = None
) -> AsyncIterator[str]:
    """Context: the origin of a server, once it accepts connections."""
    server = await asyncio.create_subprocess_exec(
        *command, env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"} | (env or {})
    )
    try:
        await until_listening(port, server)
        yield f"http://127.0.0.1:{port}"
    finally:
        if server.returncode is None:
            server.terminate()
        await server.wait()


async def until_listening(port: int, server: asyncio.subprocess.Process) -> None:
    while True:
        assert server.returncode is None, "the server has stopped"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        await asyncio.sleep(0.02)
