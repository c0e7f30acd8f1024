"""The user of a call: the fields that name it in each API, the callers that may name it, and the
places where it appears."""

import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jwt
import pytest
from aiohttp import FormData, web

from falproxy.server.fast_path.protocol import ROUTE_CACHE
from falproxy.stores.ledger import CallRecord, UsageQuery
from falproxy.stores.ledger.writer import LEDGER_WRITER
from tests.support.fake_fal import FakeFal
from tests.support.fake_queue import FakeQueue
from tests.support.gateway import Gateway, MakeGateway
from tests.support.sandbox_proxy import (
    ASYNC,
    PNG,
    Reply,
    SandboxProxy,
    data_uri,
    open_sandbox_proxy,
)
from tests.support.urls import PROXY, REQUEST, RUN, SUBMIT
from tests.support.waiting import wait_until

HEADER = "x-falproxy-user"
KEY = {"x-falproxy-key": "s3cret-of-ann"}
JWT_SECRET = "a secret of at least thirty-two characters"
DEV, SCHNELL = "fal-ai/flux/dev", "fal-ai/flux/schnell"
DRAW = {"prompt": "!delay 0 a heron", "image_size": {"width": 64, "height": 48}}
OPENAI = {"model": DEV, "prompt": "!delay 0 a heron", "size": "64x64"}
STREAM = {"model": SCHNELL, "prompt": "a heron", "stream": True, "partial_images": 1}


@dataclass(frozen=True, slots=True)
class Api:
    """A request that calls a model. field: the field of its body that names the user."""

    path: str
    body: Mapping[str, object]
    target: str | None = None
    field: str | None = None
    is_form: bool = False

    async def request(
        self, proxy: SandboxProxy, user: str | None = None, **headers: str | bytes
    ) -> Reply:
        """Send the request. user: sent in the body."""
        body = dict(self.body) if user is None else {**self.body, self.field or "": user}
        sent: dict[str, Any] = {"data": form(body)} if self.is_form else {"json": body}
        if self.target:
            headers["x-fal-target-url"] = self.target
        return await proxy.request("POST", self.path, headers=headers, **sent)


def form(fields: Mapping[str, Any]) -> FormData:
    data = FormData(dict(fields))
    data.add_field("image", PNG, filename="in.png", content_type="image/png")
    return data


GENERATE = Api("/api/images/generate", {"model": "flux-dev", "inputs": DRAW}, field="userId")
EDIT_FORM = {"model": "kontext", "prompt": "a heron"}
EDIT_JSON = EDIT_FORM | {"images": [{"image_url": data_uri()}]}
APIS = {
    "header route, run": Api(PROXY, DRAW, RUN),
    "header route, submit": Api(PROXY, DRAW, SUBMIT),
    "header route, stream": Api(PROXY, DRAW, f"https://fal.run/{SCHNELL}/stream"),
    "base URL, run": Api(f"/api/fal/run/{DEV}", DRAW),
    "base URL, submit": Api(f"/api/fal/queue/{DEV}", DRAW),
    "kontext": Api("/kontext", {"prompt": "a heron", "image_url": data_uri()}),
    "openai": Api("/v1/images/generations", OPENAI, field="user"),
    "openai, several calls": Api("/v1/images/generations", OPENAI | {"n": 10}, field="user"),
    "openai, other field": Api("/v1/images/generations", OPENAI, field="safety_identifier"),
    "openai, stream": Api("/v1/images/generations", STREAM, field="user"),
    "openai, edit as form": Api("/v1/images/edits", EDIT_FORM, field="user", is_form=True),
    "openai, edit as JSON": Api("/v1/images/edits", EDIT_JSON, field="user"),
    "generate": GENERATE,
    "template": Api(
        "/api/templates/product-shot", {"variables": {"product": "a heron"}}, field="userId"
    ),
}
SOURCES: list[tuple[str, str | None]] = [
    (name, source) for name, api in APIS.items() for source in ("header", api.field) if source
]


@dataclass(frozen=True, slots=True)
class Auth:
    """How callers authenticate. expected: the user of calls that name `ada`."""

    settings: Mapping[str, object]
    headers: Mapping[str, str]
    expected: str | None
    has_hook: bool = False


def token(**claims: object) -> str:
    fields = {"sub": "eve", "aud": "authenticated", "exp": time.time() + 60} | claims
    return jwt.encode(fields, JWT_SECRET, "HS256")


async def hook(request: web.Request) -> str | None:
    return request.headers.get("x-my-caller")


AUTHS: dict[str, Callable[[], Auth]] = {
    "none": lambda: Auth({}, {}, None),
    "access key": lambda: Auth({"access_keys": (("ann", KEY["x-falproxy-key"]),)}, KEY, "ada"),
    "token": lambda: Auth(
        {"jwt_secret": JWT_SECRET}, {"Authorization": f"Bearer {token()}"}, "eve"
    ),
    "hook": lambda: Auth({}, {"x-my-caller": "ann"}, "ada", has_hook=True),
}


@asynccontextmanager
async def open_proxy(folder: Path, auth: Auth, **settings: Any) -> AsyncIterator[SandboxProxy]:
    authenticate = hook if auth.has_hook else None
    options: dict[str, Any] = dict(auth.settings) | settings
    async with open_sandbox_proxy(folder, authenticate=authenticate, **options) as proxy:
        yield proxy


def open_locked(folder: Path, **settings: Any) -> AbstractAsyncContextManager[SandboxProxy]:
    return open_proxy(folder, AUTHS["access key"](), **settings)


async def users_by_source(
    proxy: SandboxProxy, headers: Mapping[str, str], sources: Sequence[tuple[str, str | None]]
) -> dict[tuple[str, str | None], set[str | None]]:
    """Call models, and name `ada` by each of the sources: API, and its field, `header` or None.
    Returns the users of the records of each call."""
    users = {}
    for name, source in sources:
        known = {record.id for record in await proxy.records()}
        named = {HEADER: "ada"} if source == "header" else {}
        user = "ada" if source not in ("header", None) else None
        reply = await APIS[name].request(proxy, user, **headers, **named)
        assert reply.status == 200, reply
        records = [record for record in await proxy.records() if record.id not in known]
        users[name, source] = {record.user_id for record in records}
    return users


@pytest.mark.parametrize("method", AUTHS)
async def test_the_user_of_a_call_is_recorded(tmp_path: Path, method: str) -> None:
    auth = AUTHS[method]()
    async with open_proxy(tmp_path, auth, cache=False) as proxy:
        users = await users_by_source(proxy, auth.headers, SOURCES)
        assert users == {key: {auth.expected} for key in SOURCES}
        assert all(HEADER not in seen.headers for seen in proxy.sandbox.seen)


async def test_calls_without_a_user_have_none(tmp_path: Path) -> None:
    async with open_locked(tmp_path, cache=False) as proxy:
        sources = [(name, None) for name in APIS]
        assert await users_by_source(proxy, KEY, sources) == {key: {None} for key in sources}


async def test_the_subject_of_a_token_is_the_user(tmp_path: Path) -> None:
    async with open_proxy(tmp_path, AUTHS["token"](), cache=False) as proxy:
        bearer = {"Authorization": f"Bearer {token(sub='zoë|42')}"}
        sources = [(name, None) for name in APIS]
        assert await users_by_source(proxy, bearer, sources) == {key: {"zoë|42"} for key in sources}


async def test_a_token_and_a_key_at_the_same_proxy(tmp_path: Path) -> None:
    auth = Auth(
        {"access_keys": (("ann", KEY["x-falproxy-key"]),), "jwt_secret": JWT_SECRET}, {}, ""
    )
    async with open_proxy(tmp_path, auth) as proxy:
        api = APIS["header route, run"]
        await api.request(proxy, **KEY, **{HEADER: "ada"})
        await api.request(proxy, **{"Authorization": f"Bearer {token()}", HEADER: "ada"})
        assert [record.user_id for record in await proxy.records()] == ["eve", "ada"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("x" * 128, "x" * 128, id="the longest"),
        pytest.param("ë" * 128, "ë" * 128, id="the longest, more bytes than characters"),
        pytest.param("ada lovelace, 7=x%41", "ada lovelace, 7=x%41", id="punctuation"),
        pytest.param("艾达 👩‍💻", "艾达 👩‍💻", id="UTF-8"),
        pytest.param("  ada\t", "ada", id="blanks around it, which headers cannot have"),
        pytest.param("", None, id="empty"),
        pytest.param(" ", None, id="a blank"),
    ],
)
@pytest.mark.parametrize("source", ["header", "openai", "generate"])
async def test_a_valid_user_is_recorded_unchanged(
    tmp_path: Path, source: str, text: str, expected: str | None
) -> None:
    async with open_locked(tmp_path) as proxy:
        if source == "header":
            reply = await APIS["header route, run"].request(proxy, **KEY, **{HEADER: text})
        else:
            reply = await APIS[source].request(proxy, text, **KEY)
        assert reply.status == 200, reply
        assert {record.user_id for record in await proxy.records()} == {expected}


INVALID = [
    pytest.param("x" * 129, "has 129 characters; at most 128", id="too long"),
    pytest.param("a\x85b", "a control character", id="a C1 control character"),
    pytest.param("a\u2028b", "a control character", id="a line separator"),
]
INVALID_IN_BODY = [
    *INVALID,
    pytest.param("a\nb", "a control character", id="a line break"),
    pytest.param("a\0b", "a control character", id="NUL"),
    pytest.param("a\x1b[2Jb", "a control character", id="an escape sequence"),
]


def error_of(path: str, document: Mapping[str, Any]) -> tuple[str, str]:
    """Return code and message of an error in the shape of a path's API."""
    if path.startswith("/api/fal/"):
        assert document["message"] == document["detail"]
        return document["type"], document["message"]
    error = document["error"]
    assert set(error) == (
        {"message", "type", "param", "code"} if path.startswith("/v1/") else {"code", "message"}
    )
    return error["code"], error["message"]


async def assert_refused(proxy: SandboxProxy, api: Api, reply: Reply, code: str, text: str) -> None:
    assert reply.status == 400, reply
    refused_code, message = error_of(api.path, reply.document)
    assert refused_code == code
    assert text in message
    assert proxy.model_requests == []
    assert await proxy.records() == []


@pytest.mark.parametrize(("text", "message"), INVALID)
@pytest.mark.parametrize("name", APIS)
async def test_an_invalid_header_is_refused_by_every_api(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    async with open_locked(tmp_path) as proxy:
        reply = await APIS[name].request(proxy, **KEY, **{HEADER: text})
        await assert_refused(proxy, APIS[name], reply, "user_invalid", f"{HEADER} ")
        assert message in str(reply.document)


@pytest.mark.parametrize(("text", "message"), INVALID_IN_BODY)
@pytest.mark.parametrize("name", [name for name, api in APIS.items() if api.field])
async def test_an_invalid_field_is_refused_with_its_name(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    api = APIS[name]
    async with open_locked(tmp_path) as proxy:
        reply = await api.request(proxy, text, **KEY)
        await assert_refused(proxy, api, reply, "user_invalid", f"{api.field} ")
        assert message in str(reply.document)
        if api.path.startswith("/v1/"):
            assert reply.document["error"]["param"] == api.field


@pytest.mark.parametrize("name", ["openai", "generate", "template"])
async def test_half_of_a_surrogate_pair_is_refused(tmp_path: Path, name: str) -> None:
    async with open_locked(tmp_path) as proxy:
        api = APIS[name]
        body = json.dumps({**api.body, api.field or "": "a\ud83d"})
        headers = {**KEY, "Content-Type": "application/json"}
        reply = await proxy.request("POST", api.path, data=body, headers=headers)
        assert reply.status == 400
        assert proxy.model_requests == []


@pytest.mark.parametrize("method", AUTHS)
async def test_an_invalid_user_is_refused_whether_or_not_it_is_believed(
    tmp_path: Path, method: str
) -> None:
    auth = AUTHS[method]()
    async with open_proxy(tmp_path, auth) as proxy:
        for name in ("header route, submit", "generate"):
            reply = await APIS[name].request(proxy, **auth.headers, **{HEADER: "x" * 129})
            await assert_refused(proxy, APIS[name], reply, "user_invalid", HEADER)
        reply = await GENERATE.request(proxy, "x" * 129, **auth.headers)
        await assert_refused(proxy, GENERATE, reply, "user_invalid", "userId")


@pytest.mark.parametrize("name", [name for name, api in APIS.items() if api.field])
async def test_header_and_body_may_not_name_different_users(tmp_path: Path, name: str) -> None:
    async with open_locked(tmp_path) as proxy:
        api = APIS[name]
        reply = await api.request(proxy, "ada", **KEY, **{HEADER: "bob"})
        await assert_refused(proxy, api, reply, "user_ambiguous", f"{api.field} and {HEADER}")
        assert (await api.request(proxy, "ada", **KEY, **{HEADER: "ada"})).status == 200
        assert {record.user_id for record in await proxy.records()} == {"ada"}


async def test_a_header_that_is_sent_twice_is_refused(gateway_with_key: Gateway) -> None:
    for method, target in (("POST", RUN), ("GET", f"{REQUEST}/status")):
        headers = [*KEY.items(), (HEADER, "ada"), (HEADER, "ada")]
        response = await gateway_with_key.call(target, method, headers=headers)
        assert (response.status, (await response.json())["type"]) == (400, "user_ambiguous")


async def test_a_header_that_is_not_utf_8_is_refused(
    gateway_with_key: Gateway, fal: FakeFal
) -> None:
    request = (
        f"POST {PROXY} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 2\r\n"
        f"Content-Type: application/json\r\nx-fal-target-url: {RUN}\r\n"
        f"x-falproxy-key: {KEY['x-falproxy-key']}\r\n{HEADER}: zo\xeb\r\n\r\n{{}}"
    )
    response = await gateway_with_key.send_raw(request.encode("latin-1"))
    assert response.startswith(b"HTTP/1.1 400 ")
    assert b"x-falproxy-user is not valid UTF-8." in response
    assert fal.seen == []


class TestGenerate:
    async def test_returns_the_user_of_the_call(self, tmp_path: Path) -> None:
        auth = AUTHS["token"]()
        async with open_proxy(tmp_path, auth) as proxy:
            assert (await GENERATE.request(proxy, "ada", **auth.headers)).document[
                "userId"
            ] == "eve"

    async def test_returns_the_user_of_the_header(self, tmp_path: Path) -> None:
        async with open_locked(tmp_path) as proxy:
            reply = await GENERATE.request(proxy, **KEY, **{HEADER: "ada"})
            assert reply.document["userId"] == "ada"

    async def test_keeps_the_user_of_a_job_without_a_waiting_client(self, tmp_path: Path) -> None:
        async with open_locked(tmp_path) as proxy:
            reply = await GENERATE.request(proxy, "ada", **KEY, **ASYNC)
            job = await proxy.wait_finished(reply.document["jobId"], KEY)
            assert (job["status"], job["userId"]) == ("completed", "ada")
            assert [record.user_id for record in await proxy.records()] == ["ada"]


@pytest.fixture
async def gateway_with_key(make_gateway: MakeGateway, fal: FakeFal) -> Gateway:
    return await make_gateway(fal.origin, access_keys=(("ann", KEY["x-falproxy-key"]),))


async def records_of(gateway: Gateway) -> list[CallRecord]:
    writer = gateway.client.server.app[LEDGER_WRITER]  # type: ignore[attr-defined]
    await wait_until(lambda: not writer.pending_rows)
    records: list[CallRecord] = await writer.ledger.latest(UsageQuery())
    return records


def fast_path_hits(gateway: Gateway) -> int:
    hits: int = gateway.client.server.app[ROUTE_CACHE].hits  # type: ignore[attr-defined]
    return hits


@pytest.mark.parametrize("is_locked", [True, False], ids=["with a key", "open"])
async def test_repeated_requests_keep_their_own_user(
    make_gateway: MakeGateway, queue: FakeQueue, is_locked: bool
) -> None:
    """Submits of callers with a key never take the fast path, and polls have no record."""
    settings = {"access_keys": (("ann", KEY["x-falproxy-key"]),)} if is_locked else {}
    gateway = await make_gateway(queue.fake.origin, **settings)
    users = ["ada", "bob", None] * 4
    for user in users:
        headers = [*KEY.items(), *([(HEADER, user)] if user else [])]
        submitted = await gateway.call(SUBMIT, json={"prompt": "a heron"}, headers=headers)
        request_id = (await submitted.json())["request_id"]
        status = f"https://queue.fal.run/fal-ai/flux/requests/{request_id}/status"
        for _ in range(2):
            response = await gateway.call(status, "GET", headers=headers)
            assert response.status in (200, 202)
    new_heads = len({*users})  # heads that differ in the request id only are no new ones
    polls, submits = 2 * len(users) - new_heads, len(users) - new_heads
    assert fast_path_hits(gateway) == (polls if is_locked else polls + submits)
    expected = users if is_locked else [None] * len(users)
    assert [record.user_id for record in reversed(await records_of(gateway))] == expected
    assert all(seen.header(HEADER) is None for seen in queue.fake.seen)


@pytest.mark.parametrize("path", ["/v1/images/generations", "/api/images/generate"])
async def test_a_field_of_the_body_is_read_for_every_request(tmp_path: Path, path: str) -> None:
    """Their heads are equal, and only their bodies name the user."""
    name = "openai" if path.startswith("/v1/") else "generate"
    users = ["ada", "bob", "ada", "eve"]
    async with open_locked(tmp_path) as proxy:
        for user in users:
            assert (await APIS[name].request(proxy, user, **KEY)).status == 200
        assert [record.user_id for record in reversed(await proxy.records())] == users


async def test_pages_of_other_origins_may_send_the_header(tmp_path: Path) -> None:
    async with open_locked(tmp_path, allowed_origins=("https://app.example",)) as proxy:
        reply = await proxy.request(
            "OPTIONS",
            PROXY,
            headers={
                "Origin": "https://app.example",
                "Access-Control-Request-Method": "POST",
                "Access-Control-Request-Headers": f"content-type,{HEADER}",
            },
        )
        assert HEADER in reply.headers["Access-Control-Allow-Headers"].split(", ")


async def test_metrics_have_no_label_for_users(tmp_path: Path) -> None:
    """Their number is not bounded, and each label value would be a time series."""
    async with open_locked(tmp_path, admins=("ann",)) as proxy:
        for name in ("header route, submit", "openai", "generate"):
            await APIS[name].request(proxy, **KEY, **{HEADER: "lovelace"})
        async with proxy.session.get(f"{proxy.origin}/metrics", headers=KEY) as response:
            text = await response.text()
        assert 'endpoint="' in text
        assert "lovelace" not in text
        assert "user=" not in text


async def test_users_are_in_the_lines_of_their_calls_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_locked(tmp_path) as proxy:
        for user in ("lovelace", "lovelace" * 20):
            await APIS["header route, run"].request(proxy, **KEY, **{HEADER: user})
            await GENERATE.request(proxy, user, **KEY)
    users = [vars(each).pop("fields").pop("user") for each in caplog.records if is_call(each)]
    assert {*users} == {"lovelace", None}  # the longer name is refused
    logged = "\n".join(f"{record.getMessage()} {vars(record)}" for record in caplog.records)
    assert "lovelace" not in logged


def is_call(record: logging.LogRecord) -> bool:
    return record.name == "falproxy.calls"
