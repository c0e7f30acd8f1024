"""`falproxy cache`: size of the result cache, its deletion, and the cache key of a call."""

import json
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import time

from multidict import CIMultiDict, CIMultiDictProxy

from falproxy.app.components import create_cache_policy, create_cache_store, create_fetcher
from falproxy.errors import ProxyError, SettingsError
from falproxy.fal.cache_key import explain_key
from falproxy.fal.target import parse_target
from falproxy.media.image_rules import ImageLimits, InputRefused
from falproxy.middleware.cache_policy import key_material, result_keys
from falproxy.middleware.image_inputs import ImageCheck, InspectedInput
from falproxy.proxy.call import Call
from falproxy.settings import Settings
from falproxy.spool import Spool
from falproxy.stores.cache import Lookup
from falproxy.stores.cache.eligibility import CacheControl, CacheEligibility, parse_cache_control

BYPASS_REASONS = {
    "off": "FALPROXY_CACHE is off",
    "endpoint": "the endpoint is not in FALPROXY_CACHE_ENDPOINTS",
    "webhook": "fal sends the result to fal_webhook",
    "query": "the URL has a query",
    "store-io": "X-Fal-Store-IO turns off storage at fal",
    "no-store": "Cache-Control contains no-store",
    "input": "the input is not unambiguous JSON (NaN, duplicate keys), is very large, or very deep",
    "image": "an image could not be read here, or is not given as a plain URL or data URI",
}


@dataclass(frozen=True, slots=True)
class DescribedCall:
    """A model call that a file describes.

    principal: the caller, as `route:name`, for example `key:ann`.
    """

    call: Call
    body: bytes
    principal: str


async def stats(settings: Settings) -> AsyncIterator[str]:
    """Yield the place and size of the result cache. Raises: SettingsError, StoreError."""
    async with create_cache_store(settings) as store:
        counts = await store.stats()
    file = (settings.data_dir / "results.sqlite").resolve()
    yield f"store    {'Redis, by REDIS_URL' if settings.cache.redis_url else file}"
    yield f"results  {counts.results}"
    yield f"bytes    {counts.size}"
    yield f"flights  {counts.shared_calls}"
    yield f"ids      {counts.virtual_ids}"


async def clear(settings: Settings) -> AsyncIterator[str]:
    """Delete all results. Raises: SettingsError, StoreError."""
    async with create_cache_store(settings) as store:
        yield f"results deleted: {await store.clear()}"


async def explain(settings: Settings, file: Path) -> AsyncIterator[str]:
    """Yield the cache key of a call, its material, and the outcome of the call now. The call is not
    made, but images are read from their URLs.

    Raises: SettingsError, the file does not describe a call; StoreError.
    """
    described = read_call(file)
    try:
        inspected = await inspect_input(settings, described)
    except ProxyError as error:
        yield f"refused  {error.code}{error_location(error)}: {error.message}"
        for note in notes(settings):
            yield f"note     {note}"
        return
    if inspected.bypass_reason is not None:
        reason = BYPASS_REASONS.get(inspected.bypass_reason, "it cannot be shared")
        yield f"bypass   {inspected.bypass_reason}: {reason}"
        return
    call, policy, owner = described.call, create_cache_policy(settings), described.principal
    content_key, source_key = result_keys(call, inspected, policy, owner)
    material = key_material(call, inspected, policy, owner)
    yield f"key      {source_key}"
    yield f"made of  {json.dumps(explain_key(material), indent=2, ensure_ascii=False)}"
    for note in notes(settings, inspected.third_party_urls if content_key != source_key else ()):
        yield f"note     {note}"
    cache_control = parse_cache_control(call.headers.getall("Cache-Control", ()))
    async with create_cache_store(settings) as store:
        # In the order of `CachedCall.respond`.
        lookups = [await store.get(key) for key in dict.fromkeys((content_key, source_key))]
    yield f"now      {predict_outcome(lookups, cache_control)}"


def notes(
    settings: Settings, third_party_urls: Iterable[Sequence[str | int]] = ()
) -> Iterator[str]:
    if settings.sandbox and settings.upstream.origin is None:
        yield "the sandbox of `serve` has a data directory of its own"
    for loc in third_party_urls:
        yield f"{format_location(loc)} is on a third-party host: its URL is a part of the key"


async def inspect_input(settings: Settings, described_call: DescribedCall) -> InspectedInput:
    """Inspect the input as the proxy does. Raises: InputRefused."""
    eligibility, call = CacheEligibility(settings.cache.endpoints), described_call.call
    bypass_reason: str | None
    if not settings.cache.enabled:
        bypass_reason = "off"
    elif not eligibility.is_cacheable(call.target):
        bypass_reason = "endpoint"
    else:
        bypass_reason = eligibility.bypass_reason(call.target, call.headers)
    limits = ImageLimits(settings.images.formats)
    async with create_fetcher(settings) as fetcher:
        image_check = ImageCheck(limits, fetcher, needs_digest=bypass_reason is None)
        return await image_check.inspect(
            Spool(described_call.body), bypass_reason, check_remote=settings.images.check_remote
        )


def predict_outcome(lookups: list[Lookup], cache_control: CacheControl) -> str:
    """Return the outcome of a call. lookups: under each of its keys, the source key last."""
    now = time()
    min_stored_at = 0.0 if cache_control.max_age is None else now - cache_control.max_age
    for result in (lookup.result for lookup in lookups):
        if result is not None and result.expires_at > now and result.stored_at > min_stored_at:
            return f"hit, for {int(result.expires_at - now)} more seconds"
    if cache_control.only_if_cached:
        return "miss: the response would be 504, because of only-if-cached"
    shared_call = lookups[-1].shared_call
    if shared_call is not None and (shared_call.lease_left > 0 or shared_call.job is not None):
        return "in flight: the call would share the response"
    return "miss: the call would be sent to fal"


def read_call(file: Path) -> DescribedCall:
    """Raises: SettingsError, the file cannot be read or does not describe a call."""
    try:
        description = json.loads(file.read_bytes())
    except OSError as error:
        reason = (error.strerror or "unknown").lower()
        raise SettingsError(f"{file} cannot be read: {reason}.") from error
    except json.JSONDecodeError as error:
        position = f"line {error.lineno}, column {error.colno}"
        raise SettingsError(f"{file} is not JSON ({position}).") from error
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"{file} is not JSON in UTF-8.") from error
    match description:
        case {"endpoint": str(endpoint), "input": body, **rest}:
            headers, principal = rest.get("headers", {}), rest.get("principal", "")
        case _:
            raise SettingsError(f"{file} must hold an object with `endpoint` and `input`.")
    if not isinstance(headers, dict) or not isinstance(principal, str):
        raise SettingsError(f"{file} must hold `headers` as an object, `principal` as a string.")
    try:
        target = parse_target(
            endpoint if endpoint.startswith("https://") else f"https://fal.run/{endpoint}"
        )
    except ProxyError as error:
        raise SettingsError(f"{file} has no valid endpoint of fal: {endpoint!r}.") from error
    multidict = CIMultiDict((name, str(value)) for name, value in headers.items())
    call = Call("POST", target, CIMultiDictProxy(multidict))
    return DescribedCall(call, json.dumps(body).encode(), principal)


def error_location(error: ProxyError) -> str:
    """Return the location of the refused image in the input, or an empty string."""
    if not isinstance(error, InputRefused):
        return ""
    loc = error.detail[0]["loc"]
    return f" at {format_location(loc[1:])}" if isinstance(loc, list) else ""


def format_location(loc: Sequence[str | int]) -> str:
    """Format a location in the input, for example `images.0.url`."""
    return ".".join(map(str, loc))
