"""Public keys of tokens: their removal, rotation and replacement, and a URL that cannot be read."""

import asyncio
import json
from collections.abc import Callable

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from falproxy.errors import ProxyError
from falproxy.middleware import jwks
from falproxy.middleware.jwks import JwksClient
from falproxy.server.fast_path.protocol import ROUTE_CACHE
from tests.support.fake_fal import FakeFal, respond_as_queue
from tests.support.gateway import Gateway, MakeGateway
from tests.support.jwks_issuer import EC, OTHER_EC, RSA, Issuer, claims, signed
from tests.support.polling_client import PollingClient, poll_request
from tests.support.urls import RUN, SUBMIT
from tests.support.waiting import wait_until

pytestmark = pytest.mark.takes(seconds=1)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the keys be read ten times as often."""
    for name in ("READ_INTERVAL", "READ_GRACE", "MISS_INTERVAL", "FAILURE_COOLDOWN"):
        monkeypatch.setattr(jwks, name, getattr(jwks, name) / 10)


@pytest.fixture
async def gateway(make_gateway: MakeGateway, fal: FakeFal, issuer: Issuer) -> Gateway:
    fal.respond = respond_as_queue
    return await make_gateway(fal.origin, jwks_url=issuer.url)


def of_ec() -> str:
    return signed(EC, "ES256", "ec")


def of_rsa() -> str:
    return signed(RSA, "RS256", "rsa")


def port_of(gateway: Gateway) -> int:
    return int(gateway.origin.rpartition(":")[2])


def hits_of(gateway: Gateway) -> int:
    return gateway.client.app[ROUTE_CACHE].hits


async def call_status(gateway: Gateway, token: str) -> int:
    headers = [("Authorization", f"Bearer {token}")]
    return (await gateway.call(RUN, json={}, headers=headers)).status


async def poll_of(gateway: Gateway, token: str) -> bytes:
    """Return the poll of a new job."""
    header = f"Bearer {token}"
    response = await gateway.call(SUBMIT, json={}, headers=[("Authorization", header)])
    assert response.status == 200
    return poll_request((await response.json())["request_id"], f"Authorization: {header}")


# Removed keys, on the fast path and on the normal path


def remove(issuer: Issuer) -> None:
    del issuer.keys["ec"]


def replace_under_the_same_id(issuer: Issuer) -> None:
    issuer.keys["ec"] = OTHER_EC


def remove_all(issuer: Issuer) -> None:
    issuer.keys.clear()


@pytest.mark.parametrize("change", [remove, replace_under_the_same_id, remove_all])
@pytest.mark.usefixtures("quick")
async def test_tokens_of_a_removed_key_are_refused(
    gateway: Gateway, fal: FakeFal, issuer: Issuer, change: Callable[[Issuer], None]
) -> None:
    token = of_ec()
    poll = await poll_of(gateway, token)
    async with PollingClient(port_of(gateway)) as client:
        for _ in range(3):
            assert await client.status(poll) == 200
        assert hits_of(gateway) == 2
        change(issuer)
        await client.seconds_until(401, poll)
        seen = len(fal.seen)
        assert await client.status(poll) == 401
        assert await call_status(gateway, token) == 401
        assert len(fal.seen) == seen


@pytest.mark.timed
@pytest.mark.slow(seconds=5)
async def test_a_removed_key_is_refused_within_five_seconds(
    gateway: Gateway, issuer: Issuer
) -> None:
    polls = [await poll_of(gateway, token) for token in (of_ec(), of_rsa())]
    async with PollingClient(port_of(gateway)) as client:
        for poll in polls:
            assert [await client.status(poll) for _ in range(3)] == [200] * 3
        remove(issuer)
        assert await client.seconds_until(401, polls[0]) < 5
        assert await client.status(polls[1]) == 200
    assert issuer.fetched <= 3


@pytest.mark.usefixtures("quick")
async def test_a_rotation_leaves_tokens_of_other_keys_on_the_fast_path(
    gateway: Gateway, issuer: Issuer
) -> None:
    poll = await poll_of(gateway, of_rsa())
    async with PollingClient(port_of(gateway)) as client:
        await client.status(poll)
        issuer.keys["ec"], issuer.keys["new"] = OTHER_EC, EC
        fetched, hits = issuer.fetched, hits_of(gateway)
        polls = 0
        while issuer.fetched < fetched + 3:
            assert await client.status(poll) == 200
            polls += 1
            await asyncio.sleep(0.01)
        assert hits_of(gateway) == hits + polls
        assert await call_status(gateway, signed(EC, "ES256", "new")) == 200
        assert await call_status(gateway, of_ec()) == 401


async def test_a_new_key_is_accepted_at_once(gateway: Gateway, issuer: Issuer) -> None:
    assert await call_status(gateway, of_rsa()) == 200
    issuer.keys["new"] = OTHER_EC
    assert await call_status(gateway, signed(OTHER_EC, "ES256", "new")) == 200
    assert issuer.fetched == 2


@pytest.mark.parametrize("headers", [{}, {"kid": ""}, {"kid": "unknown"}])
async def test_a_token_without_a_known_key_id_is_refused(
    gateway: Gateway, fal: FakeFal, headers: dict[str, str]
) -> None:
    token = jwt.encode(claims(), RSA, "RS256", headers)
    assert await call_status(gateway, token) == 401
    assert fal.seen == []


# A URL that cannot be read

BROKEN = [
    pytest.param((500, ""), id="an error"),
    pytest.param((404, "{}"), id="not found"),
    pytest.param((200, "<html>"), id="a page"),
    pytest.param((200, "{}"), id="no set"),
    pytest.param((200, '{"keys": {}}'), id="another set"),
    pytest.param((200, "[" * 100_000), id="deep"),
]


@pytest.mark.parametrize("response", BROKEN)
@pytest.mark.usefixtures("quick")
async def test_while_the_url_cannot_be_read_known_keys_are_valid_and_others_a_503(
    gateway: Gateway, issuer: Issuer, response: tuple[int, str], caplog: pytest.LogCaptureFixture
) -> None:
    poll = await poll_of(gateway, of_ec())
    async with PollingClient(port_of(gateway)) as client:
        await client.status(poll)
        issuer.response, fetched = response, issuer.fetched
        while issuer.fetched < fetched + 2:
            assert await client.status(poll) == 200
            await asyncio.sleep(0.01)
        hits = hits_of(gateway)
        assert await client.status(poll) == 200
        assert hits_of(gateway) == hits + 1
        assert await call_status(gateway, of_rsa()) == 200
        assert await call_status(gateway, signed(OTHER_EC, "ES256", "new")) == 503
        issuer.response = None
        remove(issuer)
        await client.seconds_until(401, poll)
    assert sum("FALPROXY_JWKS_URL" in line for line in caplog.messages) == 1


@pytest.mark.usefixtures("quick")
async def test_known_keys_are_not_trusted_for_ever(
    gateway: Gateway, issuer: Issuer, fal: FakeFal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jwks, "TRUST_SECONDS", 0.5)
    poll = await poll_of(gateway, of_ec())
    async with PollingClient(port_of(gateway)) as client:
        await client.status(poll)
        issuer.response = (500, "")
        await client.seconds_until(503, poll)
        seen = len(fal.seen)
        assert await call_status(gateway, of_ec()) == 503
        assert len(fal.seen) == seen
        issuer.response = None
        await client.seconds_until(200, poll)


# The reads


@pytest.mark.usefixtures("quick")
async def test_the_reads_end_when_no_token_is_used(
    gateway: Gateway, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jwks, "IDLE_SECONDS", 0.5)
    token = of_ec()
    assert await call_status(gateway, token) == 200
    await wait_until(lambda: issuer.fetched == 2, seconds=5)
    await asyncio.sleep(1.0)
    fetched = issuer.fetched
    await asyncio.sleep(0.7)
    assert issuer.fetched == fetched
    remove(issuer)
    assert await call_status(gateway, token) == 401  # read before the token is used again
    assert issuer.fetched == fetched + 1


@pytest.mark.usefixtures("quick")
async def test_the_reads_end_with_the_application(gateway: Gateway, issuer: Issuer) -> None:
    assert await call_status(gateway, of_ec()) == 200
    await gateway.client.close()
    fetched = issuer.fetched
    await asyncio.sleep(0.7)
    assert issuer.fetched == fetched


async def test_requests_at_once_share_a_read(gateway: Gateway, issuer: Issuer) -> None:
    tokens = [signed(EC, "ES256", "ec", sub=f"user-{number}") for number in range(20)]
    statuses = await asyncio.gather(*(call_status(gateway, token) for token in tokens))
    assert statuses == [200] * 20
    assert issuer.fetched == 1


UNUSABLE = [
    pytest.param({"use": "enc"}, id="for encryption"),
    pytest.param({"kid": None}, id="without an id"),
    pytest.param({"kid": 7}, id="an id that is no text"),
    pytest.param({"kty": "oct"}, id="another kind"),
    pytest.param({"x": 7}, id="a coordinate that is no text"),
    pytest.param({"crv": []}, id="a curve that is no text"),
]


@pytest.mark.parametrize("changes", UNUSABLE)
async def test_an_unusable_key_does_not_prevent_the_use_of_others(
    issuer: Issuer, changes: dict[str, object]
) -> None:
    document = {"keys": [7, None, {**issuer.document("ec"), **changes}, issuer.document("rsa")]}
    issuer.response = (200, json.dumps(document))
    keys = JwksClient(issuer.url)
    assert (await keys.find("rsa")).use()
    with pytest.raises(jwt.PyJWKClientError):
        await keys.find("ec")
    keys.close()


async def test_the_first_of_two_keys_with_an_id_is_used(issuer: Issuer) -> None:
    issuer.keys["x"] = OTHER_EC
    second = {**issuer.document("x"), "kid": "ec"}
    document = {"keys": [issuer.document("ec"), second]}
    issuer.response = (200, json.dumps(document))
    keys = JwksClient(issuer.url)
    found = (await keys.find("ec")).jwk.key
    assert isinstance(found, ec.EllipticCurvePublicKey)
    assert found.public_numbers() == EC.public_key().public_numbers()
    keys.close()


async def test_a_closed_client_reads_no_more(issuer: Issuer) -> None:
    keys = JwksClient(issuer.url)
    keys.close()
    with pytest.raises(ProxyError):
        await keys.find("ec")
    assert issuer.fetched == 0
