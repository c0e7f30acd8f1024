"""On which terms results are kept, and the names that they are kept under."""

import time
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from aiohttp import web

from falproxy.fal.input_json import Material, key
from falproxy.fal.policy import plain_path
from falproxy.middleware.image_inputs import Input
from falproxy.proxy.call import Call
from falproxy.stores.cache import Result, StoreError
from falproxy.stores.cache.circuit_breaker import Guard
from falproxy.stores.cache.eligibility import telling_headers

if TYPE_CHECKING:
    from falproxy.stores.files.rehosting import Outputs

# The result that a call was answered with, by itself or by an id that stands for it.
KEPT_RESULT = web.RequestKey("falproxy.kept_result", Result)
NOBODY = ""  # leads a flight by this token
SHARED = "shared"  # the tenant of all who have none of their own


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """ttl: seconds that a result serves new calls. max_entry: bytes that a document may have.
    is_private: whether nobody gets the results of another principal. upstream: as in Material.
    outputs: where the files of results are kept, if they are."""

    ttl: float
    max_entry: int
    is_private: bool
    upstream: str
    outputs: "Outputs | None" = None

    def tenant(self, owner: str) -> str:
        """Whose results a call gets, and adds to."""
        return owner if self.is_private and owner else SHARED

    def result(self, body: bytes, content_type: str) -> Result:
        now = time.time()
        return Result(body, content_type, now, now + self.ttl)

    async def rehost(self, guard: Guard, key: str, result: Result) -> None:
        """Has a result that is kept name its files where we keep them. It was kept first, as fal
        said it: it is paid for, and files take their time. Those that cannot be stored now are
        tried again when it is given out, and so are all whose addresses pass."""
        if self.outputs is None:
            return
        rewritten = (await self.outputs.rewrite(result.body)).document
        if rewritten == result.body or not self.outputs.storage.lasts:
            return
        with suppress(StoreError):
            found = await guard.ask(guard.store.get(key))
            if found.result is not None and found.result.stored_at == result.stored_at:
                kept = replace(result, body=rewritten)
                await guard.ask(guard.store.finish(key, NOBODY, kept))


def name_result(call: Call, seen: Input, terms: Terms, owner: str) -> tuple[str, str]:
    """The key of the very bytes, and the key under which this call's result is kept.

    They differ where somebody else serves an image: he could give fal another one than us, and
    all who have the first would get what comes of the second. So what comes of an address serves
    that address only, unless it touches nobody else's calls.
    """
    material = describe(call, seen, terms, owner)
    common = key(material)
    if not seen.foreign or material.tenant != SHARED:
        return common, common
    images = {loc: f"{seen.digests[loc]} {url}" for loc, url in seen.foreign.items()}
    return common, key(replace(material, images={**seen.digests, **images}))


def describe(call: Call, seen: Input, terms: Terms, owner: str) -> Material:
    """All that a call's result depends on."""
    return Material(
        endpoint=plain_path(call.target).strip("/"),
        tenant=terms.tenant(owner),
        upstream=terms.upstream,
        headers=telling_headers(call.headers),
        tree=seen.tree,
        images=seen.digests,
    )
