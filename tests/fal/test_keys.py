"""fal keys that take turns."""

import pytest

from falproxy.fal.keys import COOLDOWN_SECONDS, FalKey, KeyPool
from tests.support.fake_clock import FakeClock


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def positions(ring: KeyPool, count: int) -> list[int]:
    return [ring.next_key().position for _ in range(count)]


def test_keys_rotate(clock: FakeClock) -> None:
    assert positions(KeyPool(["a", "b", "c"], clock), 7) == [1, 2, 3, 1, 2, 3, 1]


def test_a_refused_key_is_skipped_during_its_cooldown(clock: FakeClock) -> None:
    ring = KeyPool(["a", "b", "c"], clock)
    assert ring.start_cooldown(key_at(ring, 2))
    assert positions(ring, 4) == [3, 1, 3, 1]
    clock.now += COOLDOWN_SECONDS
    assert set(positions(ring, 3)) == {1, 2, 3}


def test_a_cooldown_starts_once(clock: FakeClock) -> None:
    ring = KeyPool(["a", "b"], clock)
    key = ring.next_key()
    assert [ring.start_cooldown(key) for _ in range(3)] == [True, False, False]


def test_with_all_keys_in_cooldown_the_first_to_end_is_used(clock: FakeClock) -> None:
    ring = KeyPool(["a", "b"], clock)
    ring.start_cooldown(key_at(ring, 2))
    clock.now += 1
    ring.start_cooldown(key_at(ring, 1))
    assert positions(ring, 3) == [2, 2, 2]


def test_a_key_is_found_by_its_fingerprint_at_any_position(clock: FakeClock) -> None:
    mark = key_at(KeyPool(["a", "b"], clock), 2).fingerprint
    found = KeyPool(["b", "c", "a"], clock).find(mark)
    assert found is not None
    assert (found.position, found.authorization) == (1, "Key b")
    assert KeyPool(["a"], clock).find(mark) is None


def test_a_key_is_not_in_its_repr(clock: FakeClock) -> None:
    assert "s3cret" not in repr(KeyPool(["id:s3cret"], clock).next_key())


def key_at(ring: KeyPool, position: int) -> FalKey:
    while (key := ring.next_key()).position != position:
        pass
    return key
