"""Names that nobody had before."""

from falproxy.ids import Names, dated, new_name


def test_no_two_are_the_same() -> None:
    names = Names()
    drawn = [names.next() for _ in range(2000)] + [new_name() for _ in range(2000)]
    assert len(set(drawn)) == 4000
    assert all(len(name) == 32 and int(name, 16) >= 0 for name in drawn)


def test_those_of_a_later_time_sort_behind() -> None:
    names = Names()
    at = 1_800_000_000.0
    made = [dated(names.next(), at + number / 1e5) for number in range(500)]
    assert made == sorted(made)
    assert {len(name) for name in made} == {32}
    assert dated(names.next(), at) != dated(names.next(), at)
