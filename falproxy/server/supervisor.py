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
from falproxy.server.worker_metrics import share_metrics, socket_path

logger = logging.getLogger(__name__)

HANDLED_SIGNALS = (*SIGNALS, signal.SIGCHLD)
# Seconds until a worker that ended unasked has a successor: ever longer, unless it lived for long.
BACKOFF_MIN, BACKOFF_MAX, BACKOFF_RESET = 0.1, 30.0, 60.0
KILL_TIMEOUT = 5.0  # seconds beyond the drain; whoever is still there then is killed
READ_SIZE = 4096


@dataclass(frozen=True, slots=True)
class WorkerContext:
    """What one of the processes knows. leash: a pipe that ends when it is to stop, also because
    nobody looks after it any more. folder: where the workers find each other. ready: a pipe to the
    supervisor."""

    stop_pipe: int
    folder: Path
    ready_pipe: int

    def join(self, app: web.Application) -> None:
        """Makes an application one of several."""
        share_metrics(app, self.folder)

    def signal_ready(self, port: int) -> None:
        """Calls are accepted."""
        os.write(self.ready_pipe, b"1")
        os.close(self.ready_pipe)


@dataclass(slots=True)
class WorkerProcess:
    """A worker's process. leash: it stops when this is closed. ready: has a byte to read once
    calls are accepted."""

    pid: int
    stop_pipe: int
    ready_pipe: int
    started_at: float = field(default_factory=time.monotonic)


@dataclass(slots=True)
class WorkerSlot:
    """One worker after the other. due: when the next one starts."""

    number: int
    process: WorkerProcess | None = None
    restart_delay: float = BACKOFF_MIN
    start_at: float = 0.0


def supervise(
    count: int,
    work: Callable[[WorkerContext], int],
    *,
    drain: float,
    on_started: Callable[[], None],
) -> int:
    """Keeps so many workers running until SIGTERM or SIGINT, which lets them finish what they do.

    work: what each does, in a process of its own that begins as a copy of this one: there must be
    no thread and no event loop yet. started: called once the first one accepts calls. The exit
    code: 0 after a clean stop; the worker's where not even the first could start.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="falproxy-workers-")))
        heard = stack.enter_context(open_signal_pipe())
        gc.collect()
        gc.freeze()  # what is there now stays as it is, in memory that all share
        return Supervisor(count, work, folder, heard, drain, on_started).run()


@contextmanager
def open_signal_pipe() -> Iterator[int]:
    """A pipe with a byte for each signal that came."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    os.set_blocking(writing, False)
    before = {number: signal.signal(number, lambda *_: None) for number in HANDLED_SIGNALS}
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
        work: Callable[[WorkerContext], int],
        folder: Path,
        signal_pipe: int,
        drain: float,
        on_started: Callable[[], None],
    ) -> None:
        self._slots = [WorkerSlot(number) for number in range(1, count + 1)]
        self._work = work
        self._folder = folder
        self._signal_pipe = signal_pipe
        self._drain = drain
        self._on_started = on_started
        self._was_ready = False  # a worker was ready once
        self._deadline: float | None = None  # since it is to stop
        self._exit_code = 0

    def run(self) -> int:
        while self._deadline is None or self._processes:
            self._start_due()
            for number in self._wait():
                if number in SIGNALS:
                    self._stop(number)
            self._reap()
            if self._deadline is not None and time.monotonic() >= self._deadline:
                self._kill()
        return self._exit_code

    @property
    def _processes(self) -> list[WorkerProcess]:
        return [place.process for place in self._slots if place.process is not None]

    @property
    def _startable_slots(self) -> list[WorkerSlot]:
        """Nobody but the first starts before that one has shown that it can be done."""
        return self._slots if self._was_ready else self._slots[:1]

    def _start_due(self) -> None:
        if self._deadline is not None:
            return
        for place in self._startable_slots:
            if place.process is None and place.start_at <= time.monotonic():
                self._start(place)

    def _wait(self) -> bytes:
        """Signals that came, as soon as there is something to do."""
        times = [place.start_at for place in self._startable_slots if place.process is None]
        if self._deadline is not None:
            times = [self._deadline]
        seconds = max(min(times) - time.monotonic(), 0) if times else None
        unready = {
            running.ready_pipe: running for running in self._processes if running.ready_pipe >= 0
        }
        readable, _, _ = select.select([self._signal_pipe, *unready], [], [], seconds)
        for ready in set(readable) & unready.keys():
            self._read_ready_pipe(unready[ready])
        with suppress(BlockingIOError):
            return os.read(self._signal_pipe, READ_SIZE)
        return b""

    def _read_ready_pipe(self, process: WorkerProcess) -> None:
        is_ready = (
            os.read(process.ready_pipe, 1) != b""
        )  # else it has ended, which is told elsewhere
        os.close(process.ready_pipe)
        process.ready_pipe = -1
        if is_ready and not self._was_ready:
            self._was_ready = True
            self._on_started()

    def _start(self, slot: WorkerSlot) -> None:
        leash, held = os.pipe()
        ready, telling = os.pipe()
        # A signal that the child got before it has handlers of its own would be told to us.
        signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED_SIGNALS)
        try:
            pid = os.fork()
            if pid == 0:
                worker = WorkerContext(leash, self._folder, telling)
                run_child(self._work, worker, [held, ready, self._signal_pipe, *self._pipes()])
            slot.process = WorkerProcess(pid, held, ready)
        except OSError as error:  # too many processes, or no memory for one
            close_pipes(held, ready)
            self._schedule_restart(slot, f"could not start: {error.strerror}", 0)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED_SIGNALS)
            close_pipes(leash, telling)

    def _pipes(self) -> list[int]:
        return [
            pipe for running in self._processes for pipe in (running.stop_pipe, running.ready_pipe)
        ]

    def _reap(self) -> None:
        """Processes that ended, some of which may be none of ours where this is the first one."""
        by_pid = {place.process.pid: place for place in self._slots if place.process is not None}
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0] != 0:
                pid, status = ended
                if (place := by_pid.get(pid)) is not None and place.process is not None:
                    self._on_exit(place, place.process, os.waitstatus_to_exitcode(status))

    def _on_exit(self, slot: WorkerSlot, process: WorkerProcess, code: int) -> None:
        slot.process = None
        close_pipes(process.stop_pipe, process.ready_pipe)
        socket_path(self._folder, process.pid).unlink(missing_ok=True)
        if self._deadline is not None:
            self._exit_code = self._exit_code or int(code != 0)
        elif not self._was_ready:
            self._deadline = time.monotonic()
            self._exit_code = max(code, 1)
        else:
            how = f"exit code {code}" if code >= 0 else f"signal {-code}"
            what = f"(process {process.pid}) ended with {how}"
            self._schedule_restart(slot, what, time.monotonic() - process.started_at)

    def _schedule_restart(self, slot: WorkerSlot, reason: str, lifetime: float) -> None:
        """lived: seconds."""
        if lifetime >= BACKOFF_RESET:
            slot.restart_delay = BACKOFF_MIN
        logger.error(
            "Worker %d %s; in %g s there is another", slot.number, reason, slot.restart_delay
        )
        slot.start_at = time.monotonic() + slot.restart_delay
        slot.restart_delay = min(2 * slot.restart_delay, BACKOFF_MAX)

    def _stop(self, number: int) -> None:
        """The first time in peace."""
        if self._deadline is not None:
            self._exit_code = 128 + number
            self._deadline = time.monotonic()
            return
        self._deadline = time.monotonic() + self._drain + KILL_TIMEOUT
        for running in self._processes:
            close_pipes(running.stop_pipe)
            running.stop_pipe = -1

    def _kill(self) -> None:
        self._deadline = time.monotonic() + KILL_TIMEOUT
        for running in self._processes:
            logger.warning("Process %d did not end in time and is killed", running.pid)
            os.kill(running.pid, signal.SIGKILL)


def run_child(
    work: Callable[[WorkerContext], int], worker: WorkerContext, pipes: Iterable[int]
) -> NoReturn:
    """What this process does from here on, which was a copy of the supervisor so far. pipes: of
    the supervisor; nobody else may hold them when it dies."""
    code = 1
    try:
        # A terminal's Ctrl-C is for all of its processes; workers stop when they are told to.
        os.setpgid(0, 0)
        close_pipes(*pipes)
        signal.set_wakeup_fd(-1)
        for number in HANDLED_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED_SIGNALS)
        code = work(worker)
    except BaseException:
        logger.exception("A worker failed")
    finally:
        logging.shutdown()
        sys.stdout.flush()
        os._exit(code)  # all else on the stack is the supervisor's


def close_pipes(*pipes: int) -> None:
    for pipe in pipes:
        if pipe >= 0:
            os.close(pipe)
