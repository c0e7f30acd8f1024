"""One call to fal, read and checked, not yet sent."""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from aiohttp import web
from multidict import CIMultiDictProxy

from falproxy.fal.keys import FalKey
from falproxy.fal.target import Target
from falproxy.limit_settings import CallerLimits
from falproxy.media.image_rules import ImageLimits
from falproxy.stores.keys.known_keys import KeyGrant


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One request to fal.

    headers: the client's, unfiltered; `headers.request_headers` filters them.
    body: the client's bytes as they arrive, None for no body; it can be read once.
    length: bytes of the body, None if unknown until its end.
    key: the fal key to send it with, None for the default one.
    needs_identity: the response is going to be read here, so fal must not encode it.
    tags: the value of `X-Fal-Tags`; None sends the client's header.
    is_memoized: the same object stands for equal requests, which have small heads.
    """

    method: str
    target: Target
    headers: CIMultiDictProxy[str]
    body: AsyncIterator[bytes] | None = None
    length: int | None = None
    key: FalKey | None = None
    needs_identity: bool = False
    tags: str | None = None
    is_memoized: bool = False


@dataclass(frozen=True, slots=True)
class LateOutcome:
    """The outcome of a call that continued for other clients after its own client had left.

    report: called with the status and headers of fal's response.
    """

    report: Callable[[int, Mapping[str, str]], None]


class Grant(Protocol):
    """The validity of a caller's credential. Cached decisions refer to it."""

    def use(self) -> bool:
        """Return whether a request may pass now, without another look at the credential."""


CALL = web.RequestKey("falproxy.call", Call)
# The image formats of this API, where they are fewer than those that the proxy accepts.
IMAGE_LIMITS = web.RequestKey("falproxy.image_limits", ImageLimits)
REQUEST_ID = web.RequestKey("falproxy.request_id", str)
# fal's id of the queued request that a request is about.
JOB_ID = web.RequestKey("falproxy.job_id", str)
# The authenticated caller.
PRINCIPAL = web.RequestKey("falproxy.principal", str)
# The person behind the call, as an authenticated caller names them (`proxy/user.py`).
USER = web.RequestKey("falproxy.user", str)
# The principal with its authentication method: the same name by another method is another owner.
OWNER = web.RequestKey("falproxy.owner", str)
# Limits of the caller's key, which replace the settings.
CALLER_LIMITS = web.RequestKey("falproxy.caller_limits", CallerLimits)
# Set for callers with a key that was made at run time.
KEY_GRANT = web.RequestKey("falproxy.key_grant", KeyGrant)
# Set for callers whose credential may end: a token, a key made at run time, a hook's identity.
GRANT = web.RequestKey("falproxy.grant", Grant)
# Set if the same request head may come from another caller on another connection.
CONNECTION_BOUND = web.RequestKey("falproxy.connection_bound", bool)
ERROR_CODE = web.RequestKey("falproxy.error_code", str)
# Seconds until fal's response head arrived, or until the call failed.
UPSTREAM_SECONDS = web.RequestKey("falproxy.upstream_seconds", float)
# Set for a call that takes its fal key from the rotation: the next call gets another key.
USES_ROTATION = web.RequestKey("falproxy.uses_rotation", bool)
# Set for a call that returns the same result when it is repeated, without another job; read by
# re-hosting.
REPEAT_IS_FREE = web.RequestKey("falproxy.repeat_is_free", bool)
# The value of the response header `x-falproxy-rehost`.
REHOST_STATUS = web.RequestKey("falproxy.rehost_status", str)
# Seconds until the files of a result were stored; not set if it has none.
STORED_SECONDS = web.RequestKey("falproxy.stored_seconds", float)
# The cache outcome of a cacheable call: hit, miss, collapsed or bypass.
CACHE_OUTCOME = web.RequestKey("falproxy.cache_outcome", str)
# The inputs of a model call that its price may depend on; not set if they cannot be read.
PRICED_INPUTS = web.RequestKey("falproxy.priced_inputs", dict[str, object])
# The inputs of the calls that the same request makes after this one: limits admit all or none.
FOLLOWING_INPUTS = web.RequestKey("falproxy.following_inputs", Sequence[Mapping[str, object]])
# Set for a call that rates have counted already, and that had to wait for its place.
RATES_COUNTED = web.RequestKey("falproxy.rates_counted", bool)
# The id in fal's response to the opening of a session of live video.
OPENED_SESSION = web.RequestKey("falproxy.opened_session", str)
LATE_OUTCOME = web.RequestKey("falproxy.late_outcome", LateOutcome)
