"""`falproxy doctor`: what is wrong with an installation, and how to mend it."""

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from time import monotonic

from multidict import CIMultiDict, CIMultiDictProxy

from falproxy.app.components import create_storage, create_store
from falproxy.cli.security_checks import Finding, Level, check_access, is_loopback
from falproxy.errors import ProxyError, SettingsError
from falproxy.fal.keys import FalKey, KeyPool
from falproxy.fal.policy import Globs
from falproxy.fal.target import parse_target
from falproxy.proxy.call import Call
from falproxy.proxy.upstream import Upstream, open_transport
from falproxy.settings import SANDBOX_KEY, Settings
from falproxy.stores.cache import CacheStore, StoreError
from falproxy.stores.files import StorageError
from falproxy.stores.ledger import LedgerError
from falproxy.stores.ledger.writer import choose_ledger

# A call that costs nothing and that fal answers with 401 when the key is wrong.
KEY_CHECK_URL = "https://api.fal.ai/v1/models/pricing?endpoint_id=fal-ai/flux/dev"
TIMEOUT = 10.0
# Addresses of the account that nobody should be able to call through a proxy.
ACCOUNT_ENDPOINTS = (
    "api.fal.ai/v1/keys",
    "api.fal.ai/v1/account/billing",
    "api.fal.ai/v1/serverless/secrets",
    "rest.fal.ai/keys",
    "rest.fal.ai/users/current",
    "rest.fal.ai/tokens",
)
SECRET_MIN = 16  # characters of an access key
JWT_SECRET_MIN = 32  # bytes, as many as the hash of HS256 has

SLOW_STORE_SECONDS = 0.05  # seconds, from which on calls do without the store
# What is wrong with a Redis, by the name of redis-py's error.
REDIS_FIXES = {
    "AuthenticationError": "Check the user name and the password in REDIS_URL.",
    "NoPermissionError": "Let the user of REDIS_URL read and write falproxy:*, and run scripts.",
    "OutOfMemoryError": "It is full: give it more memory, or a maxmemory-policy that evicts.",
    "ResponseError": "Check the database number in REDIS_URL; a cluster has none.",
    "ReadOnlyError": "It is a replica: name its primary in REDIS_URL.",
}
REDIS_DEFAULT_FIX = "Check REDIS_URL and the firewall; rediss:// is for servers that speak TLS."


async def run_checks(settings: Settings) -> list[Finding]:
    """Everything there is to say, in an order to read it in."""
    findings = [finding async for finding in check_keys(settings)]
    findings += check_access(settings)
    findings += check_origins(settings)
    findings += check_secrets(settings)
    findings += check_policy(settings)
    findings += await asyncio.to_thread(lambda: list(check_data_dir(settings)))
    findings += [finding async for finding in check_outputs(settings)]
    findings.append(await try_ledger(settings))
    findings += [finding async for finding in check_cache(settings)]
    return findings


async def check_keys(settings: Settings) -> AsyncIterator[Finding]:
    """Shape of each key, and what fal says to it."""
    if settings.fal_keys == (SANDBOX_KEY,):
        yield Finding(Level.NOTE, "The sandbox answers, not fal.", "Set FAL_KEY to use fal.ai.")
        return
    ring = KeyPool(settings.fal_keys, monotonic)
    async with open_transport((settings.upstream.connect_timeout, TIMEOUT)) as way:
        for _ in settings.fal_keys:
            key = ring.next_key()
            if ":" not in key.authorization:
                text = f"The fal key at position {key.position} is not of the form id:secret."
                yield Finding(Level.PROBLEM, text, "Copy it anew from fal.ai/dashboard/keys.")
                continue
            upstream = Upstream(way, key, origin=settings.upstream.origin)
            yield await try_key(upstream, key)


async def try_key(upstream: Upstream, key: FalKey) -> Finding:
    headers = CIMultiDictProxy(CIMultiDict({"accept": "application/json"}))
    try:
        response = await upstream.send(Call("GET", parse_target(KEY_CHECK_URL), headers))
    except ProxyError as error:
        mend = "Check DNS, the firewall and https://status.fal.ai."
        return Finding(Level.PROBLEM, f"No answer from fal: {error.message}", mend)
    response.close()
    name = f"the fal key at position {key.position}"
    if response.status == 200:
        return Finding(Level.OK, f"fal is reachable and takes {name}.")
    if response.status in (401, 403):
        mend = "Make a new one with API scope at fal.ai/dashboard/keys."
        return Finding(Level.PROBLEM, f"fal refuses {name} ({response.status}).", mend)
    text = f"fal is reachable, but does not say whether it takes {name} ({response.status})."
    return Finding(Level.NOTE, text)


def check_origins(settings: Settings) -> Iterator[Finding]:
    for origin in settings.auth.allowed_origins:
        host = origin.partition("://")[2].partition(":")[0]
        if origin.startswith("http://") and not is_loopback(host):
            yield Finding(
                Level.NOTE,
                f"Pages of {origin} come without encryption: who sits in between can call too.",
                "Allow the https origin instead.",
            )
    if settings.auth.allowed_origins and not settings.auth.is_locked:
        yield Finding(
            Level.NOTE,
            "FALPROXY_ALLOWED_ORIGINS keeps other pages out, but not other programs.",
            "Set FALPROXY_ACCESS_KEYS or FALPROXY_JWT_SECRET as well.",
        )


def check_secrets(settings: Settings) -> Iterator[Finding]:
    for name in settings.auth.short_names(SECRET_MIN):
        yield Finding(
            Level.PROBLEM,
            f"The access key of {name} has less than {SECRET_MIN} characters.",
            "Make one with: python -c 'import secrets; print(secrets.token_urlsafe())'",
        )
    if settings.auth.jwt_secret and len(settings.auth.jwt_secret.encode()) < JWT_SECRET_MIN:
        yield Finding(
            Level.PROBLEM,
            f"FALPROXY_JWT_SECRET has less than {JWT_SECRET_MIN} bytes: it can be guessed.",
            "Use the secret of whoever signs the tokens, whole.",
        )


def check_policy(settings: Settings) -> Iterator[Finding]:
    """Combinations that do not mean what they look like."""
    targets = Globs(settings.auth.allowed_targets)
    for address in ACCOUNT_ENDPOINTS:
        if targets.match(address):
            yield Finding(
                Level.PROBLEM,
                f"FALPROXY_ALLOWED_TARGETS lends the key to https://{address}.",
                "Name the paths that are needed, such as api.fal.ai/v1/models.",
            )
    if settings.sandbox and settings.fal_keys != (SANDBOX_KEY,):
        yield Finding(
            Level.NOTE,
            "FALPROXY_SANDBOX is on: the fal key is not used.",
            "Take FALPROXY_SANDBOX out to use fal.ai.",
        )
    if settings.ai_keys and settings.fal_key not in settings.ai_keys:
        yield Finding(
            Level.NOTE, "AI_KEYS is set, so FAL_KEY is not used.", "Take one of them out."
        )


def check_data_dir(settings: Settings) -> Iterator[Finding]:
    directory = settings.data_dir
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        reason = os.strerror(error.errno or 0).lower()
        yield Finding(
            Level.PROBLEM,
            f"FALPROXY_DATA_DIR {directory} cannot be written: {reason}.",
            "Name a directory that this user may write.",
        )
    else:
        yield Finding(Level.OK, f"Data is kept in {directory}.")


async def try_ledger(settings: Settings) -> Finding:
    """Whether calls can be written down."""
    place = "PostgreSQL" if settings.ledger.database_url else "a file"
    try:
        async with choose_ledger(settings.ledger.database_url, settings.data_dir) as ledger:
            await ledger.probe()
    except (SettingsError, LedgerError) as error:
        mend = (
            "Check DATABASE_URL, and that its user may make tables."
            if settings.ledger.database_url
            else ""
        )
        return Finding(Level.PROBLEM, f"Calls cannot be written down: {error}", mend)
    return Finding(Level.OK, f"Calls are written down in {place}.")


async def check_cache(settings: Settings) -> AsyncIterator[Finding]:
    """Whether results are kept. Redis also knows whose requests are, without them too."""
    if not settings.cache.enabled:
        mend = "Take FALPROXY_CACHE out to reuse results."
        yield Finding(Level.NOTE, "FALPROXY_CACHE is off: equal calls are paid anew.", mend)
    if settings.cache.enabled or settings.cache.redis_url:
        yield await try_store(settings)


async def try_store(settings: Settings) -> Finding:
    """Whether the store can be used, and how long it takes to answer."""
    try:
        seconds = await measure_latency(create_store(settings))
    except SettingsError as error:
        mend = "Or take REDIS_URL out: results are then kept in a file."
        return Finding(Level.PROBLEM, str(error), mend)
    except StoreError as error:
        mend = "Move the file away, or name another FALPROXY_DATA_DIR."
        if settings.cache.redis_url:
            mend = REDIS_FIXES.get(type(error.__cause__).__name__, REDIS_DEFAULT_FIX)
        return Finding(Level.PROBLEM, f"Results cannot be kept: {error}.", mend)
    place = "Redis" if settings.cache.redis_url else "a file"
    took = f"takes {seconds * 1000:.1f} ms to write to."
    text = (
        f"Results are kept in {place}, which {took}" if settings.cache.enabled else f"Redis {took}"
    )
    if seconds > SLOW_STORE_SECONDS:
        mend = "Calls do without a store so slow: take one that is nearer."
        return Finding(Level.NOTE, text, mend)
    return Finding(Level.OK, text)


async def check_outputs(settings: Settings) -> AsyncIterator[Finding]:
    """Whether outputs are kept, and whether the bucket or the disk takes them."""
    place = settings.storage_backend
    if place == "off":
        mend = "Set SUPABASE_URL and SUPABASE_KEY, or FALPROXY_REHOST=disk."
        text = "Outputs stay with fal, whose URLs are temporary."
        if settings.storage.supabase_url or settings.storage.supabase_key:
            text = f"{text} Of SUPABASE_URL and SUPABASE_KEY only one is set."
        yield Finding(Level.NOTE, text, mend)
        return
    try:
        async with create_storage(settings) as storage:
            await storage.check()
    except (SettingsError, StorageError) as error:
        yield Finding(Level.PROBLEM, f"Outputs cannot be kept: {error}")
        return
    places = {
        "supabase": f"in the bucket {settings.storage.supabase_bucket}",
        "disk": "on the disk",
    }
    kept = places.get(place, f"in the {place} storage")
    yield Finding(Level.OK, f"Outputs are kept {kept}.")
    if place == "disk" and settings.cache.redis_url:
        text = "Results are shared through Redis, but their files are on this machine's disk."
        yield Finding(Level.NOTE, text, "Share the folder too, or keep outputs in Supabase.")
    if place == "disk" and not settings.sandbox and not settings.server.public_url:
        text = "fal cannot read kept files, for results that become inputs."
        yield Finding(Level.NOTE, text, "Set FALPROXY_PUBLIC_URL to where fal reaches the proxy.")


async def measure_latency(store: CacheStore) -> float:
    """Seconds that a store takes at best, once it is connected. Raises: StoreError."""
    seconds = []
    async with store:
        for _ in range(4):
            asked = monotonic()
            await store.probe()
            seconds.append(monotonic() - asked)
        await store.get("doctor")  # by a script, where it is Redis
    return min(seconds[1:])
