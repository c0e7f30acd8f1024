"""Re-hosting in real processes: after any kill or failure, every file under its final name is
complete, and a repeated request returns it."""

import asyncio
import fcntl
import hashlib
import os
import re
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
    suppress,
)
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest
from aiohttp import ClientError, ClientSession, web
from multidict import CIMultiDictProxy

from falproxy.middleware.rehost import REHOST_HEADER
from falproxy.stores.files.disk import INCOMING, LOCK
from falproxy.stores.files.rehosting import SIZE_MAX
from tests.support.cache_processes import serving
from tests.support.cli_process import CliProcess, run_command
from tests.support.fake_fal import FakeFal
from tests.support.fake_supabase import FakeSupabase
from tests.support.fake_supabase.apart import fake_apart
from tests.support.fake_supabase.errors import DATABASE_BUSY, NO_JWT, TOO_LARGE, ErrorKind
from tests.support.fake_supabase.faults import (
    Fault,
    Handler,
    close_connection,
    delay,
    fail_with,
    hang,
    lose_response,
    respond,
)
from tests.support.fake_supabase.store import Bucket
from tests.support.gateway import MakeGateway
from tests.support.key_search import CANARY, leak_trace
from tests.support.rehost_process import MP4, PNG, fal_apart, name_of, result_url
from tests.support.urls import PROXY
from tests.support.waiting import wait_until

BUCKET = "fal_images"
# Rounds of a process that is killed at some moment, for each storage.
ROUNDS = int(os.environ.get("ROUNDS", "3"))
SEED = 5
IMAGE, VIDEO = PNG + Random(1).randbytes(300_000), MP4 + Random(2).randbytes(8 * 2**20)
LONG_VIDEO = VIDEO * 4  # some hundredths of a second to write
TIMEOUT = 20.0  # seconds


# ---- fal, its files, and the stored ones


@dataclass(slots=True)
class Gate:
    """A point at which callers wait.

    reached: set when a caller waits.
    opened: set to let callers continue.
    """

    reached: asyncio.Event = field(default_factory=asyncio.Event)
    opened: asyncio.Event = field(default_factory=asyncio.Event)

    async def pass_through(self) -> None:
        self.reached.set()
        await self.opened.wait()


@dataclass(slots=True)
class Source:
    """The handler of a fake fal with finished requests.

    results: files by name, by request id.
    gates: by file name; readers wait there in the middle of the file.
    """

    fal: FakeFal
    results: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gates: dict[str, Gate] = field(default_factory=dict)

    def add(self, **files: bytes) -> str:
        """Add a finished request whose result names some files, and return its URL."""
        request_id = f"7e2f0b8a-0001-4000-8000-{len(self.results):012}"
        self.results[request_id] = files
        return f"https://queue.fal.run/fal-ai/flux/requests/{request_id}"

    def urls(self, target: str) -> list[str]:
        """Return fal's URLs of the files of a result."""
        request_id = target.rpartition("/")[2]
        return [f"{self.fal.origin}/files/{request_id}/{name}" for name in self.results[request_id]]

    def reads(self) -> int:
        """Return the number of requested files."""
        return sum(seen.target.startswith("/files/") for seen in self.fal.seen)

    @contextmanager
    def gate(self, name: str) -> Iterator[Gate]:
        """Make all readers of the file wait in its middle."""
        gate = self.gates[name] = Gate()
        try:
            yield gate
        finally:
            del self.gates[name]
            gate.opened.set()

    async def respond(self, request: web.Request) -> web.StreamResponse:
        _, first, *_, last = request.path.split("/")
        if first == "files":
            request_id = request.path.split("/")[2]
            return await self._send(request, last, self.results[request_id][last])
        files = [{"url": url, "width": 512} for url in self.urls(request.path)]
        return web.json_response({"files": files})

    async def _send(self, request: web.Request, name: str, content: bytes) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": str(len(content))})
        await response.prepare(request)
        half = len(content) // 2
        await response.write(content[:half])
        if name in self.gates:
            await self.gates[name].pass_through()
        await response.write(content[half:])
        await response.write_eof()
        return response


@pytest.fixture
def source(fal: FakeFal) -> Source:
    source = Source(fal)
    fal.respond = source.respond
    return source


@pytest.fixture
async def supabase() -> AsyncIterator[FakeSupabase]:
    async with FakeSupabase() as fake:
        yield fake


@pytest.fixture
async def client() -> AsyncIterator[ClientSession]:
    async with ClientSession(trace_configs=[leak_trace()]) as session:
        yield session


@dataclass(frozen=True, slots=True)
class ProxyResponse:
    status: int
    document: Any
    headers: CIMultiDictProxy[str]
    seconds: float

    @property
    def urls(self) -> list[str]:
        return [file["url"] for file in self.document["files"]]

    @property
    def rehost_status(self) -> str:
        return self.headers.get(REHOST_HEADER, "")


async def get(session: ClientSession, origin: str, target: str) -> ProxyResponse:
    """Return the result of a request through a proxy."""
    started = time.monotonic()
    headers = {"x-fal-target-url": target}
    async with session.get(origin + PROXY, headers=headers) as response:
        document = await response.json()
        seconds = time.monotonic() - started
        return ProxyResponse(response.status, document, response.headers, seconds)


async def read(session: ClientSession, url: str) -> bytes:
    async with session.get(url, raise_for_status=True) as response:
        return await response.read()


@dataclass(slots=True)
class World:
    """A proxy process that re-hosts outputs, and its client.

    supabase: the storage, unless it is the disk.
    """

    source: Source
    session: ClientSession
    folder: Path
    env: dict[str, str]
    supabase: FakeSupabase | None = None
    proxy: CliProcess = field(init=False)
    stack: AsyncExitStack = field(default_factory=AsyncExitStack)

    @property
    def files(self) -> Path:
        return self.folder / ".falproxy" / "files"

    async def start(self) -> None:
        """Start a new process after the end of the previous one."""
        origin = self.source.fal.origin
        env = {"FAL_KEY": CANARY, "FALPROXY_UPSTREAM_ORIGIN": origin, "CWD": str(self.folder)}
        context = run_command("serve", **env, **self.env)
        self.proxy = await self.stack.enter_async_context(context)

    async def get(self, target: str) -> ProxyResponse:
        return await get(self.session, self.proxy.origin, target)

    def kept(self) -> dict[str, bytes]:
        """Return the stored files by name."""
        if self.supabase is not None:
            bucket = self.supabase.buckets.get(BUCKET)
            return {name: one.content for name, one in bucket.objects.items()} if bucket else {}
        return {path.name: path.read_bytes() for path in self.files.glob("??/??/*")}

    async def check_stored(self) -> None:
        """Check that every file matches its name, and that temporary files are not served."""
        for name, content in self.kept().items():
            assert hashlib.sha256(content).hexdigest() == name.partition(".")[0]
        for path in self.files.rglob("*"):
            if path.is_file() and path.parent.name == INCOMING:
                for name in (path.name, f"{INCOMING}/{path.name}"):
                    async with self.session.get(f"{self.proxy.origin}/files/{name}") as response:
                        assert response.status == 404

    async def check_response(self, response: ProxyResponse, *contents: bytes) -> None:
        """Check that the files are stored at the URLs of the response."""
        assert (response.status, response.rehost_status) == (200, f"stored; count={len(contents)}")
        assert not any(url.startswith(self.source.fal.origin) for url in response.urls)
        assert [await read(self.session, url) for url in response.urls] == list(contents)


MakeWorld = Callable[..., AbstractAsyncContextManager[World]]


@pytest.fixture
def on(source: Source, supabase: FakeSupabase, client: ClientSession, tmp_path: Path) -> MakeWorld:
    """Start a world with a storage: "disk", "supabase", or "signed"."""

    @asynccontextmanager
    async def make(storage: str, **env: str) -> AsyncIterator[World]:
        fake = None if storage == "disk" else supabase
        if fake is None:
            env |= {"FALPROXY_REHOST": "disk"}
        else:
            env |= {"SUPABASE_URL": fake.url, "SUPABASE_KEY": fake.service_key}
        if storage == "signed":
            env |= {"SUPABASE_SIGNED_URLS": "60"}
        world = World(source, client, tmp_path, env, fake)
        async with world.stack:
            await world.start()
            yield world

    return make


STORAGES = pytest.mark.parametrize("storage", ["disk", "supabase"])


# ---- Points at which a process is stopped


Reach = Callable[[], Awaitable[object]]
# Context managers entered before the files are requested. Each yields a function that returns once
# the process has reached the point, where it stays until the end.
Step = Callable[[World], AbstractAsyncContextManager[Reach]]


@asynccontextmanager
async def downloading(world: World) -> AsyncIterator[Reach]:
    with world.source.gate("video") as gate:
        yield gate.reached.wait


@asynccontextmanager
async def another_downloading(world: World) -> AsyncIterator[Reach]:
    """Wait until the first file is stored and the response waits for the second."""

    async def reach() -> None:
        await gate.reached.wait()
        await wait_until(lambda: len(world.kept()) == 1, seconds=TIMEOUT)

    with world.source.gate("image") as gate:
        yield reach


@asynccontextmanager
async def before_it_writes(world: World) -> AsyncIterator[Reach]:
    async def reach() -> None:
        await wait_until((world.files / INCOMING).exists, seconds=TIMEOUT)

    with lock(world):
        yield reach


@asynccontextmanager
async def while_it_writes(world: World) -> AsyncIterator[Reach]:
    async def reach() -> None:
        await first_bytes(world)
        world.proxy.process.send_signal(signal.SIGSTOP)
        assert world.kept() == {}

    yield reach
    with suppress(ProcessLookupError):
        world.proxy.process.send_signal(signal.SIGCONT)


@asynccontextmanager
async def before_it_has_a_name(world: World) -> AsyncIterator[Reach]:
    """Wait until the file is on the disk and the rename waits for the lock."""
    with FolderLock(world) as held:

        async def reach() -> None:
            await first_bytes(world)
            held.take()
            await wait_until(lambda: incoming(world) == [len(LONG_VIDEO)], seconds=TIMEOUT)
            assert world.kept() == {}

        yield reach


class FolderLock:
    """The lock of the folder."""

    def __init__(self, world: World) -> None:
        world.files.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(world.files / LOCK, os.O_RDWR | os.O_CREAT, 0o600)

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._descriptor)

    def take(self) -> None:
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)


@contextmanager
def lock(world: World) -> Iterator[None]:
    with FolderLock(world) as held:
        held.take()
        yield


def incoming(world: World) -> list[int]:
    """Return the sizes of the temporary files."""
    with suppress(FileNotFoundError):
        return [file.stat().st_size for file in os.scandir(world.files / INCOMING)]
    return []


async def first_bytes(world: World) -> None:
    """Wait until bytes of a temporary file are written. Polls without a pause."""

    def poll() -> None:
        deadline = time.monotonic() + TIMEOUT
        while not any(incoming(world)):
            assert time.monotonic() < deadline

    await asyncio.to_thread(poll)


def at(method: str, path: str, *, is_done: bool = False) -> Step:
    """Hold Supabase's response to a request. is_done: after Supabase has executed the request."""

    @asynccontextmanager
    async def step(world: World) -> AsyncIterator[Reach]:
        gate = Gate()

        async def fault(request: web.Request, handler: Handler) -> web.StreamResponse:
            if not is_done:
                await gate.pass_through()
            response = await handler(request)
            if is_done:
                await gate.pass_through()
            return response

        assert world.supabase is not None
        world.supabase.fail(fault, method=method, path=path)
        yield gate.reached.wait
        gate.opened.set()
        world.supabase.clear_faults()

    return step


STEPS = (
    pytest.param("disk", downloading, id="disk: while it downloads"),
    pytest.param("disk", before_it_writes, id="disk: before it writes"),
    pytest.param("disk", while_it_writes, id="disk: while it writes"),
    pytest.param("disk", before_it_has_a_name, id="disk: written, without a name"),
    pytest.param("disk", another_downloading, id="disk: stored, no response yet"),
    pytest.param("supabase", downloading, id="supabase: while it downloads"),
    pytest.param("supabase", at("GET", "/bucket"), id="supabase: requests the bucket"),
    pytest.param("supabase", at("POST", "/bucket"), id="supabase: creates the bucket"),
    pytest.param(
        "supabase", at("POST", "/bucket", is_done=True), id="supabase: has created the bucket"
    ),
    pytest.param("supabase", at("POST", f"/object/{BUCKET}"), id="supabase: while it uploads"),
    pytest.param(
        "supabase",
        at("POST", f"/object/{BUCKET}", is_done=True),
        id="supabase: uploaded, response not received",
    ),
    pytest.param("signed", at("POST", "/object/sign"), id="supabase: uploaded, not signed"),
    pytest.param("supabase", another_downloading, id="supabase: stored, no response yet"),
)


def request_result(world: World, step: Step) -> tuple[str, tuple[bytes, ...]]:
    """Return a result and its files."""
    if step is another_downloading:
        return world.source.add(video=VIDEO, image=IMAGE), (VIDEO, IMAGE)
    if step in (while_it_writes, before_it_has_a_name):
        return world.source.add(video=LONG_VIDEO), (LONG_VIDEO,)
    return world.source.add(video=VIDEO), (VIDEO,)


# ---- A process that is killed


@pytest.mark.parametrize(("storage", "step"), STEPS)
async def test_after_a_kill_no_file_is_wrong_and_a_repeated_call_gets_it(
    on: MakeWorld, storage: str, step: Step
) -> None:
    async with on(storage) as world, asyncio.timeout(2 * TIMEOUT):
        target, contents = request_result(world, step)
        async with step(world) as reached:
            call = asyncio.ensure_future(world.get(target))
            await reached()
            assert not call.done()
            world.proxy.process.kill()
            await world.proxy.process.wait()
            with pytest.raises(ClientError):
                await call
        await world.start()
        await world.check_stored()
        await world.check_response(await world.get(target), *contents)
        assert sorted(world.kept().values()) == sorted(contents)
        await world.check_stored()


@STORAGES
async def test_a_kill_at_any_moment_leaves_no_wrong_file(on: MakeWorld, storage: str) -> None:
    chance = Random(SEED)
    made: list[bytes] = []

    def some_files() -> tuple[bytes, bytes]:
        made.append(PNG + chance.randbytes(100_000))
        made.append(MP4 + chance.randbytes(8 * 2**20))
        return made[-2], made[-1]

    async with on(storage) as world, asyncio.timeout(TIMEOUT * (1 + ROUNDS)):
        image, video = some_files()
        duration = (await world.get(world.source.add(image=image, video=video))).seconds
        responses = 0
        for _ in range(ROUNDS):
            image, video = some_files()
            target = world.source.add(image=image, video=video)
            call = asyncio.ensure_future(world.get(target))
            await asyncio.sleep(chance.uniform(0.0, 1.3 * duration))
            world.proxy.process.kill()
            await world.proxy.process.wait()
            with suppress(ClientError):
                await call
                responses += 1
                assert {image, video} <= set(world.kept().values())
            await world.start()
            await world.check_stored()
            await world.check_response(await world.get(target), image, video)
            assert sorted(world.kept().values()) == sorted(made)
        await world.check_stored()
    print(f"{ROUNDS} kills within {duration:.2f} s, {responses} of them after the response")


# ---- A process that stops


# States of a file when the process is stopped.
UNFINISHED = (
    pytest.param("disk", downloading, id="disk: while it downloads"),
    pytest.param("disk", before_it_writes, id="disk: before it writes"),
    pytest.param("supabase", downloading, id="supabase: while it downloads"),
    pytest.param("supabase", at("POST", f"/object/{BUCKET}"), id="supabase: while it uploads"),
    pytest.param(
        "supabase",
        at("POST", f"/object/{BUCKET}", is_done=True),
        id="supabase: uploaded, response not received",
    ),
    pytest.param("signed", at("POST", "/object/sign"), id="supabase: uploaded, not signed"),
)
# FALPROXY_DRAIN of processes whose storage hangs, and the time that a busy machine may take in
# addition, in seconds.
DRAIN, SLACK = 1.0, 3.0


async def stopped(world: World) -> int:
    """Return the exit code."""
    async with asyncio.timeout(TIMEOUT):
        return await world.proxy.process.wait()


@pytest.mark.parametrize(("storage", "step"), UNFINISHED)
async def test_a_stop_waits_for_the_files_of_a_call(
    on: MakeWorld, storage: str, step: Step
) -> None:
    async with on(storage) as world:
        target = world.source.add(video=VIDEO)
        async with asyncio.timeout(TIMEOUT), step(world) as reached:
            call = asyncio.ensure_future(world.get(target))
            await reached()
            world.proxy.process.terminate()
            await until_stopping(world)
            assert (call.done(), world.proxy.process.returncode) == (False, None)
        response = await call
        assert await stopped(world) == 0
        assert (response.status, response.rehost_status) == (200, "stored; count=1")
        assert list(world.kept().values()) == [VIDEO]
        assert next(iter(world.kept())) in response.urls[0]


@pytest.mark.parametrize(("storage", "step"), UNFINISHED[:4])
async def test_a_stop_waits_for_a_file_whose_client_has_disconnected(
    on: MakeWorld, storage: str, step: Step
) -> None:
    async with on(storage) as world:
        target = world.source.add(video=VIDEO)
        async with asyncio.timeout(TIMEOUT), step(world) as reached:
            call = asyncio.ensure_future(world.get(target))
            await reached()
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
            await asyncio.sleep(0.1)  # until the proxy sees it
            world.proxy.process.terminate()
            await until_stopping(world)
            await asyncio.sleep(0.2)
            assert world.proxy.process.returncode is None
        assert await stopped(world) == 0
        assert list(world.kept().values()) == [VIDEO]
        assert [line for line in world.proxy.log if line["level"] == "error"] == []


async def until_stopping(world: World) -> None:
    await wait_until(
        lambda: any("Stopping" in str(line["message"]) for line in world.proxy.log), seconds=TIMEOUT
    )


HANGING = (
    pytest.param("disk", downloading, id="disk: fal hangs"),
    pytest.param("disk", before_it_writes, id="disk: the disk hangs"),
    pytest.param("supabase", at("POST", f"/object/{BUCKET}"), id="supabase: it hangs"),
)


@asynccontextmanager
async def hanging(world: World, step: Step) -> AsyncIterator[asyncio.Task[ProxyResponse]]:
    """A call whose file hangs until the end. The client does not retry by itself."""
    async with asyncio.timeout(TIMEOUT), step(world) as reached:
        call = asyncio.ensure_future(world.get(world.source.add(video=VIDEO)))
        try:
            await reached()
            yield call
        finally:
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)


@pytest.mark.parametrize(("storage", "step"), HANGING)
async def test_a_stop_waits_half_the_drain_for_a_file_that_hangs(
    on: MakeWorld, storage: str, step: Step
) -> None:
    async with on(storage, FALPROXY_DRAIN=str(DRAIN)) as world:
        async with hanging(world, step) as call:
            call.cancel()
            await asyncio.sleep(0.1)  # until the proxy sees it
            assert await stopped_within(world, DRAIN / 2 + SLACK) == 0
        await world.start()
        await world.check_stored()


@pytest.mark.parametrize(("storage", "step"), HANGING)
async def test_a_stop_waits_one_drain_more_for_a_call_whose_file_hangs(
    on: MakeWorld, storage: str, step: Step
) -> None:
    async with on(storage, FALPROXY_DRAIN=str(DRAIN)) as world:
        async with hanging(world, step):
            assert await stopped_within(world, 1.5 * DRAIN + SLACK) == 0
        await world.start()
        await world.check_stored()


@pytest.mark.parametrize(("storage", "step"), [HANGING[0], HANGING[2]])
async def test_a_stop_sends_a_result_whose_file_hangs(
    on: MakeWorld, storage: str, step: Step
) -> None:
    async with on(storage, FALPROXY_DRAIN=str(DRAIN)) as world, hanging(world, step) as call:
        world.proxy.process.terminate()
        response = await call
        assert (response.status, response.rehost_status) == (200, "pending")


async def stopped_within(world: World, seconds: float) -> int:
    """Return the exit code."""
    started = time.monotonic()
    world.proxy.process.terminate()
    async with asyncio.timeout(seconds):
        code = await world.proxy.process.wait()
    print(f"stopped after {time.monotonic() - started:.2f} s")
    return code


# ---- Memory and latency while a video is stored


LARGE = SIZE_MAX - 1
MEMORY_BOUND = 12.0  # MiB by which the process may grow
# Bounds of the latency of /health/live in seconds: 99th percentile and maximum. The same machine
# runs fal, the storage and this test.
P99_BOUND, SLOWEST_BOUND = 0.03, 0.1


@dataclass(slots=True)
class LoadedProxy:
    """A proxy between a fal and a storage in separate processes.

    requests: number of requested results.
    kept: numbers and sizes of files, by URL.
    """

    session: ClientSession
    proxy: CliProcess
    requests: int = 0
    kept: dict[str, tuple[int, int]] = field(default_factory=dict)

    async def store_file(self, size: int) -> None:
        """Request a result with a new file and wait until it is stored."""
        self.requests += 1
        number_and_size = self.requests, size
        headers = {"x-fal-target-url": result_url(*number_and_size)}
        async with self.session.get(self.proxy.origin + PROXY, headers=headers) as response:
            url = (await response.json())["file"]["url"]
            assert response.headers[REHOST_HEADER] == "stored; count=1"
        self.kept[url] = number_and_size

    def check_names(self) -> None:
        """Check the names of all files. Slow, hence outside of measurements."""
        for url, number_and_size in self.kept.items():
            assert name_of(*number_and_size) in url

    def memory(self, name: str) -> float:
        """Return `VmRSS`, or `VmHWM` (the peak since `forget_peak`), in MiB."""
        status = Path(f"/proc/{self.proxy.process.pid}/status").read_text()
        match = re.search(rf"{name}:\s+(\d+) kB", status)
        assert match is not None
        return int(match[1]) / 1024

    def forget_peak(self) -> None:
        Path(f"/proc/{self.proxy.process.pid}/clear_refs").write_text("5")


@asynccontextmanager
async def open_loaded_proxy(
    storage: str, session: ClientSession, folder: Path
) -> AsyncIterator[LoadedProxy]:
    async with AsyncExitStack() as stack:
        env = {"FALPROXY_REHOST": "disk"}
        if storage != "disk":
            fake = await stack.enter_async_context(fake_apart())
            env = {"SUPABASE_URL": fake.url, "SUPABASE_KEY": fake.key}
        origin = await stack.enter_async_context(fal_apart())
        env |= {"FAL_KEY": CANARY, "FALPROXY_UPSTREAM_ORIGIN": origin, "CWD": str(folder)}
        proxy = await stack.enter_async_context(run_command("serve", **env))
        loaded = LoadedProxy(session, proxy)
        await loaded.store_file(2**20)  # creates everything that is created once
        yield loaded
        loaded.check_names()


@STORAGES
async def test_memory_does_not_grow_with_the_files(
    storage: str, client: ClientSession, tmp_path: Path
) -> None:
    async with open_loaded_proxy(storage, client, tmp_path) as loaded:
        for at_once in (1, 4):
            loaded.forget_peak()
            before = loaded.memory("VmRSS")
            await asyncio.gather(*(loaded.store_file(LARGE) for _ in range(at_once)))
            grown = loaded.memory("VmHWM") - before
            print(f"{at_once} at once: {grown:.1f} MiB above {before:.1f} MiB")
            assert grown < MEMORY_BOUND


@pytest.mark.timed
@STORAGES
async def test_other_requests_are_served_while_a_video_is_stored(
    storage: str, client: ClientSession, tmp_path: Path
) -> None:
    measured = []
    async with open_loaded_proxy(storage, client, tmp_path) as loaded:
        for _ in range(3):  # the best of three, since the machine may be busy
            polled = await poll_while(loaded.proxy, loaded.store_file(LARGE))
            measured.append((polled[len(polled) * 99 // 100], polled[-1]))
            p99, slowest = measured[-1]
            print(f"{len(polled)} polls, p99 {1000 * p99:.1f} ms, slowest {1000 * slowest:.1f} ms")
            if p99 < P99_BOUND and slowest < SLOWEST_BOUND:
                return
    pytest.fail(f"other requests were delayed: {measured}")


async def poll_while(proxy: CliProcess, work: Coroutine[object, object, None]) -> list[float]:
    """Return the sorted latencies of /health/live in seconds during the work."""
    seconds = []
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.origin.rpartition(":")[2])
    working = asyncio.ensure_future(work)
    while not working.done():
        started = time.perf_counter()
        writer.write(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await reader.readuntil(b"}")
        seconds.append(time.perf_counter() - started)
        await asyncio.sleep(0.001)
    await working
    writer.close()
    await writer.wait_closed()
    return sorted(seconds)


# ---- Failures of Supabase


INTERNAL = ErrorKind(500, "Internal", "Internal Server Error", "InternalError", http=500)
PAGE = "<!doctype html><title>502 Bad Gateway</title>"
UPLOADS = f"/object/{BUCKET}"


@dataclass(slots=True)
class StoredWorld:
    """A proxy in this process with its own Supabase project."""

    source: Source
    supabase: FakeSupabase
    session: ClientSession
    origin: str

    async def get(self, target: str) -> ProxyResponse:
        response = await get(self.session, self.origin, target)
        assert response.status == 200
        return response

    async def check_stored(self, response: ProxyResponse, *contents: bytes) -> None:
        """Check that all files are at the URLs of the response, and that there are no others."""
        assert response.rehost_status == f"stored; count={len(contents)}"
        assert all(url.startswith(self.supabase.url) for url in response.urls)
        assert [await read(self.session, url) for url in response.urls] == list(contents)
        objects = self.supabase.objects(BUCKET)
        assert sorted(one.content for one in objects.values()) == sorted(contents)
        for name, one in objects.items():
            assert hashlib.sha256(one.content).hexdigest() == name.partition(".")[0]


MakeStored = Callable[..., Awaitable[StoredWorld]]


@pytest.fixture
def make_stored(
    source: Source, supabase: FakeSupabase, client: ClientSession, make_gateway: MakeGateway
) -> MakeStored:
    async def make(key: str | None = None) -> StoredWorld:
        settings = {"supabase_url": supabase.url, "supabase_key": key or supabase.service_key}
        gateway = await make_gateway(source.fal.origin, **settings)
        return StoredWorld(source, supabase, client, gateway.origin)

    return make


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(fail_with(INTERNAL), id="500"),
        pytest.param(fail_with(DATABASE_BUSY), id="429"),
        pytest.param(close_connection, id="reset"),
        pytest.param(lose_response, id="response lost after the work was done"),
        pytest.param(delay(0.3), id="slow"),
    ],
)
async def test_a_single_failure_is_retried(make_stored: MakeStored, fault: Fault) -> None:
    stored = await make_stored()
    stored.supabase.fail(fault, path=UPLOADS)
    response = await stored.get(stored.source.add(image=IMAGE))
    await stored.check_stored(response, IMAGE)


@pytest.mark.parametrize(
    ("path", "fault"),
    [
        pytest.param(UPLOADS, fail_with(INTERNAL), id="500"),
        pytest.param(UPLOADS, fail_with(DATABASE_BUSY), id="429"),
        pytest.param(UPLOADS, fail_with(NO_JWT), id="403"),
        pytest.param(UPLOADS, fail_with(TOO_LARGE), id="413"),
        pytest.param(UPLOADS, respond(502, PAGE), id="HTML page of a gateway"),
        pytest.param(UPLOADS, respond(200, PAGE), id="HTML page with status 200"),
        pytest.param(UPLOADS, close_connection, id="reset"),
        pytest.param(UPLOADS, lose_response, id="responses lost after the work was done"),
        pytest.param("/bucket", fail_with(NO_JWT), id="bucket: 403"),
        pytest.param("/bucket", respond(200, PAGE), id="bucket: HTML page with status 200"),
        pytest.param("/bucket", lose_response, id="bucket: created, and the responses lost"),
    ],
)
async def test_a_lasting_failure_leaves_fal_s_url_until_it_is_fixed(
    make_stored: MakeStored, path: str, fault: Fault
) -> None:
    stored = await make_stored()
    target = stored.source.add(image=IMAGE)
    stored.supabase.fail(fault, times=1000, path=path)
    response = await stored.get(target)
    print(f"response after {response.seconds:.2f} s")
    assert (response.rehost_status, response.urls) == ("failed", stored.source.urls(target))
    stored.supabase.clear_faults()
    await until_logged(stored, target, "stored; count=1")
    await stored.check_stored(await stored.get(target), IMAGE)


@pytest.mark.timed
async def test_a_supabase_that_refuses_connections_delays_requests_little(
    make_stored: MakeStored,
) -> None:
    stored = await make_stored()
    target = stored.source.add(image=IMAGE)
    await stored.supabase.stop()
    first = await stored.get(target)
    assert (first.rehost_status, first.urls) == ("failed", stored.source.urls(target))
    second = await stored.get(stored.source.add(image=PNG))
    assert second.rehost_status in ("failed", "pending")
    print(f"response after {first.seconds:.2f} s, then {second.seconds:.2f} s")
    assert first.seconds < 5.0
    assert second.seconds < 2.0
    await stored.supabase.start()
    await until_logged(stored, target, "stored; count=1")


async def until_logged(stored: StoredWorld, target: str, status: str) -> None:
    async with asyncio.timeout(TIMEOUT):
        while (await stored.get(target)).rehost_status != status:
            await asyncio.sleep(0.05)


async def test_a_deleted_bucket_is_created_again(make_stored: MakeStored) -> None:
    stored = await make_stored()
    await stored.check_stored(await stored.get(stored.source.add(image=IMAGE)), IMAGE)
    del stored.supabase.buckets[BUCKET]
    await stored.check_stored(await stored.get(stored.source.add(image=PNG)), PNG)


async def test_a_bucket_that_is_deleted_during_an_upload_is_created_again(
    make_stored: MakeStored,
) -> None:
    stored = await make_stored()

    async def delete_bucket(request: web.Request, handler: Handler) -> web.StreamResponse:
        handling = asyncio.ensure_future(handler(request))
        await asyncio.sleep(0)
        del stored.supabase.buckets[BUCKET]
        return await handling

    stored.supabase.fail(delete_bucket, path=UPLOADS)
    await stored.check_stored(await stored.get(stored.source.add(video=VIDEO)), VIDEO)


async def test_a_private_bucket_is_not_used_before_it_is_public(make_stored: MakeStored) -> None:
    stored = await make_stored()
    bucket = stored.supabase.buckets[BUCKET] = Bucket(BUCKET)
    target = stored.source.add(image=IMAGE)
    response = await stored.get(target)
    assert (response.rehost_status, response.urls) == ("failed", stored.source.urls(target))
    assert bucket.objects == {}
    bucket.is_public = True
    await stored.check_stored(await stored.get(target), IMAGE)


async def test_a_bucket_with_a_lower_limit_accepts_smaller_files(make_stored: MakeStored) -> None:
    stored = await make_stored()
    bucket = stored.supabase.buckets[BUCKET] = Bucket(BUCKET, is_public=True, size_max=len(IMAGE))
    target = stored.source.add(image=IMAGE, video=VIDEO)
    response = await stored.get(target)
    assert response.rehost_status == "failed, stored; count=1"
    assert response.urls[1] == stored.source.urls(target)[1]
    assert await read(stored.session, response.urls[0]) == IMAGE
    bucket.size_max = None
    await until_logged(stored, target, "stored; count=2")
    await stored.check_stored(await stored.get(target), IMAGE, VIDEO)


@pytest.mark.parametrize(
    "make_key",
    [
        pytest.param(lambda fake: f"{fake.service_key}x", id="forged"),
        pytest.param(lambda fake: fake.token(role="anon"), id="publishable"),
    ],
)
async def test_a_wrong_key_leaves_fal_s_url(
    make_stored: MakeStored, supabase: FakeSupabase, make_key: Callable[[FakeSupabase], str]
) -> None:
    stored = await make_stored(make_key(supabase))
    target = stored.source.add(image=IMAGE)
    response = await stored.get(target)
    assert (response.rehost_status, response.urls) == ("failed", stored.source.urls(target))
    assert BUCKET not in supabase.buckets


# ---- A Supabase that does not respond


# Shortens the time that a response waits for its files, which is 30 s and not a setting.
WITH_SHORT_TIMEOUT = """
from falproxy.stores.files import rehosting
assert (rehosting.WAIT_TIMEOUT, rehosting.SHORT_WAIT_TIMEOUT) == (30.0, 1.0)
rehosting.WAIT_TIMEOUT = 2.5
from falproxy.cli.main import main
raise SystemExit(main())
"""
LATER_RESPONSE_MAX = 2.0  # seconds


@pytest.fixture
async def short_timeout(
    source: Source, supabase: FakeSupabase, client: ClientSession, tmp_path: Path
) -> AsyncIterator[StoredWorld]:
    env = {"SUPABASE_URL": supabase.url, "SUPABASE_KEY": supabase.service_key}
    env |= {"FAL_KEY": CANARY, "FALPROXY_UPSTREAM_ORIGIN": source.fal.origin}
    async with serving(WITH_SHORT_TIMEOUT, FALPROXY_DATA_DIR=str(tmp_path), **env) as proxy:
        yield StoredWorld(source, supabase, client, proxy.origin)
        assert [line for line in proxy.log if line["level"] == "error"] == []


@pytest.mark.timed
async def test_a_supabase_that_hangs_delays_only_the_first_request(
    short_timeout: StoredWorld,
) -> None:
    short_timeout.supabase.fail(hang, times=1000)
    targets = [short_timeout.source.add(image=IMAGE + bytes([each])) for each in range(12)]
    first = await short_timeout.get(targets[0])
    assert (first.rehost_status, first.urls) == ("pending", short_timeout.source.urls(targets[0]))
    second = await short_timeout.get(targets[1])
    others = await asyncio.gather(*map(short_timeout.get, targets))
    print(f"response after {first.seconds:.2f} s, then {second.seconds:.2f} s")
    for target, response in zip([targets[1], *targets], [second, *others], strict=True):
        assert (response.rehost_status, response.urls) == (
            "pending",
            short_timeout.source.urls(target),
        )
        assert response.seconds < LATER_RESPONSE_MAX
    short_timeout.supabase.clear_faults()
    await short_timeout.supabase.stop()  # closes the connections, as a restart does
    await short_timeout.supabase.start()
    for target in targets:
        await until_logged(short_timeout, target, "stored; count=1")
    assert len(short_timeout.supabase.objects(BUCKET)) == len(targets)


async def test_a_file_that_is_late_is_stored_for_the_next_request(
    short_timeout: StoredWorld,
) -> None:
    gate = Gate()

    async def fault(request: web.Request, handler: Handler) -> web.StreamResponse:
        await gate.pass_through()
        return await handler(request)

    short_timeout.supabase.fail(fault, path=UPLOADS)
    target = short_timeout.source.add(image=IMAGE)
    response = await short_timeout.get(target)
    assert (response.rehost_status, response.urls) == ("pending", short_timeout.source.urls(target))
    gate.opened.set()
    await until_logged(short_timeout, target, "stored; count=1")
    await short_timeout.check_stored(await short_timeout.get(target), IMAGE)
    assert short_timeout.source.reads() == 1
