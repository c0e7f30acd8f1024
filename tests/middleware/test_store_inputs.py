"""FALPROXY_REHOST_INPUTS in complete calls: which inputs are stored, and when."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from aiohttp import ClientError, ClientResponse, web
from aiohttp.pytest_plugin import AiohttpServer

from falproxy.media.fetch import FetchTimeouts
from tests.support import offline_fal
from tests.support.fake_fal import FakeFal
from tests.support.fake_hosts import redirect, reply
from tests.support.fake_queue import FakeQueue, is_hit, request_about, submitted_id
from tests.support.gateway import Gateway, MakeGateway
from tests.support.image_hosts import PNG, Internet, open_internet, uri
from tests.support.rehosting import name_of
from tests.support.running_proxy import open_running_proxy
from tests.support.storages import files_in
from tests.support.urls import RUN, SUBMIT
from tests.support.waiting import wait_until

TIMEOUT = 5.0  # seconds; of `wait_until`

STREAM = f"{RUN}/stream"
KONTEXT = "https://fal.run/fal-ai/flux-pro/kontext"
KONTEXT_SUBMIT = "https://queue.fal.run/fal-ai/flux-pro/kontext"
RESULT: dict[str, object] = {"seed": 1, "has_nsfw_concepts": [False]}
FLAGGED: dict[str, object] = {"seed": 1, "has_nsfw_concepts": [False, True]}
LARGE = PNG + bytes(range(251)) * 2000  # beyond what is held in memory

Stored = Callable[[], set[str]]


@pytest.fixture(autouse=True)
def fal_outlives_the_proxy(aiohttp_server: AiohttpServer) -> None:
    """The context that is entered first is closed last."""


@pytest.fixture
async def internet() -> AsyncIterator[Internet]:
    async with open_internet() as opened:
        yield opened


@pytest.fixture
def queue(fal: FakeFal) -> FakeQueue:
    played = FakeQueue(fal)
    played.output = lambda number: web.json_response(RESULT)
    return played


@pytest.fixture
def make(make_gateway: MakeGateway, fal: FakeFal, internet: Internet) -> MakeGateway:
    async def make(**given: object) -> Gateway:
        options = {"rehost": "disk", "rehost_inputs": True} | given
        return await make_gateway(fal.origin, internet.fetcher(), **options)

    return make


@pytest.fixture
async def gateway(make: MakeGateway) -> Gateway:
    return await make()


@pytest.fixture
def stored(tmp_path: Path) -> Stored:
    """Return the names of all stored files."""
    return lambda: {path.name for path in files_in(tmp_path / "files")}


async def post(gateway: Gateway, target: str, body: object, **headers: str) -> ClientResponse:
    fields = [(name.replace("_", "-"), value) for name, value in headers.items()]
    async with asyncio.timeout(10):
        response = await gateway.call(target, json=body, headers=fields)
        await response.read()
    return response


def image(number: int) -> bytes:
    return PNG + b"%d" % number


async def show_that_inputs_are_stored(gateway: Gateway, stored: Stored) -> None:
    """Have one more input stored: those before it have been decided about."""
    await post(gateway, RUN, {"image_url": uri(PNG + b"the last one")})
    await wait_until(lambda: name_of(PNG + b"the last one") in stored(), seconds=TIMEOUT)


# Which inputs


@pytest.mark.both_transports
@pytest.mark.parametrize("target", [RUN, SUBMIT, STREAM, KONTEXT, KONTEXT_SUBMIT])
@pytest.mark.parametrize("kind", ["url", "data"])
async def test_an_input_is_stored_on_every_route(
    gateway: Gateway, queue: FakeQueue, internet: Internet, stored: Stored, target: str, kind: str
) -> None:
    body = {"prompt": "a", "image_url": internet.url() if kind == "url" else uri(PNG)}
    response = await post(gateway, target, body)
    assert response.status == 200
    await wait_until(lambda: stored() == {name_of(PNG)}, seconds=TIMEOUT)
    assert queue.paid == 1
    sent = json.loads(next(seen.body for seen in queue.fake.seen if seen.method == "POST"))
    assert sent == body  # fal gets the client's own URL


@pytest.mark.parametrize("mount", ["run", "queue"])
async def test_an_input_is_stored_on_the_base_urls(
    gateway: Gateway, queue: FakeQueue, internet: Internet, stored: Stored, mount: str
) -> None:
    path = f"/api/fal/{mount}/fal-ai/flux/dev"
    response = await gateway.client.post(path, json={"image_url": internet.url()})
    assert response.status == 200, await response.text()
    await wait_until(lambda: stored() == {name_of(PNG)}, seconds=TIMEOUT)


async def test_an_input_in_the_query_is_stored(
    gateway: Gateway, fal: FakeFal, internet: Internet, stored: Stored
) -> None:
    fal.respond = respond(RESULT)
    target = f"{RUN}?prompt=a&image_url={quote(internet.url(), safe='')}"
    assert (await gateway.call(target, "GET")).status == 200
    await wait_until(lambda: stored() == {name_of(PNG)}, seconds=TIMEOUT)


def respond(
    document: object, status: int = 200
) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def respond(request: web.Request) -> web.Response:
        return web.json_response(document, status=status)

    return respond


@pytest.mark.parametrize(
    "inputs",
    [
        pytest.param(lambda urls: {"image_urls": urls}, id="a list"),
        pytest.param(
            lambda urls: {"image_url": urls[0], "mask_url": urls[1], "end_image_url": urls[2]},
            id="several keys",
        ),
        pytest.param(
            lambda urls: {"images": [{"url": urls[0]}], "image": urls[1], "a": {"mask": urls[2]}},
            id="objects",
        ),
        pytest.param(lambda urls: {"image_urls": [*urls, *urls[:2]]}, id="the same twice"),
    ],
)
async def test_all_images_of_a_call_are_stored(
    gateway: Gateway, queue: FakeQueue, internet: Internet, stored: Stored, inputs: Any
) -> None:
    internet.public.responses["/b.png"] = reply(body=image(1))
    urls = [internet.url(), internet.url("/b.png"), uri(LARGE)]
    await post(gateway, SUBMIT, inputs(urls))
    await wait_until(
        lambda: stored() == {name_of(PNG), name_of(image(1)), name_of(LARGE)}, seconds=TIMEOUT
    )
    assert internet.public.connections == 2


async def test_inputs_stay_where_they_are_by_default(
    make: MakeGateway, queue: FakeQueue, internet: Internet, stored: Stored
) -> None:
    gateway = await make(rehost_inputs=False)
    await post(gateway, RUN, {"image_url": internet.url(), "mask_url": uri(PNG)})
    assert internet.public.connections == 0
    assert stored() == set()


async def test_other_texts_and_files_are_no_images(
    gateway: Gateway, queue: FakeQueue, internet: Internet, stored: Stored
) -> None:
    internet.public.responses["/page"] = reply(body=b"<!doctype html><p>a page</p>")
    internet.public.responses["/moved"] = redirect("/page")
    page, moved = internet.url("/page"), internet.url("/moved")
    body = {"image_url": page, "mask_url": moved, "prompt": internet.url(), "url": internet.url()}
    assert (await post(gateway, RUN, body)).status == 200
    await show_that_inputs_are_stored(gateway, stored)
    assert stored() == {name_of(PNG + b"the last one")}


async def test_a_file_of_our_own_is_not_stored_again(
    gateway: Gateway, queue: FakeQueue, internet: Internet, stored: Stored
) -> None:
    await post(gateway, RUN, {"image_url": uri(PNG)})
    await wait_until(stored, seconds=TIMEOUT)
    await post(gateway, RUN, {"image_url": internet.url(f"/files/{name_of(PNG)}")})
    await show_that_inputs_are_stored(gateway, stored)
    assert internet.public.connections == 0


# Which calls


@pytest.mark.parametrize("target", [RUN, SUBMIT, KONTEXT, KONTEXT_SUBMIT])
@pytest.mark.parametrize(
    ("document", "status"),
    [
        pytest.param(FLAGGED, 200, id="flagged"),
        pytest.param({"detail": "no"}, 200, id="an error with 200"),
        pytest.param({"detail": [{"type": "content_policy_violation"}]}, 422, id="refused"),
        pytest.param({"detail": "broken"}, 500, id="failed"),
    ],
)
async def test_inputs_of_results_that_are_not_accepted_are_not_stored(
    gateway: Gateway, queue: FakeQueue, stored: Stored, target: str, document: object, status: int
) -> None:
    queue.output = lambda number: web.json_response(
        RESULT if number > 1 else document, status=200 if number > 1 else status
    )
    response = await post(gateway, target, {"image_url": uri(PNG)})
    if "queue" in target:
        await request_about(gateway, await submitted_id(response))
    await show_that_inputs_are_stored(gateway, stored)
    assert stored() == {name_of(PNG + b"the last one")}


@pytest.mark.parametrize("target", [RUN, SUBMIT, STREAM])
async def test_inputs_of_calls_that_fal_refuses_are_not_stored(
    gateway: Gateway, queue: FakeQueue, stored: Stored, target: str
) -> None:
    queue.refusal = lambda: web.json_response({"detail": "no"}, status=403)
    assert (await post(gateway, target, {"image_url": uri(PNG)})).status == 403
    queue.refusal = None
    await show_that_inputs_are_stored(gateway, stored)
    assert name_of(PNG) not in stored()


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param({"X_Fal_Store_IO": "0"}, id="fal must not store it"),
        pytest.param({"Cache_Control": "no-store"}, id="no store at all"),
    ],
)
@pytest.mark.parametrize("target", [RUN, SUBMIT, KONTEXT])
async def test_inputs_that_must_not_be_stored_are_not(
    gateway: Gateway,
    queue: FakeQueue,
    internet: Internet,
    stored: Stored,
    target: str,
    headers: dict[str, str],
) -> None:
    await post(gateway, target, {"image_url": uri(PNG)}, **headers)
    await show_that_inputs_are_stored(gateway, stored)
    assert name_of(PNG) not in stored()


def events(*documents: object, breaks: bool = False) -> Callable[[web.Request], Awaitable[Any]]:
    async def respond(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for document in documents:
            await response.write(b"data: " + json.dumps(document).encode() + b"\n\n")
        if breaks and request.transport is not None:
            request.transport.abort()
        return response

    return respond


@pytest.mark.both_transports
@pytest.mark.parametrize(
    ("documents", "breaks", "expected"),
    [
        pytest.param([{"step": 1}, RESULT], False, True, id="a result"),
        pytest.param([{"step": 1, "error": None}], False, True, id="no error"),
        pytest.param([{"step": 1}, FLAGGED], False, False, id="flagged"),
        pytest.param([FLAGGED, RESULT], False, False, id="flagged before the end"),
        pytest.param([{"error": {"message": "no"}}], False, False, id="an error"),
        pytest.param([RESULT], True, False, id="it breaks off"),
        pytest.param([], False, False, id="no events"),
    ],
)
async def test_a_stream_is_judged_by_its_events(
    gateway: Gateway,
    fal: FakeFal,
    stored: Stored,
    documents: list[object],
    breaks: bool,
    expected: bool,
) -> None:
    fal.respond = events(*documents, breaks=breaks)
    try:
        await post(gateway, STREAM, {"image_url": uri(PNG)})
    except ClientError:
        assert breaks
    fal.respond = respond(RESULT)
    await show_that_inputs_are_stored(gateway, stored)
    if expected:
        await wait_until(lambda: name_of(PNG) in stored(), seconds=TIMEOUT)
    assert (name_of(PNG) in stored()) is expected


async def test_a_result_without_json_has_no_flags(
    gateway: Gateway, fal: FakeFal, stored: Stored
) -> None:
    async def respond_file(request: web.Request) -> web.Response:
        return web.Response(body=PNG, content_type="image/png")

    fal.respond = respond_file
    await post(gateway, RUN, {"image_url": uri(PNG)})
    await wait_until(lambda: name_of(PNG) in stored(), seconds=TIMEOUT)


# When


async def test_an_input_is_stored_without_a_client_that_reads_the_result(
    gateway: Gateway, queue: FakeQueue, internet: Internet, stored: Stored
) -> None:
    queue.hold()
    target = f"{SUBMIT}?fal_webhook=https://a.example/hook"
    await submitted_id(await post(gateway, target, {"image_url": internet.url()}))
    await wait_until(
        lambda: internet.public.connections, seconds=TIMEOUT
    )  # read at once, since it may be deleted soon
    assert stored() == set()
    queue.release()
    await wait_until(lambda: stored() == {name_of(PNG)}, seconds=TIMEOUT)
    assert queue.paid == 1


async def test_a_client_that_deletes_its_file_with_the_result_loses_nothing(
    gateway: Gateway, queue: FakeQueue, internet: Internet, stored: Stored
) -> None:
    queue.hold()
    call = asyncio.create_task(post(gateway, RUN, {"image_url": internet.url()}))
    await wait_until(
        lambda: internet.public.connections and not internet.public.open_now, seconds=TIMEOUT
    )
    del internet.public.responses["/a.png"]
    queue.release()
    assert (await call).status == 200
    await wait_until(lambda: stored() == {name_of(PNG)}, seconds=TIMEOUT)


async def test_no_call_waits_for_its_inputs(
    make_gateway: MakeGateway, fal: FakeFal, queue: FakeQueue, internet: Internet, stored: Stored
) -> None:
    opened = asyncio.Event()

    async def serve_slowly(writer: asyncio.StreamWriter) -> None:
        await opened.wait()
        writer.write(reply(body=PNG))
        await writer.drain()

    internet.public.responses["/slow.png"] = serve_slowly
    fetcher = internet.fetcher(timeouts=FetchTimeouts(per_attempt=20.0, idle=10.0, overall=20.0))
    gateway = await make_gateway(fal.origin, fetcher, rehost="disk", rehost_inputs=True)
    response = await post(gateway, RUN, {"image_url": internet.url("/slow.png")})
    assert (response.status, stored()) == (200, set())
    opened.set()
    await wait_until(lambda: stored() == {name_of(PNG)}, seconds=TIMEOUT)


async def test_an_image_that_cannot_be_read_fails_nothing(
    gateway: Gateway, queue: FakeQueue, internet: Internet, caplog: pytest.LogCaptureFixture
) -> None:
    url = internet.url("/secret-name.png?token=s3cret")
    assert (await post(gateway, RUN, {"image_url": url})).status == 200
    message = "An input was not stored: The host of the URL responded with status 404."
    await wait_until(
        lambda: message in [record.getMessage() for record in caplog.records], seconds=TIMEOUT
    )
    assert "secret-name" not in caplog.text
    assert "s3cret" not in caplog.text


async def test_a_private_address_is_not_read(
    gateway: Gateway, queue: FakeQueue, internet: Internet, stored: Stored
) -> None:
    response = await post(gateway, RUN, {"image_url": internet.url(host="127.0.0.1")})
    assert response.status == 422
    assert internet.private.connections == 0


async def test_equal_calls_store_their_input_once(
    gateway: Gateway, queue: FakeQueue, internet: Internet, stored: Stored
) -> None:
    body = {"prompt": "a", "image_url": internet.url()}
    await post(gateway, KONTEXT, body)
    await wait_until(lambda: stored() == {name_of(PNG)}, seconds=TIMEOUT)
    assert is_hit(await post(gateway, KONTEXT, body))
    assert queue.paid == 1
    assert stored() == {name_of(PNG)}


async def test_a_call_whose_client_leaves_is_not_kept_for_ever(
    make: MakeGateway, queue: FakeQueue, stored: Stored, caplog: pytest.LogCaptureFixture
) -> None:
    gateway = await make(drain=2.0)
    queue.hold()
    call = asyncio.create_task(gateway.call(RUN, json={"image_url": uri(PNG)}))
    await wait_until(lambda: queue.posts, seconds=TIMEOUT)
    call.cancel()
    await wait_until(lambda: queue.disconnects, seconds=TIMEOUT)
    await show_that_inputs_are_stored_later(gateway, queue, stored)
    assert name_of(PNG) not in stored()
    await gateway.client.close()
    assert "the proxy stops" not in caplog.text


async def show_that_inputs_are_stored_later(
    gateway: Gateway, queue: FakeQueue, stored: Stored
) -> None:
    queue.release()
    await show_that_inputs_are_stored(gateway, stored)


async def test_a_stop_does_not_wait_for_jobs_and_reports_their_inputs(
    make: MakeGateway, queue: FakeQueue, stored: Stored, caplog: pytest.LogCaptureFixture
) -> None:
    gateway = await make(drain=0.2)
    queue.hold()
    await post(gateway, SUBMIT, {"image_urls": [uri(PNG), uri(image(1))]})
    async with asyncio.timeout(TIMEOUT):
        await gateway.client.close()
    (record,) = [each for each in caplog.records if "the proxy stops" in each.getMessage()]
    assert (record.levelno, record.getMessage()[:2]) == (logging.WARNING, "2 ")
    assert stored() == set()


async def test_what_the_results_allow_is_stored_before_the_stop(
    make: MakeGateway, queue: FakeQueue, stored: Stored
) -> None:
    gateway = await make(drain=5.0)
    for number in range(10):
        await post(gateway, RUN, {"image_url": uri(LARGE + b"%d" % number)})
    await gateway.client.close()
    assert len(stored()) == 10


async def test_a_storage_that_is_down_gets_the_input_later(
    gateway: Gateway,
    queue: FakeQueue,
    tmp_path: Path,
    stored: Stored,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = tmp_path / "files"
    folder.write_text("a file where a folder should be")
    assert (await post(gateway, RUN, {"image_url": uri(PNG)})).status == 200
    await wait_until(lambda: "An input is going to be stored later" in caplog.text, seconds=TIMEOUT)
    folder.unlink()
    await wait_until(lambda: stored() == {name_of(PNG)}, seconds=15)


async def test_many_inputs_of_one_call_are_bounded(
    gateway: Gateway, queue: FakeQueue, stored: Stored, caplog: pytest.LogCaptureFixture
) -> None:
    body = {"image_urls": [uri(image(number)) for number in range(110)]}
    assert (await post(gateway, RUN, body)).status == 200
    await wait_until(lambda: len(stored()) == 100, seconds=TIMEOUT)
    assert "10 inputs of a call are not stored" in caplog.text


# The other APIs


@pytest.mark.parametrize(
    ("path", "body"),
    [
        pytest.param("/kontext", {"prompt": "a cat", "image_url": ...}, id="kontext"),
        pytest.param("/kontext/dev", {"prompt": "a cat", "image_data": ...}, id="image_data"),
        pytest.param(
            "/api/images/generate",
            {"model": "flux-dev", "inputs": {"prompt": "a cat", "image_url": ...}},
            id="generate",
        ),
        pytest.param(
            "/v1/images/edits",
            {"model": "kontext", "prompt": "a cat", "images": [{"image_url": ...}]},
            id="edits",
        ),
    ],
)
async def test_the_other_apis_store_their_inputs(
    tmp_path: Path, path: str, body: dict[str, Any]
) -> None:
    sample = offline_fal.png()
    async with open_running_proxy(tmp_path, rehost_inputs=True, access_key="s3cret") as proxy:
        text = json.dumps(body, default=lambda _: uri(sample))
        headers = {"x-falproxy-key": "s3cret", "Content-Type": "application/json"}
        url = proxy.origin + path
        async with proxy.session.post(url, data=text, headers=headers) as response:
            assert response.status == 200, await response.text()
        await wait_until(
            lambda: name_of(sample) in {each.name for each in files_in(tmp_path)}, seconds=TIMEOUT
        )
