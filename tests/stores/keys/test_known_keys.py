"""The keys that a process accepts: new, changed and revoked ones, and a store that is away."""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self

import pytest

from falproxy.limit_settings import NO_CALLER_LIMITS
from falproxy.stores.keys import (
    AccessKey,
    Expiry,
    KeyChange,
    KeyStoreError,
    KeysVersion,
    NewKey,
    StoredSecret,
    new_secret,
)
from falproxy.stores.keys import known_keys as module
from falproxy.stores.keys.known_keys import TRUST_SECONDS, KeyGrant, KnownKeys
from falproxy.stores.keys.sql_keys import SqlKeyStore, choose_key_store
from tests.support.fake_clock import FakeClock
from tests.support.waiting import wait_until

WEB = NewKey(name="web", creator="cli")


class FlakyStore:
    """A store whose reads can fail or hang, and are counted."""

    def __init__(self, inner: SqlKeyStore) -> None:
        self.inner = inner
        self.is_away = self.hangs = False
        self.reads = 0
        self.uses: list[Sequence[str]] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None: ...

    async def version(self) -> KeysVersion:
        self.reads += 1
        if self.hangs:
            await asyncio.sleep(3600)
        if self.is_away:
            raise KeyStoreError("it is away")
        return await self.inner.version()

    async def secrets(self, now: float) -> list[StoredSecret]:
        return await self.inner.secrets(now)

    async def record_uses(self, key_ids: Sequence[str]) -> None:
        self.uses.append(key_ids)
        await self.inner.record_uses(key_ids)

    async def disconnect(self) -> None:
        await self.inner.disconnect()


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqlKeyStore]:
    async with choose_key_store(None, tmp_path) as opened:
        yield opened


@pytest.fixture
def flaky(store: SqlKeyStore) -> FlakyStore:
    return FlakyStore(store)


@pytest.fixture
async def known(flaky: FlakyStore) -> AsyncIterator[KnownKeys]:
    async with KnownKeys(flaky) as opened:  # type: ignore[arg-type]  # without administration
        yield opened


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_INTERVAL", 0.02)
    monkeypatch.setattr(module, "REFRESH_INTERVAL_MIN", 0.01)
    monkeypatch.setattr(module, "FAILURE_COOLDOWN", 0.02)
    monkeypatch.setattr(module, "REFRESH_TIMEOUT", 0.3)


async def valid(known: KnownKeys, secret: str) -> KeyGrant:
    grant = await known.find(secret)
    assert grant is not None
    assert grant.is_valid()
    return grant


async def wait_until_ended(grant: KeyGrant) -> None:
    await wait_until(lambda: not grant.is_valid(), seconds=5)


async def test_a_new_key_is_found_at_once(known: KnownKeys, store: SqlKeyStore) -> None:
    for name in ("web", "batch"):
        key, secret = await store.create(replace(WEB, name=name))
        assert known.get(secret) is None
        assert (await valid(known, secret)).key == key
        assert known.get(secret) is not None
    assert known.names == {"web", "batch"}


async def test_a_revoked_key_is_withdrawn_without_a_request(
    known: KnownKeys, store: SqlKeyStore
) -> None:
    key, secret = await store.create(WEB)
    _, other = await store.create(replace(WEB, name="batch"))
    grant, kept = await valid(known, secret), await valid(known, other)
    await store.revoke(key.id)
    await wait_until_ended(grant)
    assert grant.has_ended
    assert not grant.use()
    assert known.get(other) is kept
    assert kept.is_valid()
    found = await known.find(secret)  # recognized, to report the reason
    assert found is not None
    assert found.key.revoked_at is not None


async def test_a_changed_key_withdraws_decisions_about_the_old_one(
    known: KnownKeys, store: SqlKeyStore
) -> None:
    key, secret = await store.create(WEB)
    grant = await valid(known, secret)
    await store.change(
        key.id, KeyChange(expiry=None, limits=NO_CALLER_LIMITS, endpoints=("fal-ai/flux*",))
    )
    await wait_until_ended(grant)
    assert (await valid(known, secret)).key.endpoints == ("fal-ai/flux*",)


async def test_a_rotated_secret_ends_and_with_grace_later(
    known: KnownKeys, store: SqlKeyStore
) -> None:
    key, first = await store.create(WEB)
    grant = await valid(known, first)
    _, second = await store.rotate(key.id, 0.3) or (key, "")
    await valid(known, second)
    replaced = await valid(known, first)
    assert replaced is not grant
    later = KeyChange(expiry=Expiry(after=60.0), limits=NO_CALLER_LIMITS, endpoints=())
    await store.change(key.id, later)
    await wait_until_ended(await valid(known, first))
    await asyncio.sleep(0.3)
    await wait_until_ended(replaced)
    await valid(known, second)


async def test_a_grant_ends_when_its_key_expires_without_the_store(
    known: KnownKeys, store: SqlKeyStore, flaky: FlakyStore
) -> None:
    _, secret = await store.create(replace(WEB, expiry=Expiry(after=0.2)))
    grant = await valid(known, secret)
    flaky.is_away = True
    await wait_until_ended(grant)
    assert grant.has_ended


async def test_expiry_is_by_the_clock_of_the_database(store: SqlKeyStore) -> None:
    clock = FakeClock()
    known = KnownKeys(store, clock)
    _, secret = await store.create(replace(WEB, expiry=Expiry(after=100.0)))
    await known.refresh()
    grant = known.get(secret)
    assert grant is not None
    clock.now += 99
    assert grant.is_valid()
    clock.now += 2
    assert grant.has_ended


async def test_while_the_store_is_away_known_keys_are_trusted_for_a_time(
    store: SqlKeyStore, flaky: FlakyStore, caplog: pytest.LogCaptureFixture
) -> None:
    clock = FakeClock()
    known = KnownKeys(flaky, clock)  # type: ignore[arg-type]
    _, secret = await store.create(WEB)
    await known.refresh()
    flaky.is_away = True
    clock.now += TRUST_SECONDS - 1
    with pytest.raises(KeyStoreError):
        await known.refresh()
    grant = await valid(known, secret)
    with pytest.raises(KeyStoreError):
        await known.find(new_secret())
    clock.now += 2
    assert not grant.is_valid()
    assert not grant.has_ended  # it is not certain
    with pytest.raises(KeyStoreError):
        await known.find(secret)
    flaky.is_away = False
    clock.now += 1
    assert await known.find(secret) is grant
    assert grant.is_valid()
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert [text[:20] for text in warnings] == [
        "Keys cannot be read:",
        "Keys can be read aga",
    ]


async def test_a_store_that_hangs_is_an_error_in_time(
    known: KnownKeys, store: SqlKeyStore, flaky: FlakyStore
) -> None:
    _, secret = await store.create(WEB)
    await valid(known, secret)
    flaky.hangs = True
    async with asyncio.timeout(5):
        with pytest.raises(KeyStoreError):
            await known.find(new_secret())
    await valid(known, secret)
    flaky.hangs = False
    async with asyncio.timeout(5):
        while True:
            try:
                assert await known.find(new_secret()) is None
                break
            except KeyStoreError:
                await asyncio.sleep(0.01)


async def test_unknown_secrets_cause_few_reads(store: SqlKeyStore, flaky: FlakyStore) -> None:
    known = KnownKeys(flaky)  # type: ignore[arg-type]
    found = await asyncio.gather(*(known.find(new_secret()) for _ in range(1000)))
    assert {*found} == {None}
    assert flaky.reads <= 2
    assert repr(known) == "<KnownKeys 0 secrets>"


async def test_a_key_created_during_a_read_is_found(
    known: KnownKeys, store: SqlKeyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refresh that began before the request does not count."""
    for number in range(30):
        unknown = asyncio.ensure_future(known.find(new_secret()))
        await asyncio.sleep(0.001 * (number % 10))
        _, secret = await store.create(replace(WEB, name=f"web-{number}"))
        await valid(known, secret)
        await unknown


async def test_without_keys_the_store_is_not_read_again(
    known: KnownKeys, store: SqlKeyStore, flaky: FlakyStore
) -> None:
    await wait_until(lambda: flaky.reads, seconds=5)
    await asyncio.sleep(0.2)
    assert flaky.reads == 1
    _, secret = await store.create(WEB)
    await valid(known, secret)
    await asyncio.sleep(0.2)
    assert flaky.reads > 3


async def test_the_last_use_is_written_later_and_rarely(
    store: SqlKeyStore, flaky: FlakyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "USES_INTERVAL", 0.02)
    key, secret = await store.create(WEB)
    await store.create(replace(WEB, name="unused"))
    async with KnownKeys(flaky) as known:  # type: ignore[arg-type]
        grant = await valid(known, secret)
        assert grant.use()
        assert flaky.uses == []
        await wait_until(lambda: flaky.uses, seconds=5)
        for _ in range(20):
            assert grant.use()
            await asyncio.sleep(0.01)
        assert flaky.uses == [(key.id,)]
    assert flaky.uses == [(key.id,)] * 2  # and once more at the end
    used: AccessKey | None = await store.find("web")
    assert used is not None
    assert used.last_used_at is not None


async def test_a_database_that_was_replaced_is_read(tmp_path: Path) -> None:
    """The generation does not start from the same number."""
    first, second = (choose_key_store(None, tmp_path / name) for name in ("one", "two"))
    await first.create(WEB)
    await asyncio.sleep(0.01)
    await second.create(WEB)
    versions = [await each.version() for each in (first, second)]
    assert versions[0].generation != versions[1].generation
    for each in (first, second):
        await each.disconnect()
