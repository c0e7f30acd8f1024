"""Authentication by JWT: valid and invalid tokens, caching, and the JWKS client."""

import asyncio
import hmac
import json
import time
from base64 import urlsafe_b64encode
from collections.abc import Callable
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization

from falproxy.middleware import tokens
from tests.support.fake_fal import FakeFal, WireFal
from tests.support.gateway import Gateway, MakeGateway
from tests.support.jwks_issuer import EC, RSA, SECRET, Issuer, claims, signed
from tests.support.urls import RUN

OTHER = "another-secret-that-is-just-as-long-and-that-is-not-configured-for-this-proxy"


async def call_status(gateway: Gateway, token: str) -> int:
    headers = [("Authorization", f"Bearer {token}")]
    return (await gateway.call(RUN, json={}, headers=headers)).status


@pytest.fixture
async def gateway(make_gateway: MakeGateway, fal: FakeFal) -> Gateway:
    return await make_gateway(fal.origin, jwt_secret=SECRET)


@pytest.mark.parametrize("algorithm", ["HS256", "HS384", "HS512"])
async def test_a_token_signed_with_the_secret_is_valid(gateway: Gateway, algorithm: str) -> None:
    assert await call_status(gateway, signed(algorithm=algorithm)) == 200


async def test_the_subject_of_a_token_is_the_principal(
    gateway: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    await call_status(gateway, signed(sub="user-7"))
    fields = [vars(record)["fields"] for record in caplog.records if "fields" in vars(record)]
    assert fields[-1]["principal"] == "user-7"


async def test_a_401_names_the_credentials_that_the_proxy_accepts(
    make_gateway: MakeGateway, fal: FakeFal
) -> None:
    keys = (("ann", "ann-s3cret"),)
    accepts_tokens = await make_gateway(fal.origin, jwt_secret=SECRET)
    accepts_both = await make_gateway(fal.origin, jwt_secret=SECRET, access_keys=keys)
    expired = signed(exp=time.time() - 60)
    for gateway, has_keys in ((accepts_tokens, False), (accepts_both, True)):
        for token in (None, expired):
            headers = [] if token is None else [("Authorization", f"Bearer {token}")]
            response = await gateway.call(RUN, json={}, headers=headers)
            message = (await response.json())["message"]
            assert "token" in message
            assert ("access key" in message) is has_keys
            challenge = "Bearer" if token is None else 'Bearer error="invalid_token"'
            assert response.headers["WWW-Authenticate"] == challenge
    assert fal.seen == []


def unsigned() -> str:
    return jwt.encode(claims(), "", "none")


BAD: list[Any] = [
    pytest.param(lambda: signed(exp=time.time() - 60), id="expired"),
    pytest.param(lambda: signed(exp=None), id="without an expiry"),
    pytest.param(lambda: signed(nbf=time.time() + 60), id="not valid yet"),
    pytest.param(lambda: signed(sub=None), id="without a subject"),
    pytest.param(lambda: signed(aud="anon"), id="for another audience"),
    pytest.param(lambda: signed(aud=None), id="without an audience"),
    pytest.param(lambda: signed(key=OTHER), id="signed with another secret"),
    pytest.param(unsigned, id="not signed"),
    pytest.param(lambda: signed() + "x", id="changed"),
    pytest.param(lambda: signed().rpartition(".")[0] + ".", id="without a signature"),
    pytest.param(lambda: "a.b.c", id="not a token"),
    pytest.param(lambda: "\u00e9.a.b", id="not ASCII"),
    pytest.param(lambda: signed(sub=""), id="an empty subject"),
    pytest.param(lambda: SECRET, id="the secret itself"),
    pytest.param(lambda: "", id="empty"),
]


@pytest.mark.parametrize("make", BAD)
async def test_an_invalid_token_is_a_401(
    gateway: Gateway, fal: FakeFal, make: Callable[[], str]
) -> None:
    assert await call_status(gateway, make()) == 401
    assert fal.seen == []


@pytest.mark.parametrize(
    ("life", "times"),
    [
        pytest.param(60, 1, id="once until it expires"),
        pytest.param(-5, 5, id="every time within the leeway after its expiry"),
    ],
)
async def test_how_often_a_token_is_verified(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, life: float, times: int
) -> None:
    verified = 0
    true_decode = jwt.decode

    def decode(*args: Any, **options: Any) -> Any:
        nonlocal verified
        verified += 1
        return true_decode(*args, **options)

    monkeypatch.setattr(jwt, "decode", decode)
    token = signed(exp=time.time() + life)
    assert [await call_status(gateway, token) for _ in range(5)] == [200] * 5
    assert verified == times


async def test_keys_and_tokens_work_side_by_side(make_gateway: MakeGateway, fal: FakeFal) -> None:
    gateway = await make_gateway(fal.origin, jwt_secret=SECRET, access_key="s3cret")
    assert [await call_status(gateway, token) for token in (signed(), "s3cret", "x")] == [
        200,
        200,
        401,
    ]


async def test_tokens_signed_with_published_keys_are_valid(
    make_gateway: MakeGateway, fal: FakeFal, issuer: Issuer
) -> None:
    gateway = await make_gateway(fal.origin, jwks_url=f"{issuer.origin}/jwks.json")
    assert await call_status(gateway, signed(RSA, "RS256", "rsa")) == 200
    assert await call_status(gateway, signed(EC, "ES256", "ec")) == 200
    assert issuer.fetched == 1


async def test_unknown_keys_do_not_cause_repeated_fetches(
    make_gateway: MakeGateway, fal: FakeFal, issuer: Issuer
) -> None:
    gateway = await make_gateway(fal.origin, jwks_url=f"{issuer.origin}/jwks.json")
    for number in range(10):
        assert await call_status(gateway, signed(RSA, "RS256", f"unknown-{number}")) == 401
    assert issuer.fetched <= 2


async def test_a_public_key_is_not_used_as_a_secret(
    make_gateway: MakeGateway, fal: FakeFal, issuer: Issuer
) -> None:
    """The known attack: sign with HS256 and the text of the public key as the secret."""
    gateway = await make_gateway(fal.origin, jwks_url=f"{issuer.origin}/jwks.json")
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    published = RSA.public_key().public_bytes(serialization.Encoding.PEM, form)
    parts = [{"alg": "HS256", "typ": "JWT", "kid": "rsa"}, claims()]
    message = ".".join(encode(json.dumps(part).encode()) for part in parts)
    signature = hmac.digest(published, message.encode(), "sha256")
    assert await call_status(gateway, f"{message}.{encode(signature)}") == 401


def encode(raw: bytes) -> str:
    return urlsafe_b64encode(raw).decode().rstrip("=")


@pytest.mark.timed
async def test_a_jwks_url_that_hangs_does_not_block_other_calls(
    make_gateway: MakeGateway, fal: FakeFal, wire: WireFal
) -> None:
    """The client has a thread of its own, and a cooldown after a failure."""

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    wire.serve = hang
    gateway = await make_gateway(
        fal.origin, jwks_url=f"{wire.origin}/jwks.json", access_key="s3cret"
    )
    started = time.monotonic()
    strangers = [
        asyncio.ensure_future(call_status(gateway, signed(RSA, "RS256", str(n)))) for n in range(50)
    ]
    await asyncio.sleep(0.1)
    assert await call_status(gateway, "s3cret") == 200
    await asyncio.get_running_loop().getaddrinfo("localhost", 80)
    assert time.monotonic() - started < 2
    assert {await stranger for stranger in strangers} == {503}
    assert time.monotonic() - started < 10
    assert wire.connections == 1


@pytest.mark.parametrize("body", [b"<html>", b"", b"\xff", b"{}", b"[]"])
async def test_a_jwks_url_without_keys_admits_no_token(
    make_gateway: MakeGateway, fal: FakeFal, wire: WireFal, body: bytes
) -> None:
    wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
    gateway = await make_gateway(fal.origin, jwks_url=f"{wire.origin}/jwks.json")
    assert await call_status(gateway, signed(RSA, "RS256", "rsa")) in (401, 503)
    assert fal.seen == []


async def test_unreadable_keys_are_a_503_and_not_a_401(
    make_gateway: MakeGateway, fal: FakeFal, issuer: Issuer
) -> None:
    for url in ("http://127.0.0.1:9/jwks.json", f"{issuer.origin}/moved"):
        gateway = await make_gateway(fal.origin, jwks_url=url)
        assert await call_status(gateway, signed(RSA, "RS256", "rsa")) == 503
    assert fal.seen == []


@pytest.mark.parametrize(
    "expiry", ["1e999", "NaN", "1" + "0" * 400, "1" + "0" * 5000, "[]", '"x"', "-1"]
)
async def test_an_odd_expiry_is_no_error(gateway: Gateway, expiry: str) -> None:
    payload = json.dumps(claims(exp=7)).replace("7", expiry)
    header = encode(b'{"alg": "HS256"}')
    signing_input = f"{header}.{encode(payload.encode())}"
    signature = hmac.new(SECRET.encode(), signing_input.encode(), "sha256").digest()
    status = await call_status(gateway, f"{signing_input}.{encode(signature)}")
    assert status == (200 if expiry == "1" + "0" * 400 else 401)


async def test_an_expiry_as_text_is_no_error(gateway: Gateway) -> None:
    """PyJWT accepts it, and so do the cache and the fast path."""
    assert await call_status(gateway, signed(exp=str(int(time.time()) + 60))) == 200


async def test_the_cache_of_tokens_is_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "CACHE_BYTES", 100_000)
    verifier = tokens.JwtVerifier(SECRET, None, "authenticated")
    for number in range(20):
        assert await verifier.subject(signed(sub="a" * 15_000 + str(number)))
    assert len(verifier._verified) <= 3
    assert await verifier.subject(signed(sub="a" * 150_000))
    assert await verifier.subject(signed(sub="ann")) == "ann"
