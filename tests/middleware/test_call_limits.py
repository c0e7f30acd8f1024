"""Which limits hold for a call, and under which names they count."""

from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from falproxy.limit_settings import CallerLimits, LimitSettings
from falproxy.middleware.call_limits import limits_of, refusal
from falproxy.proxy.call import CALLER_LIMITS, OWNER, USER
from falproxy.stores.limits import LimitState
from falproxy.windows import DAY, Window

MINUTE = Window(60)
ALL = LimitSettings(
    rate=(60, MINUTE),
    concurrency=8,
    budget=(5_000_000, Window(DAY)),
    user_rate=(6, MINUTE),
    user_concurrency=2,
    user_budget=(1_000_000, Window(DAY)),
    total_budget=(9_000_000, Window(None)),
)


class Transport:
    """A connection from an address."""

    def __init__(self, address: str) -> None:
        self._address = address

    def get_extra_info(self, name: str, default: object = None) -> object:
        return (self._address, 1) if name == "peername" else default


def subjects(settings: LimitSettings, address: str = "192.0.2.1", **keys: Any) -> dict[str, int]:
    """Return the maximum of each limit, by kind and subject."""
    request = make_mocked_request("POST", "/", app=web.Application(), transport=Transport(address))
    for name, key in (("owner", OWNER), ("user", USER), ("caller_limits", CALLER_LIMITS)):
        if (value := keys.get(name)) is not None:
            request[key] = value
    limits = [own.limit for own in limits_of(request, settings)]
    return {f"{limit.kind} {limit.subject}": limit.maximum for limit in limits}


def test_without_settings_nothing_is_limited() -> None:
    assert subjects(LimitSettings(), owner="key:web", user="ann") == {}


def test_a_caller_its_user_and_all_callers_are_limited() -> None:
    assert subjects(ALL, owner="key:web", user="ann") == {
        "rate principal:key%3Aweb": 60,
        "concurrency principal:key%3Aweb": 8,
        "budget principal:key%3Aweb": 5_000_000,
        "rate user:key%3Aweb:ann": 6,
        "concurrency user:key%3Aweb:ann": 2,
        "budget user:key%3Aweb:ann": 1_000_000,
        "budget total:": 9_000_000,
    }


def test_a_key_s_own_limits_replace_the_settings_of_its_caller_only() -> None:
    own = CallerLimits(rate=(1, MINUTE), budget=(0, MINUTE))
    limits = subjects(ALL, owner="key:web", user="ann", caller_limits=own)
    assert limits["rate principal:key%3Aweb"] == 1
    assert limits["concurrency principal:key%3Aweb"] == 8
    assert limits["budget principal:key%3Aweb"] == 0
    assert limits["budget user:key%3Aweb:ann"] == 1_000_000
    only_own = subjects(LimitSettings(), owner="key:web", caller_limits=own)
    assert only_own == {"rate principal:key%3Aweb": 1, "budget principal:key%3Aweb": 0}


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        pytest.param("192.0.2.1", "192.0.2.2", False, id="two addresses"),
        pytest.param("2001:db8::1", "2001:db8::2", True, id="one IPv6 network"),
        pytest.param("2001:db8::1", "2001:db8:0:1::1", False, id="two IPv6 networks"),
        pytest.param("::ffff:192.0.2.1", "192.0.2.1", True, id="IPv4 in IPv6"),
    ],
)
def test_an_open_proxy_counts_by_address(one: str, other: str, is_same: bool) -> None:
    assert (subjects(ALL, address=one) == subjects(ALL, address=other)) is is_same


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param(("a", "b:c"), ("a:b", "c"), id="a colon"),
        pytest.param(("a", "b\nc"), ("a", "b\n"), id="a line end"),
        pytest.param(("a", "x" * 500), ("a", "x" * 501), id="long names"),
        pytest.param(("a", "é"), ("a", "%C3%A9"), id="an escape"),
        pytest.param(("a", "\ud800"), ("a", "?"), id="half a surrogate pair"),
    ],
)
def test_names_of_users_cannot_be_confused(one: tuple[str, str], other: tuple[str, str]) -> None:
    names = [subjects(ALL, owner=owner, user=user) for owner, user in (one, other)]
    users = [{name for name in limits if "user:" in name} for limits in names]
    assert not users[0] & users[1]
    assert all("\n" not in name and len(name) < 500 for name in users[0] | users[1])


def test_the_wait_is_at_least_a_second() -> None:
    request = make_mocked_request(
        "POST", "/", app=web.Application(), transport=Transport("192.0.2.1")
    )
    for own in limits_of(request, ALL):
        error = refusal(own, LimitState(9, 0.0), 1)
        assert int(error.headers["Retry-After"]) == 1
        assert error.message.endswith((".", "wait."))
