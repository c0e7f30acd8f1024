"""One request to fal, read and checked, not yet sent."""

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass

from aiohttp import web
from multidict import CIMultiDictProxy

from falproxy.fal.keys import FalKey
from falproxy.fal.target import Target
from falproxy.media.image_rules import ImageLimits


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """What a client asks of fal, in fal's own terms.

    headers: the client's, as they came; `headers.headers_up` says which of them fal sees.
    body: the client's bytes as they arrive, None when there are none; it can be read once.
    length: how many bytes the body has, None when that shows only at its end.
    key: the fal key to send it with, None for whichever is in use.
    is_document: whether the answer is going to be read here, so that fal must not encode it.
    """

    method: str
    target: Target
    headers: CIMultiDictProxy[str]
    body: AsyncIterator[bytes] | None = None
    length: int | None = None
    key: FalKey | None = None
    needs_identity: bool = False


@dataclass(frozen=True, slots=True)
class LateOutcome:
    """Is told the status and headers of fal's answer to a call that went on for others when its
    client had left."""

    report: Callable[[int, Mapping[str, str]], None]


CALL = web.RequestKey("falproxy.call", Call)
# Which pictures the path takes, where that is less than what the proxy lets through.
IMAGE_LIMITS = web.RequestKey("falproxy.image_rules", ImageLimits)
REQUEST_ID = web.RequestKey("falproxy.request_id", str)
PRINCIPAL = web.RequestKey("falproxy.principal", str)
# Whose call it is by the client's own word, where a facade has a place for it.
USER_ID = web.RequestKey("falproxy.user_id", str)
# The principal with the way it was known by: the same name by another way is somebody else.
OWNER = web.RequestKey("falproxy.owner", str)
ERROR_CODE = web.RequestKey("falproxy.error_code", str)
# Seconds until fal's status line was here, or until it was clear that none would come.
UPSTREAM_SECONDS = web.RequestKey("falproxy.upstream_seconds", float)
# There for a call that goes out with the fal key whose turn it is: the next one has another.
USES_ROTATION = web.RequestKey("falproxy.in_turn", bool)
# There for a call that can be made once more and gets the same result, without another job.
RESULT_CACHED = web.RequestKey("falproxy.is_kept", bool)
# What became of the files of a result, as the answer's header says it.
REHOST_STATUS = web.RequestKey("falproxy.rehost", str)
# What became of a call whose result may be reused: hit, miss, collapsed or bypass.
CACHE_OUTCOME = web.RequestKey("falproxy.cache", str)
LATE_OUTCOME = web.RequestKey("falproxy.late", LateOutcome)
