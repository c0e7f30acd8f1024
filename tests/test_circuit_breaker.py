"""CircuitBreaker: closed, open, and one probe after each cooldown."""

from falproxy.circuit_breaker import CircuitBreaker
from tests.support.fake_clock import FakeClock


def test_requests_are_allowed_until_it_trips() -> None:
    breaker = CircuitBreaker(30.0, FakeClock(100.0))
    assert repr(breaker) == "<CircuitBreaker closed>"
    assert [breaker.allow_request() for _ in range(3)] == [True, True, True]
    breaker.trip()
    assert not breaker.is_closed
    assert not breaker.allow_request()


def test_one_caller_probes_after_each_cooldown() -> None:
    clock = FakeClock(100.0)
    breaker = CircuitBreaker(30.0, clock)
    breaker.trip()
    for _ in range(2):
        clock.now += 29.9
        assert not breaker.allow_request()
        clock.now += 0.1
        assert [breaker.allow_request() for _ in range(3)] == [True, False, False]


def test_a_success_closes_it() -> None:
    clock = FakeClock(100.0)
    breaker = CircuitBreaker(30.0, clock)
    breaker.trip()
    clock.now += 30
    assert breaker.allow_request()
    breaker.reset()
    assert breaker.is_closed
    assert breaker.allow_request()


def test_reading_the_state_does_not_use_up_the_probe() -> None:
    clock = FakeClock(100.0)
    breaker = CircuitBreaker(30.0, clock)
    breaker.trip()
    clock.now += 30
    assert repr(breaker) == "<CircuitBreaker open, probe in 0.0 s>"
    assert not breaker.is_closed
    assert breaker.allow_request()
