"""Hooks, and the fixtures of all tests: the proxy and fakes of fal on loopback."""

import contextlib
import gc
import logging
import os
import tempfile
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack
from itertools import accumulate, count
from pathlib import Path
from uuid import uuid4

import hypothesis
import pytest
import pytest_asyncio
from aiohttp import ClientSession, web_app

pytest.register_assert_rewrite("tests.support")  # failures in helpers show their values

from falproxy.media.fetch import Fetcher
from tests.support.asgi_servers import ASGI_SERVERS
from tests.support.event_loops import EVENT_LOOPS, NewLoop
from tests.support.fake_fal import FakeFal, WireFal, open_fal, open_wire
from tests.support.gateway import Gateway, MakeGateway, open_gateway, open_session
from tests.support.key_search import LEAKS
from tests.support.paths import ROOT

# Rough durations in seconds, by which modules are ordered.
TEST_SECONDS, SLOW_TEST_SECONDS = 0.05, 1.0
# By logger; the root has no name. Two have debug messages for each event loop and each application,
# without requests.
LOG_LEVELS = {None: logging.DEBUG, "asyncio": logging.INFO, "falproxy.app.pipeline": logging.INFO}
# How examples are generated: a slow machine is no failure.
HYPOTHESIS_PROFILE = "falproxy"
SLOW_MACHINES = hypothesis.settings(
    deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
# Characters of each failure in the summary at the end of the output.
SUMMARY_MESSAGE_MAX = 200

# A file system in memory, and the bytes that must be free there for the temporary directories.
MEMORY, MEMORY_MIN = Path("/dev/shm"), 4 * 2**30

# Net new objects before a collection of the youngest ones; collections of a generation before one
# of the next.
GC_THRESHOLDS = (200_000, 50, 10)

PATH_NUMBERS = count()  # of the temporary directories of this process


def pytest_configure() -> None:
    """Keep the garbage collector from searching the tests while they are collected, and the
    temporary directories in memory: on a disk each new SQLite file takes some 20 ms. Processes run
    until they wait, instead of being interrupted by each other: that takes less CPU time."""
    gc.disable()
    if hasattr(os, "SCHED_BATCH"):
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    hypothesis.settings.register_profile(HYPOTHESIS_PROFILE, SLOW_MACHINES)
    hypothesis.settings.load_profile(HYPOTHESIS_PROFILE)
    logging.getLogger().addHandler(LEAKS)
    if has_memory():
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))


def has_memory() -> bool:
    """Return whether there is a file system in memory that is large enough and runs programs."""
    if not os.access(MEMORY, os.W_OK | os.X_OK):
        return False
    status = os.statvfs(MEMORY)
    return status.f_bavail * status.f_frsize >= MEMORY_MIN and not status.f_flag & os.ST_NOEXEC


def pytest_asyncio_loop_factories(item: pytest.Item) -> dict[str, NewLoop]:
    """Run tests on uvloop, as the proxy does, those with the marker `asyncio_loop` on asyncio's
    event loop, and those with `both_event_loops` on both."""
    if item.get_closest_marker("asyncio_loop") is not None:
        names = {"asyncio"}
    elif item.get_closest_marker("both_event_loops") is not None:
        names = {"asyncio", "uvloop"}
    else:
        names = {"uvloop"} & EVENT_LOOPS.keys() or {"asyncio"}
    return {name: new_loop for name, new_loop in EVENT_LOOPS.items() if name in names}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run tests with the marker `both_transports` on both transports of the proxy, and those with
    `asgi_servers` in ASGI servers as well."""
    marks = {mark.name for mark in metafunc.definition.iter_markers()}
    kinds = ["fast", "session"] if "both_transports" in marks else ["fast"]
    if "asgi_servers" in marks and "own_server" not in marks:
        kinds += [*ASGI_SERVERS]
    if len(kinds) > 1 and "server_kind" in metafunc.fixturenames:
        metafunc.parametrize("server_kind", kinds, indirect=True)


@pytest.fixture(scope="module")
def server_kind(request: pytest.FixtureRequest) -> str:
    """Return the server of the proxy: `fast` has the fast path and the proxy's own transport,
    `session` has neither, and others are ASGI servers."""
    return str(getattr(request, "param", "fast"))


@pytest.fixture(scope="module")
def is_fast(server_kind: str) -> bool:
    """Return whether the proxy has its fast path and its own transport, or neither."""
    return server_kind == "fast"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Repeat tests that measure time, and order the modules.

    Modules that take longest run first, so that no process of pytest-xdist begins with one of them
    when the others have finished. Those with slow tests, which mostly wait, and the others, which
    mostly compute, alternate, so that no core is idle.
    """
    seconds: dict[Path, float] = defaultdict(float)
    slow: set[Path] = set()
    for item in items:
        if item.get_closest_marker("timed") is not None:
            item.add_marker(pytest.mark.flaky(reruns=2, reruns_delay=2))
        marker = item.get_closest_marker("slow") or item.get_closest_marker("takes")
        test_seconds = TEST_SECONDS if marker is None else marker.kwargs.get("seconds")
        seconds[item.path] += test_seconds or SLOW_TEST_SECONDS
        if marker is not None and marker.name == "slow":
            slow.add(item.path)
    starts: dict[Path, float] = {}
    for modules in (slow, seconds.keys() - slow):
        starts |= start_shares({module: seconds[module] for module in modules})
    items.sort(key=lambda item: (starts[item.path], item.path))


def start_shares(seconds: Mapping[Path, float]) -> dict[Path, float]:
    """Return, for each module, the share of all modules' time that has passed when it starts, if
    the longest ones run first, one after the other."""
    longest_first = sorted(seconds, key=lambda path: (-seconds[path], path))
    ends = [*accumulate(seconds[path] for path in longest_first)]
    return {
        path: (end - seconds[path]) / ends[-1]
        for path, end in zip(longest_first, ends, strict=True)
    }


def pytest_collection_finish() -> None:
    """Exempt the collected tests, some hundred MB, from garbage collection: it would search them
    again and again. Make collections rarer, as the proxy does: they took a tenth of the time."""
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """Free the applications of a test: aiohttp keeps those of the last 1,024 handlers, and garbage
    collection would search them all."""
    web_app._cached_build_middleware.cache_clear()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Search the output of a test. That of a passed test is then dropped, so that a worker of
    pytest-xdist does not send it."""
    for title, text in report.sections:
        LEAKS.search(text, f"{title} of {report.nodeid}")
    if report.passed:
        report.sections.clear()
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is not None:
        crash.message = crash.message.partition("\n")[0][:SUMMARY_MESSAGE_MAX]


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the run if the key was seen anywhere.

    A worker of pytest-xdist sends its findings to the process that collects the results.
    """
    output: dict[str, object] | None = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["leaks"] = LEAKS.found
    elif LEAKS.found:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object) -> None:
    """Collect the findings of a worker of pytest-xdist."""
    LEAKS.found += getattr(node, "workeroutput", {}).get("leaks", [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for place in LEAKS.found:
        terminalreporter.write_line(f"ERROR the key was seen in: {place}", red=True)


@pytest.fixture
async def fal() -> AsyncIterator[FakeFal]:
    async with open_fal() as fake:
        yield fake


@pytest.fixture
async def wire() -> AsyncIterator[WireFal]:
    async with open_wire() as fake:
        yield fake


@pytest.fixture
async def make_gateway(tmp_path: Path, server_kind: str) -> AsyncIterator[MakeGateway]:
    async with AsyncExitStack() as stack:

        async def make(origin: str, fetcher: Fetcher | None = None, **options: object) -> Gateway:
            gateway = open_gateway(origin, tmp_path, server_kind, fetcher, **options)
            return await stack.enter_async_context(gateway)

        yield make


@pytest.fixture
async def gateway(make_gateway: MakeGateway, fal: FakeFal) -> Gateway:
    """The proxy with `fal` as its upstream."""
    return await make_gateway(fal.origin)


@pytest.fixture
async def session() -> AsyncIterator[ClientSession]:
    """A client that neither decompresses bodies nor limits header fields."""
    async with open_session() as client:
        yield client


# The same for tests that need no proxy of their own: one for all of a module. Such tests have the
# marker SHARED.


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def module_fal() -> AsyncIterator[FakeFal]:
    async with open_fal() as fake:
        yield fake


@pytest.fixture
def shared_fal(module_fal: FakeFal) -> FakeFal:
    module_fal.reset()
    return module_fal


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def module_gateway(
    module_fal: FakeFal, server_kind: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Gateway]:
    data_dir = tmp_path_factory.mktemp("data")
    async with open_gateway(module_fal.origin, data_dir, server_kind) as opened:
        yield opened


@pytest.fixture
def shared_gateway(module_gateway: Gateway) -> Gateway:
    """The proxy with `shared_fal` as its upstream. The client has another name in each test, so
    that no request head is known from an earlier one."""
    module_gateway.client.session.headers["User-Agent"] = f"test/{uuid4().hex}"
    return module_gateway


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_session() -> AsyncIterator[ClientSession]:
    async with open_session() as client:
        yield client


@pytest.fixture
def root() -> Path:
    return ROOT


@pytest.fixture
def tmp_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a new directory. Unlike pytest's own one it has no symbolic link, which takes longer
    to make than the directory."""
    path = tmp_path_factory.getbasetemp() / f"test-{next(PATH_NUMBERS)}"
    path.mkdir(mode=0o700)
    return path


@pytest.fixture(autouse=True, scope="session")
def run_outside_the_repository(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Change the working directory: by default the data directory is in it."""
    with contextlib.chdir(tmp_path_factory.mktemp("working-directory")):
        yield


@pytest.fixture(autouse=True, scope="session")
def temporary_directory() -> Iterator[None]:
    """Set TMPDIR of processes to a directory that is removed with what they have left in it. Its
    path is short, as sockets need, and other users may pass it, as the server of PostgreSQL does.
    """
    with (
        tempfile.TemporaryDirectory(prefix="fp-", ignore_cleanup_errors=True) as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        os.chmod(folder, 0o711)
        patch.setenv("TMPDIR", folder)
        yield


@pytest.fixture(autouse=True)
def capture_all_logs() -> None:
    """Set the levels of the loggers, if an earlier test has changed them: each change takes as long
    as all loggers are many."""
    for name, level in LOG_LEVELS.items():
        logger = logging.getLogger(name)
        if logger.level != level:
            logger.setLevel(level)
