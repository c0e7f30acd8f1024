"""The storing of inputs: bounds, decisions and failures."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from falproxy.media.fetch import Fetcher
from falproxy.stores.files.inputs import CALLS_MAX, InputStore
from falproxy.stores.files.rehosting import SIZE_MAX, Rehoster
from tests.support.image_hosts import uri
from tests.support.rehosting import (
    Cdn,
    FaultyDiskStorage,
    RequestGate,
    announce_length,
    name_of,
    png,
)
from tests.support.storages import files_in
from tests.support.waiting import wait_until

TIMEOUT = 5.0  # seconds; of `wait_until`

LARGE = png() + bytes(300_000)  # beyond what a spool holds in memory

OpenInputs = Callable[..., InputStore]


@pytest.fixture
def storage(tmp_path: Path) -> FaultyDiskStorage:
    return FaultyDiskStorage(tmp_path, lambda: "https://a.example")


@pytest.fixture
def open_inputs(storage: FaultyDiskStorage, fetcher: Fetcher) -> OpenInputs:
    def make(**options: float) -> InputStore:
        rehoster = Rehoster(storage, fetcher)
        return InputStore(rehoster, fetcher, **({"backoff": 0.01} | options))  # type: ignore[arg-type] # by name

    return make


@pytest.fixture
async def inputs(open_inputs: OpenInputs) -> AsyncIterator[InputStore]:
    inputs = open_inputs()
    yield inputs
    await inputs.close(0)


def names(folder: Path) -> set[str]:
    return {path.name for path in files_in(folder)}


async def test_inputs_are_stored_once_they_are_accepted(inputs: InputStore, tmp_path: Path) -> None:
    accepted, refused = inputs.start([uri(png(1))]), inputs.start([uri(png(2))])
    refused.decide(False)
    assert names(tmp_path) == set()
    accepted.decide(True)
    accepted.decide(False)  # too late
    await wait_until(lambda: names(tmp_path) == {name_of(png(1))}, seconds=TIMEOUT)
    await inputs.close(1)
    assert names(tmp_path) == {name_of(png(1))}


async def test_a_failure_of_the_decision_is_a_refusal(
    inputs: InputStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail() -> bool:
        raise TimeoutError

    pending = inputs.start([uri(png())])
    inputs.decide_by(pending, fail())
    await wait_until(lambda: pending.is_decided, seconds=TIMEOUT)
    await inputs.close(1)
    assert "1 inputs were not stored: the result is not known" in caplog.text
    assert names(tmp_path) == set()


async def test_a_storage_that_is_down_gets_a_file_later(
    inputs: InputStore, storage: FaultyDiskStorage, tmp_path: Path
) -> None:
    storage.error = "The disk is away."
    inputs.start([uri(png())]).decide(True)
    await wait_until(lambda: len(storage.puts) > 2, seconds=TIMEOUT)
    storage.error = None
    await wait_until(lambda: names(tmp_path) == {name_of(png())}, seconds=TIMEOUT)


async def test_the_number_of_waiting_calls_is_bounded(
    inputs: InputStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    waiting = [inputs.start([uri(png(1))]) for _ in range(CALLS_MAX)]
    further = inputs.start([uri(png(2))])
    assert further.is_decided
    assert "1 inputs are not stored: too many calls are running" in caplog.text
    for pending in waiting:
        pending.decide(False)
    await wait_until(lambda: inputs.start([]).is_decided is False, seconds=TIMEOUT)
    inputs.start([uri(png(3))]).decide(True)
    await wait_until(lambda: names(tmp_path) == {name_of(png(3))}, seconds=TIMEOUT)


@pytest.mark.parametrize(
    ("options", "content"),
    [
        pytest.param({"memory_max": 1000}, png() + bytes(600), id="in memory"),
        pytest.param({"disk_max": 500_000, "memory_max": 2**20}, LARGE, id="on the disk"),
    ],
)
async def test_the_bytes_of_waiting_inputs_are_bounded(
    open_inputs: OpenInputs,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    options: dict[str, int],
    content: bytes,
) -> None:
    inputs = open_inputs(**options)
    first = inputs.start([uri(content)])
    left = min(options.values()) - len(content)
    await wait_until(lambda: f"{left} bytes left" in repr(inputs), seconds=TIMEOUT)
    inputs.start([uri(content + b"2")]).decide(True)  # given up before the first is decided about
    await wait_until(lambda: "holds as many large bodies" in caplog.text, seconds=TIMEOUT)
    assert not names(tmp_path)
    first.decide(True)
    await wait_until(lambda: repr(inputs).startswith("<InputStore 0 calls"), seconds=TIMEOUT)
    assert len(names(tmp_path)) == 1
    assert "holds as many large bodies as it can" in caplog.text
    inputs.start([uri(content + b"3")]).decide(True)  # nothing waits any more
    await wait_until(lambda: len(names(tmp_path)) == 2, seconds=TIMEOUT)
    await inputs.close(1)


async def test_a_file_that_is_too_large_is_not_read(
    inputs: InputStore, cdn: Cdn, caplog: pytest.LogCaptureFixture
) -> None:
    url = cdn.serve_at("/large.png", announce_length(SIZE_MAX + 1))
    inputs.start([url]).decide(True)
    await wait_until(
        lambda: "An input was not stored: The file of the URL has more" in caplog.text,
        seconds=TIMEOUT,
    )


async def test_one_failure_does_not_affect_the_other_inputs(
    inputs: InputStore, cdn: Cdn, tmp_path: Path
) -> None:
    urls = [cdn.origin + "/missing.png", cdn.put("/a.png", png(1)), "data:image/png;base64,!"]
    inputs.start([*urls, uri(png(2))]).decide(True)
    await wait_until(lambda: names(tmp_path) == {name_of(png(1)), name_of(png(2))}, seconds=TIMEOUT)


async def test_refused_inputs_are_not_read_on(inputs: InputStore, cdn: Cdn) -> None:
    gate = RequestGate()
    pending = inputs.start([cdn.serve_at("/slow.png", gate.serve)])
    await wait_until(lambda: gate.waiting, seconds=TIMEOUT)
    pending.decide(False)
    await wait_until(lambda: not gate.waiting, seconds=TIMEOUT)


async def test_an_equal_file_is_stored_once_within_an_hour(
    inputs: InputStore, storage: FaultyDiskStorage
) -> None:
    for _ in range(3):
        inputs.start([uri(png())]).decide(True)
        await wait_until(lambda: storage.puts, seconds=TIMEOUT)
        await wait_until(lambda: repr(inputs).startswith("<InputStore 0 calls"), seconds=TIMEOUT)
    assert len(storage.puts) == 1


async def test_the_close_waits_for_what_can_be_stored(
    inputs: InputStore, storage: FaultyDiskStorage, tmp_path: Path
) -> None:
    storage.gate.opened.clear()
    inputs.start([uri(png())]).decide(True)
    await wait_until(lambda: storage.gate.waiting, seconds=TIMEOUT)
    closing = asyncio.create_task(inputs.close(5))
    await asyncio.sleep(0)
    storage.gate.opened.set()
    await closing
    assert names(tmp_path) == {name_of(png())}
