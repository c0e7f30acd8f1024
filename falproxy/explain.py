"""`falproxy cache`: what is kept, and why a call would be answered from it or not."""

import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import time

from multidict import CIMultiDict, CIMultiDictProxy

from falproxy.app import make_fetcher, make_store, terms_of
from falproxy.cache import Found
from falproxy.call import Call
from falproxy.config import Settings, SettingsError
from falproxy.errors import ProxyError
from falproxy.images import ImageRules
from falproxy.inputs import described
from falproxy.middleware.images import Input, Inspection
from falproxy.middleware.results import describe, name_result
from falproxy.reuse import Reuse
from falproxy.spool import Spool
from falproxy.target import parse_target

FORM = 'a call like {"endpoint": "fal-ai/flux-pro/kontext", "input": {...}}'


@dataclass(frozen=True, slots=True)
class Asked:
    """A call as a file describes it. principal: who would make it, `way:name` (`key:ann`)."""

    call: Call
    body: bytes
    principal: str


async def stats(settings: Settings) -> AsyncIterator[str]:
    """Raises: StoreError."""
    async with make_store(settings) as store:
        held = await store.stats()
    yield f"results  {held.results}"
    yield f"bytes    {held.size}"
    yield f"flights  {held.flights}"
    yield f"ids      {held.claims}"


async def clear(settings: Settings) -> AsyncIterator[str]:
    """Raises: StoreError."""
    async with make_store(settings) as store:
        yield f"forgot {await store.clear()} results"


async def explain(settings: Settings, file: Path) -> AsyncIterator[str]:
    """The key of a call, what went into it, and whether it would hit; fal is not asked. Images
    are read from their addresses, as for a call.

    Raises: SettingsError, the file describes no call; StoreError.
    """
    asked = read_call(file)
    try:
        seen = await inspect(settings, asked)
    except ProxyError as error:
        yield f"refused  {error.code}: {error.message}"
        return
    if seen.objection is not None:
        yield f"bypass   {seen.objection}"
        return
    terms = terms_of(settings)
    common, own = name_result(asked.call, seen, terms, asked.principal)
    material = describe(asked.call, seen, terms, asked.principal)
    yield f"key      {own}"
    yield f"made of  {json.dumps(described(material), indent=2)}"
    async with make_store(settings) as store:
        found = await store.get(common)
        if own != common and found.result is None:
            found = await store.get(own)
    yield f"now      {judge(found)}"


async def inspect(settings: Settings, asked: Asked) -> Input:
    """Raises: InputRefused."""
    reuse = Reuse(settings.cache_endpoints)
    if not settings.cache or not reuse.covers("POST", asked.call.target):
        return Input({}, {}, {}, "the endpoint is not in FALPROXY_CACHE_ENDPOINTS")
    objection = reuse.objection(asked.call.target, asked.call.headers)
    rules = ImageRules(settings.image_formats)
    async with make_fetcher(settings) as fetcher:
        inspection = Inspection(rules, fetcher, is_told_apart=objection is None)
        return await inspection.inspect(Spool(asked.body), objection, check_remote=False)


def judge(found: Found) -> str:
    """What a call would meet."""
    now = time()
    if found.result is not None and found.result.expires_at > now:
        return f"hit, for {int(found.result.expires_at - now)} more seconds"
    if found.flight is not None and found.flight.lease_left > 0:
        return "on its way: the call would wait for it"
    return "miss: the call would be sent to fal"


def read_call(file: Path) -> Asked:
    """Raises: SettingsError, the file cannot be read or describes no call."""
    try:
        given = json.loads(file.read_bytes())
        headers = CIMultiDict(texts(given.get("headers", {})))
        target = parse_target(f"https://fal.run/{given['endpoint']}")
        body = json.dumps(given["input"]).encode()
        principal = str(given.get("principal", ""))
    except OSError as error:
        raise SettingsError(f"{file} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, AttributeError, ProxyError) as error:
        raise SettingsError(f"{file} must hold {FORM}.") from error
    return Asked(Call("POST", target, CIMultiDictProxy(headers)), body, principal)


def texts(values: Mapping[str, object]) -> dict[str, str]:
    return {name: str(value) for name, value in values.items()}
