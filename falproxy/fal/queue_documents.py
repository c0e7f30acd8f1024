"""The JSON documents of fal's queue."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from falproxy.errors import ProxyError
from falproxy.fal.target import parse_target
from falproxy.json_object import parse_object

# Statuses of gateways in front of fal, unless the response has fal's request id.
INGRESS_ERRORS = (502, 503, 504)
# A percentage in a line of a model's log, such as that of a progress bar.
PERCENTAGE = re.compile(r"(?<![\d.])(\d{1,3})(?:\.\d+)?\s?%")


@dataclass(frozen=True, slots=True)
class QueueState:
    """The state of a job in the queue.

    is_started: the job runs, or has ended.
    percent: how much of it is done according to its log, from 0 to 100; None if unknown.
    position: number of jobs before it; None if it does not wait.
    """

    is_started: bool = False
    is_completed: bool = False
    percent: int | None = None
    position: int | None = None


def parse_submit_response(body: bytes) -> tuple[str, str | None] | None:
    """Return the request id in fal's response to a submit, and the app in its URLs if known."""
    document = parse_object(body)
    request_id = None if document is None else document.get("request_id")
    if document is None or not isinstance(request_id, str):
        return None
    try:
        target = parse_target(str(document.get("status_url")))
    except ProxyError:
        return request_id, None
    return request_id, target.endpoint if target.request_id == request_id else None


def is_completed(status_document: bytes) -> bool:
    return parse_queue_state(status_document).is_completed


def parse_queue_state(status_document: bytes) -> QueueState:
    document = parse_object(status_document) or {}
    status = document.get("status")
    return QueueState(
        is_started=status in ("IN_PROGRESS", "COMPLETED"),
        is_completed=status == "COMPLETED",
        percent=parse_percentage(document.get("logs")),
        position=parse_position(document),
    )


def parse_percentage(logs: object) -> int | None:
    """Return the last percentage in the lines of a log."""
    for line in reversed(logs if isinstance(logs, list) else []):
        message = line.get("message") if isinstance(line, dict) else None
        found = PERCENTAGE.findall(message) if isinstance(message, str) else []
        if found and int(found[-1]) <= 100:
            return int(found[-1])
    return None


def parse_position(status: Mapping[str, object]) -> int | None:
    """Return the position of a job in the queue; None if it does not wait there."""
    position = status.get("queue_position")
    if not isinstance(position, int) or isinstance(position, bool):
        return None
    return position if status.get("status") == "IN_QUEUE" else None
