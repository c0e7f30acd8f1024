"""The request header `Idempotency-Key` (IETF draft httpapi-idempotency-key-header).

A dialect whose calls to fal differ from the client's request stores the digest of that request
(`set_client_digest`), so that a repetition is recognized by it.
"""

import asyncio
import json
import re
from collections.abc import Iterable
from hashlib import sha256

from aiohttp import web
from multidict import CIMultiDictProxy

from falproxy.concurrency import OFFLOAD_MIN
from falproxy.errors import ProxyError
from falproxy.spool import Spool

IDEMPOTENCY_KEY = "Idempotency-Key"
IDEMPOTENCY_REPLAYED = "Idempotency-Replayed"
OTHER_OPERATION = "idempotency_other_operation"  # error code
LENGTH_MAX = 255  # characters
# A string of RFC 8941 §3.3.3, which the draft requires, or any other printable characters.
STRING = re.compile(r'"((?:[ !#-\[\]-~]|\\["\\])*)"')
BARE = re.compile(r"[!#-~][ -~]*")
ESCAPE = re.compile(r"\\(.)")

# Digest of the client's request, in dialects whose calls have other bodies.
CLIENT_DIGEST = web.RequestKey("falproxy.client_digest", str)
# The number of the call, of several for one request.
CALL_NUMBER = web.RequestKey("falproxy.call_number", int)
# Set if the response, or a part of it, is that of an earlier call with the key.
IS_REPLAYED = web.RequestKey("falproxy.is_replayed", bool)


def read_idempotency_key(headers: CIMultiDictProxy[str]) -> str | None:
    """Return the key of a request; None if it has none.

    Raises: ProxyError 400 `idempotency_key_invalid`.
    """
    values = headers.getall(IDEMPOTENCY_KEY, ())
    if not values:
        return None
    value = values[0].strip(" \t")
    if (match := STRING.fullmatch(value)) is not None:
        key = ESCAPE.sub(r"\1", match[1])
    else:
        key = value if BARE.fullmatch(value) else ""
    if len(values) > 1 or not 0 < len(key) <= LENGTH_MAX:
        message = (
            f"Send one {IDEMPOTENCY_KEY} of 1 to {LENGTH_MAX} printable ASCII characters, such as "
            "a UUID, with or without quotation marks."
        )
        raise ProxyError(400, "idempotency_key_invalid", message)
    return key


def has_idempotency_key(request: web.Request) -> bool:
    return IDEMPOTENCY_KEY in request.headers


async def set_client_digest(request: web.Request, parts: Iterable[str | Spool]) -> None:
    """Store the digest of the client's request, if it has a key.

    parts: of its body, in a defined order.
    Raises: ProxyError 400, the key is invalid.
    """
    if read_idempotency_key(request.headers) is not None:
        start = (request.method, request.path)
        request[CLIENT_DIGEST] = await digest_parts((*start, *parts))


async def digest_parts(parts: Iterable[str | Spool]) -> str:
    """Return a digest that differs for different sequences of parts."""
    parts = tuple(parts)
    size = sum(part.size for part in parts if isinstance(part, Spool))
    if size < OFFLOAD_MIN:
        return hash_parts(parts)
    return await asyncio.to_thread(hash_parts, parts)


def hash_parts(parts: Iterable[str | Spool]) -> str:
    texts = [part if isinstance(part, str) else part.digest() for part in parts]
    return sha256(json.dumps(texts).encode()).hexdigest()
