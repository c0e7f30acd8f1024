"""`FALPROXY_TAGS`: the header `X-Fal-Tags` as fal receives it, byte for byte."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jwt
import pytest

from falproxy.server.fast_path.protocol import ROUTE_CACHE
from tests.support.fake_fal import FakeFal
from tests.support.fake_queue import FakeQueue
from tests.support.gateway import Gateway, MakeGateway
from tests.support.sandbox_proxy import data_uri, open_sandbox_proxy
from tests.support.urls import REQUEST, RUN, SUBMIT

BOTH = ("principal", "user")
KEYS = (("web", "s3cret-of-web"),)
KEY = ("x-falproxy-key", "s3cret-of-web")
TAGS, USER = "x-fal-tags", "x-falproxy-user"
JWT_SECRET = "a secret of at least thirty-two characters"
KONTEXT = "https://fal.run/fal-ai/flux-pro/kontext"
DEV = "fal-ai/flux/dev"
Headers = list[tuple[str, str]]


async def sent_tags(gateway: Gateway, fal: FakeFal, *headers: tuple[str, str]) -> str | None:
    """Return the header that fal receives with a run."""
    response = await gateway.call(RUN, json={}, headers=[KEY, *headers])
    assert response.status == 200, await response.text()
    return fal.seen[-1].header(TAGS)


@pytest.mark.both_transports
@pytest.mark.parametrize(
    ("names", "headers", "expected"),
    [
        pytest.param(BOTH, [(USER, "ada")], "principal=web,user=ada", id="both"),
        pytest.param(("user", "principal"), [(USER, "ada")], "user=ada,principal=web", id="order"),
        pytest.param(("user",), [(USER, "ada")], "user=ada", id="the user only"),
        pytest.param(("principal",), [(USER, "ada")], "principal=web", id="the principal only"),
        pytest.param(BOTH, [], "principal=web", id="no user"),
        pytest.param(("user",), [], None, id="nothing"),
        pytest.param(
            BOTH, [(USER, "zoë, 50%")], "principal=web,user=zo%C3%AB%2C 50%25", id="escapes"
        ),
        pytest.param(
            ("user",), [(TAGS, "team=a"), (USER, "ada")], "team=a,user=ada", id="own tags"
        ),
        pytest.param(
            ("user",), [(TAGS, "a=1"), (TAGS, "b=2"), (USER, "ada")], "a=1,b=2,user=ada",
            id="own tags in two headers",
        ),
        pytest.param(("user",), [(TAGS, "team=a")], "team=a", id="own tags only"),
        pytest.param(
            ("user",), [("Connection", f"keep-alive, {TAGS}"), (USER, "ada")], "user=ada",
            id="a connection header cannot remove the tags",
        ),
        pytest.param(
            ("user",), [("Connection", TAGS), (TAGS, "team=a"), (USER, "ada")], "user=ada",
            id="tags for the connection only",
        ),
        pytest.param((), [(USER, "ada")], None, id="off"),
        pytest.param((), [(TAGS, "user=x"), (USER, "ada")], "user=x", id="off, own tags"),
    ],
)  # fmt: skip
async def test_tags_of_a_run(
    make_gateway: MakeGateway,
    fal: FakeFal,
    names: tuple[str, ...],
    headers: Headers,
    expected: str | None,
) -> None:
    gateway = await make_gateway(fal.origin, access_keys=KEYS, tags=names)
    assert await sent_tags(gateway, fal, *headers) == expected
    assert fal.seen[-1].header(USER) is None


@pytest.mark.parametrize(
    ("header", "code"),
    [
        pytest.param("user=bob", "tag_reserved", id="another user"),
        pytest.param("principal=admin", "tag_reserved", id="another principal"),
        pytest.param(",".join(f"k{n}=v" for n in range(9)), "tags_too_large", id="too many"),
        pytest.param("a=" + "x" * 1020, "tags_too_large", id="too long"),
    ],
)
@pytest.mark.parametrize("target", [RUN, SUBMIT, KONTEXT])
async def test_tags_that_fal_would_drop_are_refused(
    make_gateway: MakeGateway, fal: FakeFal, target: str, header: str, code: str
) -> None:
    gateway = await make_gateway(fal.origin, access_keys=KEYS, tags=BOTH)
    headers = [KEY, (TAGS, header), (USER, "ada")]
    response = await gateway.call(target, json={"prompt": "a"}, headers=headers)
    assert (response.status, (await response.json())["type"]) == (400, code)
    assert fal.seen == []


async def test_only_model_calls_are_tagged(make_gateway: MakeGateway, queue: FakeQueue) -> None:
    gateway = await make_gateway(queue.fake.origin, access_keys=KEYS, tags=BOTH)
    headers = [KEY, (USER, "ada")]
    submitted = await gateway.call(SUBMIT, json={"prompt": "a"}, headers=headers)
    url = f"{REQUEST.rpartition('/')[0]}/{(await submitted.json())['request_id']}"
    for suffix in ("/status", "/status", ""):
        await gateway.call(url + suffix, "GET", headers=headers)
    await gateway.call(f"{url}/cancel", "PUT", headers=headers)
    upload = "https://rest.fal.ai/storage/upload/initiate"
    await gateway.call(upload, json={"file_name": "a.png"}, headers=headers)
    assert len(queue.fake.seen) == 6
    assert [seen.header(TAGS) for seen in queue.fake.seen] == [
        "principal=web,user=ada", *[None] * 5,
    ]  # fmt: skip


async def test_a_model_call_by_get_is_tagged(make_gateway: MakeGateway, fal: FakeFal) -> None:
    gateway = await make_gateway(fal.origin, access_keys=KEYS, tags=BOTH)
    for user in ("ada", "bob"):
        assert (await gateway.call(RUN, "GET", headers=[KEY, (USER, user)])).status == 200
    assert [seen.header(TAGS) for seen in fal.seen] == [
        "principal=web,user=ada", "principal=web,user=bob",
    ]  # fmt: skip


async def test_a_token_s_subject_is_the_user_and_the_principal(
    make_gateway: MakeGateway, fal: FakeFal
) -> None:
    gateway = await make_gateway(fal.origin, jwt_secret=JWT_SECRET, tags=BOTH)
    claims = {"sub": "eve,\n" + "x" * 400, "aud": "authenticated", "exp": time.time() + 60}
    bearer = f"Bearer {jwt.encode(claims, JWT_SECRET, 'HS256')}"
    headers = [("Authorization", bearer), (USER, "ada")]
    assert (await gateway.call(RUN, json={}, headers=headers)).status == 200
    tags = dict(pair.split("=") for pair in (fal.seen[-1].header(TAGS) or "").split(","))
    assert tags["principal"] == tags["user"]
    assert tags["user"].startswith("eve%2C%0Axxx")
    assert len(tags["user"]) == 256


async def test_an_open_proxy_has_no_tags_of_its_own(
    make_gateway: MakeGateway, queue: FakeQueue
) -> None:
    """Repeated submits take the fast path, with the tags of the client."""
    gateway = await make_gateway(queue.fake.origin, tags=BOTH)
    for tags in (None, None, "team=a", "team=a", "team=b"):
        headers = [(USER, "ada"), *([(TAGS, tags)] if tags else [])]
        assert (await gateway.call(SUBMIT, json={"prompt": "a"}, headers=headers)).status == 200
    assert gateway.client.server.app[ROUTE_CACHE].hits == 2  # type: ignore[attr-defined]
    assert [seen.header(TAGS) for seen in queue.fake.seen] == [
        None, None, "team=a", "team=a", "team=b",
    ]  # fmt: skip


async def test_calls_with_other_tags_share_results(
    make_gateway: MakeGateway, queue: FakeQueue
) -> None:
    """The job has the tags of the call that was sent."""
    gateway = await make_gateway(queue.fake.origin, access_keys=KEYS, tags=BOTH)
    for headers in ([(USER, "ada")], [(USER, "bob")], [(TAGS, "team=a")]):
        response = await gateway.call(KONTEXT, json={"prompt": "a"}, headers=[KEY, *headers])
        assert response.status == 200
    assert [seen.header(TAGS) for seen in queue.fake.seen] == ["principal=web,user=ada"]


OPENAI = {"model": DEV, "prompt": "a heron", "size": "64x64"}
GENERATE = {"model": "flux-dev", "inputs": {"prompt": "a heron"}}
STREAM = {"stream": True, "partial_images": 1, "model": "fal-ai/flux/schnell"}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        pytest.param(f"/api/fal/run/{DEV}", {"prompt": "a"}, id="base URL"),
        pytest.param("/kontext", {"prompt": "a", "image_url": data_uri()}, id="kontext"),
        pytest.param("/v1/images/generations", OPENAI, id="openai"),
        pytest.param("/v1/images/generations", OPENAI | {"n": 10}, id="openai, several calls"),
        pytest.param("/v1/images/generations", OPENAI | STREAM, id="openai, stream"),
        pytest.param("/api/images/generate", GENERATE, id="generate"),
    ],
)
@pytest.mark.parametrize("names", [BOTH, ()])
async def test_calls_of_every_api_are_tagged(
    tmp_path: Path, path: str, body: Mapping[str, Any], names: tuple[str, ...]
) -> None:
    async with open_sandbox_proxy(tmp_path, access_keys=KEYS, tags=names) as proxy:
        headers = dict([KEY, (USER, "ada"), (TAGS, "team=a")])
        reply = await proxy.request("POST", path, json=body, headers=headers)
        assert reply.status == 200, reply
        expected = "team=a,principal=web,user=ada" if names else "team=a"
        calls = [seen for seen in proxy.model_requests if seen.method == "POST"]
        assert calls
        assert {seen.headers.get(TAGS) for seen in calls} == {expected}
