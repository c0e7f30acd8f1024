"""On which terms results are kept, and the names that they are kept under."""

import time
from dataclasses import dataclass, replace

from falproxy.cache import Result
from falproxy.call import Call
from falproxy.inputs import Material, key
from falproxy.middleware.images import Input
from falproxy.outputs import Outputs
from falproxy.policy import plain_path
from falproxy.reuse import telling_headers

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
    outputs: Outputs | None = None

    def tenant(self, owner: str) -> str:
        """Whose results a call gets, and adds to."""
        return owner if self.is_private and owner else SHARED

    async def result(self, body: bytes, content_type: str) -> Result:
        """With its files where we keep them. Those that could not be stored are tried again when
        the result is given out."""
        if self.outputs is not None:
            body = (await self.outputs.rewrite(body)).document
        now = time.time()
        return Result(body, content_type, now, now + self.ttl)


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
