"""Log formats: JSON lines, or plain lines on a terminal."""

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

# The logger of the access log.
ACCESS_LOGGER = "falproxy.calls"
PIPE_BUF = 4096  # bytes that a pipe writes atomically (POSIX, PIPE_BUF on Linux)
BATCH_DELAY = 0.02  # seconds that a line may wait to be written together with others
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
    """Writes the access log in batches, without a log record for each line. Records written to
    this handler are sent at once, as by any handler."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self.setFormatter(JsonLines())
        self._lines: list[str] = []

    def write(self, level: int, fields: str) -> None:
        """Add the line of one call. Needs a running event loop.

        fields: JSON without its braces.
        """
        self._lines.append(
            f'{{"time": "{format_time(time.time())}", "level": "{LEVELS[level]}", '
            f'"logger": "{ACCESS_LOGGER}", "message": "call", {fields}}}\n'
        )
        if len(self._lines) == 1:
            asyncio.get_running_loop().call_later(BATCH_DELAY, self.flush)

    def flush(self) -> None:
        lines, self._lines = self._lines, []
        for batch in pipe_batches(lines):
            self.stream.write(batch)
            super().flush()


def pipe_batches(lines: Iterable[str]) -> Iterator[str]:
    """Yield lines in batches that a pipe writes atomically: several processes may share it."""
    batch = ""
    for line in lines:
        if batch and len(batch) + len(line) > PIPE_BUF:
            yield batch
            batch = ""
        batch += line
    if batch:
        yield batch


def access_log_handler(logger: logging.Logger) -> AccessLogHandler | None:
    """Return the logger's only handler if it is an `AccessLogHandler`, else None: other handlers
    need log records."""
    handlers = logger.handlers
    if logger.propagate or len(handlers) != 1:
        return None
    return handlers[0] if isinstance(handlers[0], AccessLogHandler) else None


def format_time(timestamp: float) -> str:
    """Return seconds since 1970 as an ISO 8601 time in UTC, with milliseconds."""
    second, fraction = divmod(timestamp, 1.0)
    return f"{format_second(int(second))}.{int(fraction * 1000):03d}+00:00"


@lru_cache(16)
def format_second(second: int) -> str:
    return datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S")


class PlainLines(logging.Formatter):
    """One line for a terminal: `12:00:00 info message name=value ...`."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields = (f"{name}={escape_control(value)}" for name, value in fields_of(record).items())
        return " ".join((super().formatMessage(record), *fields))


def fields_of(record: logging.LogRecord) -> dict[str, object]:
    """Return a record's fields (`extra={"fields": {...}}`) that are not None."""
    fields: dict[str, object] = getattr(record, "fields", {})
    return {name: value for name, value in fields.items() if value is not None}


def redact_bad_requests(record: logging.LogRecord) -> bool:
    """Filter: shorten aiohttp's record of a malformed request to one line at level info.

    aiohttp logs an error with the request, which may hold secrets, and anyone can send one.
    """
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, HttpProcessingError):
        record.exc_info = record.exc_text = None
        record.levelno, record.levelname = logging.INFO, "INFO"
        record.msg, record.args = f"A request cannot be read: {type(error).__name__}", ()
    return True


def configure_logging(level: str) -> None:
    """Send all records of at least this level to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PlainLines() if sys.stderr.isatty() else JsonLines())
    if not sys.stderr.isatty():
        calls = logging.getLogger(ACCESS_LOGGER)
        calls.propagate, calls.handlers = False, [AccessLogHandler(sys.stderr)]
    logging.getLogger("aiohttp.server").addFilter(redact_bad_requests)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs every URL
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def escape_control(value: object) -> str:
    """Return a value with the control characters escaped, which could change the terminal."""
    return str(value).encode("unicode_escape").decode()
