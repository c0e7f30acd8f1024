"""`falproxy doctor`: checks of an installation, each with instructions to fix a problem."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from time import monotonic

from multidict import CIMultiDict, CIMultiDictProxy

from falproxy.app.components import create_cache_store, create_storage
from falproxy.cli.cluster_checks import check_cluster, check_eviction, check_shared_outputs
from falproxy.cli.security_checks import Finding, Level, check_access, is_loopback
from falproxy.cli.system_checks import check_folders, check_port
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

# A request that costs nothing; fal returns 401 for it if the key is invalid.
KEY_CHECK_URL = "https://api.fal.ai/v1/models/pricing?endpoint_id=fal-ai/flux/dev"
TIMEOUT = 10.0  # seconds
# Endpoints of the fal account, which callers of a proxy must not reach.
ACCOUNT_ENDPOINTS = (
    "api.fal.ai/v1/keys",
    "api.fal.ai/v1/account/billing",
    "api.fal.ai/v1/serverless/secrets",
    "rest.fal.ai/keys",
    "rest.fal.ai/users/current",
    "rest.fal.ai/tokens",
)
SECRET_MIN = 16  # minimum length of an access key in characters
JWT_SECRET_MIN = 32  # minimum length in bytes: the size of HS256's hash
SLOW_STORE_SECONDS = 0.05  # a slower store is bypassed by calls
# Name of redis-py's error → how to fix it.
REDIS_FIXES = {
    "AuthenticationError": "Check the user name and the password in REDIS_URL.",
    "NoPermissionError": "Let the user of REDIS_URL read and write falproxy:*, and run scripts.",
    "OutOfMemoryError": "It is full: give it more memory, or a maxmemory-policy that evicts.",
    "ResponseError": "Check the database number in REDIS_URL; a cluster has none.",
    "ReadOnlyError": "It is a replica: name its primary in REDIS_URL.",
}
REDIS_DEFAULT_FIX = "Check REDIS_URL and the firewall; rediss:// is for servers that speak TLS."


async def run_checks(settings: Settings) -> list[Finding]:
    """Return all findings, in the order in which they are printed."""
    findings = [finding async for finding in check_keys(settings)]
    findings += check_access(settings)
    findings += check_origins(settings)
    findings += check_secrets(settings)
    findings += check_policy(settings)
    findings += [finding async for finding in check_port(settings)]
    findings += await asyncio.to_thread(lambda: list(check_folders(settings)))
    findings += [finding async for finding in check_outputs(settings)]
    findings.append(await try_ledger(settings))
    findings += check_cluster(settings)
    findings += [finding async for finding in check_cache(settings)]
    return findings


async def check_keys(settings: Settings) -> AsyncIterator[Finding]:
    """Check the form of each fal key, and whether fal accepts it."""
    if settings.fal_keys == (SANDBOX_KEY,):
        yield Finding(
            Level.NOTE, "Calls go to the sandbox, not to fal.", "Set FAL_KEY to use fal.ai."
        )
        return
    key_pool = KeyPool(settings.fal_keys, monotonic)
    async with open_transport((settings.upstream.connect_timeout, TIMEOUT)) as transport:
        for _ in settings.fal_keys:
            key = key_pool.next_key()
            if ":" not in key.authorization:
                text = f"The fal key at position {key.position} is not of the form id:secret."
                yield Finding(Level.PROBLEM, text, "Copy it again from fal.ai/dashboard/keys.")
                continue
            if settings.sandbox:  # the key is not used, which `check_policy` notes
                continue
            upstream = Upstream(transport, key, origin=settings.upstream.origin)
            yield await try_key(upstream, key, settings.upstream.origin)


async def try_key(upstream: Upstream, key: FalKey, origin: str | None) -> Finding:
    """Send a request with a key to fal, or to the server that replaces it."""
    server = "fal" if origin is None else "the server of FALPROXY_UPSTREAM_ORIGIN"
    headers = CIMultiDictProxy(CIMultiDict({"accept": "application/json"}))
    try:
        response = await upstream.send(Call("GET", parse_target(KEY_CHECK_URL), headers))
    except ProxyError as error:
        if origin is not None:
            text = f"No response: {server} could not be reached."
            fix = "Start it, or unset FALPROXY_UPSTREAM_ORIGIN to use fal.ai."
            return Finding(Level.PROBLEM, text, fix)
        fix = "Check DNS, the firewall and https://status.fal.ai."
        return Finding(Level.PROBLEM, f"No response from fal: {error.message}", fix)
    response.close()
    name = f"the fal key at position {key.position}"
    subject = server if origin is None else server.replace("the", "The", 1)
    if response.status == 200:
        return Finding(Level.OK, f"{subject} is reachable and accepts {name}.")
    if response.status in (401, 403):
        fix = "Make a new one with API scope at fal.ai/dashboard/keys."
        return Finding(Level.PROBLEM, f"{subject} refuses {name} ({response.status}).", fix)
    text = f"{subject} is reachable, but did not confirm {name} ({response.status})."
    return Finding(Level.NOTE, text)


def check_origins(settings: Settings) -> Iterator[Finding]:
    for origin in settings.auth.allowed_origins:
        host = origin.partition("://")[2].partition(":")[0]
        if origin.startswith("http://") and not is_loopback(host):
            yield Finding(
                Level.NOTE,
                f"Pages of {origin} are loaded without encryption and can be modified on the way.",
                "Allow the https origin instead.",
            )
    if settings.auth.allowed_origins and not settings.auth.is_locked:
        yield Finding(
            Level.NOTE,
            "FALPROXY_ALLOWED_ORIGINS restricts web pages, but not other programs.",
            "Set FALPROXY_ACCESS_KEYS or FALPROXY_JWT_SECRET as well.",
        )


def check_secrets(settings: Settings) -> Iterator[Finding]:
    for name in settings.auth.short_names(SECRET_MIN):
        yield Finding(
            Level.PROBLEM,
            f"The access key of {name} has fewer than {SECRET_MIN} characters.",
            "Generate one with: python -c 'import secrets; print(secrets.token_urlsafe())'",
        )
    if settings.auth.jwt_secret and len(settings.auth.jwt_secret.encode()) < JWT_SECRET_MIN:
        yield Finding(
            Level.PROBLEM,
            f"FALPROXY_JWT_SECRET has fewer than {JWT_SECRET_MIN} bytes: it can be guessed.",
            "Use the complete secret that the tokens are signed with.",
        )


def check_policy(settings: Settings) -> Iterator[Finding]:
    """Check for settings that expose the account or contradict each other."""
    targets = Globs(settings.auth.allowed_targets)
    for endpoint in ACCOUNT_ENDPOINTS:
        if targets.match(endpoint):
            yield Finding(
                Level.PROBLEM,
                f"FALPROXY_ALLOWED_TARGETS lets callers use the key for https://{endpoint}.",
                "List only the paths that are needed, such as api.fal.ai/v1/models.",
            )
    if settings.sandbox and settings.fal_keys != (SANDBOX_KEY,):
        yield Finding(
            Level.NOTE,
            "FALPROXY_SANDBOX is on: the fal key is not used.",
            "Unset FALPROXY_SANDBOX to use fal.ai.",
        )
    if settings.ai_keys and settings.fal_key not in settings.ai_keys:
        yield Finding(Level.NOTE, "AI_KEYS is set, so FAL_KEY is not used.", "Unset one of them.")


async def try_ledger(settings: Settings) -> Finding:
    location = "PostgreSQL" if settings.ledger.database_url else "a file"
    try:
        async with choose_ledger(settings.ledger.database_url, settings.data_dir) as ledger:
            await ledger.probe()
    except (SettingsError, LedgerError) as error:
        fix = (
            "Check DATABASE_URL, and that its user may create tables."
            if settings.ledger.database_url
            else ""
        )
        return Finding(Level.PROBLEM, f"Calls cannot be recorded: {error}", fix)
    return Finding(Level.OK, f"Calls are recorded in {location}.")


async def check_cache(settings: Settings) -> AsyncIterator[Finding]:
    """Check the result cache. Redis is checked without it too: it also stores request owners."""
    if not settings.cache.enabled:
        fix = "Unset FALPROXY_CACHE to reuse results."
        yield Finding(
            Level.NOTE, "FALPROXY_CACHE is off: each of several equal calls is paid.", fix
        )
    if settings.cache.enabled or settings.cache.redis_url:
        for finding in await try_store(settings):
            yield finding


async def try_store(settings: Settings) -> list[Finding]:
    """Check whether the store is usable, and measure its latency."""
    try:
        store = create_cache_store(settings)
        seconds, policy = await measure_latency(store)
    except SettingsError as error:
        fix = "Or unset REDIS_URL: results are then stored in a file."
        return [Finding(Level.PROBLEM, str(error), fix)]
    except StoreError as error:
        fix = "Move the file away, or set another FALPROXY_DATA_DIR."
        if settings.cache.redis_url:
            fix = REDIS_FIXES.get(type(error.__cause__).__name__, REDIS_DEFAULT_FIX)
        return [Finding(Level.PROBLEM, f"Results cannot be stored: {error}.", fix)]
    location = "Redis" if settings.cache.redis_url else "a file"
    latency = f"takes {seconds * 1000:.1f} ms to write to."
    text = (
        f"Results are stored in {location}, which {latency}"
        if settings.cache.enabled
        else f"Redis {latency}"
    )
    finding = Finding(Level.OK, text)
    if seconds > SLOW_STORE_SECONDS:
        fix = "Calls bypass a store this slow: use one that is nearer."
        finding = Finding(Level.NOTE, text, fix)
    return [*check_eviction(policy), finding]


async def check_outputs(settings: Settings) -> AsyncIterator[Finding]:
    """Check whether outputs are stored, and whether the bucket or the disk is writable."""
    backend = settings.storage_backend
    if backend == "off":
        fix = "Set SUPABASE_URL and SUPABASE_KEY, or FALPROXY_REHOST=disk."
        text = "Outputs stay with fal, whose URLs are temporary."
        if settings.storage.supabase_url or settings.storage.supabase_key:
            text = f"{text} Of SUPABASE_URL and SUPABASE_KEY only one is set."
        yield Finding(Level.NOTE, text, fix)
        return
    try:
        async with create_storage(settings) as storage:
            await storage.check()
    except (SettingsError, StorageError) as error:
        yield Finding(Level.PROBLEM, f"Outputs cannot be stored: {error}")
        return
    locations = {
        "supabase": f"in the bucket {settings.storage.supabase_bucket}",
        "disk": "on the disk",
    }
    location = locations.get(backend, f"in the {backend} storage")
    yield Finding(Level.OK, f"Outputs are stored {location}.")
    for finding in check_shared_outputs(settings):
        yield finding
    if backend == "disk" and not settings.sandbox and not settings.server.public_url:
        text = "fal cannot read stored files when results are used as inputs."
        yield Finding(
            Level.NOTE,
            text,
            "Set FALPROXY_PUBLIC_URL to the URL under which fal reaches the proxy.",
        )


async def measure_latency(store: CacheStore) -> tuple[float, str | None]:
    """Return the lowest latency of a connected store in seconds, and what it evicts when it is
    full; None for a file, or without a limit. Raises: StoreError."""
    seconds = []
    async with store:
        for _ in range(4):
            started = monotonic()
            await store.probe()
            seconds.append(monotonic() - started)
        await store.get("doctor")  # runs a script, if the store is Redis
        policy = await store.eviction_policy()
    return min(seconds[1:]), policy
