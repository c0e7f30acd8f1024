"""Several processes on one port, and the one that looks after them."""

import gc
import logging
import os
import select
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from aiohttp import web

from falproxy.server.runner import SIGNALS
from falproxy.server.worker_metrics import share_numbers, socket_of

logger = logging.getLogger(__name__)

HEARD = (*SIGNALS, signal.SIGCHLD)
# Seconds until a worker that ended unasked has a successor: ever longer, unless it lived for long.
SOON, LATE, LONG = 0.1, 30.0, 60.0
GRACE = 5.0  # seconds beyond the drain; whoever is still there then is killed
BYTES = 4096


@dataclass(frozen=True, slots=True)
class Worker:
    """What one of the processes knows. leash: a pipe that ends when it is to stop, also because
    nobody looks after it any more. folder: where the workers find each other. ready: a pipe to the
    supervisor."""

    leash: int
    folder: Path
    ready: int

    def join(self, app: web.Application) -> None:
        """Makes an application one of several."""
        share_numbers(app, self.folder)

    def tell_ready(self, port: int) -> None:
        """Calls are accepted."""
        os.write(self.ready, b"1")
        os.close(self.ready)


@dataclass(slots=True)
class Running:
    """A worker's process. leash: it stops when this is closed. ready: has a byte to read once
    calls are accepted."""

    pid: int
    leash: int
    ready: int
    since: float = field(default_factory=time.monotonic)


@dataclass(slots=True)
class Place:
    """One worker after the other. due: when the next one starts."""

    number: int
    running: Running | None = None
    delay: float = SOON
    due: float = 0.0


def supervise(
    count: int, work: Callable[[Worker], int], *, drain: float, started: Callable[[], None]
) -> int:
    """Keeps so many workers running until SIGTERM or SIGINT, which lets them finish what they do.

    work: what each does, in a process of its own that begins as a copy of this one: there must be
    no thread and no event loop yet. started: called once the first one accepts calls. The exit
    code: 0 after a clean stop; the worker's where not even the first could start.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="falproxy-workers-")))
        heard = stack.enter_context(hear())
        gc.collect()
        gc.freeze()  # what is there now stays as it is, in memory that all share
        return Supervisor(count, work, folder, heard, drain, started).run()


@contextmanager
def hear() -> Iterator[int]:
    """A pipe with a byte for each signal that came."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    os.set_blocking(writing, False)
    before = {number: signal.signal(number, lambda *_: None) for number in HEARD}
    earlier = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    try:
        yield reading
    finally:
        signal.set_wakeup_fd(earlier)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(reading)
        os.close(writing)


class Supervisor:
    """heard: where signals can be read."""

    def __init__(
        self,
        count: int,
        work: Callable[[Worker], int],
        folder: Path,
        heard: int,
        drain: float,
        started: Callable[[], None],
    ) -> None:
        self._places = [Place(number) for number in range(1, count + 1)]
        self._work = work
        self._folder = folder
        self._heard = heard
        self._drain = drain
        self._started = started
        self._is_up = False  # a worker was ready once
        self._ends_at: float | None = None  # since it is to stop
        self._code = 0

    def run(self) -> int:
        while self._ends_at is None or self._running:
            self._start_due()
            for number in self._wait():
                if number in SIGNALS:
                    self._stop(number)
            self._reap()
            if self._ends_at is not None and time.monotonic() >= self._ends_at:
                self._kill()
        return self._code

    @property
    def _running(self) -> list[Running]:
        return [place.running for place in self._places if place.running is not None]

    @property
    def _wanted(self) -> list[Place]:
        """Nobody but the first starts before that one has shown that it can be done."""
        return self._places if self._is_up else self._places[:1]

    def _start_due(self) -> None:
        if self._ends_at is not None:
            return
        for place in self._wanted:
            if place.running is None and place.due <= time.monotonic():
                self._start(place)

    def _wait(self) -> bytes:
        """Signals that came, as soon as there is something to do."""
        times = [place.due for place in self._wanted if place.running is None]
        if self._ends_at is not None:
            times = [self._ends_at]
        seconds = max(min(times) - time.monotonic(), 0) if times else None
        unready = {running.ready: running for running in self._running if running.ready >= 0}
        readable, _, _ = select.select([self._heard, *unready], [], [], seconds)
        for ready in set(readable) & unready.keys():
            self._hear_ready(unready[ready])
        with suppress(BlockingIOError):
            return os.read(self._heard, BYTES)
        return b""

    def _hear_ready(self, running: Running) -> None:
        is_ready = os.read(running.ready, 1) != b""  # else it has ended, which is told elsewhere
        os.close(running.ready)
        running.ready = -1
        if is_ready and not self._is_up:
            self._is_up = True
            self._started()

    def _start(self, place: Place) -> None:
        leash, held = os.pipe()
        ready, telling = os.pipe()
        # A signal that the child got before it has handlers of its own would be told to us.
        signal.pthread_sigmask(signal.SIG_BLOCK, HEARD)
        try:
            pid = os.fork()
            if pid == 0:
                worker = Worker(leash, self._folder, telling)
                become(self._work, worker, [held, ready, self._heard, *self._pipes()])
            place.running = Running(pid, held, ready)
        except OSError as error:  # too many processes, or no memory for one
            close(held, ready)
            self._put_off(place, f"could not start: {error.strerror}", 0)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, HEARD)
            close(leash, telling)

    def _pipes(self) -> list[int]:
        return [pipe for running in self._running for pipe in (running.leash, running.ready)]

    def _reap(self) -> None:
        """Processes that ended, some of which may be none of ours where this is the first one."""
        by_pid = {place.running.pid: place for place in self._places if place.running is not None}
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0] != 0:
                pid, status = ended
                if (place := by_pid.get(pid)) is not None and place.running is not None:
                    self._bury(place, place.running, os.waitstatus_to_exitcode(status))

    def _bury(self, place: Place, running: Running, code: int) -> None:
        place.running = None
        close(running.leash, running.ready)
        socket_of(self._folder, running.pid).unlink(missing_ok=True)
        if self._ends_at is not None:
            self._code = self._code or int(code != 0)
        elif not self._is_up:
            self._ends_at = time.monotonic()
            self._code = max(code, 1)
        else:
            how = f"exit code {code}" if code >= 0 else f"signal {-code}"
            what = f"(process {running.pid}) ended with {how}"
            self._put_off(place, what, time.monotonic() - running.since)

    def _put_off(self, place: Place, what: str, lived: float) -> None:
        """lived: seconds."""
        if lived >= LONG:
            place.delay = SOON
        logger.error("Worker %d %s; in %g s there is another", place.number, what, place.delay)
        place.due = time.monotonic() + place.delay
        place.delay = min(2 * place.delay, LATE)

    def _stop(self, number: int) -> None:
        """The first time in peace."""
        if self._ends_at is not None:
            self._code = 128 + number
            self._ends_at = time.monotonic()
            return
        self._ends_at = time.monotonic() + self._drain + GRACE
        for running in self._running:
            close(running.leash)
            running.leash = -1

    def _kill(self) -> None:
        self._ends_at = time.monotonic() + GRACE
        for running in self._running:
            logger.warning("Process %d did not end in time and is killed", running.pid)
            os.kill(running.pid, signal.SIGKILL)


def become(work: Callable[[Worker], int], worker: Worker, pipes: Iterable[int]) -> NoReturn:
    """What this process does from here on, which was a copy of the supervisor so far. pipes: of
    the supervisor; nobody else may hold them when it dies."""
    code = 1
    try:
        # A terminal's Ctrl-C is for all of its processes; workers stop when they are told to.
        os.setpgid(0, 0)
        close(*pipes)
        signal.set_wakeup_fd(-1)
        for number in HEARD:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HEARD)
        code = work(worker)
    except BaseException:
        logger.exception("A worker failed")
    finally:
        logging.shutdown()
        sys.stdout.flush()
        os._exit(code)  # all else on the stack is the supervisor's


def close(*pipes: int) -> None:
    for pipe in pipes:
        if pipe >= 0:
            os.close(pipe)
