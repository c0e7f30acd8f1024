"""Checks of settings for several machines, which run at every start and in `falproxy doctor`."""

from collections.abc import Iterator

from falproxy.cli.security_checks import Finding, Level
from falproxy.settings import Settings

# What a full Redis does by these policies: the id of a paid request must not be evicted, and a call
# in flight should not be.
EVICTION_FINDINGS = {
    "allkeys": (Level.PROBLEM, "evicts ids of paid requests, whose clients then get a 404"),
    "volatile-random": (Level.NOTE, "evicts calls in flight, which are then made twice"),
    "volatile-ttl": (Level.NOTE, "evicts calls in flight, which are then made twice"),
    "noeviction": (Level.NOTE, "stores nothing until results expire"),
}
EVICTION_FIX = "Set its maxmemory-policy to volatile-lru: then it evicts results only."


def check_cluster(settings: Settings) -> Iterator[Finding]:
    """Check for stores that several machines share only in part."""
    has_redis, has_postgres = bool(settings.cache.redis_url), bool(settings.ledger.database_url)
    if has_redis and not has_postgres:
        yield Finding(
            Level.NOTE,
            "REDIS_URL is set without DATABASE_URL: each node has its own ledger, so that a job of "
            "/api/images/jobs is a 404 on other nodes, and usage is that of one node.",
            "Set DATABASE_URL for several nodes; one node needs neither.",
        )
    if has_postgres and not has_redis:
        yield Finding(
            Level.NOTE,
            "DATABASE_URL is set without REDIS_URL: each node has its own results and request "
            "owners, so that a queued request is a 404 on other nodes.",
            "Set REDIS_URL for several nodes.",
        )


def check_shared_outputs(settings: Settings) -> Iterator[Finding]:
    """Check whether all machines serve the files in shared results."""
    has_redis, has_postgres = bool(settings.cache.redis_url), bool(settings.ledger.database_url)
    if settings.storage_backend == "disk" and (has_redis or has_postgres):
        text = "Results are shared, but their files are on this machine's disk."
        if has_redis:
            text = "Results are shared through Redis, but their files are on this machine's disk."
        yield Finding(Level.NOTE, text, "Share the folder too, or store outputs in Supabase.")


def check_eviction(policy: str | None) -> Iterator[Finding]:
    """Check what a full Redis evicts.

    policy: its `maxmemory-policy`; None if its memory has no limit.
    """
    for prefix, (level, consequence) in EVICTION_FINDINGS.items():
        if policy is not None and policy.startswith(prefix):
            yield Finding(level, f"When Redis is full, it {consequence} ({policy}).", EVICTION_FIX)
