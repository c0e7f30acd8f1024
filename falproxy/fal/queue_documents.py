"""The JSON documents of fal's queue."""

from falproxy.errors import ProxyError
from falproxy.fal.target import parse_target
from falproxy.json_object import parse_object

# Statuses of gateways in front of fal, unless the response has fal's request id.
INGRESS_ERRORS = (502, 503, 504)


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
    status = parse_object(status_document)
    return status is not None and status.get("status") == "COMPLETED"


def parse_queue_position(status_document: bytes) -> int | None:
    """Return the position of a job in the queue; None if it does not wait there."""
    status = parse_object(status_document) or {}
    position = status.get("queue_position")
    if not isinstance(position, int) or isinstance(position, bool):
        return None
    return position if status.get("status") == "IN_QUEUE" else None
