"""The limit for guesses of access keys, by address and through the whole proxy."""

import logging

import pytest

from falproxy.middleware.guess_limit import (
    ADDRESSES_MAX,
    BURST,
    SECONDS_PER_GUESS,
    GuessLimit,
    network_of,
)
from tests.support.fake_clock import FakeClock
from tests.support.fake_fal import FakeFal
from tests.support.gateway import Gateway, MakeGateway
from tests.support.urls import RUN

KEYS = (("ann", "ann-s3cret-of-ann"), ("bob", "bob-s3cret-of-bob"))
ANN, BOB = [("x-falproxy-key", "ann-s3cret-of-ann")], [("x-falproxy-key", "bob-s3cret-of-bob")]
WRONG = [("x-falproxy-key", "a-wr0ng-guess")]
ADDRESS = "203.0.113.7"


def exhausted(clock: FakeClock) -> GuessLimit:
    limit = GuessLimit(clock)
    for _ in range(BURST):
        assert limit.seconds_to_wait(ADDRESS) == 0
        limit.record_refusal(ADDRESS)
    return limit


def test_an_address_has_a_number_of_guesses_and_then_one_in_a_time() -> None:
    clock = FakeClock()
    limit = exhausted(clock)
    assert limit.seconds_to_wait(ADDRESS) == SECONDS_PER_GUESS
    clock.now += SECONDS_PER_GUESS - 1
    assert limit.seconds_to_wait(ADDRESS) == 1
    clock.now += 1
    assert limit.seconds_to_wait(ADDRESS) == 0
    limit.record_refusal(ADDRESS)
    assert limit.seconds_to_wait(ADDRESS) == SECONDS_PER_GUESS
    clock.now += 1000 * SECONDS_PER_GUESS
    for _ in range(BURST):
        limit.record_refusal(ADDRESS)
    assert limit.seconds_to_wait(ADDRESS) == SECONDS_PER_GUESS


def test_other_addresses_are_not_affected() -> None:
    limit = exhausted(FakeClock())
    assert limit.seconds_to_wait("203.0.113.8") == 0


def test_memory_is_bounded() -> None:
    limit = GuessLimit(FakeClock())
    for number in range(ADDRESSES_MAX + 100):
        limit.record_refusal(f"address-{number}")
        limit.record_success(f"address-{number}", "ann")
    assert repr(limit) == f"<GuessLimit {ADDRESSES_MAX} addresses>"


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("203.0.113.7", "203.0.113.7"),
        ("::ffff:203.0.113.7", "203.0.113.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::9", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::9", "2001:db8:1:3::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
    ],
)
def test_ipv6_addresses_count_by_their_network(address: str, network: str) -> None:
    assert network_of(address) == network


@pytest.fixture
async def locked(make_gateway: MakeGateway, fal: FakeFal) -> Gateway:
    return await make_gateway(fal.origin, access_keys=KEYS)


async def status(gateway: Gateway, headers: list[tuple[str, str]]) -> int:
    return (await gateway.call(RUN, json={}, headers=headers)).status


async def test_a_refused_key_leaves_the_client_s_address_in_the_log(
    locked: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    assert await status(locked, WRONG) == 401
    (record,) = [record for record in caplog.records if "refused" in record.getMessage()]
    assert record.levelno == logging.WARNING
    fields = record.fields  # type: ignore[attr-defined]
    assert fields["client"] == "127.0.0.1"
    assert fields["request_id"]
    assert "a-wr0ng-guess" not in caplog.text + str(fields)


async def test_too_many_wrong_keys_are_a_429(locked: Gateway, fal: FakeFal) -> None:
    assert await status(locked, ANN) != 401
    seen = len(fal.seen)
    assert [await status(locked, WRONG) for _ in range(BURST)] == [401] * BURST
    response = await locked.call(RUN, json={}, headers=WRONG)
    assert (response.status, (await response.json())["type"]) == (429, "too_many_attempts")
    assert 0 < int(response.headers["Retry-After"]) <= SECONDS_PER_GUESS
    # A right key is not confirmed either, unless it was used from this address before.
    assert await status(locked, BOB) == 429
    assert len(fal.seen) == seen
    assert await status(locked, ANN) not in (401, 429)
    # A request without a key is no guess.
    assert await status(locked, []) == 401


@pytest.mark.parametrize("path", ["/v1/models", "/api/usage", "/metrics", "/api/fal/rest/x"])
async def test_the_limit_holds_for_all_paths_together(locked: Gateway, path: str) -> None:
    for _ in range(BURST):
        await status(locked, WRONG)
    response = await locked.client.get(path, headers=dict(WRONG))
    assert response.status == 429
    assert "Retry-After" in response.headers


async def test_tokens_do_not_count(make_gateway: MakeGateway, fal: FakeFal) -> None:
    """Clients repeat a token that has expired."""
    gateway = await make_gateway(fal.origin, access_keys=KEYS, jwt_secret="s" * 32)
    for _ in range(BURST + 5):
        assert await status(gateway, [("Authorization", "Bearer a.b.c")]) == 401
