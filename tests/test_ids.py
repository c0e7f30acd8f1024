"""Random ids, and ids that sort by time."""

from falproxy.ids import IdGenerator, new_id, time_ordered_id


def test_ids_are_unique() -> None:
    names = IdGenerator()
    drawn = [names.next_id() for _ in range(2000)] + [new_id() for _ in range(2000)]
    assert len(set(drawn)) == 4000
    assert all(len(name) == 32 and int(name, 16) >= 0 for name in drawn)


def test_ids_sort_by_time() -> None:
    names = IdGenerator()
    at = 1_800_000_000.0
    made = [time_ordered_id(names.next_id(), at + number / 1e5) for number in range(500)]
    assert made == sorted(made)
    assert {len(name) for name in made} == {32}
    assert time_ordered_id(names.next_id(), at) != time_ordered_id(names.next_id(), at)
