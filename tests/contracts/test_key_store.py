"""The contract of the stores of keys, over SQLite and over PostgreSQL."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from falproxy.limit_settings import NO_CALLER_LIMITS, CallerLimits, parse_budget, parse_rate
from falproxy.stores import keys
from falproxy.stores.keys import (
    ENDED_RETENTION,
    NO_KEYS,
    AccessKey,
    Expiry,
    KeyChange,
    KeyEndedError,
    KeyNameTakenError,
    KeyStore,
    KeyStoreError,
    NewKey,
    TooManyKeysError,
    digest_of,
    is_secret,
)
from falproxy.stores.keys.sql_keys import choose_key_store
from tests.support.store_processes import StoreProcesses

LIMITS = CallerLimits(parse_rate("60/minute"), 8, parse_budget("5.25/14d"))
FULL = NewKey(
    name="web",
    creator="key:ann",
    expiry=Expiry(after=3600.0),
    limits=LIMITS,
    endpoints=("fal-ai/flux*", "fal-ai/caf\u00e9"),
)
PLAIN = NewKey(name="batch", creator="cli")
SAME = KeyChange(expiry=None, limits=NO_CALLER_LIMITS, endpoints=())


Processes = StoreProcesses[KeyStore]


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.slow)])
async def processes(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Processes]:
    url = None
    if request.param == "postgres":
        url = request.getfixturevalue("postgres").fresh()
    processes = Processes(lambda: choose_key_store(url, tmp_path / "data"))
    async with processes.stack:
        yield processes


@pytest.fixture
async def store(processes: Processes) -> KeyStore:
    return await processes.store()


@pytest.fixture
async def other(processes: Processes) -> KeyStore:
    """The store of another process."""
    return await processes.store()


async def secrets_of(store: KeyStore) -> dict[str, AccessKey]:
    """Return the keys by the digest of the secrets that are valid."""
    now = (await store.version()).now
    return {
        stored.digest: stored.key
        for stored in await store.secrets(now)
        if stored.key.state(now) == "active"
        and (stored.expires_at is None or stored.expires_at > now)
    }


async def test_without_a_key_there_are_no_tables(store: KeyStore) -> None:
    assert await store.version() == NO_KEYS
    assert await store.secrets(0.0) == []
    assert await store.list_keys(revoked=True) == []
    assert await store.find("web") is None
    assert await store.version() == NO_KEYS


async def test_a_key_is_read_as_it_was_created(store: KeyStore, other: KeyStore) -> None:
    key, secret = await store.create(FULL)
    now = (await store.version()).now
    assert is_secret(secret)
    assert (key.name, key.creator, key.limits) == ("web", "key:ann", LIMITS)
    assert key.endpoints == FULL.endpoints
    assert abs(key.created_at - now) < 5
    assert key.expires_at == pytest.approx(key.created_at + 3600, abs=0.01)
    assert (key.revoked_at, key.last_used_at, key.state(now)) == (None, None, "active")
    assert await other.find("web") == await other.find(key.id) == key
    assert await other.list_keys() == [key]
    assert await secrets_of(other) == {digest_of(secret): key}


async def test_only_the_digest_of_a_secret_is_stored(
    processes: Processes, store: KeyStore, tmp_path: Path
) -> None:
    _, secret = await store.create(FULL)
    rotated = await store.rotate((await store.list_keys())[0].id, 60.0)
    assert rotated is not None
    rows = await store._database.execute("SELECT * FROM falproxy_key_secrets")  # type: ignore[attr-defined]
    assert {row[0] for row in rows} == {digest_of(secret), digest_of(rotated[1])}
    for file in tmp_path.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert secret.encode() not in content
            assert rotated[1].encode() not in content


async def test_a_time_of_expiry_is_stored_exactly(store: KeyStore) -> None:
    key, _ = await store.create(replace(PLAIN, expiry=Expiry(at=4_000_000_000.0)))
    assert key.expires_at == 4_000_000_000.0


async def test_a_name_is_unique_among_keys_that_are_not_revoked(
    store: KeyStore, other: KeyStore
) -> None:
    first, _ = await store.create(FULL)
    with pytest.raises(KeyNameTakenError):
        await other.create(FULL)
    assert (await store.version()).generation == (await other.version()).generation
    await other.revoke(first.id)
    second, _ = await store.create(FULL)
    assert second.id != first.id
    assert await store.find("web") == second
    assert await store.find(first.id) is not None
    assert [key.id for key in await store.list_keys()] == [second.id]
    assert [key.id for key in await store.list_keys(revoked=True)] == [second.id, first.id]


async def test_of_equal_keys_created_at_once_one_is_stored(processes: Processes) -> None:
    stores = [await processes.store() for _ in range(5)]
    results = await asyncio.gather(
        *(store.create(FULL) for store in stores), return_exceptions=True
    )
    refused = [result for result in results if isinstance(result, KeyNameTakenError)]
    assert len(refused) == 4, results
    assert len(await stores[0].list_keys()) == 1


async def test_the_name_of_an_expired_key_can_be_used_again(store: KeyStore) -> None:
    expired, _ = await store.create(replace(PLAIN, expiry=Expiry(after=0.0)))
    key, secret = await store.create(PLAIN)
    assert await store.find("batch") == key
    old = await store.find(expired.id)
    assert old is not None
    assert old.state(0.0) == "revoked"
    assert await secrets_of(store) == {digest_of(secret): key}


async def test_each_change_has_another_generation(store: KeyStore, other: KeyStore) -> None:
    generations = [(await other.version()).generation]

    async def note() -> None:
        generations.append((await other.version()).generation)

    key, _ = await store.create(FULL)
    await note()
    await store.change(key.id, SAME)
    await note()
    await store.rotate(key.id, 0.0)
    await note()
    await store.revoke(key.id)
    await note()
    assert len(set(generations)) == 5
    await store.record_uses([key.id])
    assert (await other.version()).generation == generations[-1]


async def test_the_clock_is_that_of_the_database(store: KeyStore) -> None:
    await store.create(PLAIN)
    first = (await store.version()).now
    await asyncio.sleep(0.02)
    assert 0 < (await store.version()).now - first < 5


async def test_a_key_is_changed(store: KeyStore, other: KeyStore) -> None:
    key, secret = await store.create(FULL)
    changed = await store.change(key.id, SAME)
    assert changed == replace(key, limits=NO_CALLER_LIMITS, endpoints=())
    never = await store.change(key.id, replace(SAME, expiry=Expiry()))
    assert never is not None
    assert never.expires_at is None
    later = await store.change(key.id, replace(SAME, limits=LIMITS, expiry=Expiry(after=60.0)))
    assert later is not None
    assert later.limits == LIMITS
    assert later.expires_at is not None
    assert await secrets_of(other) == {digest_of(secret): later}


async def test_an_expired_key_is_valid_again_with_a_later_expiry(store: KeyStore) -> None:
    key, secret = await store.create(replace(PLAIN, expiry=Expiry(after=0.0)))
    assert await secrets_of(store) == {}
    with pytest.raises(KeyEndedError):
        await store.rotate(key.id, 0.0)
    await store.change(key.id, replace(SAME, expiry=Expiry(after=60.0)))
    assert {*await secrets_of(store)} == {digest_of(secret)}


async def test_a_rotated_secret_ends_at_once_or_after_its_grace(store: KeyStore) -> None:
    key, first = await store.create(PLAIN)
    rotated = await store.rotate(key.id, 60.0)
    assert rotated is not None
    same, second = rotated
    assert same == key
    assert {*await secrets_of(store)} == {digest_of(first), digest_of(second)}
    third = (await store.rotate(key.id, 3600.0) or ("", ""))[1]
    assert {*await secrets_of(store)} == {digest_of(each) for each in (first, second, third)}
    stored = {each.digest: each.expires_at for each in await store.secrets(0.0)}
    assert (stored[digest_of(first)] or 0) < (stored[digest_of(second)] or 0)  # not prolonged
    fourth = (await store.rotate(key.id, 0.0) or ("", ""))[1]
    assert {*await secrets_of(store)} == {digest_of(fourth)}


async def test_the_number_of_secrets_of_a_key_is_limited(store: KeyStore) -> None:
    key, secret = await store.create(PLAIN)
    for _ in range(keys.ENDED_SECRETS_MAX + 5):
        await asyncio.sleep(0.002)  # they are ordered by milliseconds
        secret = (await store.rotate(key.id, 0.0) or ("", ""))[1]
    stored = await store.secrets(0.0)
    assert len(stored) == keys.ENDED_SECRETS_MAX
    assert digest_of(secret) in {each.digest for each in stored}


async def test_a_revoked_key_stays_revoked(store: KeyStore, other: KeyStore) -> None:
    key, _ = await store.create(PLAIN)
    revoked = await other.revoke(key.id)
    assert revoked is not None
    assert revoked.revoked_at is not None
    assert await store.revoke(key.id) == revoked
    with pytest.raises(KeyEndedError):
        await store.rotate(key.id, 0.0)
    with pytest.raises(KeyEndedError):
        await store.change(key.id, SAME)
    assert await secrets_of(store) == {}
    # Its secret is recognized for some days.
    now = (await store.version()).now
    assert len(await store.secrets(now)) == 1
    assert await store.secrets(now + ENDED_RETENTION + 1) == []


@pytest.mark.parametrize("name", ["unknown", "0" * 16, "", "\0", "\udcff", "'; --"])
async def test_an_unknown_key_is_none(store: KeyStore, name: str) -> None:
    await store.create(PLAIN)
    assert await store.find(name) is None


async def test_operations_on_an_unknown_id_return_none(store: KeyStore) -> None:
    await store.create(PLAIN)
    assert await store.change("0" * 16, SAME) is None
    assert await store.rotate("0" * 16, 0.0) is None
    assert await store.revoke("0" * 16) is None


async def test_the_last_use_is_written_once_in_a_minute(store: KeyStore, other: KeyStore) -> None:
    key, _ = await store.create(FULL)
    unused, _ = await store.create(PLAIN)
    await store.record_uses([key.id, "unknown"])
    used = await other.find(key.id)
    assert used is not None
    assert used.last_used_at is not None
    await asyncio.sleep(0.01)
    await other.record_uses([key.id])
    again = await store.find(key.id)
    assert again is not None
    assert again.last_used_at == used.last_used_at
    await store._database.execute("UPDATE falproxy_keys SET last_used_at = last_used_at - 61000")  # type: ignore[attr-defined]
    await other.record_uses([key.id])
    again = await store.find(key.id)
    assert again is not None
    assert again.last_used_at is not None
    assert again.last_used_at > used.last_used_at
    assert (await store.find(unused.id) or key).last_used_at is None


async def test_the_number_of_keys_is_limited(
    store: KeyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("falproxy.stores.keys.sql_keys.KEYS_MAX", 1)
    key, _ = await store.create(PLAIN)
    with pytest.raises(TooManyKeysError):
        await store.create(FULL)
    await store.revoke(key.id)
    await store.create(FULL)


async def test_the_store_can_be_used_after_it_was_disconnected(store: KeyStore) -> None:
    key, _ = await store.create(PLAIN)
    await store.disconnect()
    assert await store.find("batch") == key


async def test_the_ledger_and_the_keys_share_a_database(
    processes: Processes, store: KeyStore
) -> None:
    """Each has its own version, so that one does not prevent a downgrade of the other."""
    from falproxy.stores.ledger.database import LedgerDatabase
    from falproxy.stores.ledger.sql_ledger import SqlLedger

    ledger = SqlLedger(LedgerDatabase(store._database._factory))  # type: ignore[attr-defined]
    async with ledger:
        await ledger.probe()
        assert await store.version() == NO_KEYS
        key, _ = await store.create(PLAIN)
        await ledger.probe()
    assert await store.list_keys() == [key]


@pytest.mark.parametrize("url", [None, "postgresql://127.0.0.1:9/x"])
async def test_a_database_that_is_away_is_an_error(tmp_path: Path, url: str | None) -> None:
    (tmp_path / "ledger.sqlite").mkdir()
    async with choose_key_store(url, tmp_path) as store:
        for work in (store.version(), store.list_keys(), store.find("a"), store.create(PLAIN)):
            with pytest.raises(KeyStoreError):
                await work
