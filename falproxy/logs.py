"""How log records look: JSON lines, or plain lines where a person is watching."""

import json
import logging
import sys
from datetime import UTC, datetime

from aiohttp.http import HttpProcessingError


class JsonLines(logging.Formatter):
    """One JSON object a line: `time`, `level`, `logger`, `message`, then the record's fields."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **fields_of(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class PlainLines(logging.Formatter):
    """The same for a terminal: `12:00:00 info message name=value ...`."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields = (f"{name}={plain(value)}" for name, value in fields_of(record).items())
        return " ".join((super().formatMessage(record), *fields))


def fields_of(record: logging.LogRecord) -> dict[str, object]:
    """What a record carries beside its message (`extra={"fields": {...}}`), without the unknown."""
    fields: dict[str, object] = getattr(record, "fields", {})
    return {name: value for name, value in fields.items() if value is not None}


def hide_bad_requests(record: logging.LogRecord) -> bool:
    """Filter: aiohttp shows a request that it cannot read, with whatever secret is in it, and as
    an error, though any stranger can send one. Its kind is enough."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, HttpProcessingError):
        record.exc_info = record.exc_text = None
        record.levelno, record.levelname = logging.INFO, "INFO"
        record.msg, record.args = f"A request cannot be read: {type(error).__name__}", ()
    return True


def write_logs(level: str) -> None:
    """Sends all records from a level up to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PlainLines() if sys.stderr.isatty() else JsonLines())
    logging.getLogger("aiohttp.server").addFilter(hide_bad_requests)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs every URL
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def plain(value: object) -> str:
    """A value without characters that a terminal would obey."""
    return str(value).encode("unicode_escape").decode()
