"""`/api/keys`: keys that are made at run time, over HTTP."""

import logging
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientResponse

from falproxy.stores.keys import ENDED_SECRETS_MAX, KeyStoreError, is_secret
from falproxy.stores.keys.known_keys import KNOWN_KEYS
from tests.support.fake_fal import FakeFal
from tests.support.gateway import Gateway, MakeGateway
from tests.support.running_proxy import open_running_proxy
from tests.support.urls import RUN

KEYS = (("ann", "ann-s3cret-of-ann"), ("bob", "bob-s3cret-of-bob"))
ANN, BOB = {"x-falproxy-key": "ann-s3cret-of-ann"}, {"x-falproxy-key": "bob-s3cret-of-bob"}
FIELDS = {
    "name": "web",
    "expires": "90d",
    "rate": "60/minute",
    "concurrency": 8,
    "budget": "5/day",
    "endpoints": ["fal-ai/flux*", "fal-ai/kling/**"],
}
NO_LIMITS: dict[str, object] = {"rate": None, "concurrency": None, "budget": None, "endpoints": []}


@pytest.fixture
async def gateway(make_gateway: MakeGateway, fal: FakeFal) -> Gateway:
    return await make_gateway(fal.origin, access_keys=KEYS, admins=("ann", "carl", "jwt:eve"))


async def send(
    gateway: Gateway, method: str, path: str = "", body: object = None, **options: Any
) -> tuple[int, Any]:
    options = {"headers": ANN} | options
    response = await gateway.client.request(method, f"/api/keys{path}", json=body, **options)
    return response.status, await checked_document(response)


async def checked_document(response: ClientResponse) -> Any:
    assert response.headers["Cache-Control"] == "no-store"
    assert response.content_type == "application/json"
    return await response.json()


async def create(gateway: Gateway, **fields: object) -> Any:
    status, document = await send(gateway, "POST", "", {"name": "web", **fields})
    assert status == 201, document
    return document


def error_code(document: Any) -> str:
    assert set(document) == {"error"}
    return str(document["error"]["code"])


async def call(gateway: Gateway, secret: str) -> int:
    headers = [("x-falproxy-key", secret)]
    return (await gateway.call(RUN, json={}, headers=headers)).status


async def test_a_key_is_created_listed_and_shown(gateway: Gateway) -> None:
    status, created = await send(gateway, "POST", "", FIELDS)
    assert status == 201
    secret = created.pop("secret")
    assert is_secret(secret)
    assert (created["name"], created["state"], created["creator"]) == ("web", "active", "key:ann")
    assert (created["rate"], created["concurrency"]) == ("60/minute", 8)
    assert (created["budget"], created["endpoints"]) == ("5.00/day", FIELDS["endpoints"])
    assert created["created_at"] < created["expires_at"]
    assert (created["revoked_at"], created["last_used_at"]) == (None, None)
    assert await send(gateway, "GET") == (200, {"keys": [created]})
    for name in ("web", created["id"]):
        assert await send(gateway, "GET", f"/{name}") == (200, created)


async def test_a_key_without_limits(gateway: Gateway) -> None:
    created = await create(gateway)
    assert created.items() >= {**NO_LIMITS, "expires_at": None}.items()
    assert await call(gateway, created["secret"]) == 200


async def test_a_key_is_rotated_and_revoked_at_once(gateway: Gateway) -> None:
    created = await create(gateway)
    status, rotated = await send(gateway, "POST", "/web/rotate")
    assert status == 200
    assert await call(gateway, created["secret"]) == 401
    assert await call(gateway, rotated["secret"]) == 200
    status, again = await send(gateway, "POST", "/web/rotate", {"grace": "1h"})
    assert [await call(gateway, each["secret"]) for each in (rotated, again)] == [200, 200]
    status, revoked = await send(gateway, "DELETE", "/web")
    assert (status, revoked["state"]) == (200, "revoked")
    assert [await call(gateway, each["secret"]) for each in (rotated, again)] == [401, 401]
    assert await send(gateway, "DELETE", f"/{created['id']}") == (200, revoked)
    assert await send(gateway, "GET") == (200, {"keys": []})
    assert await send(gateway, "GET", "?revoked=1") == (200, {"keys": [revoked]})
    for path, method, body in (("/rotate", "POST", {}), ("", "PATCH", {"budget": "1/day"})):
        status, document = await send(gateway, method, f"/web{path}", body)
        assert (status, error_code(document)) == (409, "key_ended")
    assert ENDED_SECRETS_MAX > 3


async def test_a_key_is_changed(gateway: Gateway) -> None:
    created = await create(gateway, rate="60/minute", endpoints="a/b, c/d")
    del created["secret"]
    assert created["endpoints"] == ["a/b", "c/d"]
    status, changed = await send(gateway, "PATCH", "/web", {"budget": "0.50/12h", "rate": None})
    assert status == 200
    assert changed == {**created, "budget": "0.50/12h", "rate": None}
    status, changed = await send(
        gateway, "PATCH", "/web", {"expires": "2035-01-31", "endpoints": []}
    )
    assert changed["expires_at"] == "2035-01-31T00:00:00.000Z"
    assert changed["endpoints"] == []
    assert await send(gateway, "PATCH", "/web", {}) == (200, changed)


INVALID = [
    ({}, "name"),
    ({"name": ""}, "name"),
    ({"name": None}, "name"),
    ({"name": 5}, "name"),
    ({"name": "a b"}, "name"),
    ({"name": "-a"}, "name"),
    ({"name": "a" * 65}, "name"),
    ({"name": "key:ann"}, "name"),
    ({"name": "caf\u00e9"}, "name"),
    ({"name": "a\n"}, "name"),
    ({"name": "0123456789abcdef"}, "name"),
    ({"rate": "60"}, "rate"),
    ({"rate": 60}, "rate"),
    ({"rate": "0/minute"}, "rate"),
    ({"rate": {"a": 1}}, "rate"),
    ({"concurrency": 0}, "concurrency"),
    ({"concurrency": 1.5}, "concurrency"),
    ({"concurrency": True}, "concurrency"),
    ({"budget": "5"}, "budget"),
    ({"budget": "-5/day"}, "budget"),
    ({"expires": "yesterday"}, "expires"),
    ({"expires": "2020-01-31"}, "expires"),
    ({"expires": "0d"}, "expires"),
    ({"expires": "999999d"}, "expires"),
    ({"expires": 90}, "expires"),
    ({"expires": "2027-02-30"}, "expires"),
    ({"endpoints": {"a": 1}}, "endpoints"),
    ({"endpoints": [1]}, "endpoints"),
    ({"endpoints": [""]}, "endpoints"),
    ({"endpoints": ["a"] * 51}, "endpoints"),
    ({"endpoints": ["/a"]}, "endpoints"),
    ({"endpoints": ["*a*b*c*d"]}, "endpoints"),
    ({"budgte": "5/day"}, "budgte"),
    ({"secret": "mine"}, "secret"),
]


@pytest.mark.parametrize(("fields", "field"), INVALID)
async def test_an_invalid_field_is_named(
    gateway: Gateway, fields: dict[str, object], field: str
) -> None:
    body = fields if field == "name" else {"name": "web", **fields}
    status, document = await send(gateway, "POST", "", body)
    assert (status, error_code(document)) == (400, "key_invalid")
    assert document["error"]["message"].startswith(f"`{field}` ")
    assert await send(gateway, "GET") == (200, {"keys": []})


@pytest.mark.parametrize("name", ["ann", "Ann", "bob", "carl"])
async def test_names_of_settings_and_admins_are_reserved(gateway: Gateway, name: str) -> None:
    status, document = await send(gateway, "POST", "", {"name": name})
    assert (status, error_code(document)) == (409, "name_taken")


async def test_a_name_is_taken_until_its_key_is_revoked(gateway: Gateway) -> None:
    await create(gateway)
    status, document = await send(gateway, "POST", "", {"name": "web"})
    assert (status, error_code(document)) == (409, "name_taken")
    await send(gateway, "DELETE", "/web")
    await create(gateway)


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/x"), ("PATCH", "/x"), ("DELETE", "/x"), ("POST", "/x/rotate"), ("GET", "/%00")],
)
async def test_an_unknown_key_is_a_404(gateway: Gateway, method: str, path: str) -> None:
    status, document = await send(gateway, method, path, {} if method != "GET" else None)
    assert (status, error_code(document)) == (404, "key_not_found")


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("PUT", "", "GET, POST"),
        ("DELETE", "", "GET, POST"),
        ("POST", "/web", "GET, PATCH, DELETE"),
        ("GET", "/web/rotate", "POST"),
        ("OPTIONS", "", "GET, POST"),
    ],
)
async def test_other_methods_are_a_405(
    gateway: Gateway, method: str, path: str, allow: str
) -> None:
    response = await gateway.client.request(method, f"/api/keys{path}", headers=ANN)
    assert (response.status, response.headers["Allow"]) == (405, allow)


ALL = (("GET", ""), ("POST", ""), ("GET", "/web"), ("PATCH", "/web"), ("DELETE", "/web"),
       ("POST", "/web/rotate"))  # fmt: skip


@pytest.mark.parametrize(("method", "path"), ALL)
async def test_only_admins_manage_keys(gateway: Gateway, method: str, path: str) -> None:
    created = await create(gateway)
    for headers, expected in (
        ({}, (401, "unauthenticated")),
        ({"Cookie": "x-falproxy-key=ann-s3cret-of-ann"}, (401, "unauthenticated")),
        (BOB, (403, "not_an_admin")),
        ({"x-falproxy-key": created["secret"]}, (403, "not_an_admin")),
    ):
        status, document = await send(
            gateway, method, path, None if method == "GET" else {}, headers=headers
        )
        assert (status, error_code(document)) == expected
    assert len((await send(gateway, "GET"))[1]["keys"]) == 1
    assert await call(gateway, created["secret"]) == 200


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", ""])
async def test_a_form_of_another_page_cannot_create_a_key(
    gateway: Gateway, content_type: str
) -> None:
    headers = {**ANN, "Content-Type": content_type}
    response = await gateway.client.post("/api/keys", data=b'{"name": "web"}', headers=headers)
    assert response.status == 415
    assert error_code(await checked_document(response)) == "not_json"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"name": NaN}', b"\xff", b"null"])
async def test_a_body_that_is_no_object_is_a_400(gateway: Gateway, body: bytes) -> None:
    headers = {**ANN, "Content-Type": "application/json"}
    response = await gateway.client.post("/api/keys", data=body, headers=headers)
    assert response.status == 400
    assert error_code(await checked_document(response)) == "key_invalid"


async def test_a_large_body_is_a_413(gateway: Gateway) -> None:
    status, document = await send(gateway, "POST", "", {"name": "a" * 100_000})
    assert (status, error_code(document)) == (413, "body_too_large")


@pytest.mark.parametrize("grace", ["soon", "31d", 60, True])
async def test_an_invalid_grace_changes_nothing(gateway: Gateway, grace: object) -> None:
    created = await create(gateway)
    status, document = await send(gateway, "POST", "/web/rotate", {"grace": grace})
    assert (status, error_code(document)) == (400, "key_invalid")
    assert document["error"]["message"].startswith("`grace` ")
    assert await call(gateway, created["secret"]) == 200


async def test_changes_are_logged_without_the_secret(
    gateway: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    secrets = [(await create(gateway))["secret"]]
    secrets.append((await send(gateway, "POST", "/web/rotate"))[1]["secret"])
    await send(gateway, "PATCH", "/web", {"budget": "1/day"})
    await send(gateway, "DELETE", "/web")
    lines = [r for r in caplog.records if r.name == "falproxy.web.keys" and hasattr(r, "fields")]
    assert [r.getMessage() for r in lines] == [
        "A key was created", "A key was rotated", "A key was changed", "A key was revoked",
    ]  # fmt: skip
    assert all(r.levelno == logging.INFO for r in lines)
    assert {(r.fields["by"], r.fields["key_name"]) for r in lines} == {("key:ann", "web")}
    text = caplog.text + str([getattr(r, "fields", "") for r in caplog.records])
    assert not [secret for secret in secrets if secret in text]


async def test_a_store_that_is_away_is_a_503(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = gateway.client.app[KNOWN_KEYS].store

    def away(*args: object, **options: object) -> None:
        raise KeyStoreError("it is away")

    for name in ("list_keys", "find", "create"):
        monkeypatch.setattr(store, name, away)
    for method, path, body in (("GET", "", None), ("POST", "", FIELDS), ("GET", "/web", None)):
        response = await gateway.client.request(method, f"/api/keys{path}", json=body, headers=ANN)
        assert (response.status, response.headers["Retry-After"]) == (503, "5")
        assert error_code(await checked_document(response)) == "keys_unavailable"


async def test_an_embedded_proxy_serves_keys_below_its_prefix(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"access_keys": KEYS, "admins": ("ann",)}
    async with open_running_proxy(tmp_path, "/deep/er", **settings) as place:
        url = f"{place.origin}/api/keys"
        async with place.session.post(url, json={"name": "web"}, headers=ANN) as response:
            assert response.status == 201
            assert response.headers["Cache-Control"] == "no-store"
