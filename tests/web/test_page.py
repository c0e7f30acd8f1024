"""`/`, `/web` and `/dashboard` as files: what is there, how it is kept, and what is not."""

import gzip
import json
from configparser import ConfigParser
from fnmatch import fnmatch
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.pytest_plugin import AiohttpClient

import falproxy
from falproxy.app import HANDLER_ARGS
from falproxy.web.page import CONTENT_TYPES, read_files
from tests.support.key_search import CANARY

WEB = Path(falproxy.__file__).parent / "web" / "static"
FILES = sorted(str(path.relative_to(WEB)) for path in WEB.rglob("*") if path.is_file())
SECRET = "open-sesame"
MODULE_MAX = 300  # lines
PLAIN = {"Accept-Encoding": "identity"}


def settings(**given: str) -> falproxy.Settings:
    return falproxy.Settings(fal_key=CANARY, access_key=SECRET, public_url=given.get("public_url"))


@pytest.mark.parametrize("name", FILES)
async def test_every_file_is_served_as_what_it_is(aiohttp_client: AiohttpClient, name: str) -> None:
    client = await aiohttp_client(falproxy.create_app(settings()))
    response = await client.get(f"/web/{name}", headers=PLAIN)
    assert response.status == 200
    assert response.headers["Content-Type"] == f"{CONTENT_TYPES[Path(name).suffix]}; charset=utf-8"
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["Cache-Control"] == "no-cache"
    if not name.endswith(".html"):
        assert await response.read() == (WEB / name).read_bytes()


async def test_the_page_runs_its_own_scripts_alone(aiohttp_client: AiohttpClient) -> None:
    client = await aiohttp_client(falproxy.create_app(settings()))
    response = await client.get("/")
    policy = response.headers["Content-Security-Policy"]
    assert "default-src 'none'; script-src 'self'; style-src 'self';" in policy
    assert "unsafe" not in policy
    text = await response.text()
    assert "<style" not in text
    assert " style=" not in text
    assert "http://" not in text
    assert "https://" not in text


async def test_the_policy_lets_pages_read_where_outputs_are_kept(
    aiohttp_client: AiohttpClient,
) -> None:
    own = falproxy.Settings(
        fal_key=CANARY, supabase_url="https://abc.supabase.co/", supabase_key="sb_secret_x"
    )
    client = await aiohttp_client(falproxy.create_app(own))
    policy = (await client.get("/")).headers["Content-Security-Policy"]
    connect = next(part for part in policy.split("; ") if part.startswith("connect-src"))
    assert "https://abc.supabase.co" in connect.split()
    assert "https://*.fal.media" in connect.split()


async def test_what_has_not_changed_is_not_sent_again(aiohttp_client: AiohttpClient) -> None:
    client = await aiohttp_client(falproxy.create_app(settings()))
    first = await client.get("/web/app.js")
    tag = first.headers["ETag"]
    again = await client.get("/web/app.js", headers={"If-None-Match": tag})
    assert (again.status, await again.read(), again.headers["ETag"]) == (304, b"", tag)
    other = await client.get("/web/app.js", headers={"If-None-Match": '"other"'})
    assert other.status == 200


async def test_files_are_named_by_their_edition_and_then_kept_for_ever(
    aiohttp_client: AiohttpClient,
) -> None:
    client = await aiohttp_client(falproxy.create_app(settings()))
    edition = read_files().content_hash
    assert f'src="web/{edition}/app.js"' in await (await client.get("/")).text()
    kept = await client.get(f"/web/{edition}/app.js")
    assert kept.headers["Cache-Control"] == "public, max-age=31536000, immutable"
    # A page of another process, one release older: its files are there, and asked for each time.
    older = await client.get("/web/@0123456789abcdef/app.js")
    assert (older.status, older.headers["Cache-Control"]) == (200, "no-cache")


@pytest.mark.parametrize(
    ("taken", "is_packed"),
    [
        pytest.param("gzip, deflate, br", True, id="among others"),
        pytest.param("br;q=1.0, GZIP;q=0.5", True, id="in capitals, with a weight"),
        pytest.param("gzip;q=0", False, id="named as what is not taken"),
        pytest.param("br", False, id="not named"),
        pytest.param("identity", False, id="as it is"),
    ],
)
async def test_files_are_packed_for_who_takes_that(
    aiohttp_client: AiohttpClient, taken: str, is_packed: bool
) -> None:
    client = await aiohttp_client(falproxy.create_app(settings()), auto_decompress=False)
    response = await client.get("/web/app.js", headers={"Accept-Encoding": taken})
    content = await response.read()
    assert response.headers["Vary"] == "Accept-Encoding"
    assert (response.headers.get("Content-Encoding") == "gzip") is is_packed
    assert (gzip.decompress(content) if is_packed else content) == (WEB / "app.js").read_bytes()


@pytest.mark.parametrize(
    "path",
    [
        pytest.param("/web/nothing.js", id="no such file"),
        pytest.param("/web/..%2Fversion.py", id="above"),
        pytest.param("/web/dashboard", id="a directory"),
        pytest.param("/web//etc/passwd", id="an absolute path"),
        pytest.param("/web/@0123456789abcdef/..%2F..%2Fversion.py", id="above, below an edition"),
    ],
)
async def test_there_are_no_other_files(aiohttp_client: AiohttpClient, path: str) -> None:
    client = await aiohttp_client(falproxy.create_app(settings()))
    response = await client.get(path)
    assert (response.status, (await response.json())["error"]["code"]) == (404, "file_not_found")


async def test_it_says_what_it_is_and_no_secrets(aiohttp_client: AiohttpClient) -> None:
    client = await aiohttp_client(falproxy.create_app(settings()))
    response = await client.get("/web/about.json")
    told = await response.json()
    assert set(told) == {"version", "isSandbox", "isLocked", "uploads", "formats", "maxBody"}
    assert (told["version"], told["isSandbox"], told["isLocked"]) == (
        falproxy.__version__,
        False,
        True,
    )
    for secret in (CANARY, SECRET):
        assert secret not in json.dumps(told)


async def test_below_a_prefix_it_is_at_the_prefix(aiohttp_client: AiohttpClient) -> None:
    app = web.Application(handler_args=HANDLER_ARGS)
    falproxy.setup(app, settings(), prefix="/deep/er")
    client = await aiohttp_client(app)
    assert (await client.get("/deep/er/")).status == 200
    led = await client.get("/deep/er", allow_redirects=False)
    assert (led.status, led.headers["Location"]) == (302, "er/")
    assert (await client.get("/deep/er")).url.path == "/deep/er/"
    assert (await client.get("/")).status == 404


async def test_somebody_s_own_first_page_stays_its_own(aiohttp_client: AiohttpClient) -> None:
    async def own(request: web.Request) -> web.Response:
        return web.Response(text="own")

    app = web.Application(handler_args=HANDLER_ARGS)
    falproxy.setup(app, settings())
    for path in ("/", "/dashboard", "/web/app.js"):
        app.router.add_get(path, own)
    client = await aiohttp_client(app)
    for path in ("/", "/dashboard", "/web/app.js"):
        assert await (await client.get(path)).text() == "own"


def test_all_files_are_in_the_package(root: Path) -> None:
    config = ConfigParser()
    config.read(root / "setup.cfg")
    patterns = [p.strip() for p in config["options.package_data"]["falproxy.web"].split(",")]
    for name in FILES:
        assert any(fnmatch(f"static/{name}", pattern) for pattern in patterns), name


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".js")])
def test_modules_are_short_and_say_what_they_are_for(name: str) -> None:
    text = (WEB / name).read_text()
    assert len(text.splitlines()) <= MODULE_MAX
    assert text.startswith("/**")
    assert "innerHTML" not in text
    assert max(map(len, text.splitlines())) <= 120
