"""Lifetime and sharing of cached results, and their cache keys."""

import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from aiohttp import web

from falproxy.fal.cache_key import KeyMaterial, cache_key
from falproxy.fal.policy import normalized_path
from falproxy.middleware.image_inputs import InspectedInput
from falproxy.proxy.call import Call
from falproxy.stores.cache import CachedResult, StoreError
from falproxy.stores.cache.circuit_breaker import StoreBreaker
from falproxy.stores.cache.eligibility import vary_headers

if TYPE_CHECKING:
    from falproxy.stores.files.rehosting import Rehoster

# The cached result in the response, or for which the response has a virtual id; accounting
# estimates its price.
CACHED_RESULT = web.RequestKey("falproxy.cached_result", CachedResult)
NO_OWNER_TOKEN = ""  # matches no shared call, so that only the result is stored
CONTENT_TYPE_MAX = 200  # characters of a type that is stored; cached results are JSON
JSON = "application/json"
# Its arguments are the request id, and status and headers of the result.
SettleJob = Callable[[str, int, Mapping[str, str]], Awaitable[None]]
SHARED_TENANT = "shared"  # the tenant of all callers without one of their own


@dataclass(frozen=True, slots=True, kw_only=True)
class CachePolicy:
    """Settings of the result cache.

    ttl: seconds that a result is served to new calls.
    max_entry: maximum bytes of a document.
    is_private: True if callers do not share their results.
    upstream: as in `KeyMaterial`.
    rehoster: None if the files of results stay at fal.
    settle_job: called with the end of a job; None without limits.
    """

    ttl: float
    max_entry: int
    is_private: bool
    upstream: str
    rehoster: "Rehoster | None" = None
    settle_job: SettleJob | None = None

    def tenant(self, owner: str) -> str:
        """Return the group of callers that share their results with this one."""
        return owner if self.is_private and owner else SHARED_TENANT

    def new_result(self, body: bytes, content_type: str) -> CachedResult:
        now = time.time()
        is_usual = content_type.isascii() and len(content_type) <= CONTENT_TYPE_MAX
        return CachedResult(body, content_type if is_usual else JSON, now, now + self.ttl)

    async def rehost(self, breaker: StoreBreaker, key: str, result: CachedResult) -> None:
        """Store the files of a cached result, and replace their URLs in it.

        The result is cached before that with fal's URLs, because it is paid for and the files take
        time. Files that cannot be stored now, or whose stored URLs expire, are handled again when
        the result is served.
        """
        if self.rehoster is None:
            return
        rewritten = (await self.rehoster.rewrite(result.body)).document
        if rewritten == result.body or not self.rehoster.storage.has_permanent_urls:
            return
        with suppress(StoreError):
            current = (await breaker.call(breaker.store.get(key))).result
            if current is not None and current.stored_at == result.stored_at:
                rehosted = replace(result, body=rewritten)
                await breaker.call(breaker.store.finish(key, NO_OWNER_TOKEN, rehosted))


def result_keys(
    call: Call, inspected: InspectedInput, cache_policy: CachePolicy, owner: str
) -> tuple[str, str]:
    """Return the content key, made of the bytes of all images, and the source key, under which the
    result of this call is stored.

    They differ if an image is on a third-party host. That host could send fal other bytes than us,
    and the result of those would be served to all callers that have the right image. Therefore the
    source key contains the URL as well, unless callers do not share results.
    """
    material = key_material(call, inspected, cache_policy, owner)
    content_key = cache_key(material)
    if not inspected.third_party_urls or material.tenant != SHARED_TENANT:
        return content_key, content_key
    images = {
        loc: f"{inspected.digests[loc]} {url}" for loc, url in inspected.third_party_urls.items()
    }
    return content_key, cache_key(replace(material, images={**inspected.digests, **images}))


def key_material(
    call: Call, inspected: InspectedInput, cache_policy: CachePolicy, owner: str
) -> KeyMaterial:
    return KeyMaterial(
        endpoint=normalized_path(call.target).strip("/"),
        tenant=cache_policy.tenant(owner),
        upstream=cache_policy.upstream,
        headers=vary_headers(call.headers),
        tree=inspected.tree,
        images=inspected.digests,
    )
