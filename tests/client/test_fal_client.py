"""falproxy.client: every method of fal_client through the proxy, in its oldest and newest 1.x.

Two versions cannot be imported into one process: tests/fal_clients/play.py plays the scenarios in
processes of their own, and what must hold is here.
"""

import asyncio
import io
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Self

import pytest
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer
from PIL import Image

import falproxy
from falproxy.sandbox import Sandbox
from falproxy.sandbox import create_app as create_sandbox
from falproxy.sandbox.state import Seen
from tests.end_to_end.test_js_node import DEV, KONTEXT, World, need, origin_of, until
from tests.support.key_search import CANARY, SECRET
from tests.support.urls import PROXY

ROOT = Path(__file__).parent.parent.parent
PLAYER = ROOT / "tests" / "fal_clients" / "play.py"
OLDEST = "1.0.0"
# Where `make` puts the oldest fal_client; the newest is the environment's own.
OLDEST_PATH = Path(sys.prefix) / "fal_client" / OLDEST
PLAY_TIMEOUT = 90.0  # seconds for one scenario, on a slow machine
# A key that must never leave the client's process.
CLIENT_KEY = "client-id:client-secret"
PASS = "the-key-of-a-friend"

# Plays the scenario of a name and returns its result.
Play = Callable[..., Coroutine[Any, Any, Any]]


def clean_environment() -> dict[str, str]:
    """Ours without any word of fal or of a proxy."""
    return {name: value for name, value in os.environ.items() if "FAL" not in name}


@dataclass(slots=True)
class Player:
    """A process that plays scenarios with one version of fal_client."""

    process: subprocess.Popen[str]

    @classmethod
    def start(cls, version: str, home: Path, **env: str) -> Self:
        """version: `oldest` or `newest`."""
        path = OLDEST_PATH if version == "oldest" else None
        if path is not None:
            need(path)
        paths = [str(directory) for directory in (path, ROOT) if directory]
        process = subprocess.Popen(
            [sys.executable, str(PLAYER)],
            env={
                **clean_environment(),
                **env,
                "PYTHONPATH": os.pathsep.join(paths),
                "HOME": str(home),
            },
            cwd=home,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return cls(process)

    def play(self, order: dict[str, Any]) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "the player ended"
        assert SECRET not in line
        answer = json.loads(line)
        assert "failed" not in answer, answer["failed"]
        return answer["result"]

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module", params=["oldest", "newest"])
def player(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Player]:
    """The client's machine has a fal key, which is nobody else's business."""
    player = Player.start(request.param, tmp_path_factory.mktemp("home"), FAL_KEY=CLIENT_KEY)
    yield player
    player.stop()


@dataclass(frozen=True, slots=True)
class ClientWorld(World):
    """A world that also knows what reached the proxy. at_proxy: requests, in their order."""

    at_proxy: list[web.Request] = field(default_factory=list)


@asynccontextmanager
async def open_world(**options: Any) -> AsyncIterator[ClientWorld]:
    """A new world. options: settings of the proxy.

    Leaving it checks what every scenario owes: no key but the proxy's went to fal, and the
    client's own key went nowhere.
    """
    sandbox = Sandbox(speed=50)
    at_proxy: list[web.Request] = []

    @web.middleware
    async def record(request: web.Request, handler: Any) -> Any:
        at_proxy.append(request)
        return await handler(request)

    app = web.Application(middlewares=[record], handler_args={"handler_cancellation": True})
    async with TestServer(create_sandbox(sandbox)) as fal:
        settings = falproxy.Settings(fal_key=CANARY, upstream_origin=origin_of(fal), **options)
        falproxy.setup(app, settings, prefix="/ai")
        async with TestServer(app) as gateway, ClientSession() as session:
            sandbox.public_url = origin_of(fal)
            yield ClientWorld(
                f"{origin_of(gateway)}/ai", origin_of(fal), sandbox, session, at_proxy
            )
    for call in sandbox.seen:
        check_credentials(call)
    for request in at_proxy:
        check_request(request)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[ClientWorld]:
    async with open_world(data_dir=tmp_path) as opened:
        yield opened


@pytest.fixture
async def locked(tmp_path: Path) -> AsyncIterator[ClientWorld]:
    """A world whose proxy knows two people."""
    keys = (("friend", PASS), ("other", "another-key"))
    async with open_world(access_keys=keys, data_dir=tmp_path) as opened:
        yield opened


def check_credentials(call: Seen) -> None:
    """A call to fal has the proxy's key; files have a token for uploads, sockets one in the URL."""
    keys = call.headers.getall("Authorization", [])
    if call.host.startswith("127.0.0.1"):
        assert [key.partition(" ")[0] for key in keys] in ([], ["Bearer"]), call.path
    else:
        assert keys == ([] if "fal_jwt_token=" in call.query else [f"Key {CANARY}"]), call.path
    assert "client-secret" not in str(call.headers), call.path
    assert "x-falproxy-key" not in call.headers, call.path


def check_request(request: web.Request) -> None:
    """What the client sends to the proxy: a target, perhaps a key of the proxy's, no other key."""
    assert request.path == f"/ai{PROXY}"
    assert request.headers["x-fal-target-url"].startswith("https://")
    assert request.headers["Host"] == f"127.0.0.1:{request.url.port}"
    assert request.headers["User-Agent"].startswith("fal-client/1.")
    assert "Authorization" not in request.headers
    assert "client-" not in str(request.headers).replace("fal-client/", "")


@pytest.fixture(params=["sync", "async"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def play(world: ClientWorld, player: Player, kind: str) -> Play:
    return actor(player, kind, world.gateway)


def actor(player: Player, kind: str, proxy: str, key: str | None = None) -> Play:
    """Plays with one kind of client, which is told of a proxy and a key for it."""

    async def play(
        scenario: str, /, *, env: dict[str, str] | None = None, loops: int = 1, **options: Any
    ) -> Any:
        order = {
            "scenario": scenario,
            "kind": kind,
            "proxy": options.pop("proxy", proxy),
            "key": options.pop("key", key),
            "env": env or {},
            "loops": loops,
            "options": options,
        }
        try:
            async with asyncio.timeout(PLAY_TIMEOUT):
                return await asyncio.to_thread(player.play, order)
        except TimeoutError:
            player.stop()
            raise

    return play


@cache
def photo() -> bytes:
    """A PNG of 350 KB: noise does not compress."""
    file = io.BytesIO()
    Image.frombytes("RGB", (400, 300), random.Random(1).randbytes(400 * 300 * 3)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "photo.png"
    path.write_bytes(photo())
    return path


HERON = {"prompt": "a heron at dawn", "seed": 7, "image_size": "square"}


class TestModels:
    async def test_a_run_brings_the_picture_that_fal_makes(
        self, world: ClientWorld, play: Play
    ) -> None:
        result = await play("run")
        assert world.sandbox.jobs == 1
        assert world.sandbox.keys_seen == {f"Key {CANARY}"}
        made = await world.picture(result)
        assert made == await world.made_directly(DEV, **HERON)
        assert made != await world.made_directly(DEV, **{**HERON, "seed": 8})

    async def test_a_subscription_sees_queue_logs_and_result(
        self, world: ClientWorld, play: Play
    ) -> None:
        result = await play("subscribe")
        assert world.sandbox.jobs == 1
        (request_id,) = result["enqueued"]
        assert any(request_id in seen.path for seen in world.sandbox.seen)
        statuses = list(dict.fromkeys(status for status, _ in result["updates"]))
        assert statuses[-2:] == ["InProgress", "Completed"]
        assert result["updates"][-1][1] > 0
        assert await world.picture(result["data"]) == await world.made_directly(
            DEV, prompt="!delay 0.4 a paper boat on a river", seed=11
        )

    async def test_a_handle_knows_status_events_and_result(
        self, world: ClientWorld, play: Play
    ) -> None:
        result = await play("handle")
        assert world.sandbox.jobs == 1
        assert result["status_url"].startswith("https://queue.fal.run/")
        assert result["first"] in ("Queued", "InProgress")
        assert len(result["events"]) > 2
        assert result["events"][-1] == "Completed"
        assert result["logs"]
        assert result["seconds"] > 0
        assert result["data"]["seed"] == 3

    async def test_a_request_is_found_again_by_its_id(self, world: ClientWorld, play: Play) -> None:
        result = await play("handle")
        assert result["status"] == "Completed"
        assert result["result"] == result["data"]
        assert (await play("found_handle"))["seed"] == 3

    async def test_a_target_arrives_byte_for_byte(self, world: ClientWorld, play: Play) -> None:
        hook = "https://app.example/hook?job=1&next=%2Fa%20b"
        await play("webhook", url=hook)
        submit = world.at_proxy[0]
        query = "fal_webhook=https%3A%2F%2Fapp.example%2Fhook%3Fjob%3D1%26next%3D%252Fa%2520b"
        assert submit.headers["x-fal-target-url"] == f"https://queue.fal.run/{DEV}?{query}"
        assert submit.headers["x-fal-queue-priority"] == "low"
        assert world.sandbox.seen[0].query == query
        assert world.sandbox.seen[0].headers["x-fal-runner-hint"] == "h"

    @pytest.mark.timed
    @pytest.mark.parametrize("by_id", [False, True], ids=["by its handle", "by its id"])
    async def test_a_running_job_can_be_cancelled(
        self, world: ClientWorld, play: Play, by_id: bool
    ) -> None:
        result = await play("cancel_running", by_id=by_id)
        assert result["seconds"] < 3  # the job itself would take five
        assert (result["error"]["name"], result["error"]["status"]) == ("FalClientHTTPError", 499)
        assert world.sandbox.jobs == 0

    async def test_a_cancel_that_comes_too_late_is_told_so(self, play: Play) -> None:
        error = await play("cancel_too_late")
        assert (error["name"], error["status"]) == ("FalClientHTTPError", 400)
        assert json.loads(error["body"]) == {"status": "ALREADY_COMPLETED"}

    async def test_events_of_a_stream_arrive_while_it_runs(
        self, world: ClientWorld, play: Play
    ) -> None:
        result = await play("stream")
        arrivals = result["arrivals"]
        assert len(arrivals) > 2
        # Held back by anybody on the way, they would all arrive together at the end.
        assert arrivals[-1] - arrivals[0] > 0.2
        assert (await world.picture(result["data"])).size == (1024, 768)
        assert world.sandbox.jobs == 1

    async def test_many_at_once_get_each_their_own_picture(
        self, world: ClientWorld, play: Play
    ) -> None:
        results = await play("many_at_once")
        assert [result["seed"] for result in results] == list(range(10))
        assert world.sandbox.jobs == 10

    async def test_a_client_outlives_its_event_loop(self, world: ClientWorld, play: Play) -> None:
        await play("run", loops=2)
        assert world.sandbox.jobs == 2


class TestFiles:
    async def test_uploads_arrive_whole(
        self, world: ClientWorld, play: Play, picture: Path
    ) -> None:
        urls = await play("upload", path=str(picture))
        assert await world.download(urls["bytes"]) == photo()
        assert await world.download(urls["file"]) == photo()
        assert await world.download(urls["storage"]) == photo()
        drawn = Image.open(io.BytesIO(await world.download(urls["image"])))
        assert drawn.convert("RGB") == Image.open(picture).convert("RGB")

    async def test_files_go_to_the_cdn_with_one_token_made_through_the_proxy(
        self, world: ClientWorld, play: Play, picture: Path
    ) -> None:
        await play("upload", path=str(picture), key=PASS)
        targets = [request.headers["x-fal-target-url"] for request in world.at_proxy]
        assert targets == [
            "https://rest.fal.ai/storage/auth/token?storage_type=fal-cdn-v3",
            "https://rest.fal.ai/storage/upload/initiate?storage_type=gcs",
        ]
        uploads = [seen for seen in world.sandbox.seen if seen.path == "/files/upload"]
        assert len(uploads) == 3
        assert all(seen.headers["Authorization"].startswith("Bearer ") for seen in uploads)

    @pytest.mark.parametrize("as_bytes", [False, True], ids=["a file", "bytes"])
    async def test_a_large_upload_arrives_whole_in_parts(
        self, world: ClientWorld, play: Play, player: Player, kind: str, picture: Path,
        as_bytes: bool,
    ) -> None:  # fmt: skip
        if as_bytes and kind == "sync" and (await play("version"))["version"] == OLDEST:
            pytest.skip("fal_client 1.0.0 and 1.0.1 cut bytes down to their first part")
        url = await play("upload_in_parts", path=str(picture), as_bytes=as_bytes)
        assert await world.download(url) == photo()
        parts = [seen for seen in world.sandbox.seen if "/multipart/" in seen.path]
        assert len(parts) == 7  # six of them, and the word that they are all

    async def test_an_uploaded_picture_can_be_edited(
        self, world: ClientWorld, play: Play, picture: Path
    ) -> None:
        result = await play("edit", path=str(picture))
        inputs = {"prompt": "make it winter", "image_url": result["image_url"], "seed": 21}
        made = await world.picture(result["data"])
        assert made == await world.made_directly(KONTEXT, **inputs)
        assert made != await world.made_directly(KONTEXT, **{**inputs, "seed": 22})


class TestSockets:
    @pytest.mark.parametrize("scenario", ["realtime", "ws_connect"])
    @pytest.mark.parametrize("options", [{}, {"use_jwt": False}], ids=["token", "no token asked"])
    async def test_a_socket_opens_with_a_token_from_the_proxy(
        self, world: ClientWorld, play: Play, scenario: str, options: dict[str, Any]
    ) -> None:
        fal_run = f"{world.fal.replace('http', 'ws', 1)}/fal.run/"
        result = await play(scenario, fal_run=fal_run, **options)
        assert result["seed"] == 9
        assert result["sizes"][0] > 1000
        token, socket = sorted(world.sandbox.seen, key=lambda seen: seen.method, reverse=True)
        assert (token.host, token.path) == ("rest.fal.ai", "/tokens/")
        assert (socket.host, socket.path) == ("fal.run", "/fal-ai/fast-lightning-sdxl/realtime")


class TestErrors:
    @pytest.mark.parametrize("scenario", ["run_error", "queue_error", "stream_error"])
    async def test_a_wrong_input_names_its_field(
        self, world: ClientWorld, play: Play, scenario: str
    ) -> None:
        error = await play(scenario, prompt="a vase", guidance_scale=99)
        assert (error["name"], error["status"]) == ("FalClientHTTPError", 422)
        (detail,) = error["message"]
        assert detail["loc"] == ["body", "guidance_scale"]
        assert detail["type"] == "less_than_equal"
        assert world.sandbox.jobs == 0

    @pytest.mark.parametrize("scenario", ["run_error", "queue_error", "stream_error"])
    async def test_an_error_of_fals_has_its_sentence_and_type(
        self, play: Play, scenario: str
    ) -> None:
        error = await play(scenario, prompt="!error 500 internal_error")
        assert (error["name"], error["status"]) == ("FalClientHTTPError", 500)
        assert (error["message"], error["type"]) == ("Internal error", "internal_error")

    async def test_a_refusal_of_the_proxy_has_its_sentence(
        self, world: ClientWorld, play: Play
    ) -> None:
        error = await play("run_error", endpoint=f"{DEV}?fal_jwt_token=mine")
        assert (error["name"], error["status"]) == ("FalClientHTTPError", 412)
        assert error["message"] == json.loads(error["body"])["detail"]
        assert "carries a token of its own" in error["message"]
        assert world.sandbox.seen == []

    @pytest.mark.parametrize(
        ("prompt", "calls"),
        [
            pytest.param("!error 429 concurrent_requests_limit times=2", 3, id="two 429"),
            pytest.param("!error 503 nginx times=1", 2, id="fal's front door says 503"),
        ],
    )
    async def test_what_fal_client_tries_again_it_still_tries_again(
        self, world: ClientWorld, play: Play, prompt: str, calls: int
    ) -> None:
        with pytest.raises(AssertionError, match="nothing was raised"):
            await play("run_error", prompt=prompt)
        assert len(world.at_proxy) == len(world.sandbox.seen) == calls
        assert world.sandbox.jobs == 1

    async def test_a_post_that_failed_is_not_sent_again(
        self, world: ClientWorld, play: Play
    ) -> None:
        error = await play("run_error", prompt="!error 503 runner_connection_error times=1")
        assert (error["status"], error["type"]) == (503, "runner_connection_error")
        assert len(world.at_proxy) == len(world.sandbox.seen) == 1

    async def test_a_run_may_have_a_time_limit(self, world: ClientWorld, play: Play) -> None:
        options = {"timeout": 0.5, "start_timeout": 30}
        error = await play("run_error", prompt="!delay 5 a slow train", options=options)
        assert error["name"] == "ReadTimeout"
        await until(lambda: [seen.status for seen in world.sandbox.seen] == [499])
        assert world.sandbox.jobs == 0

    @pytest.mark.timed
    async def test_a_subscription_that_takes_too_long_is_cancelled(
        self, world: ClientWorld, play: Play
    ) -> None:
        result = await play("client_timeout")
        assert result["error"]["name"] == "FalClientTimeoutError"
        assert result["error"]["request_id"]
        assert result["seconds"] < 3
        assert "PUT" in {seen.method for seen in world.sandbox.seen}
        assert world.sandbox.jobs == 0

    @pytest.mark.parametrize("scenario", ["upload_error", "realtime_error"])
    async def test_a_token_that_is_refused_comes_with_the_reason(
        self, world: ClientWorld, play: Play, scenario: str
    ) -> None:
        world.sandbox.key = "another:key"
        error = await play(scenario)
        assert (error["name"], error["status"]) == ("FalClientHTTPError", 401)
        assert error["message"] == "No user found for Key ID and Secret"

    async def test_an_unreachable_proxy_is_named(self, play: Play, unused_tcp_port: int) -> None:
        error = await play("unreachable", proxy=f"http://127.0.0.1:{unused_tcp_port}")
        assert error["name"] == "ConnectError"
        url = f"http://127.0.0.1:{unused_tcp_port}{PROXY}"
        assert error["message"].startswith(f"The proxy at {url} cannot be reached: ")


class TestKeys:
    """The fal key of the client's machine: `check_credentials` and `check_request` look for it
    after every test of this module."""

    @pytest.mark.parametrize("key", [None, PASS], ids=["no key", "a key"])
    async def test_the_proxy_gets_the_key_that_is_for_it(
        self, world: ClientWorld, play: Play, picture: Path, key: str | None
    ) -> None:
        await play("edit", path=str(picture), key=key)
        assert len(world.at_proxy) > 3
        for request in world.at_proxy:
            assert request.headers.get("x-falproxy-key") == key

    async def test_everything_works_with_an_access_key(
        self, locked: ClientWorld, player: Player, kind: str, picture: Path
    ) -> None:
        play = actor(player, kind, locked.gateway, PASS)
        fal_run = f"{locked.fal.replace('http', 'ws', 1)}/fal.run/"
        assert (await play("run"))["seed"] == 7
        assert (await play("handle"))["result"]["seed"] == 3
        assert (await play("cancel_running", by_id=False))["error"]["status"] == 499
        assert len((await play("stream"))["arrivals"]) > 2
        assert (await play("edit", path=str(picture)))["data"]["seed"] == 21
        assert (await play("realtime", fal_run=fal_run))["seed"] == 9

    @pytest.mark.parametrize("scenario", ["run_error", "stream_error", "upload_error"])
    async def test_without_one_the_proxy_says_what_is_missing(
        self, locked: ClientWorld, player: Player, kind: str, scenario: str
    ) -> None:
        error = await actor(player, kind, locked.gateway, "guessed")(scenario)
        assert (error["name"], error["status"]) == ("FalClientHTTPError", 401)
        assert error["message"] == json.loads(error["body"])["detail"]
        assert "access key" in error["message"]
        assert locked.sandbox.seen == []

    async def test_both_come_from_the_environment(self, world: ClientWorld, play: Play) -> None:
        env = {"FALPROXY_URL": world.gateway, "FALPROXY_KEY": PASS}
        assert (await play("run", proxy=None, env=env))["seed"] == 7
        assert [request.headers["x-falproxy-key"] for request in world.at_proxy] == [PASS]

    async def test_an_empty_key_is_none(self, world: ClientWorld, play: Play) -> None:
        await play("run", key="", env={"FALPROXY_KEY": PASS})
        assert "x-falproxy-key" not in world.at_proxy[0].headers

    async def test_a_client_does_not_show_its_key(self, world: ClientWorld, play: Play) -> None:
        assert PASS not in await play("shown", key=PASS)

    @pytest.mark.parametrize("version", ["oldest", "newest"])
    async def test_no_fal_key_is_needed(
        self, world: ClientWorld, version: str, picture: Path, tmp_path: Path
    ) -> None:
        player = Player.start(version, tmp_path)
        try:
            for kind in ("sync", "async"):
                play = actor(player, kind, world.gateway)
                await play("run")
                await play("upload", path=str(picture))
                await play("realtime", fal_run=f"{world.fal.replace('http', 'ws', 1)}/fal.run/")
        finally:
            player.stop()


@pytest.fixture(params=["functions", "async functions"])
def call(request: pytest.FixtureRequest, world: ClientWorld, player: Player) -> Play:
    """Plays with the functions of the module, after `install`."""
    return actor(player, str(request.param), world.gateway)


class TestFunctions:
    async def test_they_go_through_the_proxy(self, world: ClientWorld, call: Play) -> None:
        made = await world.picture(await call("run"))
        assert made == await world.made_directly(DEV, **HERON)
        assert len(world.at_proxy) == 1

    async def test_all_of_them_work(self, world: ClientWorld, call: Play, picture: Path) -> None:
        fal_run = f"{world.fal.replace('http', 'ws', 1)}/fal.run/"
        assert (await call("subscribe"))["updates"][-1][0] == "Completed"
        assert (await call("handle"))["result"]["seed"] == 3
        assert (await call("cancel_running", by_id=True))["error"]["status"] == 499
        assert len((await call("stream"))["arrivals"]) > 2
        urls = await call("upload", path=str(picture))
        assert await world.download(urls["file"]) == photo()
        for options in ({}, {"use_jwt": False}):
            assert (await call("realtime", fal_run=fal_run, **options))["seed"] == 9
            assert (await call("ws_connect", fal_run=fal_run, **options))["seed"] == 9

    async def test_so_does_what_was_imported_before(self, world: ClientWorld, call: Play) -> None:
        made = await world.picture(await call("early_import"))
        assert made == await world.made_directly(DEV, **HERON)
        assert len(world.at_proxy) == 1

    async def test_an_environment_is_enough(self, world: ClientWorld, call: Play) -> None:
        await call("run", proxy=None, env={"FALPROXY_URL": world.gateway, "FALPROXY_KEY": PASS})
        assert [request.headers["x-falproxy-key"] for request in world.at_proxy] == [PASS]

    async def test_a_second_proxy_takes_the_place_of_the_first(
        self, world: ClientWorld, call: Play
    ) -> None:
        await call("install_again", proxy="http://127.0.0.1:1", second=world.gateway)
        assert len(world.at_proxy) == 1

    async def test_they_can_be_given_back(self, play: Play, call: Play) -> None:
        before = await play("defaults")
        assert before == {"classes": ["fal_client.client"], "is_ours": False, "is_bound": True}
        during = await call("defaults")
        assert during == {"classes": ["falproxy.client.clients"], "is_ours": True, "is_bound": True}
        assert await play("defaults") == before


async def test_the_readme_s_examples_work(world: ClientWorld, root: Path, tmp_path: Path) -> None:
    section = (root / "README.md").read_text().partition("\n## In Python\n")[2]
    examples = re.findall(r"```python\n(.*?)```", section.partition("\n## ")[0], re.DOTALL)
    assert len(examples) == 3
    (tmp_path / "photo.png").write_bytes(photo())
    for example in examples:
        done = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-c", example.replace("http://localhost:8080", world.gateway)],
            cwd=tmp_path,
            env={**clean_environment(), "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(world.fal)
    assert world.sandbox.jobs == len(examples)
