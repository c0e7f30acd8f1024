"""`falproxy cache`: what is kept, and why a call would be answered from it or not."""

import json
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import time

from multidict import CIMultiDict, CIMultiDictProxy

from falproxy.app.components import cache_policy, create_fetcher, create_store
from falproxy.errors import ProxyError, SettingsError
from falproxy.fal.input_json import explain_key
from falproxy.fal.target import parse_target
from falproxy.media.image_rules import ImageLimits, InputRefused
from falproxy.middleware.cache_policy import key_material, result_keys
from falproxy.middleware.image_inputs import ImageCheck, InspectedInput
from falproxy.proxy.call import Call
from falproxy.settings import Settings
from falproxy.spool import Spool
from falproxy.stores.cache import Lookup
from falproxy.stores.cache.eligibility import CacheControl, CacheEligibility, parse_cache_control

# Why a call is made for itself.
BYPASS_REASONS = {
    "off": "FALPROXY_CACHE is off",
    "endpoint": "the endpoint is not in FALPROXY_CACHE_ENDPOINTS",
    "webhook": "fal is to send its result to fal_webhook",
    "query": "its URL has a query",
    "store-io": "X-Fal-Store-IO asks fal not to keep it",
    "no-store": "its Cache-Control says no-store",
    "input": "its input is not JSON that all would read alike (NaN, very large, or deep)",
    "image": "an image could not be read here, or is not named by a plain URL or data URI",
}


@dataclass(frozen=True, slots=True)
class DescribedCall:
    """A call as a file describes it. principal: who would make it, `way:name` (`key:ann`)."""

    call: Call
    body: bytes
    principal: str


async def stats(settings: Settings) -> AsyncIterator[str]:
    """How much is kept, and where. Raises: SettingsError, StoreError."""
    async with create_store(settings) as store:
        held = await store.stats()
    file = (settings.data_dir / "results.sqlite").resolve()
    place = "Redis, by REDIS_URL" if settings.cache.redis_url else file
    yield f"store    {place}"
    yield f"results  {held.results}"
    yield f"bytes    {held.size}"
    yield f"flights  {held.flights}"
    yield f"ids      {held.virtual_ids}"


async def clear(settings: Settings) -> AsyncIterator[str]:
    """Forgets all results. Raises: SettingsError, StoreError."""
    async with create_store(settings) as store:
        yield f"results forgotten: {await store.clear()}"


async def explain(settings: Settings, file: Path) -> AsyncIterator[str]:
    """The key of a call, what went into it, and what it would meet; fal is not asked. Images are
    read from their addresses, as for a call.

    Raises: SettingsError, the file describes no call; StoreError.
    """
    asked = read_call(file)
    try:
        seen = await inspect_input(settings, asked)
    except ProxyError as error:
        yield f"refused  {error.code}{error_location(error)}: {error.message}"
        for note in notes(settings):
            yield f"note     {note}"
        return
    if seen.bypass_reason is not None:
        reason = BYPASS_REASONS.get(seen.bypass_reason, "it cannot be shared")
        yield f"bypass   {seen.bypass_reason}: {reason}"
        return
    terms = cache_policy(settings)
    keys = result_keys(asked.call, seen, terms, asked.principal)
    material = key_material(asked.call, seen, terms, asked.principal)
    yield f"key      {keys[-1]}"
    yield f"made of  {json.dumps(explain_key(material), indent=2, ensure_ascii=False)}"
    for note in notes(settings, seen.third_party_urls if keys[0] != keys[-1] else ()):
        yield f"note     {note}"
    directives = parse_cache_control(asked.call.headers.getall("Cache-Control", ()))
    async with create_store(settings) as store:
        # As a call does: the very bytes first, then what is this call's own.
        found = [await store.get(key) for key in dict.fromkeys(keys)]
    yield f"now      {predict_outcome(found, directives)}"


def notes(
    settings: Settings, third_party_urls: Iterable[Sequence[str | int]] = ()
) -> Iterator[str]:
    if settings.sandbox and settings.upstream.origin is None:
        yield "the sandbox that `serve` starts keeps its files and results to itself"
    for loc in third_party_urls:
        yield f"{format_location(loc)} is served by others: its address is a part of the key"


async def inspect_input(settings: Settings, described_call: DescribedCall) -> InspectedInput:
    """What the proxy would make of the call's input. Raises: InputRefused."""
    reuse = CacheEligibility(settings.cache.endpoints)
    objection: str | None = "off"
    if settings.cache.enabled:
        is_covered = reuse.is_cacheable("POST", described_call.call.target)
        objection = "endpoint"
        if is_covered:
            objection = reuse.bypass_reason(described_call.call.target, described_call.call.headers)
    rules = ImageLimits(settings.images.formats)
    async with create_fetcher(settings) as fetcher:
        inspection = ImageCheck(rules, fetcher, needs_digest=objection is None)
        spool = Spool(described_call.body)
        return await inspection.inspect(spool, objection, check_remote=settings.images.check_remote)


def predict_outcome(lookups: list[Lookup], cache_control: CacheControl) -> str:
    """What a call would meet. found: under each of its keys, its own last."""
    now = time()
    newer_than = 0.0 if cache_control.max_age is None else now - cache_control.max_age
    for result in (one.result for one in lookups):
        if result is not None and result.expires_at > now and result.stored_at > newer_than:
            return f"hit, for {int(result.expires_at - now)} more seconds"
    if cache_control.only_if_cached:
        return "miss: the call would be answered 504, because it says only-if-cached"
    flight = lookups[-1].flight
    if flight is not None and (flight.lease_left > 0 or flight.job is not None):
        return "on its way: the call would share what comes of it"
    return "miss: the call would be sent to fal"


def read_call(file: Path) -> DescribedCall:
    """Raises: SettingsError, the file cannot be read or describes no call."""
    try:
        given = json.loads(file.read_bytes())
    except OSError as error:
        reason = (error.strerror or "unknown").lower()
        raise SettingsError(f"{file} cannot be read: {reason}.") from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise SettingsError(f"{file} is not JSON ({where}).") from error
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"{file} is not JSON in UTF-8.") from error
    match given:
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
        raise SettingsError(f"{file} names no endpoint of fal: {endpoint!r}.") from error
    told = CIMultiDict((name, str(value)) for name, value in headers.items())
    return DescribedCall(
        Call("POST", target, CIMultiDictProxy(told)), json.dumps(body).encode(), principal
    )


def error_location(error: ProxyError) -> str:
    """Where in the input the refused image is, where it is known."""
    if not isinstance(error, InputRefused):
        return ""
    loc = error.detail[0]["loc"]
    return f" at {format_location(loc[1:])}" if isinstance(loc, list) else ""


def format_location(loc: Sequence[str | int]) -> str:
    """A place in the input as in JavaScript: `images.0.url`."""
    return ".".join(map(str, loc))
