"""The fast path for polls of other jobs, whose heads differ in the request id only."""

import asyncio
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from falproxy import Identity, create_app
from falproxy.app.pipeline import authorization
from falproxy.limit_settings import parse_rate
from falproxy.proxy.head_only import add_id_check, any_request_id, head_only
from falproxy.server.fast_path import split_poll
from falproxy.server.fast_path.protocol import ProxyServer
from falproxy.stores.cache.virtual_requests import new_virtual_id
from falproxy.stores.keys import NewKey
from falproxy.stores.keys.known_keys import KNOWN_KEYS
from falproxy.stores.keys.sql_keys import choose_key_store
from falproxy.stores.ownership import OWNERSHIP
from tests.support.fake_fal import FakeFal
from tests.support.gateway import FastPathTestServer
from tests.support.key_search import CANARY
from tests.support.polled_proxy import (
    SECRET,
    MakeProxy,
    bearer,
    new_id,
    recording,
    respond_with_path,
    token_of,
)
from tests.support.polling_client import PollingClient, poll_request, submit_request
from tests.support.settings import make_settings

pytestmark = pytest.mark.both_event_loops

KEY_LINE = "x-falproxy-key: a-key-of-16-chars"
KEYS = (("web", "a-key-of-16-chars"), ("app", "another-key-of-16"))


def token_line(subject: str, **changes: Any) -> str:
    return bearer(token_of(subject, **changes))


# The polls of new jobs


async def test_a_poll_of_another_job_takes_the_fast_path(
    make_proxy: MakeProxy, fal: FakeFal
) -> None:
    proxy = await make_proxy()
    client = await proxy.client()
    ids = [new_id() for _ in range(6)]
    for request_id in ids:
        assert await client.request(poll_request(request_id)) == (200, b'{"status": "IN_PROGRESS"}')
    assert proxy.hits == 5
    paths = [f"/fal-ai/flux/requests/{request_id}/status" for request_id in ids]
    assert [seen.target for seen in fal.seen] == paths
    first, *others = [[*seen.headers] for seen in fal.seen]
    assert all(headers == first for headers in others)


async def test_the_log_has_the_request_id_of_each_poll(
    make_proxy: MakeProxy, caplog: pytest.LogCaptureFixture
) -> None:
    proxy = await make_proxy()
    client = await proxy.client()
    ids = [new_id() for _ in range(3)]
    with caplog.at_level(logging.INFO, "falproxy.calls"):
        for request_id in ids:
            await client.status(poll_request(request_id))
    fields = [vars(each)["fields"] for each in caplog.records if each.name == "falproxy.calls"]
    assert [line["fal_request_id"] for line in fields] == ids
    assert proxy.hits == 2


ID = "7e2f0b8a-0001-4000-8000-000000000000"
FIRST = poll_request(ID)


@pytest.mark.parametrize(
    "second",
    [
        pytest.param(poll_request(ID.upper()), id="an id in upper case"),
        pytest.param(poll_request(ID[:-1]), id="a shorter id"),
        pytest.param(poll_request(f"{ID}0"), id="a longer id"),
        pytest.param(poll_request(ID.replace("-", "0")), id="an id of another form"),
        pytest.param(poll_request(f"{ID[:-2]}%61"), id="an escape in the id"),
        pytest.param(poll_request(f"x/requests/{ID}"), id="another path"),
        pytest.param(poll_request(ID, "x-new: 1"), id="another header"),
        pytest.param(poll_request(ID).replace(b"/status", b"/status?logs=1"), id="a query"),
        pytest.param(poll_request(ID).replace(b"/status", b""), id="the result"),
        pytest.param(poll_request(ID).replace(b"/status", b"/cancel"), id="another verb"),
        pytest.param(poll_request(ID).replace(b"fal-ai/flux", b"fal-ai/fast"), id="another model"),
        pytest.param(poll_request(ID).replace(b"GET", b"PUT"), id="another method"),
        pytest.param(poll_request(""), id="no id"),
    ],
)
async def test_a_head_that_differs_otherwise_takes_the_normal_path(
    make_proxy: MakeProxy, second: bytes
) -> None:
    proxy = await make_proxy()
    client = await proxy.client()
    for _ in range(2):
        assert await client.status(FIRST) == 200
    assert proxy.hits == 1
    await client.request(second)
    assert proxy.hits == 1
    assert await client.status(poll_request(new_id())) == 200
    assert proxy.hits == 2


async def test_a_head_with_its_id_twice_is_for_itself_only(
    make_proxy: MakeProxy, fal: FakeFal
) -> None:
    """Another page may be about another job than the poll."""
    proxy = await make_proxy()
    client = await proxy.client()
    polled = new_id()

    def poll(page_id: str) -> bytes:
        referer = f"Referer: https://app.example.com/requests/{page_id}/status"
        return poll_request(polled).replace(b"\r\nx-fal", f"\r\n{referer}\r\nx-fal".encode())

    for page_id in (polled, polled, new_id(), new_id()):
        assert await client.status(poll(page_id)) == 200
    assert {seen.target for seen in fal.seen} == {f"/fal-ai/flux/requests/{polled}/status"}
    assert proxy.hits == 1


async def test_responses_to_pipelined_and_split_polls_of_other_jobs_are_in_order(
    make_proxy: MakeProxy, fal: FakeFal
) -> None:
    fal.respond = respond_with_path
    proxy = await make_proxy()
    client = await proxy.client()
    await client.status(FIRST)
    ids = [new_id() for _ in range(5)]
    polls = [poll_request(request_id) for request_id in ids]
    client.write(polls[0] + polls[1] + polls[2][:100])
    await asyncio.sleep(0.05)
    client.write(polls[2][100:])
    client.write(polls[3])
    client.write(polls[4])
    bodies = [(await client.read())[1] for _ in ids]
    assert [json.loads(body)["path"].split("/")[4] for body in bodies] == ids


async def test_a_route_for_all_jobs_expires(make_proxy: MakeProxy) -> None:
    proxy = await make_proxy()
    proxy.routes.ttl = 0.2
    client = await proxy.client()
    await client.status(FIRST)
    await asyncio.sleep(0.3)
    await client.status(poll_request(new_id()))
    assert proxy.hits == 0
    await client.status(poll_request(new_id()))
    assert proxy.hits == 1


async def test_many_jobs_have_one_route(make_proxy: MakeProxy) -> None:
    proxy = await make_proxy()
    client = await proxy.client()
    for _ in range(20):
        await client.status(poll_request(new_id()))
    assert len(proxy.routes._routes) == 1


# Middleware


@pytest.mark.parametrize(
    ("declare", "new_ids_seen", "repeats_seen"),
    [
        pytest.param(lambda it: it, 6, 6, id="undeclared"),
        pytest.param(head_only, 6, 1, id="decides by the head, which includes the id"),
        pytest.param(any_request_id, 1, 0, id="decides for all ids"),
    ],
)
async def test_a_middleware_sees_what_it_is_not_declared_for(
    make_proxy: MakeProxy,
    monkeypatch: pytest.MonkeyPatch,
    declare: Callable[[Middleware], Middleware],
    new_ids_seen: int,
    repeats_seen: int,
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(
        "falproxy.app.authorization",
        lambda *args, **options: [*authorization(*args, **options), recording(seen, declare)],
    )
    proxy = await make_proxy()
    client = await proxy.client()
    for _ in range(6):
        await client.status(poll_request(new_id()))
    assert len(seen) == new_ids_seen
    seen.clear()
    for _ in range(6):
        await client.status(FIRST)
    assert len(seen) == repeats_seen


async def test_a_middleware_of_the_application_sees_each_request_id(
    fal: FakeFal, tmp_path: Path
) -> None:
    seen: list[str] = []
    settings = make_settings(fal_key=CANARY, upstream_origin=fal.origin, data_dir=tmp_path)
    app = create_app(settings)
    app.middlewares.append(recording(seen, head_only))
    server = FastPathTestServer(app)
    await server.start_server()
    assert server.port is not None
    async with PollingClient(server.port) as client:
        for request_id in (new_id(), new_id(), ID, ID):
            assert await client.status(poll_request(request_id)) == 200
    await server.close()
    assert len(seen) == 3


async def test_a_check_of_a_middleware_decides_about_each_id(
    make_proxy: MakeProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    allowed = {new_id() for _ in range(5)}

    @any_request_id
    @web.middleware
    async def checking(request: web.Request, handler: Handler) -> web.StreamResponse:
        seen.append(request.path)
        add_id_check(request, allowed.__contains__)
        return await handler(request)

    monkeypatch.setattr(
        "falproxy.app.authorization",
        lambda *args, **options: [*authorization(*args, **options), checking],
    )
    proxy = await make_proxy()
    client = await proxy.client()
    for request_id in allowed:
        await client.status(poll_request(request_id))
    assert (len(seen), proxy.hits) == (1, 4)
    for _ in range(2):
        await client.status(poll_request(ID))
    assert (len(seen), proxy.hits) == (3, 4)


async def test_a_policy_that_is_stricter_refuses_what_was_on_the_fast_path(
    make_proxy: MakeProxy, tmp_path: Path
) -> None:
    """A reload makes another application, with routes of its own."""
    before = await make_proxy(access_keys=KEYS)
    after = await make_proxy(access_keys=KEYS[1:])
    request_id, client = await before.submit(KEY_LINE), await before.client()
    poll = poll_request(request_id, KEY_LINE)
    for _ in range(3):
        assert await client.status(poll) == 200
    servers = [each.server.runner.server for each in (before, after) if each.server.runner]
    assert isinstance(servers[0], ProxyServer)
    assert isinstance(servers[1], ProxyServer)
    servers[0].adopt(servers[1])
    for connection in (client, await before.client()):
        assert await connection.status(poll) == 401
        assert await connection.status(poll_request(new_id(), KEY_LINE)) == 401
    assert after.hits == 0


# Callers


@pytest.mark.parametrize("has_tokens", [False, True], ids=["access keys", "tokens"])
async def test_a_caller_polls_new_jobs_of_its_own_only(
    make_proxy: MakeProxy, fal: FakeFal, has_tokens: bool
) -> None:
    options: dict[str, Any] = {"jwt_secret": SECRET} if has_tokens else {"access_keys": KEYS}
    of_ann, of_bob = KEY_LINE, "x-falproxy-key: another-key-of-16"
    if has_tokens:
        of_ann, of_bob = token_line("ann"), token_line("bob")
    proxy = await make_proxy(**options)
    client = await proxy.client()
    own = [await proxy.submit(of_ann) for _ in range(4)]
    others = [await proxy.submit(of_bob) for _ in range(2)]
    for request_id in own:
        assert await client.status(poll_request(request_id, of_ann)) == 200
    assert proxy.hits == 3
    seen = len(fal.seen)
    for request_id in (*others, new_id(), new_virtual_id()):
        for _ in range(2):
            assert await client.status(poll_request(request_id, of_ann)) == 404
    assert len(fal.seen) == seen
    assert proxy.hits == 3
    for request_id in own:
        assert await client.status(poll_request(request_id, of_ann)) == 200
        assert await client.status(poll_request(request_id, of_bob)) == 404
    assert proxy.hits == 7


async def test_jobs_of_another_fal_key_are_sent_with_it(
    make_proxy: MakeProxy, fal: FakeFal
) -> None:
    proxy = await make_proxy(ai_keys=(CANARY, "b:c"))
    ids = [await proxy.submit() for _ in range(4)]
    keys = {}
    for request_id, seen in zip(ids, fal.seen, strict=True):
        keys[request_id] = seen.header("authorization")
    assert len({*keys.values()}) == 2
    client = await proxy.client()
    fal.seen.clear()
    for request_id in ids * 3:
        assert await client.status(poll_request(request_id)) == 200
    assert [seen.header("authorization") for seen in fal.seen] == [keys[each] for each in ids * 3]


async def test_a_token_ends_for_new_jobs_too(make_proxy: MakeProxy, fal: FakeFal) -> None:
    proxy = await make_proxy(jwt_secret=SECRET)
    line = token_line("ann")
    jobs = [await proxy.submit(line) for _ in range(5)]
    client = await proxy.client()
    for request_id in jobs[:3]:
        assert await client.status(poll_request(request_id, line)) == 200
    assert proxy.hits == 2
    route = next(iter(proxy.routes._routes.values()))
    assert route.grant is not None
    route.grant.deadline = 0  # type: ignore[attr-defined]
    route.grant.expires_at = 0  # type: ignore[attr-defined]
    for request_id in jobs[3:]:
        assert await client.status(poll_request(request_id, line)) == 401
    assert proxy.hits == 2


async def test_a_revoked_key_ends_for_new_jobs_too(make_proxy: MakeProxy, tmp_path: Path) -> None:
    async with choose_key_store(None, tmp_path) as store:
        proxy = await make_proxy(keys="on")
        made, secret = await store.create(NewKey(name="web", creator="cli"))
        line = f"x-falproxy-key: {secret}"
        jobs = [await proxy.submit(line) for _ in range(4)]
        client = await proxy.client()
        for request_id in jobs[:3]:
            assert await client.status(poll_request(request_id, line)) == 200
        assert proxy.hits == 2
        await store.revoke(made.id)
        await proxy.server.app[KNOWN_KEYS].refresh()
        assert await client.status(poll_request(jobs[3], line)) == 401
        assert proxy.hits == 2


async def test_a_hook_is_called_for_each_new_job(make_proxy: MakeProxy) -> None:
    asked: list[str] = []

    async def hook(request: web.Request) -> Identity:
        asked.append(request.headers["x-fal-target-url"])
        return Identity("ann", valid_for=60)

    proxy = await make_proxy(hook)
    jobs = [await proxy.submit() for _ in range(3)]
    client = await proxy.client()
    asked.clear()
    for request_id in jobs * 2:
        assert await client.status(poll_request(request_id)) == 200
    assert (len(asked), proxy.hits) == (3, 3)


async def test_polls_of_new_jobs_are_not_limited(make_proxy: MakeProxy) -> None:
    proxy = await make_proxy(jwt_secret=SECRET, rate=parse_rate("4/minute"))
    line = token_line("ann")
    jobs = [await proxy.submit(line) for _ in range(4)]
    client = await proxy.client()
    for request_id in jobs * 3:
        assert await client.status(poll_request(request_id, line)) == 200
    assert proxy.hits == 11
    assert await client.status(submit_request(line)) == 429


# Virtual requests


async def test_virtual_and_shared_ids_take_the_normal_path(
    make_proxy: MakeProxy, fal: FakeFal
) -> None:
    proxy = await make_proxy(access_keys=KEYS)
    client = await proxy.client()
    own, shared = [await proxy.submit(KEY_LINE) for _ in range(2)]
    assert await client.status(poll_request(own, KEY_LINE)) == 200
    assert await client.status(poll_request(shared, KEY_LINE)) == 200
    assert proxy.hits == 1
    assert await client.status(poll_request(new_virtual_id(), KEY_LINE)) == 404
    assert await client.status(poll_request(own, KEY_LINE)) == 200
    assert proxy.hits == 2  # the route is still there


async def test_the_owner_of_a_job_is_read_from_memory(make_proxy: MakeProxy) -> None:
    """The first poll of a job whose owner another process has stored takes the normal path."""
    proxy = await make_proxy(access_keys=KEYS)
    client = await proxy.client()
    jobs = [await proxy.submit(KEY_LINE) for _ in range(3)]
    for request_id in jobs[:2]:
        await client.status(poll_request(request_id, KEY_LINE))
    assert proxy.hits == 1
    proxy.server.app[OWNERSHIP]._recent.clear()
    for _ in range(2):
        assert await client.status(poll_request(jobs[2], KEY_LINE)) == 200
    assert proxy.hits == 2


# Heads


@pytest.mark.parametrize(
    ("head", "parts"),
    [
        (f"a/requests/{ID}/status", ("a/requests/", ID, "/status")),
        (f"/requests/{ID}", ("/requests/", ID, "")),
        (f"/requests/{ID}/requests/{ID}", ("/requests/", ID, f"/requests/{ID}")),
        (f"/requests/x/requests/{ID}/status", None),
        (f"/requests/{ID[:-1]}", None),
        (f"/requests/{ID.upper()}", None),
        (f"/requests/{ID[:-1]}\n/status", None),
        (f"requests/{ID}/status", None),
        ("/requests/", None),
        ("", None),
    ],
)
def test_split_poll(head: str, parts: tuple[str, str, str] | None) -> None:
    split = split_poll(head.encode())
    if parts is None:
        assert split is None
    else:
        before, request_id, behind = (part.encode() for part in parts)
        assert split == (request_id, (before, behind))
