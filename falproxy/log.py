"""How log records look: JSON lines, or plain lines where a person is watching."""

import asyncio
import json
import logging
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from functools import lru_cache
from typing import TextIO

from aiohttp.http import HttpProcessingError

# The logger that has one line a call.
ACCESS_LOGGER = "falproxy.calls"
PIPE_BUF = 4096  # bytes that a pipe takes whole (POSIX, PIPE_BUF on Linux)
BATCH_DELAY = 0.02  # seconds that a call's line may wait for others
encode = json.JSONEncoder(default=str).encode
LEVELS = {logging.INFO: "info", logging.WARNING: "warning"}


class JsonLines(logging.Formatter):
    """One JSON object a line: `time`, `level`, `logger`, `message`, then the record's fields."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": format_time(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **fields_of(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return encode(line)


class AccessLogHandler(logging.StreamHandler[TextIO]):
    """The lines of calls, of which there are many: they are made without a record each, and leave
    a moment later, together. What comes as a record leaves at once, as everywhere."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self.setFormatter(JsonLines())
        self._lines: list[str] = []

    def write(self, level: int, fields: str) -> None:
        """A call's line. fields: JSON without its braces. Only on a running event loop."""
        self._lines.append(
            f'{{"time": "{format_time(time.time())}", "level": "{LEVELS[level]}", '
            f'"logger": "{ACCESS_LOGGER}", "message": "call", {fields}}}\n'
        )
        if len(self._lines) == 1:
            asyncio.get_running_loop().call_later(BATCH_DELAY, self.flush)

    def flush(self) -> None:
        lines, self._lines = self._lines, []
        for piece in pipe_batches(lines):
            self.stream.write(piece)
            super().flush()


def pipe_batches(lines: Iterable[str]) -> Iterator[str]:
    """Lines in pieces that a pipe takes whole: several processes may write into it at once."""
    piece = ""
    for line in lines:
        if piece and len(piece) + len(line) > PIPE_BUF:
            yield piece
            piece = ""
        piece += line
    if piece:
        yield piece


def access_log_handler(logger: logging.Logger) -> AccessLogHandler | None:
    """Where a logger's calls go without a record each. None where somebody else takes them, or
    some of them."""
    handlers = logger.handlers
    if logger.propagate or len(handlers) != 1:
        return None
    return handlers[0] if isinstance(handlers[0], AccessLogHandler) else None


def format_time(at: float) -> str:
    """A time in UTC, to the millisecond."""
    second, rest = divmod(at, 1.0)
    return f"{format_second(int(second))}.{int(rest * 1000):03d}+00:00"


@lru_cache(16)
def format_second(second: int) -> str:
    return datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S")


class PlainLines(logging.Formatter):
    """The same for a terminal: `12:00:00 info message name=value ...`."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields = (f"{name}={escape_control(value)}" for name, value in fields_of(record).items())
        return " ".join((super().formatMessage(record), *fields))


def fields_of(record: logging.LogRecord) -> dict[str, object]:
    """What a record carries beside its message (`extra={"fields": {...}}`), without the unknown."""
    fields: dict[str, object] = getattr(record, "fields", {})
    return {name: value for name, value in fields.items() if value is not None}


def redact_bad_requests(record: logging.LogRecord) -> bool:
    """Filter: aiohttp shows a request that it cannot read, with whatever secret is in it, and as
    an error, though any stranger can send one. Its kind is enough."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, HttpProcessingError):
        record.exc_info = record.exc_text = None
        record.levelno, record.levelname = logging.INFO, "INFO"
        record.msg, record.args = f"A request cannot be read: {type(error).__name__}", ()
    return True


def configure_logging(level: str) -> None:
    """Sends all records from a level up to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PlainLines() if sys.stderr.isatty() else JsonLines())
    if not sys.stderr.isatty():
        calls = logging.getLogger(ACCESS_LOGGER)
        calls.propagate, calls.handlers = False, [AccessLogHandler(sys.stderr)]
    logging.getLogger("aiohttp.server").addFilter(redact_bad_requests)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs every URL
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def escape_control(value: object) -> str:
    """A value without characters that a terminal would obey."""
    return str(value).encode("unicode_escape").decode()
