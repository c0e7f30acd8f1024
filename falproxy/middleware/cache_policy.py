"""On which terms results are kept, and the names that they are kept under."""

import time
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from aiohttp import web

from falproxy.fal.input_json import KeyMaterial, cache_key
from falproxy.fal.policy import normalized_path
from falproxy.middleware.image_inputs import InspectedInput
from falproxy.proxy.call import Call
from falproxy.stores.cache import CachedResult, StoreError
from falproxy.stores.cache.circuit_breaker import StoreBreaker
from falproxy.stores.cache.eligibility import vary_headers

if TYPE_CHECKING:
    from falproxy.stores.files.rehosting import Rehoster

# The result that a call was answered with, by itself or by an id that stands for it.
CACHED_RESULT = web.RequestKey("falproxy.kept_result", CachedResult)
NO_OWNER_TOKEN = ""  # leads a flight by this token
SHARED_TENANT = "shared"  # the tenant of all who have none of their own


@dataclass(frozen=True, slots=True, kw_only=True)
class CachePolicy:
    """ttl: seconds that a result serves new calls. max_entry: bytes that a document may have.
    is_private: whether nobody gets the results of another principal. upstream: as in Material.
    outputs: where the files of results are kept, if they are."""

    ttl: float
    max_entry: int
    is_private: bool
    upstream: str
    rehoster: "Rehoster | None" = None

    def tenant(self, owner: str) -> str:
        """Whose results a call gets, and adds to."""
        return owner if self.is_private and owner else SHARED_TENANT

    def new_result(self, body: bytes, content_type: str) -> CachedResult:
        now = time.time()
        return CachedResult(body, content_type, now, now + self.ttl)

    async def rehost(self, breaker: StoreBreaker, key: str, result: CachedResult) -> None:
        """Has a result that is kept name its files where we keep them. It was kept first, as fal
        said it: it is paid for, and files take their time. Those that cannot be stored now are
        tried again when it is given out, and so are all whose addresses pass."""
        if self.rehoster is None:
            return
        rewritten = (await self.rehoster.rewrite(result.body)).document
        if rewritten == result.body or not self.rehoster.storage.has_permanent_urls:
            return
        with suppress(StoreError):
            found = await breaker.call(breaker.store.get(key))
            if found.result is not None and found.result.stored_at == result.stored_at:
                kept = replace(result, body=rewritten)
                await breaker.call(breaker.store.finish(key, NO_OWNER_TOKEN, kept))


def result_keys(
    call: Call, inspected: InspectedInput, cache_policy: CachePolicy, owner: str
) -> tuple[str, str]:
    """The key of the very bytes, and the key under which this call's result is kept.

    They differ where somebody else serves an image: he could give fal another one than us, and
    all who have the first would get what comes of the second. So what comes of an address serves
    that address only, unless it touches nobody else's calls.
    """
    material = key_material(call, inspected, cache_policy, owner)
    common = cache_key(material)
    if not inspected.third_party_urls or material.tenant != SHARED_TENANT:
        return common, common
    images = {
        loc: f"{inspected.digests[loc]} {url}" for loc, url in inspected.third_party_urls.items()
    }
    return common, cache_key(replace(material, images={**inspected.digests, **images}))


def key_material(
    call: Call, inspected: InspectedInput, cache_policy: CachePolicy, owner: str
) -> KeyMaterial:
    """All that a call's result depends on."""
    return KeyMaterial(
        endpoint=normalized_path(call.target).strip("/"),
        tenant=cache_policy.tenant(owner),
        upstream=cache_policy.upstream,
        headers=vary_headers(call.headers),
        tree=inspected.tree,
        images=inspected.digests,
    )
