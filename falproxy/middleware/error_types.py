"""The type of fal's error in a failed response, from its header or its body."""

import re
import zlib
from collections.abc import Callable

from aiohttp import hdrs, web

from falproxy.fal.error_body import parse_error_body
from falproxy.proxy.forward import RelayedResponse
from falproxy.proxy.local_responses import LocalDocument

ERROR_STATUS = 400
ERROR_TYPE_HEADER = "x-fal-error-type"
BODY_MAX = 64 * 2**10  # bytes of an error's body that are read, and of its decompressed form
# Other texts are not types: they may have parts of the input.
ERROR_TYPE = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,99}")
GZIP_OR_ZLIB = zlib.MAX_WBITS | 32

ReportType = Callable[[str], None]


async def find_error_type(response: web.StreamResponse, report: ReportType) -> str | None:
    """Return the type of the error in an unsent response; None if it is no error or has none.

    report: called with the type if it is in a body that is still to be relayed.
    """
    if response.status < ERROR_STATUS:
        return None
    if isinstance(response, RelayedResponse):
        if known := checked_type(response.upstream_headers.get(ERROR_TYPE_HEADER, "")):
            return known
        if not response.is_body_complete:
            report_from_body(response, report)
            return None
        body = await response.document(BODY_MAX)  # a middleware has read it
        return None if body is None else type_in_body(body)
    if known := checked_type(response.headers.get(ERROR_TYPE_HEADER, "")):
        return known
    body = await response.document() if isinstance(response, LocalDocument) else None
    return None if body is None else type_in_body(body)


def report_from_body(response: RelayedResponse, report: ReportType) -> None:
    """Report the type when the body has been relayed, which is not delayed."""
    is_encoded = hdrs.CONTENT_ENCODING in response.upstream_headers
    pieces: list[bytes] = []
    size = 0

    def add_piece(piece: bytes) -> None:
        nonlocal size
        size += len(piece)
        if size <= BODY_MAX:
            pieces.append(piece)

    def parse_pieces() -> None:
        body = b"".join(pieces)
        pieces.clear()
        if found := type_in_body(decompress(body) if is_encoded else body):
            report(found)

    response.on_body_end(parse_pieces, add_piece)


def type_in_body(body: bytes) -> str | None:
    error = parse_error_body(body) if body else None
    if error is None:
        return None
    return checked_type(error.error_type or (error.model_error.type if error.model_error else ""))


def checked_type(text: str) -> str | None:
    return text if ERROR_TYPE.fullmatch(text) else None


def decompress(body: bytes) -> bytes:
    """Return the start of a gzip or zlib body; empty for other encodings."""
    try:
        return zlib.decompressobj(GZIP_OR_ZLIB).decompress(body, BODY_MAX)
    except zlib.error:
        return b""
