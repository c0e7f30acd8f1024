"""The client's address behind trusted proxies: in the log, in limits, and for guessed keys."""

from ipaddress import ip_network
from typing import Any

import pytest

from falproxy.errors import SettingsError
from falproxy.middleware.guess_limit import BURST
from falproxy.settings import Settings
from falproxy.trusted_proxies import Network
from tests.support.fake_fal import FakeFal
from tests.support.gateway import Gateway, MakeGateway
from tests.support.urls import RUN

KEYS = (("ann", "ann-s3cret-of-ann"), ("bob", "bob-s3cret-of-bob"))
TRUSTED = (ip_network("127.0.0.0/8"), ip_network("10.0.0.0/8"))
OTHERS = (ip_network("10.0.0.0/8"),)
CLIENT, OTHER = "203.0.113.7", "203.0.113.8"


async def run(gateway: Gateway, forwarded_for: str | None, **headers: str) -> int:
    fields = [*headers.items()]
    if forwarded_for is not None:
        fields.append(("X-Forwarded-For", forwarded_for))
    return (await gateway.call(RUN, json={}, headers=fields)).status


def logged(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [vars(each)["fields"] for each in caplog.records if each.name == "falproxy.calls"]


@pytest.mark.parametrize(
    ("trusted", "client"),
    [
        pytest.param(TRUSTED, CLIENT, id="a trusted peer"),
        pytest.param(OTHERS, "127.0.0.1", id="another peer"),
        pytest.param((), "127.0.0.1", id="no trusted proxies"),
    ],
)
async def test_the_access_log_has_the_address_of_the_client(
    make_gateway: MakeGateway,
    fal: FakeFal,
    caplog: pytest.LogCaptureFixture,
    trusted: tuple[Network, ...],
    client: str,
) -> None:
    gateway = await make_gateway(fal.origin, trusted_proxies=trusted)
    with caplog.at_level("INFO", "falproxy.calls"):
        assert await run(gateway, f"198.51.100.66, {CLIENT}") == 200
        assert await run(gateway, None) == 200
    assert [line["client"] for line in logged(caplog)] == [client, "127.0.0.1"]


async def test_a_refused_call_is_logged_with_its_address_too(
    make_gateway: MakeGateway, fal: FakeFal, caplog: pytest.LogCaptureFixture
) -> None:
    gateway = await make_gateway(fal.origin, trusted_proxies=TRUSTED, access_keys=KEYS)
    with caplog.at_level("INFO", "falproxy"):
        assert await run(gateway, CLIENT, **{"x-falproxy-key": "a-wr0ng-guess"}) == 401
    (line,) = logged(caplog)
    assert line["client"] == CLIENT
    (refused,) = [each for each in caplog.records if "refused" in each.getMessage()]
    assert vars(refused)["fields"]["client"] == CLIENT


async def test_the_access_log_has_the_user(
    make_gateway: MakeGateway, fal: FakeFal, caplog: pytest.LogCaptureFixture
) -> None:
    gateway = await make_gateway(fal.origin, access_keys=KEYS)
    key = {"x-falproxy-key": KEYS[0][1]}
    with caplog.at_level("INFO", "falproxy.calls"):
        assert await run(gateway, None, **key, **{"x-falproxy-user": "eve"}) == 200
        assert await run(gateway, None, **key) == 200
    assert [line.get("user") for line in logged(caplog)] == ["eve", None]


async def test_limits_of_an_open_proxy_count_each_client(
    make_gateway: MakeGateway, fal: FakeFal
) -> None:
    rate = Settings.from_env({"FAL_KEY": "a:b", "FALPROXY_RATE_LIMIT": "2/hour"}).limits.rate
    gateway = await make_gateway(fal.origin, trusted_proxies=TRUSTED, rate=rate)
    assert [await run(gateway, CLIENT) for _ in range(3)] == [200, 200, 429]
    assert await run(gateway, OTHER) == 200
    # A forged address in front of the own one is no new client.
    assert await run(gateway, f"198.51.100.66, {CLIENT}") == 429
    assert await run(gateway, f"10.9.9.9, {CLIENT}") == 429


async def test_without_trust_a_client_cannot_evade_its_limit(
    make_gateway: MakeGateway, fal: FakeFal
) -> None:
    rate = Settings.from_env({"FAL_KEY": "a:b", "FALPROXY_RATE_LIMIT": "2/hour"}).limits.rate
    gateway = await make_gateway(fal.origin, trusted_proxies=OTHERS, rate=rate)
    statuses = [await run(gateway, f"203.0.113.{number}") for number in range(4)]
    assert statuses == [200, 200, 429, 429]


async def test_guesses_count_for_the_client_that_makes_them(
    make_gateway: MakeGateway, fal: FakeFal
) -> None:
    gateway = await make_gateway(fal.origin, trusted_proxies=TRUSTED, access_keys=KEYS)
    wrong, right = {"x-falproxy-key": "a-wr0ng-guess"}, {"x-falproxy-key": KEYS[0][1]}
    for number in range(BURST):
        assert await run(gateway, f"198.51.100.{number}, {CLIENT}", **wrong) == 401
    assert await run(gateway, CLIENT, **right) == 429
    assert await run(gateway, OTHER, **right) == 200


@pytest.mark.parametrize(
    ("trusted", "protocols", "scheme"),
    [
        pytest.param((), ["https"], "https", id="one"),
        pytest.param((), ["HTTPS"], "https", id="upper case"),
        pytest.param((), ["https, http"], "https", id="two proxies"),
        pytest.param((), ["https", "http"], "https", id="two headers"),
        pytest.param((), [" , https"], "https", id="an empty value first"),
        pytest.param((), ["http, https"], "http", id="the client's is the first"),
        pytest.param((), ["javascript"], "http", id="no scheme of the web"),
        pytest.param((), [""], "http", id="empty"),
        pytest.param(TRUSTED, ["https"], "https", id="trusted"),
        pytest.param(OTHERS, ["https"], "http", id="not trusted"),
    ],
)
async def test_urls_have_the_scheme_of_the_client(
    make_gateway: MakeGateway,
    fal: FakeFal,
    trusted: tuple[Network, ...],
    protocols: list[str],
    scheme: str,
) -> None:
    gateway = await make_gateway(fal.origin, trusted_proxies=trusted)
    headers = [("Host", "localhost"), ("Accept-Encoding", "identity")]
    headers += [("X-Forwarded-Proto", each) for each in protocols]
    response = await gateway.client.get("/openapi.json", headers=headers)
    assert (await response.json())["servers"][0]["url"] == f"{scheme}://localhost"


@pytest.mark.parametrize(
    "text", ["0.0.0.0/0", "*", "10.0.0.5/8", "proxy.example.com", "10.0.0.0/8,x"]
)
def test_other_values_of_the_setting_stop_the_start(text: str) -> None:
    with pytest.raises(SettingsError, match="FALPROXY_TRUSTED_PROXIES must be") as caught:
        Settings.from_env({"FAL_KEY": "a:b", "FALPROXY_TRUSTED_PROXIES": text})
    assert text not in str(caught.value).replace("10.0.0.0/8", "")
