"""Files of `/`, `/web` and `/dashboard`: content types, caching, security headers, package data."""

import gzip
import json
import re
from configparser import ConfigParser
from fnmatch import fnmatch
from os.path import normpath
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.pytest_plugin import AiohttpClient
from yarl import URL

import falproxy
from falproxy.app import HANDLER_ARGS
from falproxy.web.page import CONTENT_TYPES, read_files
from tests.support.key_search import CANARY
from tests.support.settings import make_settings

WEB = Path(falproxy.__file__).parent / "web" / "static"
FILES = sorted(str(path.relative_to(WEB)) for path in WEB.rglob("*") if path.is_file())
SECRET = "open-sesame"
MODULE_MAX = 300  # lines
PLAIN = {"Accept-Encoding": "identity"}


def settings(**options: str) -> falproxy.Settings:
    return make_settings(fal_key=CANARY, access_key=SECRET, public_url=options.get("public_url"))


@pytest.mark.parametrize("name", FILES)
async def test_every_file_is_served_with_its_content_type(
    aiohttp_client: AiohttpClient, name: str
) -> None:
    client = await aiohttp_client(falproxy.create_app(settings()))
    response = await client.get(f"/web/{name}", headers=PLAIN)
    assert response.status == 200
    assert response.headers["Content-Type"] == CONTENT_TYPES[Path(name).suffix]
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["Cache-Control"] == "no-cache"
    if not name.endswith(".html"):
        assert await response.read() == (WEB / name).read_bytes()


async def test_the_page_runs_only_its_own_scripts(aiohttp_client: AiohttpClient) -> None:
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


async def test_the_csp_allows_the_origin_of_stored_outputs(
    aiohttp_client: AiohttpClient,
) -> None:
    with_supabase = make_settings(
        fal_key=CANARY, supabase_url="https://abc.supabase.co/", supabase_key="sb_secret_x"
    )
    client = await aiohttp_client(falproxy.create_app(with_supabase))
    policy = (await client.get("/")).headers["Content-Security-Policy"]
    connect = next(part for part in policy.split("; ") if part.startswith("connect-src"))
    assert "https://abc.supabase.co" in connect.split()
    assert "https://*.fal.media" in connect.split()


async def test_an_unchanged_file_is_a_304(aiohttp_client: AiohttpClient) -> None:
    client = await aiohttp_client(falproxy.create_app(settings()))
    first = await client.get("/web/app.js")
    tag = first.headers["ETag"]
    again = await client.get("/web/app.js", headers={"If-None-Match": tag})
    assert (again.status, await again.read(), again.headers["ETag"]) == (304, b"", tag)
    other = await client.get("/web/app.js", headers={"If-None-Match": '"other"'})
    assert other.status == 200


async def test_files_below_their_content_hash_are_immutable(
    aiohttp_client: AiohttpClient,
) -> None:
    client = await aiohttp_client(falproxy.create_app(settings()))
    content_hash = read_files().content_hash
    assert f'src="web/{content_hash}/app.js"' in await (await client.get("/")).text()
    current = await client.get(f"/web/{content_hash}/app.js")
    assert current.headers["Cache-Control"] == "public, max-age=31536000, immutable"
    # A page of an older release, from another process: its files are served, but revalidated.
    older = await client.get("/web/@0123456789abcdef/app.js")
    assert (older.status, older.headers["Cache-Control"]) == (200, "no-cache")


@pytest.mark.parametrize(
    ("accepted", "is_compressed"),
    [
        pytest.param("gzip, deflate, br", True, id="among others"),
        pytest.param("br;q=1.0, GZIP;q=0.5", True, id="in upper case, with a weight"),
        pytest.param("gzip;q=0", False, id="excluded by its weight"),
        pytest.param("br", False, id="not named"),
        pytest.param("identity", False, id="identity"),
    ],
)
async def test_files_are_compressed_for_clients_that_accept_gzip(
    aiohttp_client: AiohttpClient, accepted: str, is_compressed: bool
) -> None:
    client = await aiohttp_client(falproxy.create_app(settings()), auto_decompress=False)
    response = await client.get("/web/app.js", headers={"Accept-Encoding": accepted})
    content = await response.read()
    assert response.headers["Vary"] == "Accept-Encoding"
    assert (response.headers.get("Content-Encoding") == "gzip") is is_compressed
    assert (gzip.decompress(content) if is_compressed else content) == (WEB / "app.js").read_bytes()


@pytest.mark.parametrize(
    "path",
    [
        pytest.param("/web/nothing.js", id="no such file"),
        pytest.param("/web/..%2Fversion.py", id="above"),
        pytest.param("/web/dashboard", id="a directory"),
        pytest.param("/web//etc/passwd", id="an absolute path"),
        pytest.param(
            "/web/@0123456789abcdef/..%2F..%2Fversion.py", id="above, below a content hash"
        ),
    ],
)
async def test_other_files_are_not_served(aiohttp_client: AiohttpClient, path: str) -> None:
    client = await aiohttp_client(falproxy.create_app(settings()))
    response = await client.get(path)
    assert (response.status, (await response.json())["error"]["code"]) == (404, "file_not_found")


async def test_about_json_has_properties_and_no_secrets(aiohttp_client: AiohttpClient) -> None:
    client = await aiohttp_client(falproxy.create_app(settings()))
    response = await client.get("/web/about.json")
    about = await response.json()
    assert set(about) == {"version", "isSandbox", "isLocked", "uploads", "formats", "maxBody"}
    assert (about["version"], about["isSandbox"], about["isLocked"]) == (
        falproxy.__version__,
        False,
        True,
    )
    for secret in (CANARY, SECRET):
        assert secret not in json.dumps(about)


async def test_below_a_prefix_the_page_is_at_the_prefix(aiohttp_client: AiohttpClient) -> None:
    app = web.Application(handler_args=HANDLER_ARGS)
    falproxy.setup(app, settings(), prefix="/deep/er")
    client = await aiohttp_client(app)
    assert (await client.get("/deep/er/")).status == 200
    redirect = await client.get("/deep/er", allow_redirects=False)
    assert (redirect.status, redirect.headers["Location"]) == (302, "er/")
    assert (await client.get("/deep/er")).url.path == "/deep/er/"
    assert (await client.get("/")).status == 404


async def test_existing_routes_of_the_application_are_kept(aiohttp_client: AiohttpClient) -> None:
    async def own(request: web.Request) -> web.Response:
        return web.Response(text="own")

    app = web.Application(handler_args=HANDLER_ARGS)
    falproxy.setup(app, settings())
    for path in ("/", "/dashboard", "/web/app.js"):
        app.router.add_get(path, own)
    client = await aiohttp_client(app)
    for path in ("/", "/dashboard", "/web/app.js"):
        assert await (await client.get(path)).text() == "own"


BROWSER = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}


@pytest.mark.parametrize(
    ("path", "root"),
    [
        pytest.param("/nothing", "./", id="beside the page"),
        pytest.param("/not/at/all", "../../", id="deeper"),
        pytest.param("/nothing/", "../", id="with a slash"),
    ],
)
async def test_a_browser_gets_a_page_for_a_missing_path(
    aiohttp_client: AiohttpClient, path: str, root: str
) -> None:
    client = await aiohttp_client(falproxy.create_app(settings()))
    response = await client.get(path, headers=BROWSER)
    text = await response.text()
    assert (response.status, response.content_type) == (404, "text/html")
    assert f'href="{root}web/base.css"' in text
    assert "{root}" not in text
    assert "unsafe" not in response.headers["Content-Security-Policy"]
    stylesheet = response.url.join(URL(f"{root}web/base.css"))
    assert (await client.get(stylesheet.path)).status == 200


@pytest.mark.parametrize(
    ("method", "accept"),
    [
        pytest.param("GET", "*/*", id="fetch"),
        pytest.param("GET", "application/json", id="a program"),
        pytest.param("POST", BROWSER["Accept"], id="another method"),
    ],
)
async def test_others_get_json_for_a_missing_path(
    aiohttp_client: AiohttpClient, method: str, accept: str
) -> None:
    client = await aiohttp_client(falproxy.create_app(settings()))
    response = await client.request(method, "/nothing", headers={"Accept": accept})
    assert (response.status, (await response.json())["error"]["code"]) == (404, "not_found")


@pytest.mark.parametrize("name", ["dashboard", "docs"])
async def test_a_final_slash_is_redirected(aiohttp_client: AiohttpClient, name: str) -> None:
    client = await aiohttp_client(falproxy.create_app(settings()))
    response = await client.get(f"/{name}/", headers=BROWSER)
    assert (response.status, response.url.path) == (200, f"/{name}")


@pytest.mark.parametrize("prefix", ["", "/deep/er"])
@pytest.mark.parametrize(
    ("name", "content_type"),
    [("favicon.ico", "image/x-icon"), ("robots.txt", "text/plain; charset=utf-8")],
)
async def test_browsers_and_crawlers_get_their_files(
    aiohttp_client: AiohttpClient, name: str, content_type: str, prefix: str
) -> None:
    if prefix:
        app = web.Application(handler_args=HANDLER_ARGS)
        falproxy.setup(app, settings(), prefix=prefix)
    else:
        app = falproxy.create_app(settings())
    client = await aiohttp_client(app)
    response = await client.get(f"{prefix}/{name}")
    content = await response.read()
    assert (response.status, response.headers["Content-Type"]) == (200, content_type)
    assert response.headers["Cache-Control"] == "public, max-age=86400"
    assert 0 < len(content) < 1500
    again = await client.get(
        f"{prefix}/{name}", headers={"If-None-Match": response.headers["ETag"]}
    )
    assert again.status == 304
    if prefix:
        assert (await client.get(f"/{name}")).status == 404, "it belongs to the application"


async def test_crawlers_are_asked_to_stay_away(aiohttp_client: AiohttpClient) -> None:
    client = await aiohttp_client(falproxy.create_app(settings()))
    lines = (await (await client.get("/robots.txt")).text()).splitlines()
    assert lines == ["User-agent: *", "Disallow: /"]


async def test_an_application_without_a_prefix_has_its_own_robots_txt(
    aiohttp_client: AiohttpClient,
) -> None:
    app = web.Application(handler_args=HANDLER_ARGS)
    falproxy.setup(app, settings())
    client = await aiohttp_client(app)
    assert (await client.get("/robots.txt")).status == 404


def css_variables(path: Path) -> list[dict[str, str]]:
    """Return the variables of each `:root` in a style sheet: light, dark."""
    blocks = re.findall(r":root \{(.*?)\}", path.read_text(), re.DOTALL)
    return [dict(re.findall(r"(--[\w-]+): (.*?);", block)) for block in blocks]


def test_the_example_has_the_colors_type_and_icon_of_the_pages(root: Path) -> None:
    example = root / "examples" / "js-client" / "src"
    for used, defined in zip(
        css_variables(example / "style.css")[:2], css_variables(WEB / "base.css")[:2], strict=True
    ):
        assert used.items() <= defined.items()
        assert {"--accent", "--background", "--text"} <= used.keys()
    assert (example / "icon.svg").read_bytes() == (WEB / "icon.svg").read_bytes()


def test_all_files_are_in_the_package(root: Path) -> None:
    config = ConfigParser()
    config.read(root / "setup.cfg")
    patterns = [p.strip() for p in config["options.package_data"]["falproxy.web"].split(",")]
    for name in FILES:
        assert any(fnmatch(f"static/{name}", pattern) for pattern in patterns), name


def imports_of(name: str) -> set[str]:
    """Return the modules that a module imports before it runs."""
    text = (WEB / name).read_text()
    paths = re.findall(r'^(?:import|export)\b[^;"]*"(\.\.?/[^"]+)";', text, re.MULTILINE)
    return {normpath(Path(name).parent / path) for path in paths}


@pytest.mark.parametrize("name", ["index.html", "dashboard.html"])
def test_a_page_preloads_all_modules_that_it_needs(name: str) -> None:
    """Otherwise, each further level of imports is a round trip."""
    text = (WEB / name).read_text()
    (entry,) = re.findall(r'<script type="module" src="web/([^"]+)">', text)
    needed, found = set[str](), {entry}
    while found:
        needed |= found
        found = set[str]().union(*map(imports_of, found)) - needed
    preloaded = re.findall(r'<link rel="modulepreload" href="web/([^"]+)">', text)
    assert sorted(preloaded) == sorted(needed - {entry})


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".js")])
def test_modules_are_short_and_have_a_doc_comment(name: str) -> None:
    text = (WEB / name).read_text()
    assert len(text.splitlines()) <= MODULE_MAX
    assert text.startswith("/**")
    assert "innerHTML" not in text
    assert max(map(len, text.splitlines())) <= 120
