"""Running a command, and the exit codes of its errors."""

import asyncio
import sys
import traceback
from asyncio import AbstractEventLoop
from collections.abc import Callable, Coroutine

from falproxy.errors import SettingsError

FAILED, INVALID_SETTINGS = 1, 2
INTERRUPTED = 130


def run_with_exit_code(command: Callable[[], int]) -> int:
    """Run a command and return its exit code, or that of a start or stop that failed."""
    try:
        return command()
    except SettingsError as error:
        sys.stderr.write(f"falproxy: {error}\n")
        return INVALID_SETTINGS
    except Exception as error:
        # The text is left out: it may be a value of a setting, such as a password.
        frames = "".join(traceback.format_tb(error.__traceback__))
        sys.stderr.write(f"{frames}falproxy: The command failed ({type(error).__name__}).\n")
        return FAILED
    except KeyboardInterrupt:  # a second one, which does not wait for running calls
        return INTERRUPTED


def run_coroutine(coroutine: Coroutine[object, object, int | None]) -> int:
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(coroutine) or 0


def loop_factory() -> Callable[[], AbstractEventLoop]:
    """Return the constructor of uvloop's event loop if uvloop is installed, else asyncio's."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop
