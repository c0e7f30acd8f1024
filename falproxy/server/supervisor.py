"""Worker processes on one port, and the supervisor that starts, restarts and stops them."""

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

from falproxy.metrics import METRICS
from falproxy.server.service_manager import ServiceManager
from falproxy.server.signals import RELOAD_SIGNAL, SIGNALS, STOP_LATER
from falproxy.server.worker_metrics import retire_worker, share_metrics

logger = logging.getLogger(__name__)

HANDLED_SIGNALS = (*SIGNALS, signal.SIGCHLD, *filter(None, [RELOAD_SIGNAL]))
# Seconds until a crashed worker is restarted: doubling, and reset after a long enough lifetime.
BACKOFF_MIN, BACKOFF_MAX, BACKOFF_RESET = 0.1, 30.0, 60.0
KILL_TIMEOUT = 5.0  # seconds beyond the drain, after which a worker is killed
READ_SIZE = 4096


@dataclass(frozen=True, slots=True)
class WorkerContext:
    """A worker's connection to its supervisor and the other workers.

    stop_pipe: reaches its end when the worker has to stop, also when the supervisor has died.
    folder: holds the sockets of the workers; None if no folder is writable.
    ready_pipe: to the supervisor.
    restarts: of workers that had ended unexpectedly, until this one was started.
    is_first: it has the first slot, and no predecessor.
    """

    stop_pipe: int
    folder: Path | None
    ready_pipe: int
    restarts: int = 0
    is_first: bool = True

    def join(self, app: web.Application) -> None:
        """Connect an application to the other workers."""
        app[METRICS].health["worker_restarts"] = lambda: self.restarts
        if self.folder is not None:
            share_metrics(app, self.folder)

    def signal_ready(self) -> None:
        """Report to the supervisor that calls are accepted."""
        with suppress(BrokenPipeError):  # it has died, so that the worker is about to stop
            os.write(self.ready_pipe, b"1")
        os.close(self.ready_pipe)


@dataclass(slots=True)
class WorkerProcess:
    """A running worker, as the supervisor sees it.

    stop_pipe: the worker stops when this is closed.
    ready_pipe: has a byte to read once calls are accepted; -1 after that.
    generation: number of reloads before its start.
    """

    pid: int
    stop_pipe: int
    ready_pipe: int
    generation: int
    started_at: float = field(default_factory=time.monotonic)


@dataclass(slots=True)
class WorkerSlot:
    """The place of one worker and its successors.

    restart_delay: seconds.
    start_at: earliest start of the next process, by `time.monotonic`.
    """

    number: int
    process: WorkerProcess | None = None
    restart_delay: float = BACKOFF_MIN
    start_at: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisorConfig:
    """What a supervisor runs.

    count: of workers.
    work: run by each worker in a forked process; returns its exit code. There must be no thread
        and no event loop before the fork.
    stop_timeout: seconds for workers to stop.
    on_started: called once the first worker accepts calls.
    on_reload: called on SIGHUP; returns whether the new settings are valid, for new workers too.
    manager: is notified.
    """

    count: int
    work: Callable[[WorkerContext], int]
    stop_timeout: float
    on_started: Callable[[], None]
    on_reload: Callable[[], bool]
    manager: ServiceManager


def supervise(config: SupervisorConfig, fallback_folder: Path) -> int:
    """Keep workers running until SIGTERM or SIGINT, then let them finish their calls.

    fallback_folder: for temporary files, if no folder for these is writable.

    Returns the exit code: 0 after a clean stop; the first worker's if it could not start.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(temporary_folder(fallback_folder))
        signal_pipe = stack.enter_context(open_signal_pipe())
        gc.collect()
        gc.freeze()  # keeps the memory pages that all processes share unchanged
        return Supervisor(config, folder, signal_pipe).run()


@contextmanager
def temporary_folder(fallback: Path) -> Iterator[Path | None]:
    """Context manager: create a folder for the sockets of workers; None if that is not possible."""
    with ExitStack() as stack:
        folder = None
        for parent in (None, fallback):
            if folder is None:
                with suppress(OSError):
                    temporary = tempfile.TemporaryDirectory(prefix="falproxy-workers-", dir=parent)
                    folder = Path(stack.enter_context(temporary))
        if folder is None:
            logger.warning(
                "No folder for temporary files is writable: /metrics returns the numbers of one "
                "worker instead of their sum. Set TMPDIR to one."
            )
        yield folder


@contextmanager
def open_signal_pipe() -> Iterator[int]:
    """Context manager: return a pipe that gets a byte for each signal."""
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    os.set_blocking(write_end, False)
    old_handlers = {number: signal.signal(number, lambda *_: None) for number in HANDLED_SIGNALS}
    old_wakeup_fd = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    try:
        yield read_end
    finally:
        signal.set_wakeup_fd(old_wakeup_fd)
        for number, handler in old_handlers.items():
            signal.signal(number, handler)
        os.close(read_end)
        os.close(write_end)


class Supervisor:
    """Starts, restarts and stops the workers.

    signal_pipe: has a byte for each signal.
    """

    def __init__(self, config: SupervisorConfig, folder: Path | None, signal_pipe: int) -> None:
        self._config = config
        self._slots = [WorkerSlot(number) for number in range(1, config.count + 1)]
        self._folder = folder
        self._signal_pipe = signal_pipe
        self._generation = 0
        self._was_ready = False  # a worker has been ready
        self._deadline: float | None = None  # set while stopping
        self._exit_code = 0
        self._restarts = 0
        self._next_alive = time.monotonic()  # next message for the watchdog

    def run(self) -> int:
        while self._deadline is None or self._processes:
            self._start_due()
            for number in self._wait():
                if number in SIGNALS:
                    self._stop(number)
                elif number == RELOAD_SIGNAL and self._deadline is None:
                    self._reload()
            self._reap()
            self._send_alive()
            if self._deadline is not None and time.monotonic() >= self._deadline:
                self._kill()
        return self._exit_code

    def __repr__(self) -> str:
        state = "running" if self._deadline is None else "stopping"
        return f"<Supervisor {state}, {len(self._processes)} of {len(self._slots)} workers>"

    @property
    def _processes(self) -> list[WorkerProcess]:
        return [slot.process for slot in self._slots if slot.process is not None]

    @property
    def _startable_slots(self) -> list[WorkerSlot]:
        """Only the first slot until a worker has been ready: if it fails, no other is tried."""
        return self._slots if self._was_ready else self._slots[:1]

    def _start_due(self) -> None:
        if self._deadline is not None:
            return
        for slot in self._startable_slots:
            if slot.process is None and slot.start_at <= time.monotonic():
                self._start(slot)

    def _wait(self) -> bytes:
        """Wait for a signal, a ready worker or the next deadline. Return the signals received."""
        times = [slot.start_at for slot in self._startable_slots if slot.process is None]
        if self._deadline is not None:
            times = [self._deadline]
        if self._config.manager.watchdog_interval is not None:
            times.append(self._next_alive)
        seconds = max(min(times) - time.monotonic(), 0) if times else None
        unready = {
            process.ready_pipe: process for process in self._processes if process.ready_pipe >= 0
        }
        readable, _, _ = select.select([self._signal_pipe, *unready], [], [], seconds)
        for pipe in set(readable) & unready.keys():
            self._read_ready_pipe(unready[pipe])
        with suppress(BlockingIOError):
            return os.read(self._signal_pipe, READ_SIZE)
        return b""

    def _read_ready_pipe(self, process: WorkerProcess) -> None:
        is_ready = os.read(process.ready_pipe, 1) != b""  # empty: it ended, which `_reap` handles
        os.close(process.ready_pipe)
        process.ready_pipe = -1
        if is_ready and process.generation != self._generation:
            self._signal_reload(process)
        if is_ready and not self._was_ready:
            self._was_ready = True
            self._config.on_started()
            self._config.manager.ready()

    def _reload(self) -> None:
        """Let all workers read the settings again, those that are starting when they are ready."""
        self._config.manager.reloading()
        if self._config.on_reload():
            self._generation += 1
            for process in self._processes:
                if process.ready_pipe < 0:
                    self._signal_reload(process)
        self._config.manager.ready()

    def _signal_reload(self, process: WorkerProcess) -> None:
        process.generation = self._generation
        if RELOAD_SIGNAL is not None:
            os.kill(process.pid, RELOAD_SIGNAL)

    def _send_alive(self) -> None:
        interval = self._config.manager.watchdog_interval
        if interval is not None and time.monotonic() >= self._next_alive:
            self._config.manager.alive()
            self._next_alive = time.monotonic() + interval

    def _start(self, slot: WorkerSlot) -> None:
        child_stop_pipe, stop_pipe = os.pipe()
        ready_pipe, child_ready_pipe = os.pipe()
        # Before the child resets its handlers, its signals would be written to the signal pipe.
        signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED_SIGNALS)
        try:
            pid = os.fork()
            if pid == 0:
                worker = WorkerContext(
                    child_stop_pipe,
                    self._folder,
                    child_ready_pipe,
                    self._restarts,
                    is_first=not self._was_ready and slot.number == 1,
                )
                pipes = [stop_pipe, ready_pipe, self._signal_pipe, *self._pipes()]
                run_child(self._config.work, worker, pipes)
            slot.process = WorkerProcess(pid, stop_pipe, ready_pipe, self._generation)
        except OSError as error:  # too many processes, or no memory for one
            close_pipes(stop_pipe, ready_pipe)
            self._schedule_restart(slot, f"could not start: {error.strerror}", 0)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED_SIGNALS)
            close_pipes(child_stop_pipe, child_ready_pipe)

    def _pipes(self) -> list[int]:
        return [
            pipe for process in self._processes for pipe in (process.stop_pipe, process.ready_pipe)
        ]

    def _reap(self) -> None:
        """Handle processes that ended. As process 1 of a container, the supervisor also gets
        processes that are no workers."""
        by_pid = {slot.process.pid: slot for slot in self._slots if slot.process is not None}
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0] != 0:
                pid, status = ended
                if (slot := by_pid.get(pid)) is not None and slot.process is not None:
                    self._on_exit(slot, slot.process, os.waitstatus_to_exitcode(status))

    def _on_exit(self, slot: WorkerSlot, process: WorkerProcess, code: int) -> None:
        slot.process = None
        close_pipes(process.stop_pipe, process.ready_pipe)
        if self._folder is not None:
            retire_worker(self._folder, process.pid)
        if self._deadline is not None:
            self._exit_code = self._exit_code or int(code != 0)
        elif not self._was_ready:
            self._deadline = time.monotonic()
            self._exit_code = max(code, 1)
        else:
            status = f"exit code {code}" if code >= 0 else f"signal {-code}"
            reason = f"(process {process.pid}) ended with {status}"
            self._schedule_restart(slot, reason, time.monotonic() - process.started_at)

    def _schedule_restart(self, slot: WorkerSlot, reason: str, lifetime: float) -> None:
        """Set the time of the next start.

        lifetime: seconds that the last process ran.
        """
        if lifetime >= BACKOFF_RESET:
            slot.restart_delay = BACKOFF_MIN
        logger.error(
            "Worker %d %s; it is restarted in %g s", slot.number, reason, slot.restart_delay
        )
        self._restarts += 1
        slot.start_at = time.monotonic() + slot.restart_delay
        slot.restart_delay = min(2 * slot.restart_delay, BACKOFF_MAX)

    def _stop(self, number: int) -> None:
        """Let the workers finish their calls; at the second signal, kill them."""
        if self._deadline is not None:
            self._exit_code = 128 + number
            self._deadline = time.monotonic()
            return
        self._config.manager.stopping()
        self._deadline = time.monotonic() + self._config.stop_timeout + KILL_TIMEOUT
        for process in self._processes:
            if number != signal.SIGINT:
                with suppress(OSError):  # it has ended
                    os.write(process.stop_pipe, STOP_LATER)
            close_pipes(process.stop_pipe)
            process.stop_pipe = -1

    def _kill(self) -> None:
        self._deadline = time.monotonic() + KILL_TIMEOUT
        for process in self._processes:
            logger.warning("Process %d did not end in time and is killed", process.pid)
            os.kill(process.pid, signal.SIGKILL)


def run_child(
    work: Callable[[WorkerContext], int], worker: WorkerContext, pipes: Iterable[int]
) -> NoReturn:
    """Turn the forked process into a worker, and exit when its work is done.

    pipes: of the supervisor. They are closed here, so that the workers notice when it dies.
    """
    code = 1
    try:
        # Ctrl-C goes to the whole process group; workers only stop when their stop pipe is closed.
        os.setpgid(0, 0)
        close_pipes(*pipes)
        signal.set_wakeup_fd(-1)
        for number in HANDLED_SIGNALS:
            is_reload = number == RELOAD_SIGNAL  # ignored until the worker can handle it
            signal.signal(number, signal.SIG_IGN if is_reload else signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED_SIGNALS)
        code = work(worker)
    except BaseException:
        logger.exception("A worker failed")
    finally:
        logging.shutdown()
        sys.stdout.flush()
        os._exit(code)  # the rest of the stack is the supervisor's


def close_pipes(*pipes: int) -> None:
    for pipe in pipes:
        if pipe >= 0:
            os.close(pipe)
