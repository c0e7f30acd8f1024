"""Starts of processes, which the dashboard marks in its charts."""

import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from falproxy.stores.ledger import ProcessStart, QueryReader
from falproxy.stores.ledger.call_list import MS
from falproxy.stores.ledger.rows import Row, to_ms
from falproxy.version import __version__

STARTS_MAX = 1000  # of a report, the newest
MARK_SECONDS = 60.0  # starts of one version within this time are one mark

# With the start before the period, whose version is the one that the first is compared with.
SELECT_STARTS = f"""
    SELECT at, version, host FROM falproxy_starts
    WHERE at < $2 AND at >= COALESCE((SELECT MAX(at) FROM falproxy_starts WHERE at < $1), $1)
    ORDER BY at DESC, id DESC LIMIT {STARTS_MAX}
"""


@dataclass(slots=True)
class StartMark:
    """Starts of one version at about the same time.

    at: of the first one, in seconds since 1970.
    is_new_version: the start before was of another version, or there is none.
    """

    at: float
    version: str
    processes: int
    hosts: int
    is_new_version: bool


@lru_cache(1)
def start_of_process(process_id: int) -> ProcessStart:
    """Return the start of this process: an application that is created again, such as by a reload,
    has the same one. Processes that are forked afterwards have others."""
    return ProcessStart(__version__, socket.gethostname(), time.time())


def this_start() -> ProcessStart:
    return start_of_process(os.getpid())


async def read_starts(reader: QueryReader, since: float, until: float) -> list[StartMark]:
    """Return the starts of a period, oldest first. Raises: LedgerError."""
    rows = await reader.read(SELECT_STARTS, (to_ms(since), to_ms(until)))
    earlier = [row for row in rows if row[0] < to_ms(since)]
    previous = earlier[0][1] if earlier else None
    return marks_from_rows(rows[: len(rows) - len(earlier)][::-1], previous)


def marks_from_rows(rows: Sequence[Row], previous: str | None) -> list[StartMark]:
    """rows: oldest first. previous: version of the start before them, None if there is none."""
    marks: list[StartMark] = []
    hosts: set[str] = set()
    if previous is None and len(rows) == STARTS_MAX:  # there may be earlier ones
        previous = rows[0][1]
    for at_ms, version, host in rows:
        at, mark = at_ms / MS, marks[-1] if marks else None
        if mark is not None and version == mark.version and at - mark.at < MARK_SECONDS:
            hosts.add(host)
            mark.processes, mark.hosts = mark.processes + 1, len(hosts)
        else:
            hosts = {host}
            marks.append(StartMark(at, version, 1, 1, is_new_version=version != previous))
        previous = version
    return marks
