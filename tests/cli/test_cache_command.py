"""`falproxy cache` as a user meets it, and that it says of a call what the proxy does with it."""

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
from tests.support.cli_process import command
from tests.support.fake_fal import FakeFal
from tests.support.gateway import Gateway, MakeGateway
from tests.support.image_hosts import KONTEXT, NO_PICTURE, PNG, open_internet, uri
from tests.support.key_search import CANARY, LEAKS
from tests.support.redis_server import redis_server
from tests.support.settings import make_settings

pytestmark = pytest.mark.slow

KONTEXT_ID = "fal-ai/flux-pro/kontext"
BODY = {"prompt": "a cät", "seed": 12345678901234567890, "image_url": uri(PNG)}


def fields_of(lines: str) -> dict[str, str]:
    """What is printed after each first word."""
    return dict(re.findall(r"^(\w+) +(.*(?:\n[ }].*)*)", lines, re.MULTILINE))


async def ask(*words: str, folder: Path, **env: str) -> tuple[int, str, str]:
    """The exit code of a real process, and what it prints and complains."""
    process = await command("cache", *words, CWD=str(folder), **env)
    async with asyncio.timeout(10):
        out, err = await process.communicate()
    LEAKS.look((out + err).decode(), "falproxy cache")
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


@dataclass(frozen=True, slots=True)
class Installation:
    """A gateway, and the settings that it runs with."""

    gateway: Gateway
    settings: Settings

    async def call(self, body: object, target: str = KONTEXT, **headers: str) -> ClientResponse:
        named = [(name.replace("_", "-"), value) for name, value in headers.items()]
        response = await self.gateway.call(target, json=body, headers=named)
        assert response.status == 200, await response.text()
        return response

    async def explain(
        self, body: object, endpoint: str = KONTEXT_ID, **more: object
    ) -> dict[str, str]:
        file = self.settings.data_dir / "call.json"
        file.write_text(json.dumps({"endpoint": endpoint, "input": body, **more}))
        return fields_of("\n".join([line async for line in explain(self.settings, file)]))

    async def ask(self, *words: str) -> dict[str, str]:
        """The same by a process of its own."""
        env = {
            "FALPROXY_DATA_DIR": str(self.settings.data_dir),
            "FALPROXY_UPSTREAM_ORIGIN": self.settings.upstream.origin or "",
            "REDIS_URL": self.settings.cache.redis_url or "",
            "FAL_KEY": CANARY,  # without one it would be told of the sandbox
        }
        code, out, err = await ask(*words, folder=self.settings.data_dir, **env)
        assert (code, err) == (0, "")
        return fields_of(out)


Install = Callable[..., Awaitable[Installation]]


@pytest.fixture
def install(make_gateway: MakeGateway, fal: FakeFal, tmp_path: Path) -> Install:
    async def install(**given: Any) -> Installation:
        given = {"data_dir": tmp_path} | given
        settings = make_settings(fal_key="a:b", upstream_origin=fal.origin, **given)
        return Installation(await make_gateway(fal.origin, **given), settings)

    return install


@pytest.fixture
async def here(install: Install) -> Installation:
    """The gateway in front of `fal`, its results in a file."""
    return await install()


@pytest.fixture(params=["file", "redis"])
async def either(request: pytest.FixtureRequest, install: Install) -> AsyncIterator[Installation]:
    """The same on each of the stores."""
    if request.param == "file":
        yield await install()
        return
    with redis_server() as server:
        installed = await install(redis_url=server.url)
        yield installed
        await installed.gateway.client.close()


# What is kept


async def test_it_says_how_much_is_kept(either: Installation) -> None:
    document = await (await either.call(BODY)).read()
    await either.call({**BODY, "seed": 2})
    settings = either.settings
    assert await either.ask("stats") == {
        "store": "Redis, by REDIS_URL"
        if settings.cache.redis_url
        else str(settings.data_dir / "results.sqlite"),
        "results": "2",
        "bytes": str(2 * len(document)),
        "flights": "0",
        "ids": "0",
    }


async def test_it_forgets_all_results(either: Installation) -> None:
    await either.call(BODY)
    assert await either.ask("clear") == {"results": "deleted: 1"}
    assert [line async for line in clear(either.settings)] == ["results deleted: 0"]
    response = await either.call(BODY)
    assert response.headers["Cache-Status"] == "falproxy; fwd=miss; stored"


async def test_nothing_is_kept_where_nobody_called(tmp_path: Path) -> None:
    code, out, err = await ask("stats", folder=tmp_path)
    assert (code, err) == (0, "")
    assert f"store    {tmp_path}/.falproxy/results.sqlite\nresults  0\n" in out


# What a call would meet


async def test_a_call_that_was_made_is_a_hit(either: Installation, fal: FakeFal) -> None:
    before = await either.explain(BODY)
    assert before["now"] == "miss: the call would be sent to fal"
    await either.call(BODY)
    after = await either.ask("explain", "call.json")
    match = re.fullmatch(r"hit, for (\d+) more seconds", after["now"])
    assert match is not None, after
    assert 3500 < int(match[1]) <= 3600
    assert after["key"] == before["key"]
    assert len(fal.seen) == 1, "nobody asked fal to explain"
    assert (await either.call(BODY)).headers["Cache-Status"].startswith("falproxy; hit")


@pytest.mark.parametrize(
    ("change", "is_hit"),
    [
        pytest.param({"seed": 2}, False, id="another seed"),
        pytest.param({"seed": 12345678901234567891}, False, id="a seed that is one more"),
        pytest.param({"strength": 1}, False, id="one more parameter"),
        pytest.param({"image_url": uri(PNG + b"x")}, False, id="another picture"),
        pytest.param({"image_url": uri(PNG, "image/gif")}, True, id="another declared type"),
        pytest.param({"n": 3.0}, True, id="a number as Python writes it"),
        pytest.param({"n": True}, False, id="what is no number"),
    ],
)
async def test_it_is_a_hit_exactly_where_the_proxy_has_one(
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
    await here.call(BODY, "https://queue.fal.run/" + KONTEXT_ID)  # of another lifecycle
    response = await here.call(BODY, X_Fal_Object_Lifecycle_Preference="60")
    assert "stored" in response.headers["Cache-Status"]
    said = await here.explain(BODY, "https://queue.fal.run/" + KONTEXT_ID, headers=headers)
    assert said["now"].startswith("hit")
    assert '"x-fal-object-lifecycle-preference"' in said["made"]
    assert "Bearer" not in str(said)


@pytest.mark.parametrize(
    ("headers", "now"),
    [
        pytest.param({"cache-control": "no-cache"}, "miss", id="a new one is asked for"),
        pytest.param({"Cache-Control": "max-age=0"}, "miss", id="none of any age"),
        pytest.param({"Cache-Control": "max-age=600"}, "hit", id="one of ten minutes"),
        pytest.param({"Cache-Control": "only-if-cached"}, "hit", id="a kept one"),
    ],
)
async def test_what_the_call_asks_for_counts(
    here: Installation, headers: dict[str, str], now: str
) -> None:
    await here.call(BODY)
    assert (await here.explain(BODY, headers=headers))["now"].startswith(now)


async def test_a_call_for_kept_results_only_is_a_504(here: Installation) -> None:
    said = await here.explain(BODY, headers={"Cache-Control": "only-if-cached"})
    assert "504" in said["now"]
    target = [("Cache-Control", "only-if-cached")]
    assert (await here.gateway.call(KONTEXT, json=BODY, headers=target)).status == 504


@pytest.mark.parametrize("kind", ["run", "submit"])
async def test_a_call_that_runs_is_on_its_way(
    either: Installation, fal: FakeFal, kind: str
) -> None:
    release = asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        if kind == "submit" and request.method == "POST":
            app = "https://queue.fal.run/fal-ai/flux-pro/requests/0001"
            return web.json_response({"request_id": "0001", "status_url": f"{app}/status"})
        await release.wait()
        return web.json_response({"status": "COMPLETED", "images": []})

    fal.answer = answer
    target = KONTEXT.replace("https://", "https://queue.") if kind == "submit" else KONTEXT
    call = asyncio.ensure_future(either.call(BODY, target))
    async with asyncio.timeout(5):
        while not fal.seen:
            await asyncio.sleep(0.01)
        if kind == "submit":
            await call
    said = await either.explain(BODY)
    assert said["now"] == "in flight: the call would share the response"
    assert "flights  1" in [line async for line in stats(either.settings)]
    release.set()
    await call


@pytest.mark.parametrize(
    ("body", "endpoint", "headers", "words"),
    [
        pytest.param(BODY, "fal-ai/flux/dev", {}, "FALPROXY_CACHE_ENDPOINTS", id="endpoint"),
        pytest.param(BODY, "no-such-thing", {}, "FALPROXY_CACHE_ENDPOINTS", id="no endpoint"),
        pytest.param(
            BODY, f"{KONTEXT_ID}?fal_webhook=https://a.b", {}, "fal_webhook", id="webhook"
        ),
        pytest.param(BODY, f"{KONTEXT_ID}?a=b", {}, "a query", id="query"),
        pytest.param(BODY, KONTEXT_ID, {"X-Fal-Store-IO": "0"}, "Store-IO", id="store-io"),
        pytest.param(BODY, KONTEXT_ID, {"Cache-Control": "no-store"}, "no-store", id="no-store"),
        pytest.param({"a": float("nan")}, KONTEXT_ID, {}, "NaN", id="input"),
        pytest.param({"image_url": "a.png"}, KONTEXT_ID, {}, "an image", id="image"),
        pytest.param([1], KONTEXT_ID, {}, "input", id="no object"),
    ],
)
async def test_a_call_for_itself_has_a_reason(
    here: Installation,
    body: object,
    endpoint: str,
    headers: dict[str, str],
    words: str,
) -> None:
    said = await here.explain(body, endpoint, headers=headers)
    assert list(said) == ["bypass"]
    assert words in said["bypass"]


async def test_without_a_cache_it_says_so(install: Install) -> None:
    here = await install(cache=False)
    assert await here.explain(BODY) == {"bypass": "off: FALPROXY_CACHE is off"}


@pytest.mark.parametrize("endpoint", [KONTEXT_ID, "fal-ai/flux/dev"])
@pytest.mark.parametrize(
    ("value", "words"),
    [
        pytest.param(uri(NO_PICTURE), "unsupported_image_format at images.0.url:", id="a PDF"),
        pytest.param("http://10.0.0.1/a.png", "image_load_error at images.0.url:", id="inside"),
    ],
)
async def test_a_refused_image_is_said(
    here: Installation, fal: FakeFal, endpoint: str, value: str, words: str
) -> None:
    body = {"images": [{"url": value}]}
    said = await here.explain(body, endpoint)
    assert list(said) == ["refused"]
    assert said["refused"].startswith(words)
    response = await here.gateway.call(f"https://fal.run/{endpoint}", json=body)
    assert (await response.json())["message"] in said["refused"]
    assert fal.seen == []


async def test_a_principal_has_results_of_its_own(install: Install) -> None:
    keys = (("ann", "s3cret-of-ann"),)
    here = await install(cache_scope="principal", access_keys=keys)
    await here.call(BODY, x_falproxy_key="s3cret-of-ann")
    ann, bob = [await here.explain(BODY, principal=f"key:{name}") for name in ("ann", "bob")]
    assert ann["now"].startswith("hit")
    assert bob["now"].startswith("miss")


async def test_a_picture_of_fal_s_own_has_no_note(here: Installation, fal: FakeFal) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        if request.path.startswith("/files"):
            return web.Response(body=PNG, content_type="image/png")
        return web.json_response({"images": []})

    fal.answer = answer
    body = {"image_url": f"{fal.origin}/files/a.png"}
    await here.call(body)
    said = await here.explain(body)
    assert said["now"].startswith("hit")
    assert "note" not in said


async def test_a_picture_that_others_serve_has_one(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its address is a part of the key, unless a result of the very bytes is there."""
    async with open_internet() as internet:
        for module in ("app", "cli.cache_command"):
            monkeypatch.setattr(f"falproxy.{module}.create_fetcher", lambda _: internet.fetcher())
        internet.public.answers["/b.png"] = internet.public.answers["/a.png"]
        here = await install()
        first, second = {"image_url": internet.url()}, {"image_url": internet.url("/b.png")}
        await here.call(first)
        said = await here.explain(first)
        assert said["note"] == "image_url is on a third-party host: its URL is a part of the key"
        assert said["now"].startswith("hit")
        assert (await here.explain(second))["now"].startswith("miss")
        await here.call({"image_url": uri(PNG)})
        assert (await here.explain(second))["now"].startswith("hit")
        assert (await here.call(second)).headers["Cache-Status"].startswith("falproxy; hit")


async def test_the_sandbox_s_results_are_not_looked_for(tmp_path: Path) -> None:
    (tmp_path / "call.json").write_text(json.dumps({"endpoint": KONTEXT_ID, "input": BODY}))
    _, out, _ = await ask("explain", "call.json", folder=tmp_path, FALPROXY_SANDBOX="1")
    assert "sandbox" in fields_of(out)["note"]


# What goes wrong


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        pytest.param(None, "call.json cannot be read: no such file or directory.", id="missing"),
        pytest.param(b'{"a":\n ]', "call.json is not JSON (line 2, column 2).", id="no JSON"),
        pytest.param(b"", "call.json is not JSON (line 1, column 1).", id="empty"),
        pytest.param(b"\xff\xff", "call.json is not JSON in UTF-8.", id="bytes"),
        pytest.param(b"[" * 99_999, "call.json is not JSON in UTF-8.", id="nested"),
        pytest.param(
            b"[]", "call.json must hold an object with `endpoint` and `input`.", id="a list"
        ),
        pytest.param(
            b'{"endpoint": 1, "input": {}}',
            "call.json must hold an object with `endpoint` and `input`.",
            id="a number for an endpoint",
        ),
        pytest.param(
            b'{"endpoint": "a/b", "input": {}, "headers": []}',
            "call.json must hold `headers` as an object, `principal` as a string.",
            id="headers in a list",
        ),
        pytest.param(
            b'{"endpoint": "https://evil.tld/a/b", "input": {}}',
            "call.json has no valid endpoint of fal: 'https://evil.tld/a/b'.",
            id="not fal's",
        ),
        pytest.param(
            b'{"endpoint": "a b", "input": {}}',
            "call.json has no valid endpoint of fal: 'a b'.",
            id="no id",
        ),
    ],
)
async def test_a_file_without_a_call_is_said(
    tmp_path: Path, content: bytes | None, sentence: str
) -> None:
    file = tmp_path / "call.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SettingsError) as error:
        read_call(file)
    assert str(error.value) == f"{tmp_path}/{sentence}"


async def test_a_mistake_is_one_sentence_and_code_2(tmp_path: Path) -> None:
    said = await ask("explain", "call.json", folder=tmp_path)
    sentence = "falproxy: call.json cannot be read: no such file or directory.\n"
    assert said == (2, "", sentence)


@pytest.mark.parametrize("question", ["stats", "clear"])
async def test_a_redis_that_is_away_is_said(tmp_path: Path, question: str) -> None:
    said = await ask(question, folder=tmp_path, REDIS_URL="redis://:s3cret@127.0.0.1:9")
    assert said == (1, "", "falproxy: Redis cannot be used (ConnectionError).\n")


async def test_a_call_has_a_key_where_redis_is_away(tmp_path: Path) -> None:
    (tmp_path / "call.json").write_text(json.dumps({"endpoint": KONTEXT_ID, "input": BODY}))
    env = {"REDIS_URL": "redis://:s3cret@127.0.0.1:9"}
    code, out, err = await ask("explain", "call.json", folder=tmp_path, **env)
    assert (code, err) == (1, "falproxy: Redis cannot be used (ConnectionError).\n")
    assert list(fields_of(out)) == ["key", "made", "note"]


async def test_a_file_that_cannot_be_opened_is_said(tmp_path: Path) -> None:
    (tmp_path / "results.sqlite").mkdir()
    code, out, err = await ask("stats", folder=tmp_path, FALPROXY_DATA_DIR=str(tmp_path))
    assert (code, out) == (1, "")
    assert err.startswith(f"falproxy: {tmp_path}/results.sqlite cannot be used: ")
    assert err.count("\n") == 1


async def test_a_url_that_is_none_of_redis_s_is_said(tmp_path: Path) -> None:
    url = "redis://:s3cret@127.0.0.1:port"
    code, _, err = await ask("stats", folder=tmp_path, REDIS_URL=url)
    assert (code, err[:20]) == (2, "falproxy: REDIS_URL ")
    assert "s3cret" not in err


async def test_redis_without_its_client_says_what_it_needs(tmp_path: Path) -> None:
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


async def test_a_bad_setting_is_named_here_too(tmp_path: Path) -> None:
    code, _, err = await ask("stats", folder=tmp_path, FALPROXY_CACHE_TTL="soon")
    assert code == 2
    assert err.startswith("falproxy: FALPROXY_CACHE_TTL must be ")


@pytest.mark.parametrize(
    ("words", "needed"),
    [
        pytest.param(["--help"], ["stats", "clear", "explain"], id="all"),
        pytest.param(["stats", "--help"], ["flights", "ids"], id="stats"),
        pytest.param(["explain", "--help"], ['"endpoint"', '"input"', "FILE"], id="explain"),
    ],
)
async def test_help_says_how_to_ask(tmp_path: Path, words: list[str], needed: list[str]) -> None:
    code, out, _ = await ask(*words, folder=tmp_path)
    assert code == 0
    assert all(word in out for word in needed)
    assert max(map(len, out.splitlines())) <= 100


async def test_no_question_is_explained(tmp_path: Path) -> None:
    code, _, err = await ask(folder=tmp_path)
    assert code == 2
    assert "usage: falproxy cache" in err
