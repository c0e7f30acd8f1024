"""`falproxy cache`: output, errors, and its prediction of the outcome of a call."""

import asyncio
import json
import re
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientResponse, web

from falproxy import Settings
from falproxy.cli.cache_command import clear, explain, read_call, stats
from falproxy.errors import SettingsError
from tests.support.cli_process import start_command
from tests.support.fake_fal import FakeFal
from tests.support.gateway import Gateway, MakeGateway
from tests.support.image_hosts import KONTEXT, NOT_AN_IMAGE, PNG, open_internet, uri
from tests.support.key_search import CANARY, LEAKS
from tests.support.redis_server import redis_server
from tests.support.settings import make_settings

pytestmark = pytest.mark.slow

KONTEXT_ID = "fal-ai/flux-pro/kontext"
BODY = {"prompt": "a cät", "seed": 12345678901234567890, "image_url": uri(PNG)}


def fields_of(lines: str) -> dict[str, str]:
    """Return the printed values by the first word of each line."""
    return dict(re.findall(r"^(\w+) +(.*(?:\n[ }].*)*)", lines, re.MULTILINE))


async def run_command(*words: str, folder: Path, **env: str) -> tuple[int, str, str]:
    """Return the exit code, the output and the errors of a real process."""
    process = await start_command("cache", *words, CWD=str(folder), **env)
    async with asyncio.timeout(10):
        out, err = await process.communicate()
    LEAKS.search((out + err).decode(), "falproxy cache")
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


@dataclass(frozen=True, slots=True)
class Installation:
    """A gateway and its settings."""

    gateway: Gateway
    settings: Settings

    async def call(self, body: object, target: str = KONTEXT, **headers: str) -> ClientResponse:
        fields = [(name.replace("_", "-"), value) for name, value in headers.items()]
        response = await self.gateway.call(target, json=body, headers=fields)
        assert response.status == 200, await response.text()
        return response

    async def explain(
        self, body: object, endpoint: str = KONTEXT_ID, **members: object
    ) -> dict[str, str]:
        file = self.settings.data_dir / "call.json"
        file.write_text(json.dumps({"endpoint": endpoint, "input": body, **members}))
        return fields_of("\n".join([line async for line in explain(self.settings, file)]))

    async def run(self, *words: str) -> dict[str, str]:
        """Run a command in a process of its own."""
        env = {
            "FALPROXY_DATA_DIR": str(self.settings.data_dir),
            "FALPROXY_UPSTREAM_ORIGIN": self.settings.upstream.origin or "",
            "REDIS_URL": self.settings.cache.redis_url or "",
            "FAL_KEY": CANARY,  # otherwise there is a note about the sandbox
        }
        code, out, err = await run_command(*words, folder=self.settings.data_dir, **env)
        assert (code, err) == (0, "")
        return fields_of(out)


Install = Callable[..., Awaitable[Installation]]


@pytest.fixture
def install(make_gateway: MakeGateway, fal: FakeFal, tmp_path: Path) -> Install:
    async def install(**fields: Any) -> Installation:
        fields = {"data_dir": tmp_path} | fields
        settings = make_settings(fal_key="a:b", upstream_origin=fal.origin, **fields)
        return Installation(await make_gateway(fal.origin, **fields), settings)

    return install


@pytest.fixture
async def here(install: Install) -> Installation:
    """A gateway in front of `fal`, with the results in a file."""
    return await install()


@pytest.fixture(params=["file", "redis"])
async def either(request: pytest.FixtureRequest, install: Install) -> AsyncIterator[Installation]:
    """A gateway on each of the stores."""
    if request.param == "file":
        yield await install()
        return
    with redis_server() as server:
        installed = await install(redis_url=server.url)
        yield installed
        await installed.gateway.client.close()


# --- stats and clear ---


async def test_stats_counts_the_content(either: Installation) -> None:
    document = await (await either.call(BODY)).read()
    await either.call({**BODY, "seed": 2})
    settings = either.settings
    assert await either.run("stats") == {
        "store": "Redis, by REDIS_URL"
        if settings.cache.redis_url
        else str(settings.data_dir / "results.sqlite"),
        "results": "2",
        "bytes": str(2 * len(document)),
        "flights": "0",
        "ids": "0",
    }


async def test_clear_deletes_all_results(either: Installation) -> None:
    await either.call(BODY)
    assert await either.run("clear") == {"results": "deleted: 1"}
    assert [line async for line in clear(either.settings)] == ["results deleted: 0"]
    response = await either.call(BODY)
    assert response.headers["Cache-Status"] == "falproxy; fwd=miss; stored"


async def test_the_stats_of_a_new_store_are_zero(tmp_path: Path) -> None:
    code, out, err = await run_command("stats", folder=tmp_path)
    assert (code, err) == (0, "")
    assert f"store    {tmp_path}/.falproxy/results.sqlite\nresults  0\n" in out


# --- explain ---


async def test_a_repeated_call_is_predicted_as_a_hit(either: Installation, fal: FakeFal) -> None:
    before = await either.explain(BODY)
    assert before["now"] == "miss: the call would be sent to fal"
    await either.call(BODY)
    after = await either.run("explain", "call.json")
    match = re.fullmatch(r"hit, for (\d+) more seconds", after["now"])
    assert match is not None, after
    assert 3500 < int(match[1]) <= 3600
    assert after["key"] == before["key"]
    assert len(fal.seen) == 1, "explain sends nothing to fal"
    assert (await either.call(BODY)).headers["Cache-Status"].startswith("falproxy; hit")


@pytest.mark.parametrize(
    ("change", "is_hit"),
    [
        pytest.param({"seed": 2}, False, id="another seed"),
        pytest.param({"seed": 12345678901234567891}, False, id="seed with a small difference"),
        pytest.param({"strength": 1}, False, id="additional parameter"),
        pytest.param({"image_url": uri(PNG + b"x")}, False, id="another image"),
        pytest.param({"image_url": uri(PNG, "image/gif")}, True, id="another declared type"),
        pytest.param({"n": 3.0}, True, id="float of the same value"),
        pytest.param({"n": True}, False, id="boolean in place of a number"),
    ],
)
async def test_a_hit_is_predicted_if_and_only_if_the_proxy_has_one(
    here: Installation, change: dict[str, object], is_hit: bool
) -> None:
    body = {**BODY, "n": 3}
    await here.call(body)
    first, second = await here.explain(body), await here.explain({**body, **change})
    assert second["now"].startswith("hit") is is_hit
    assert (second["key"] == first["key"]) is is_hit
    response = await here.call({**body, **change})
    assert response.headers["Cache-Status"].startswith("falproxy; hit") is is_hit


async def test_a_captured_request_is_explained_by_its_url_and_headers(
    here: Installation,
) -> None:
    headers = {"X-Fal-Object-Lifecycle-Preference": "60", "Authorization": "Bearer x"}
    await here.call(BODY, "https://queue.fal.run/" + KONTEXT_ID)  # with another lifecycle
    response = await here.call(BODY, X_Fal_Object_Lifecycle_Preference="60")
    assert "stored" in response.headers["Cache-Status"]
    output = await here.explain(BODY, "https://queue.fal.run/" + KONTEXT_ID, headers=headers)
    assert output["now"].startswith("hit")
    assert '"x-fal-object-lifecycle-preference"' in output["made"]
    assert "Bearer" not in str(output)


@pytest.mark.parametrize(
    ("headers", "now"),
    [
        pytest.param({"cache-control": "no-cache"}, "miss", id="no-cache"),
        pytest.param({"Cache-Control": "max-age=0"}, "miss", id="max-age=0"),
        pytest.param({"Cache-Control": "max-age=600"}, "hit", id="max-age of ten minutes"),
        pytest.param({"Cache-Control": "only-if-cached"}, "hit", id="only-if-cached"),
    ],
)
async def test_the_cache_control_of_the_call_is_respected(
    here: Installation, headers: dict[str, str], now: str
) -> None:
    await here.call(BODY)
    assert (await here.explain(BODY, headers=headers))["now"].startswith(now)


async def test_only_if_cached_without_a_result_is_predicted_as_a_504(here: Installation) -> None:
    output = await here.explain(BODY, headers={"Cache-Control": "only-if-cached"})
    assert "504" in output["now"]
    headers = [("Cache-Control", "only-if-cached")]
    assert (await here.gateway.call(KONTEXT, json=BODY, headers=headers)).status == 504


@pytest.mark.parametrize("kind", ["run", "submit"])
async def test_a_running_call_is_predicted_as_in_flight(
    either: Installation, fal: FakeFal, kind: str
) -> None:
    release = asyncio.Event()

    async def respond(request: web.Request) -> web.StreamResponse:
        if kind == "submit" and request.method == "POST":
            app = "https://queue.fal.run/fal-ai/flux-pro/requests/0001"
            return web.json_response({"request_id": "0001", "status_url": f"{app}/status"})
        await release.wait()
        return web.json_response({"status": "COMPLETED", "images": []})

    fal.respond = respond
    target = KONTEXT.replace("https://", "https://queue.") if kind == "submit" else KONTEXT
    call = asyncio.ensure_future(either.call(BODY, target))
    async with asyncio.timeout(5):
        while not fal.seen:
            await asyncio.sleep(0.01)
        if kind == "submit":
            await call
    output = await either.explain(BODY)
    assert output["now"] == "in flight: the call would share the response"
    assert "flights  1" in [line async for line in stats(either.settings)]
    release.set()
    await call


@pytest.mark.parametrize(
    ("body", "endpoint", "headers", "words"),
    [
        pytest.param(BODY, "fal-ai/flux/dev", {}, "FALPROXY_CACHE_ENDPOINTS", id="endpoint"),
        pytest.param(BODY, "no-such-thing", {}, "FALPROXY_CACHE_ENDPOINTS", id="unknown endpoint"),
        pytest.param(
            BODY, f"{KONTEXT_ID}?fal_webhook=https://a.b", {}, "fal_webhook", id="webhook"
        ),
        pytest.param(BODY, f"{KONTEXT_ID}?a=b", {}, "a query", id="query"),
        pytest.param(BODY, KONTEXT_ID, {"X-Fal-Store-IO": "0"}, "Store-IO", id="store-io"),
        pytest.param(BODY, KONTEXT_ID, {"Cache-Control": "no-store"}, "no-store", id="no-store"),
        pytest.param({"a": float("nan")}, KONTEXT_ID, {}, "NaN", id="input"),
        pytest.param({"image_url": "a.png"}, KONTEXT_ID, {}, "an image", id="image"),
        pytest.param([1], KONTEXT_ID, {}, "input", id="not an object"),
    ],
)
async def test_a_bypass_has_a_reason(
    here: Installation,
    body: object,
    endpoint: str,
    headers: dict[str, str],
    words: str,
) -> None:
    output = await here.explain(body, endpoint, headers=headers)
    assert list(output) == ["bypass"]
    assert words in output["bypass"]


async def test_a_cache_that_is_off_is_a_bypass(install: Install) -> None:
    here = await install(cache=False)
    assert await here.explain(BODY) == {"bypass": "off: FALPROXY_CACHE is off"}


@pytest.mark.parametrize("endpoint", [KONTEXT_ID, "fal-ai/flux/dev"])
@pytest.mark.parametrize(
    ("value", "words"),
    [
        pytest.param(uri(NOT_AN_IMAGE), "unsupported_image_format at images.0.url:", id="PDF"),
        pytest.param(
            "http://10.0.0.1/a.png", "image_load_error at images.0.url:", id="private address"
        ),
    ],
)
async def test_a_refused_image_is_reported(
    here: Installation, fal: FakeFal, endpoint: str, value: str, words: str
) -> None:
    body = {"images": [{"url": value}]}
    output = await here.explain(body, endpoint)
    assert list(output) == ["refused"]
    assert output["refused"].startswith(words)
    response = await here.gateway.call(f"https://fal.run/{endpoint}", json=body)
    assert (await response.json())["message"] in output["refused"]
    assert fal.seen == []


async def test_results_are_separate_for_each_principal(install: Install) -> None:
    keys = (("ann", "s3cret-of-ann"),)
    here = await install(cache_scope="principal", access_keys=keys)
    await here.call(BODY, x_falproxy_key="s3cret-of-ann")
    ann, bob = [await here.explain(BODY, principal=f"key:{name}") for name in ("ann", "bob")]
    assert ann["now"].startswith("hit")
    assert bob["now"].startswith("miss")


async def test_an_image_at_fal_has_no_note(here: Installation, fal: FakeFal) -> None:
    async def respond(request: web.Request) -> web.StreamResponse:
        if request.path.startswith("/files"):
            return web.Response(body=PNG, content_type="image/png")
        return web.json_response({"images": []})

    fal.respond = respond
    body = {"image_url": f"{fal.origin}/files/a.png"}
    await here.call(body)
    output = await here.explain(body)
    assert output["now"].startswith("hit")
    assert "note" not in output


async def test_an_image_on_a_third_party_host_has_a_note(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its URL is part of the key, unless there is a result of the same bytes."""
    async with open_internet() as internet:
        for module in ("app", "cli.cache_command"):
            monkeypatch.setattr(f"falproxy.{module}.create_fetcher", lambda _: internet.fetcher())
        internet.public.responses["/b.png"] = internet.public.responses["/a.png"]
        here = await install()
        first, second = {"image_url": internet.url()}, {"image_url": internet.url("/b.png")}
        await here.call(first)
        output = await here.explain(first)
        assert output["note"] == "image_url is on a third-party host: its URL is a part of the key"
        assert output["now"].startswith("hit")
        assert (await here.explain(second))["now"].startswith("miss")
        await here.call({"image_url": uri(PNG)})
        assert (await here.explain(second))["now"].startswith("hit")
        assert (await here.call(second)).headers["Cache-Status"].startswith("falproxy; hit")


async def test_the_sandbox_has_a_note(tmp_path: Path) -> None:
    (tmp_path / "call.json").write_text(json.dumps({"endpoint": KONTEXT_ID, "input": BODY}))
    _, out, _ = await run_command("explain", "call.json", folder=tmp_path, FALPROXY_SANDBOX="1")
    assert "sandbox" in fields_of(out)["note"]


# --- Errors ---


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        pytest.param(None, "call.json cannot be read: no such file or directory.", id="missing"),
        pytest.param(b'{"a":\n ]', "call.json is not JSON (line 2, column 2).", id="not JSON"),
        pytest.param(b"", "call.json is not JSON (line 1, column 1).", id="empty"),
        pytest.param(b"\xff\xff", "call.json is not JSON in UTF-8.", id="bytes"),
        pytest.param(b"[" * 99_999, "call.json is not JSON in UTF-8.", id="nested"),
        pytest.param(
            b"[]", "call.json must hold an object with `endpoint` and `input`.", id="list"
        ),
        pytest.param(
            b'{"endpoint": 1, "input": {}}',
            "call.json must hold an object with `endpoint` and `input`.",
            id="number as the endpoint",
        ),
        pytest.param(
            b'{"endpoint": "a/b", "input": {}, "headers": []}',
            "call.json must hold `headers` as an object, `principal` as a string.",
            id="list of headers",
        ),
        pytest.param(
            b'{"endpoint": "https://evil.tld/a/b", "input": {}}',
            "call.json has no valid endpoint of fal: 'https://evil.tld/a/b'.",
            id="URL of another host",
        ),
        pytest.param(
            b'{"endpoint": "a b", "input": {}}',
            "call.json has no valid endpoint of fal: 'a b'.",
            id="invalid endpoint id",
        ),
    ],
)
async def test_an_invalid_call_file_is_an_error(
    tmp_path: Path, content: bytes | None, sentence: str
) -> None:
    file = tmp_path / "call.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SettingsError) as error:
        read_call(file)
    assert str(error.value) == f"{tmp_path}/{sentence}"


async def test_a_usage_error_is_one_sentence_and_code_2(tmp_path: Path) -> None:
    output = await run_command("explain", "call.json", folder=tmp_path)
    sentence = "falproxy: call.json cannot be read: no such file or directory.\n"
    assert output == (2, "", sentence)


@pytest.mark.parametrize("subcommand", ["stats", "clear"])
async def test_an_unreachable_redis_is_an_error(tmp_path: Path, subcommand: str) -> None:
    output = await run_command(subcommand, folder=tmp_path, REDIS_URL="redis://:s3cret@127.0.0.1:9")
    assert output == (1, "", "falproxy: Redis cannot be used (ConnectionError).\n")


async def test_the_key_is_printed_without_redis(tmp_path: Path) -> None:
    (tmp_path / "call.json").write_text(json.dumps({"endpoint": KONTEXT_ID, "input": BODY}))
    env = {"REDIS_URL": "redis://:s3cret@127.0.0.1:9"}
    code, out, err = await run_command("explain", "call.json", folder=tmp_path, **env)
    assert (code, err) == (1, "falproxy: Redis cannot be used (ConnectionError).\n")
    assert list(fields_of(out)) == ["key", "made", "note"]


async def test_a_file_that_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "results.sqlite").mkdir()
    code, out, err = await run_command("stats", folder=tmp_path, FALPROXY_DATA_DIR=str(tmp_path))
    assert (code, out) == (1, "")
    assert err.startswith("falproxy: results.sqlite in FALPROXY_DATA_DIR cannot be used: ")
    assert err.count("\n") == 1


async def test_an_invalid_redis_url_is_an_error_without_the_password(tmp_path: Path) -> None:
    url = "redis://:s3cret@127.0.0.1:port"
    code, _, err = await run_command("stats", folder=tmp_path, REDIS_URL=url)
    assert (code, err[:20]) == (2, "falproxy: REDIS_URL ")
    assert "s3cret" not in err


async def test_a_missing_redis_client_is_an_error_with_the_remedy(tmp_path: Path) -> None:
    hide = "import sys; sys.modules['redis'] = None; from falproxy.cli.main import main; "
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", f"{hide} raise SystemExit(main(['cache', 'stats']))"),
        cwd=tmp_path,
        env={"REDIS_URL": "redis://127.0.0.1:9"},
        stderr=asyncio.subprocess.PIPE,
    )
    _, err = await process.communicate()
    assert process.returncode == 2
    assert err.startswith(b"falproxy: REDIS_URL needs redis")
    assert err.endswith(b": pip install 'falproxy[redis]'.\n")


async def test_an_invalid_setting_is_named(tmp_path: Path) -> None:
    code, _, err = await run_command("stats", folder=tmp_path, FALPROXY_CACHE_TTL="soon")
    assert code == 2
    assert err.startswith("falproxy: FALPROXY_CACHE_TTL must be ")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        pytest.param(["--help"], ["stats", "clear", "explain"], id="all"),
        pytest.param(["stats", "--help"], ["flights", "ids"], id="stats"),
        pytest.param(["explain", "--help"], ['"endpoint"', '"input"', "FILE"], id="explain"),
    ],
)
async def test_help_describes_the_commands(
    tmp_path: Path, words: list[str], expected: list[str]
) -> None:
    code, out, _ = await run_command(*words, folder=tmp_path)
    assert code == 0
    assert all(word in out for word in expected)
    assert max(map(len, out.splitlines())) <= 100


async def test_a_missing_subcommand_prints_the_usage(tmp_path: Path) -> None:
    code, _, err = await run_command(folder=tmp_path)
    assert code == 2
    assert "usage: falproxy cache" in err
