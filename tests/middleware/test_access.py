"""Access control through the whole proxy: access keys, endpoint list, owners of requests."""

import hmac
import json
import time
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import jwt
import pytest
from aiohttp import web

from falproxy import create_app
from tests.support.fake_fal import FakeFal
from tests.support.gateway import Gateway, MakeGateway
from tests.support.key_search import CANARY
from tests.support.settings import make_settings
from tests.support.urls import PROXY, REQUEST, RUN, SUBMIT

KEYS = (("ann", "ann-s3cret"), ("bob", "bob-s3cret"))
ANN, BOB = [("x-falproxy-key", "ann-s3cret")], [("x-falproxy-key", "bob-s3cret")]
QUEUE = "https://queue.fal.run"
TOKENS = "https://rest.fal.ai/tokens/"
Headers = list[tuple[str, str]]


async def serve_queue(request: web.Request) -> web.StreamResponse:
    """Respond like fal, with a new id to a submit, and with 200 for any id."""
    if "/requests/" in request.path:
        return web.json_response({"path": request.path})
    request_id = str(uuid4())
    address = f"{QUEUE}/fal-ai/flux/requests/{request_id}"
    return web.json_response({"request_id": request_id, "status_url": f"{address}/status"})


@pytest.fixture
async def locked(make_gateway: MakeGateway, fal: FakeFal) -> Gateway:
    fal.respond = serve_queue
    return await make_gateway(fal.origin, allowed_targets=(), access_keys=KEYS)


async def submit(gateway: Gateway, headers: Headers, target: str = SUBMIT) -> str:
    response = await gateway.call(target, json={"prompt": "x"}, headers=headers)
    assert response.status == 200, await response.text()
    return str((await response.json())["request_id"])


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param(ANN, id="by its own header"),
        pytest.param([("Authorization", "Bearer ann-s3cret")], id="as Bearer"),
        pytest.param([("Authorization", "Key ann-s3cret")], id="as Key, like fal's clients"),
        pytest.param([("authorization", "bEaReR  ann-s3cret")], id="in any case"),
    ],
)
async def test_an_access_key_is_accepted(locked: Gateway, fal: FakeFal, headers: Headers) -> None:
    assert (await locked.call(RUN, json={}, headers=headers)).status == 200
    assert fal.seen[0].header("authorization") == f"Key {CANARY}"
    assert "ann-s3cret" not in str(fal.seen[0])


INVALID_HEADERS = [
    pytest.param([], id="empty"),
    pytest.param([("x-falproxy-key", "")], id="an empty key"),
    pytest.param([("x-falproxy-key", "ann-s3cre")], id="a truncated key"),
    pytest.param([("x-falproxy-key", "ann-s3cret2")], id="a longer key"),
    pytest.param([("x-falproxy-key", "ann:ann-s3cret")], id="name and key"),
    pytest.param([("x-falproxy-key", "ANN-S3CRET")], id="capitals"),
    pytest.param([("x-falproxy-key", "\u0430nn-s3cret")], id="a Cyrillic letter"),
    pytest.param([("Authorization", "ann-s3cret")], id="no scheme"),
    pytest.param([("Authorization", "Basic ann-s3cret")], id="another scheme"),
    pytest.param([("Cookie", "x-falproxy-key=ann-s3cret")], id="a cookie"),
    pytest.param(
        [("x-falproxy-key", "wrong"), ("Authorization", "Bearer ann-s3cret")],
        id="a wrong key beside a right one",
    ),
]


@pytest.mark.parametrize("headers", INVALID_HEADERS)
async def test_a_missing_or_wrong_key_is_a_401(
    locked: Gateway, fal: FakeFal, headers: Headers
) -> None:
    response = await locked.call(RUN, json={}, headers=headers)
    assert (response.status, (await response.json())["type"]) == (401, "unauthenticated")
    assert response.headers["WWW-Authenticate"] == "Bearer"
    assert fal.seen == []


async def test_a_wrong_key_has_another_sentence_than_none(locked: Gateway) -> None:
    wrong = await locked.call(RUN, json={}, headers=[("Authorization", "Key wrong-k3y")])
    none = await locked.call(RUN, json={})
    message = (await none.json())["message"]
    assert message.startswith("Send an access key")
    assert (await wrong.json())["message"] == (
        f"The credential of this request is not valid here. {message}"
    )


async def test_a_key_in_the_query_is_ignored(locked: Gateway, fal: FakeFal) -> None:
    response = await locked.client.post(
        f"{PROXY}?x-falproxy-key=ann-s3cret", json={}, headers={"x-fal-target-url": RUN}
    )
    assert response.status == 401


async def test_method_caller_and_target_are_checked_in_this_order(
    locked: Gateway,
) -> None:
    assert (await locked.call(RUN, "DELETE")).status == 405
    assert (await locked.call(None)).status == 401
    assert (await locked.call("https://evil.tld/")).status == 401
    assert (await locked.call("https://evil.tld/", headers=ANN)).status == 412


async def test_every_key_is_compared_in_constant_time(
    locked: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All keys are compared, without an early exit, in constant time."""
    compared = []
    true_compare = hmac.compare_digest

    def compare(one: bytes, other: bytes) -> bool:
        compared.append(one)
        return true_compare(one, other)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    for headers in (ANN, BOB, []):
        await locked.call(RUN, json={}, headers=headers)
        assert compared == [b"ann-s3cret", b"bob-s3cret"]
        compared.clear()


async def test_a_key_without_a_name_is_accepted(make_gateway: MakeGateway, fal: FakeFal) -> None:
    gateway = await make_gateway(fal.origin, access_key="s3cret")
    assert (await gateway.call(RUN, json={})).status == 401
    headers = [("Authorization", "Bearer s3cret")]
    assert (await gateway.call(RUN, json={}, headers=headers)).status == 200


async def test_a_hook_can_authenticate_callers(
    aiohttp_client: Callable[..., object], fal: FakeFal, tmp_path: Path
) -> None:
    async def by_name(request: web.Request) -> str | None:
        return request.headers.get("X-User")

    fal.respond = serve_queue
    settings = make_settings(fal_key=CANARY, upstream_origin=fal.origin, data_dir=tmp_path)
    client = await aiohttp_client(create_app(settings, authenticate=by_name))  # type: ignore[misc]
    gateway = Gateway(client, "")
    assert (await gateway.call(RUN, json={})).status == 401
    request_id = await submit(gateway, [("X-User", "ann")])
    url = f"{QUEUE}/fal-ai/flux/requests/{request_id}"
    assert (await gateway.call(url, "GET", headers=[("X-User", "ann")])).status == 200
    assert (await gateway.call(url, "GET", headers=[("X-User", "bob")])).status == 404


OPERATIONS = [
    pytest.param("GET", "/status?logs=1", id="status"),
    pytest.param("GET", "/status/stream", id="status stream"),
    pytest.param("GET", "", id="result"),
    pytest.param("GET", "/response", id="response"),
    pytest.param("PUT", "/cancel", id="cancel"),
    pytest.param("POST", "", id="a post"),
    pytest.param("POST", "/cancel", id="a cancel by post"),
]


@pytest.mark.parametrize(("method", "suffix"), OPERATIONS)
@pytest.mark.parametrize("app", ["fal-ai/flux", "fal-ai/flux/dev", "fal-ai/other"])
async def test_only_the_owner_has_access_to_a_request(
    locked: Gateway, fal: FakeFal, method: str, suffix: str, app: str
) -> None:
    request_id = await submit(locked, ANN)
    url = f"{QUEUE}/{app}/requests/{request_id}{suffix}"
    fal.seen.clear()
    response = await locked.call(url, method, headers=BOB)
    assert (response.status, (await response.json())["type"]) == (404, "request_not_found")
    assert fal.seen == []
    assert (await locked.call(url, method, headers=ANN)).status == 200


@pytest.mark.parametrize(("method", "suffix"), OPERATIONS)
async def test_a_request_that_was_not_submitted_through_the_proxy_is_a_404(
    locked: Gateway, fal: FakeFal, method: str, suffix: str
) -> None:
    assert (await locked.call(REQUEST + suffix, method, headers=ANN)).status == 404
    assert fal.seen == []


UNUSUAL_PATHS = [
    "fal-ai/flux/%72equests/{id}",
    "fal-ai/flux/request%73/{id}/status",
    "fal-ai/flux/Requests/{id}",
    "fal-ai/flux/requests/{escaped}",
    "110602490-flux/requests/{id}",
    "requests/{id}",
    "fal-ai/flux/requests",
    "fal-ai/flux/requests/x/requests/{id}",
    "workflows/me/%72equests/{id}",
]


@pytest.mark.parametrize("path", UNUSUAL_PATHS)
@pytest.mark.parametrize("method", ["GET", "POST", "PUT"])
async def test_no_spelling_gives_access_to_another_owner_s_request(
    locked: Gateway, fal: FakeFal, path: str, method: str
) -> None:
    request_id = await submit(locked, ANN)
    escaped = "".join(f"%{ord(letter):02x}" for letter in request_id)
    fal.seen.clear()
    url = f"{QUEUE}/{path.format(id=request_id, escaped=escaped)}"
    assert (await locked.call(url, method, headers=BOB)).status in (404, 405, 412)
    assert fal.seen == []


async def test_an_id_in_a_response_does_not_change_the_owner(locked: Gateway, fal: FakeFal) -> None:
    request_id = await submit(locked, ANN)

    async def return_id(request: web.Request) -> web.StreamResponse:
        return web.json_response({"request_id": request_id})

    fal.respond = return_id
    for method in ("GET", "POST"):
        await locked.call(SUBMIT, method, headers=BOB)
    url = f"{QUEUE}/fal-ai/flux/requests/{request_id}"
    assert (await locked.call(url, "GET", headers=BOB)).status == 404
    assert (await locked.call(url, "GET", headers=ANN)).status == 200


async def test_the_same_name_by_another_method_is_another_owner(
    make_gateway: MakeGateway, fal: FakeFal
) -> None:
    fal.respond = serve_queue
    secret = "a-secret-that-is-long-enough-for-all-callers"
    gateway = await make_gateway(fal.origin, access_keys=KEYS, jwt_secret=secret)
    claims = {"sub": "ann", "aud": "authenticated", "exp": time.time() + 60}
    token = [("Authorization", f"Bearer {jwt.encode(claims, secret)}")]
    url = f"{QUEUE}/fal-ai/flux/requests/{await submit(gateway, ANN)}"
    assert (await gateway.call(url, "GET", headers=token)).status == 404
    assert (await gateway.call(url, "GET", headers=ANN)).status == 200


@pytest.mark.parametrize(
    ("content_type", "size"),
    [("Application/JSON", 0), ("application/problem+json", 0), ("application/json", 70_000)],
)
async def test_an_unusual_submit_response_still_has_an_owner(
    locked: Gateway, fal: FakeFal, content_type: str, size: int
) -> None:
    async def respond(request: web.Request) -> web.StreamResponse:
        body = json.dumps({"request_id": "odd", "more": "x" * size}).encode()
        headers = {"Content-Type": content_type, "Content-Encoding": "identity"}
        return web.Response(body=body, headers=headers)

    fal.respond = respond
    assert (await locked.call(SUBMIT, json={}, headers=ANN)).status == 200
    url = f"{QUEUE}/fal-ai/flux/requests/odd"
    assert (await locked.call(url, "GET", headers=ANN)).status == 200


async def test_an_id_that_cannot_be_stored_does_not_lose_the_response(
    locked: Gateway, fal: FakeFal
) -> None:
    async def respond(request: web.Request) -> web.StreamResponse:
        return web.json_response(text='{"request_id": "\\ud800"}')

    fal.respond = respond
    assert (await locked.call(SUBMIT, json={}, headers=ANN)).status == 200


async def test_owners_survive_a_restart(
    make_gateway: MakeGateway, fal: FakeFal, locked: Gateway
) -> None:
    request_id = await submit(locked, ANN)
    again = await make_gateway(fal.origin, allowed_targets=(), access_keys=KEYS)
    url = f"{QUEUE}/fal-ai/flux/requests/{request_id}"
    assert (await again.call(url, "GET", headers=ANN)).status == 200
    assert (await again.call(url, "GET", headers=BOB)).status == 404


async def test_owners_are_kept_in_memory_without_a_disk(
    make_gateway: MakeGateway, fal: FakeFal, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    fal.respond = serve_queue
    gateway = await make_gateway(fal.origin, access_keys=KEYS, data_dir=tmp_path / "file" / "x")
    url = f"{QUEUE}/fal-ai/flux/requests/{await submit(gateway, ANN)}"
    assert (await gateway.call(url, "GET", headers=ANN)).status == 200
    assert (await gateway.call(url, "GET", headers=BOB)).status == 404


@pytest.mark.parametrize("coding", ["gzip", "br", "identity"])
async def test_a_submit_response_is_readable_with_any_accept_encoding(
    locked: Gateway, fal: FakeFal, coding: str
) -> None:
    await submit(locked, [*ANN, ("Accept-Encoding", coding)])
    assert fal.seen[0].header("accept-encoding") == "identity"


LISTED = ("fal-ai/flux/dev",)


@pytest.mark.parametrize("headers", [ANN, BOB], ids=["ann", "bob"])
@pytest.mark.parametrize(
    ("method", "target", "status"),
    [
        ("POST", RUN, 200),
        ("POST", f"{RUN}/stream", 200),
        ("POST", SUBMIT, 200),
        ("POST", "https://fal.run/fal-ai/veo3", 403),
        ("POST", "https://fal.run/fal-ai/veo3/stream", 403),
        ("GET", "https://fal.run/fal-ai/veo3?prompt=x", 403),
        ("POST", f"{QUEUE}/fal-ai/veo3", 403),
        ("POST", "https://rest.fal.ai/storage/upload/initiate", 200),
        ("GET", "https://rest.fal.ai/keys", 403),
        ("GET", "https://api.fal.ai/v1/account/billing", 403),
    ],
)
async def test_the_endpoint_list_applies_to_all_callers(
    make_gateway: MakeGateway,
    fal: FakeFal,
    headers: Headers,
    method: str,
    target: str,
    status: int,
) -> None:
    fal.respond = serve_queue
    gateway = await make_gateway(
        fal.origin, allowed_targets=(), access_keys=KEYS, allowed_endpoints=LISTED
    )
    body: dict[str, object] = {"json": {}} if method == "POST" else {}
    response = await gateway.call(target, method, headers=headers, **body)
    assert response.status == status
    if status == 403:
        assert (await response.json())["type"] == "target_forbidden"
        assert fal.seen == []


async def test_a_list_without_keys_allows_only_requests_submitted_through_the_proxy(
    make_gateway: MakeGateway, fal: FakeFal
) -> None:
    """The URL of a request does not show the endpoint that it was submitted to."""
    fal.respond = serve_queue
    gateway = await make_gateway(fal.origin, allowed_targets=(), allowed_endpoints=LISTED)
    request_id = await submit(gateway, [])
    url = f"{QUEUE}/fal-ai/flux/requests/{request_id}/status"
    assert (await gateway.call(url, "GET")).status == 200
    assert (await gateway.call(f"{REQUEST}/status", "GET")).status == 404


@pytest.mark.parametrize(
    ("path", "params", "sent"),
    [
        pytest.param(
            "",
            {"allowed_apps": ["flux"], "token_expiration": 60},
            {"allowed_apps": ["flux"], "token_expiration": 60},
            id="as the JS client sends it",
        ),
        pytest.param(
            "",
            {"allowed_apps": ["flux"], "token_expiration": 86400},
            {"allowed_apps": ["flux"], "token_expiration": 120},
            id="a long lifetime is capped",
        ),
        pytest.param(
            "",
            {"allowed_apps": ["flux"]},
            {"allowed_apps": ["flux"], "token_expiration": 120},
            id="a missing lifetime is added",
        ),
        pytest.param(
            "",
            {"allowed_apps": ["flux"], "duration": 60},
            {"allowed_apps": ["flux"], "token_expiration": 60},
            id="by the field of this path",
        ),
        pytest.param(
            "realtime",
            {"app": "flux", "token_expiration": 1000000000.0},
            {"app": "flux", "duration": 120},
            id="by the field of the other path",
        ),
        pytest.param(
            "realtime/", {"app": "flux"}, {"app": "flux", "duration": 120}, id="a trailing slash"
        ),
        pytest.param(
            "",
            {"allowed_apps": ["flux"], "token_expiration": "forever"},
            {"allowed_apps": ["flux"], "token_expiration": 120},
            id="not a number",
        ),
        pytest.param(
            "",
            {"allowed_apps": ["flux"], "token_expiration": -1},
            {"allowed_apps": ["flux"], "token_expiration": 120},
            id="negative",
        ),
        pytest.param(
            "",
            {"allowed_apps": ["flux"], "apps": ["*"], "expires_in": 9000000000.0},
            {"allowed_apps": ["flux"], "token_expiration": 120},
            id="unknown fields are dropped",
        ),
    ],
)
async def test_a_token_lives_two_minutes_at_most(
    make_gateway: MakeGateway, fal: FakeFal, path: str, params: object, sent: object
) -> None:
    gateway = await make_gateway(fal.origin, allowed_targets=())
    assert (await gateway.call(TOKENS + path, json=params)).status == 200
    assert json.loads(fal.seen[0].body) == sent
    assert fal.seen[0].header("content-length") == str(len(fal.seen[0].body))


@pytest.mark.parametrize(
    ("body", "status"),
    [
        pytest.param(b'{"allowed_apps": ["veo3"]}', 403, id="another app"),
        pytest.param(b'{"allowed_apps": ["flux", "veo3"]}', 403, id="another app in the list"),
        pytest.param(
            b'{"allowed_apps": ["flux"], "app": "veo3"}', 403, id="another app in the other field"
        ),
        pytest.param(b'{"app": "fal-ai/veo3"}', 403, id="only in the other field"),
        pytest.param(b'{"allowed_apps": ["veo3"], "allowed_apps": ["*"]}', 403, id="a key twice"),
        pytest.param(b'{"allowed_apps": []}', 403, id="no app"),
        pytest.param(b'{"allowed_apps": null}', 403, id="null"),
        pytest.param(b'{"allowed_apps": [["flux"]]}', 403, id="a list in the list"),
        pytest.param(b'{"allowed_apps": {"flux": 1}}', 403, id="an object"),
        pytest.param(b'{"allowed_apps": ["*"]}', 403, id="a wildcard"),
        pytest.param(b'{"allowed_apps": ["fal-ai/*"]}', 403, id="a wildcard inside"),
        pytest.param(b"{}", 403, id="empty"),
        pytest.param(b"[]", 400, id="a list"),
        pytest.param(b"flux", 400, id="not JSON"),
        pytest.param(b"\xff", 400, id="not Unicode"),
        pytest.param(b"[" * 50_000, 400, id="a depth bomb"),
        pytest.param(
            b'{"allowed_apps": ["flux"], "x": "' + b"x" * 70_000 + b'"}', 400, id="too long"
        ),
    ],
)
@pytest.mark.parametrize(
    "target", [TOKENS, TOKENS[:-1], f"{TOKENS}realtime", TOKENS.replace("rest.", "rest.alpha.")]
)
async def test_no_token_for_an_app_that_is_not_listed(
    make_gateway: MakeGateway, fal: FakeFal, body: bytes, status: int, target: str
) -> None:
    gateway = await make_gateway(fal.origin, allowed_targets=(), allowed_endpoints=LISTED)
    headers = [("Content-Type", "application/json")]
    response = await gateway.call(target, data=body, headers=headers)
    assert response.status == status
    assert fal.seen == []


async def test_a_token_request_by_query_is_refused(make_gateway: MakeGateway, fal: FakeFal) -> None:
    gateway = await make_gateway(fal.origin, allowed_targets=())
    url = f"{TOKENS}?token_expiration=86400&allowed_apps=veo3"
    assert (await gateway.call(url, json={"allowed_apps": ["flux"]})).status == 403
    assert fal.seen == []


async def test_an_encoded_token_request_is_refused(make_gateway: MakeGateway, fal: FakeFal) -> None:
    gateway = await make_gateway(fal.origin, allowed_targets=(), allowed_endpoints=LISTED)
    headers = [("Content-Type", "application/json"), ("Content-Encoding", "gzip")]
    body = json.dumps({"allowed_apps": ["flux"]}).encode()
    assert (await gateway.call(TOKENS, data=body, headers=headers)).status == 400
    assert fal.seen == []


async def test_the_log_names_the_caller(locked: Gateway, caplog: pytest.LogCaptureFixture) -> None:
    await (await locked.call(RUN, json={}, headers=BOB)).read()
    fields = [vars(record)["fields"] for record in caplog.records if "fields" in vars(record)]
    assert fields[-1]["principal"] == "bob"
