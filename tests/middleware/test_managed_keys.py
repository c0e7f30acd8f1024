"""Keys that are made at run time, through the whole proxy."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock
from uuid import uuid4

import jwt
import pytest
from aiohttp import web
from aiohttp.pytest_plugin import AiohttpClient
from aiohttp.typedefs import Handler

from falproxy import create_app, setup
from falproxy.limit_settings import NO_CALLER_LIMITS, CallerLimits, parse_budget, parse_rate
from falproxy.middleware.guess_limit import BURST
from falproxy.middleware.limiter import LIMITER
from falproxy.proxy.call import CALLER_LIMITS
from falproxy.server.fast_path.protocol import ROUTE_CACHE
from falproxy.stores.keys import (
    Expiry,
    KeyChange,
    KeyStoreError,
    NewKey,
    new_secret,
)
from falproxy.stores.keys.known_keys import KNOWN_KEYS
from falproxy.stores.keys.sql_keys import SqlKeyStore, choose_key_store
from tests.support.fake_fal import FakeFal, respond_as_queue
from tests.support.gateway import Gateway, MakeGateway
from tests.support.key_search import CANARY
from tests.support.polling_client import PollingClient, poll_request
from tests.support.settings import make_settings
from tests.support.urls import RUN

QUEUE = "https://queue.fal.run"
STATIC = (("ann", "ann-s3cret-of-ann"),)
ANN = [("x-falproxy-key", "ann-s3cret-of-ann")]
WEB = NewKey(name="web", creator="cli")
FLUX = replace(WEB, endpoints=("fal-ai/flux*",))
LIMITS = CallerLimits(parse_rate("60/minute"), 8, parse_budget("5/day"))
Headers = list[tuple[str, str]]


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqlKeyStore]:
    """The store, as another process uses it."""
    async with choose_key_store(None, tmp_path) as opened:
        yield opened


@pytest.fixture
async def locked(make_gateway: MakeGateway, fal: FakeFal) -> Gateway:
    fal.respond = respond_as_queue
    return await make_gateway(fal.origin, access_keys=STATIC, allowed_targets=())


def key(secret: str) -> Headers:
    return [("x-falproxy-key", secret)]


async def call(gateway: Gateway, headers: Headers, target: str = RUN) -> tuple[int, str]:
    """Return the status of a call, and the code of its error."""
    response = await gateway.call(target, json={"prompt": "x"}, headers=headers)
    document = await response.json()
    return response.status, document.get("type", "") if response.status != 200 else ""


async def wait_until_refused(gateway: Gateway, headers: Headers, seconds: float = 5.0) -> str:
    """Return the message of the refusal."""
    async with asyncio.timeout(seconds):
        while True:
            response = await gateway.call(RUN, json={}, headers=headers)
            if response.status != 200:
                assert response.status == 401
                return str((await response.json())["message"])
            await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    "make_headers",
    [
        pytest.param(lambda secret: [("x-falproxy-key", secret)], id="its own header"),
        pytest.param(lambda secret: [("Authorization", f"Bearer {secret}")], id="Bearer"),
        pytest.param(lambda secret: [("Authorization", f"Key {secret}")], id="Key"),
    ],
)
async def test_a_new_key_is_accepted_at_once(
    locked: Gateway, fal: FakeFal, store: SqlKeyStore, make_headers: Callable[[str], Headers]
) -> None:
    _, secret = await store.create(WEB)
    assert await call(locked, make_headers(secret)) == (200, "")
    assert fal.seen[0].header("authorization") == f"Key {CANARY}"
    assert secret not in str(fal.seen[0])
    assert await call(locked, ANN) == (200, "")


async def test_the_name_is_the_caller_s_in_the_log_and_the_secret_is_not(
    locked: Gateway, store: SqlKeyStore, caplog: pytest.LogCaptureFixture
) -> None:
    _, secret = await store.create(WEB)
    await call(locked, key(secret))
    wrong = new_secret()
    assert await call(locked, key(wrong)) == (401, "unauthenticated")
    fields = [getattr(record, "fields", {}) for record in caplog.records]
    assert "web" in {each.get("principal") for each in fields}
    text = caplog.text + str(fields)
    assert secret not in text
    assert wrong not in text


SECRET = new_secret()


@pytest.mark.parametrize(
    "secret",
    [SECRET, SECRET[:-1], SECRET + "0", SECRET.upper(), "fpx_", "x"],
    ids=["unknown", "short", "long", "upper case", "prefix", "other"],
)
async def test_a_wrong_key_is_a_401(
    locked: Gateway, fal: FakeFal, store: SqlKeyStore, secret: str
) -> None:
    await store.create(WEB)
    assert await call(locked, key(secret)) == (401, "unauthenticated")
    assert fal.seen == []


async def test_a_revoked_an_expired_and_a_replaced_key_are_refused_with_the_reason(
    locked: Gateway, store: SqlKeyStore, fal: FakeFal
) -> None:
    made = {}
    for name in ("revoked", "expired", "replaced"):
        expiry = Expiry(after=0.4 if name == "expired" else 60.0)
        made[name] = await store.create(replace(WEB, name=name, expiry=expiry))
        assert await call(locked, key(made[name][1])) == (200, "")
    await store.revoke(made["revoked"][0].id)
    await store.rotate(made["replaced"][0].id, 0.0)
    messages = {
        name: await wait_until_refused(locked, key(secret)) for name, (_, secret) in made.items()
    }
    assert "was revoked" in messages["revoked"]
    assert "has expired" in messages["expired"]
    assert "was replaced" in messages["replaced"]


async def test_jobs_belong_to_one_key_not_to_a_name(
    locked: Gateway, store: SqlKeyStore, fal: FakeFal
) -> None:
    first, secret = await store.create(WEB)
    response = await locked.call(f"{QUEUE}/fal-ai/flux", json={}, headers=key(secret))
    request_id = (await response.json())["request_id"]
    status_url = f"{QUEUE}/fal-ai/flux/requests/{request_id}/status"

    async def poll(headers: Headers) -> int:
        return (await locked.call(status_url, "GET", headers=headers)).status

    assert await poll(key(secret)) == 200
    assert await poll(ANN) == 404
    rotated = await store.rotate(first.id, 0.0)
    assert rotated is not None
    assert await poll(key(rotated[1])) == 200
    await store.revoke(first.id)
    _, later = await store.create(WEB)
    assert await poll(key(later)) == 404


async def test_limits_of_the_key_are_set(
    aiohttp_client: AiohttpClient, fal: FakeFal, store: SqlKeyStore, tmp_path: Path
) -> None:
    seen: list[CallerLimits | None] = []

    @web.middleware
    async def note(request: web.Request, handler: Handler) -> web.StreamResponse:
        response = await handler(request)
        seen.append(request.get(CALLER_LIMITS))
        return response

    app = web.Application(middlewares=[note])
    setup(
        app,
        make_settings(
            fal_key=CANARY, upstream_origin=fal.origin, data_dir=tmp_path, access_keys=STATIC
        ),
    )
    client: Any = await aiohttp_client(app)
    _, limited = await store.create(replace(WEB, limits=LIMITS))
    _, plain = await store.create(replace(WEB, name="plain"))
    for headers in (key(limited), key(plain), ANN):
        assert (await client.get("/v1/models", headers=dict(headers))).status == 200
    assert seen == [LIMITS, None, None]


ALLOWED = [
    pytest.param("https://fal.run/fal-ai/flux", id="run"),
    pytest.param("https://queue.fal.run/fal-ai/flux-pro", id="submit"),
    pytest.param("https://fal.run/fal-ai/flux/stream", id="stream"),
]
FORBIDDEN = [
    pytest.param("https://fal.run/fal-ai/kling", id="another model"),
    pytest.param("https://queue.fal.run/fal-ai/kling", id="a submit"),
    pytest.param("https://fal.run/fal-ai/flux/dev", id="below the pattern"),
    pytest.param("https://fal.run/fal-ai/kling/stream", id="a stream"),
    pytest.param("https://ws.fal.run/fal-ai/kling", id="another host of models"),
    pytest.param("https://fal.run/fal-ai/other", id="allowed by the proxy only"),
]


@pytest.mark.parametrize("allowed_targets", [(), ("**",), ("fal.run/**", "queue.fal.run/**")])
@pytest.mark.parametrize("target", FORBIDDEN)
async def test_a_key_is_restricted_to_its_endpoints(
    make_gateway: MakeGateway,
    fal: FakeFal,
    store: SqlKeyStore,
    target: str,
    allowed_targets: tuple[str, ...],
) -> None:
    gateway = await make_gateway(fal.origin, access_keys=STATIC, allowed_targets=allowed_targets)
    _, secret = await store.create(FLUX)
    status, code = await call(gateway, key(secret), target)
    assert (status, code) == (403, "target_forbidden")
    response = await gateway.call(target, "GET", headers=key(secret))
    assert response.status == 403
    assert fal.seen == []


async def test_a_target_that_is_listed_as_it_stands_is_no_way_around_the_endpoints(
    make_gateway: MakeGateway, fal: FakeFal, store: SqlKeyStore
) -> None:
    target = "fal.run/fal-ai/kl%69ng"
    gateway = await make_gateway(fal.origin, access_keys=STATIC, allowed_targets=(target,))
    _, secret = await store.create(FLUX)
    assert await call(gateway, ANN, f"https://{target}") == (200, "")
    assert await call(gateway, key(secret), f"https://{target}") == (403, "target_forbidden")


@pytest.mark.parametrize("target", ALLOWED)
async def test_a_key_may_call_its_endpoints(
    make_gateway: MakeGateway, fal: FakeFal, store: SqlKeyStore, target: str
) -> None:
    gateway = await make_gateway(fal.origin, access_keys=STATIC)
    _, secret = await store.create(FLUX)
    assert (await call(gateway, key(secret), target))[0] == 200


async def test_a_key_is_never_wider_than_the_proxy(
    make_gateway: MakeGateway, fal: FakeFal, store: SqlKeyStore
) -> None:
    gateway = await make_gateway(
        fal.origin, access_keys=STATIC, allowed_endpoints=("fal-ai/flux",), allowed_targets=()
    )
    _, secret = await store.create(replace(WEB, endpoints=("**",)))
    assert (await call(gateway, key(secret), "https://fal.run/fal-ai/kling"))[0] == 403
    assert (await call(gateway, key(secret), "https://fal.run/fal-ai/flux"))[0] == 200


@pytest.mark.parametrize("allowed_targets", [(), ("rest.fal.ai/**",)])
@pytest.mark.parametrize(
    ("apps", "status"), [(["fal-ai/flux"], 200), (["fal-ai/kling"], 403), (["*"], 403), ([], 403)]
)
async def test_a_token_is_made_for_the_endpoints_of_the_key(
    make_gateway: MakeGateway,
    fal: FakeFal,
    store: SqlKeyStore,
    apps: list[str],
    status: int,
    allowed_targets: tuple[str, ...],
) -> None:
    gateway = await make_gateway(fal.origin, access_keys=STATIC, allowed_targets=allowed_targets)
    _, secret = await store.create(FLUX)
    response = await gateway.call(
        "https://rest.fal.ai/tokens/", json={"allowed_apps": apps}, headers=key(secret)
    )
    assert response.status == status
    assert len(fal.seen) == (status == 200)


async def test_a_change_of_the_endpoints_holds_for_the_next_calls(
    locked: Gateway, store: SqlKeyStore
) -> None:
    made, secret = await store.create(WEB)
    assert (await call(locked, key(secret)))[0] == 200
    other = KeyChange(expiry=None, limits=NO_CALLER_LIMITS, endpoints=("fal-ai/kling",))
    await store.change(made.id, other)
    async with asyncio.timeout(5):
        while (await call(locked, key(secret)))[0] != 403:
            await asyncio.sleep(0.02)


# The fast path


@asynccontextmanager
async def polling(gateway: Gateway, secret: str) -> AsyncIterator[tuple[PollingClient, bytes]]:
    """Yield a connection whose polls are on the fast path, and the request."""
    response = await gateway.call(f"{QUEUE}/fal-ai/flux", json={}, headers=key(secret))
    poll = poll_request((await response.json())["request_id"], f"x-falproxy-key: {secret}")
    hits = gateway.client.app[ROUTE_CACHE].hits
    async with PollingClient(int(gateway.origin.rpartition(":")[2])) as client:
        for _ in range(3):
            assert await client.status(poll) == 200
        assert gateway.client.app[ROUTE_CACHE].hits >= hits + 2
        yield client, poll


@pytest.mark.parametrize("end", ["revoke", "rotate", "expire"])
async def test_remembered_polls_end_with_the_key(
    locked: Gateway, store: SqlKeyStore, fal: FakeFal, end: str
) -> None:
    expiry = Expiry(after=1.0) if end == "expire" else Expiry()
    made, secret = await store.create(replace(WEB, expiry=expiry))
    async with polling(locked, secret) as (client, poll):
        if end == "revoke":
            await store.revoke(made.id)
        elif end == "rotate":
            await store.rotate(made.id, 0.0)
        assert await client.seconds_until(401, poll) < 3
        seen = len(fal.seen)
        assert await client.status(poll) == 401
        assert len(fal.seen) == seen


async def test_a_change_of_another_key_leaves_remembered_polls_alone(
    locked: Gateway, store: SqlKeyStore
) -> None:
    _, secret = await store.create(WEB)
    other, _ = await store.create(replace(WEB, name="other"))
    async with polling(locked, secret) as (client, poll):
        await store.revoke(other.id)
        await locked.client.app[KNOWN_KEYS].refresh()
        hits = locked.client.app[ROUTE_CACHE].hits
        assert await client.status(poll) == 200
        assert locked.client.app[ROUTE_CACHE].hits == hits + 1


# A store that is away


async def test_while_the_store_is_away_known_keys_work_and_others_are_a_503(
    locked: Gateway, store: SqlKeyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, secret = await store.create(WEB)
    assert await call(locked, key(secret)) == (200, "")
    _, unknown = await store.create(replace(WEB, name="new"))

    async def fail() -> None:
        raise KeyStoreError("it is away")

    known_keys = locked.client.app[KNOWN_KEYS]
    monkeypatch.setattr(known_keys, "_refresh", fail)
    assert await call(locked, key(secret)) == (200, "")
    assert await call(locked, ANN) == (200, "")
    response = await locked.call(RUN, json={}, headers=key(unknown))
    assert (response.status, (await response.json())["type"]) == (503, "access_unavailable")
    assert "Retry-After" in response.headers
    assert await call(locked, key("not-such-a-key")) == (401, "unauthenticated")
    monkeypatch.undo()
    async with asyncio.timeout(5):
        while (await call(locked, key(unknown)))[0] != 200:
            await asyncio.sleep(0.05)


# The limit for guesses


async def test_guesses_are_limited(locked: Gateway, store: SqlKeyStore) -> None:
    _, used = await store.create(WEB)
    _, unused = await store.create(replace(WEB, name="unused"))
    assert (await call(locked, key(used)))[0] == 200
    assert [(await call(locked, key(new_secret())))[0] for _ in range(BURST)] == [401] * BURST
    response = await locked.call(RUN, json={}, headers=key(new_secret()))
    assert (response.status, (await response.json())["type"]) == (429, "too_many_attempts")
    assert int(response.headers["Retry-After"]) > 0
    assert (await call(locked, key(unused)))[0] == 429  # a right key is not confirmed
    assert (await call(locked, key(used)))[0] == 200


async def test_a_key_that_has_ended_is_no_guess(
    locked: Gateway, store: SqlKeyStore, caplog: pytest.LogCaptureFixture
) -> None:
    """Its client may repeat it for long, and others can share its address."""
    made, secret = await store.create(WEB)
    _, other = await store.create(replace(WEB, name="other"))
    await store.revoke(made.id)
    for _ in range(BURST + 5):
        assert await call(locked, key(secret)) == (401, "unauthenticated")
    assert (await call(locked, key(other)))[0] == 200
    warnings = [r for r in caplog.records if "has ended" in r.getMessage()]
    assert len(warnings) == 1
    assert warnings[0].levelno == logging.WARNING
    assert warnings[0].fields["principal"] == "web"  # type: ignore[attr-defined]


# Whether the proxy is locked


async def test_an_open_proxy_without_keys_stays_open(
    make_gateway: MakeGateway, fal: FakeFal, store: SqlKeyStore
) -> None:
    gateway = await make_gateway(fal.origin)
    assert (await call(gateway, []))[0] == 200
    _, secret = await store.create(WEB)
    assert (await call(gateway, []))[0] == 200  # until it is restarted
    assert (await call(gateway, key(secret)))[0] == 200
    assert (await gateway.client.get("/api/keys")).status == 404


async def test_a_proxy_with_keys_at_start_is_locked_and_stays_so(
    make_gateway: MakeGateway,
    fal: FakeFal,
    store: SqlKeyStore,
    caplog: pytest.LogCaptureFixture,
) -> None:
    made, secret = await store.create(WEB)
    gateway = await make_gateway(fal.origin)
    assert any("FALPROXY_KEYS=0" in record.getMessage() for record in caplog.records)
    assert (await call(gateway, []))[0] == 401
    assert (await call(gateway, key(secret)))[0] == 200
    await store.revoke(made.id)
    await wait_until_refused(gateway, key(secret))
    assert (await call(gateway, []))[0] == 401
    again = await make_gateway(fal.origin)  # the last key was revoked: it does not open
    assert (await call(again, []))[0] == 401


async def test_a_proxy_is_locked_by_the_setting(
    make_gateway: MakeGateway, fal: FakeFal, store: SqlKeyStore
) -> None:
    gateway = await make_gateway(fal.origin, keys="on")
    assert (await call(gateway, []))[0] == 401
    _, secret = await store.create(WEB)
    assert (await call(gateway, key(secret)))[0] == 200


async def test_the_setting_turns_keys_off(
    make_gateway: MakeGateway, fal: FakeFal, store: SqlKeyStore
) -> None:
    _, secret = await store.create(WEB)
    open_gateway = await make_gateway(fal.origin, keys="off")
    assert (await call(open_gateway, []))[0] == 200
    locked_gateway = await make_gateway(fal.origin, keys="off", access_keys=STATIC)
    assert (await call(locked_gateway, key(secret)))[0] == 401
    assert (await locked_gateway.client.get("/api/keys", headers=dict(ANN))).status == 404


@pytest.mark.parametrize("content", [b"", b"no database at all" * 100])
async def test_a_file_without_keys_does_not_lock(
    make_gateway: MakeGateway, fal: FakeFal, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "ledger.sqlite").write_bytes(content)
    gateway = await make_gateway(fal.origin)
    assert (await call(gateway, []))[0] == 200


async def test_without_keys_of_this_kind_a_ledger_gets_no_tables(
    locked: Gateway, store: SqlKeyStore
) -> None:
    assert (await call(locked, key(new_secret())))[0] == 401
    assert not await store._database.is_created()


# Other methods of authentication


async def test_a_hook_is_used_beside_keys(
    aiohttp_client: AiohttpClient, fal: FakeFal, store: SqlKeyStore, tmp_path: Path
) -> None:
    async def authenticate(request: web.Request) -> str | None:
        return request.headers.get("x-user")

    settings = make_settings(
        fal_key=CANARY, upstream_origin=fal.origin, data_dir=tmp_path, admins=("web",)
    )
    client: Any = await aiohttp_client(create_app(settings, authenticate=authenticate))
    _, secret = await store.create(WEB)
    for headers, status in (
        ({"x-falproxy-key": secret}, 200),
        ({"x-user": "bob"}, 200),
        ({}, 401),
    ):
        assert (await client.get("/api/usage", headers=headers)).status == status
    # The name of an admin does not make a key one.
    assert (await client.get("/metrics", headers={"x-falproxy-key": secret})).status == 403
    assert (await client.get("/api/keys", headers={"x-falproxy-key": secret})).status == 403
    assert (await client.get("/api/keys", headers={"x-user": "web"})).status == 200


async def test_a_token_with_the_name_of_a_key_does_not_see_its_usage(
    make_gateway: MakeGateway, fal: FakeFal, store: SqlKeyStore
) -> None:
    shared = "a secret of thirty-two characters"
    gateway = await make_gateway(fal.origin, jwt_secret=shared)
    _, secret = await store.create(WEB)
    assert (await gateway.client.get("/api/usage", headers=dict(key(secret)))).status == 200
    claims = {"sub": "web", "aud": "authenticated", "exp": time.time() + 60}
    token = jwt.encode(claims, shared, "HS256")
    response = await gateway.client.get("/api/usage", headers={"Authorization": f"Bearer {token}"})
    assert response.status == 403
    assert "name_taken" in json.dumps(await response.json())


# --- Limits of a key ---

PRICED = "https://queue.fal.run/fal-ai/flux-pro/kontext"  # whose price is in the registry


async def test_the_limits_of_a_key_hold_without_any_setting(
    locked: Gateway, store: SqlKeyStore
) -> None:
    _, rated = await store.create(replace(WEB, limits=CallerLimits(rate=parse_rate("2/hour"))))
    budget = CallerLimits(budget=parse_budget("0.10/day"))
    _, budgeted = await store.create(replace(WEB, name="poor", limits=budget))
    assert [await call(locked, key(rated)) for _ in range(3)] == [
        (200, ""), (200, ""), (429, "rate_limited"),
    ]  # fmt: skip
    calls = [
        await locked.call(PRICED, json={"prompt": str(number)}, headers=key(budgeted))
        for number in range(3)
    ]
    assert [response.status for response in calls] == [200, 200, 402]
    assert [(await call(locked, ANN))[0] for _ in range(4)] == [200] * 4


async def test_a_change_of_limits_applies_to_remembered_submits(
    locked: Gateway, store: SqlKeyStore
) -> None:
    created, secret = await store.create(WEB)
    target = f"{QUEUE}/fal-ai/flux/dev"
    assert [(await call(locked, key(secret), target))[0] for _ in range(4)] == [200] * 4
    limits = CallerLimits(rate=parse_rate("1/hour"))
    await store.change(created.id, KeyChange(expiry=None, limits=limits, endpoints=()))
    async with asyncio.timeout(5):
        while (await call(locked, key(secret), target))[0] == 200:
            await asyncio.sleep(0.05)
    assert await call(locked, key(secret), target) == (429, "rate_limited")


async def test_without_limits_the_results_of_a_locked_proxy_ask_no_limits_store(
    locked: Gateway, store: SqlKeyStore
) -> None:
    await store.create(WEB)
    limiter = locked.client.server.app[LIMITER]  # type: ignore[attr-defined]
    limiter._store = None  # a use would raise
    assert await call(locked, ANN, f"{QUEUE}/fal-ai/flux/dev") == (200, "")
    result = await locked.call(f"{QUEUE}/fal-ai/flux/requests/{uuid4()}", "GET", headers=ANN)
    assert result.status in (200, 404)
    await limiter.sweep()
    limiter._store = AsyncMock()
