"""The keys in the database of the ledger: an SQLite file or PostgreSQL."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from typing import Any, Self

from falproxy.limit_settings import (
    CallerLimits,
    format_budget,
    format_rate,
    parse_budget,
    parse_rate,
)
from falproxy.stores.keys import (
    ENDED_RETENTION,
    ENDED_SECRETS_MAX,
    ID_BYTES,
    KEYS_MAX,
    LAST_USE_INTERVAL,
    NO_KEYS,
    AccessKey,
    Expiry,
    KeyChange,
    KeyEndedError,
    KeyNameTakenError,
    KeyStoreError,
    KeysVersion,
    NewKey,
    StoredSecret,
    TooManyKeysError,
    digest_of,
    new_secret,
)
from falproxy.stores.ledger import InvalidRowError, LedgerError
from falproxy.stores.ledger.database import LedgerDatabase, StatementRows
from falproxy.stores.ledger.rows import Row
from falproxy.stores.ledger.schema import Schema
from falproxy.stores.ledger.writer import choose_database

COLUMNS = (
    "id", "name", "creator", "created_at", "expires_at", "revoked_at", "last_used_at", "limits",
    "endpoints",
)  # fmt: skip
SCHEMA = Schema(
    "falproxy_keys_version",
    (
        (
            """CREATE TABLE falproxy_keys (
                id TEXT PRIMARY KEY, name TEXT NOT NULL, creator TEXT NOT NULL,
                created_at BIGINT NOT NULL, expires_at BIGINT, revoked_at BIGINT,
                last_used_at BIGINT, limits TEXT NOT NULL, endpoints TEXT NOT NULL
            )""",
            """CREATE UNIQUE INDEX falproxy_keys_by_name ON falproxy_keys (name)
                WHERE revoked_at IS NULL""",
            """CREATE TABLE falproxy_key_secrets (
                digest TEXT PRIMARY KEY, key_id TEXT NOT NULL, created_at BIGINT NOT NULL,
                expires_at BIGINT
            )""",
            "CREATE INDEX falproxy_key_secrets_by_key ON falproxy_key_secrets (key_id)",
            "CREATE TABLE falproxy_key_changes (generation BIGINT NOT NULL)",
            # Not the same in a database that replaces another one.
            "INSERT INTO falproxy_key_changes (generation) VALUES (NOW)",
        ),
    ),
    ("falproxy_keys_version", "falproxy_keys", "falproxy_key_secrets", "falproxy_key_changes"),
)

KEY_LIST = ", ".join(f"k.{column}" for column in COLUMNS)
SELECT_GENERATION = "SELECT generation, NOW FROM falproxy_key_changes"
COUNT_CHANGE = "UPDATE falproxy_key_changes SET generation = generation + 1"
SELECT_SECRETS = f"""
    SELECT s.digest, s.expires_at, {KEY_LIST}
    FROM falproxy_key_secrets AS s JOIN falproxy_keys AS k ON k.id = s.key_id
    WHERE COALESCE(s.expires_at, $1) >= $1 AND COALESCE(k.expires_at, $1) >= $1
        AND COALESCE(k.revoked_at, $1) >= $1
"""
SELECT_KEYS = f"SELECT {KEY_LIST} FROM falproxy_keys AS k"
SELECT_LIVE = f"{SELECT_KEYS} WHERE k.revoked_at IS NULL ORDER BY k.name"
SELECT_ALL = f"{SELECT_KEYS} ORDER BY k.revoked_at IS NOT NULL, k.revoked_at DESC, k.name"
SELECT_BY_ID = f"{SELECT_KEYS} WHERE k.id = $1"
SELECT_BY_NAME = f"""
    {SELECT_KEYS} WHERE k.name = $1
    ORDER BY k.revoked_at IS NOT NULL, k.revoked_at DESC LIMIT 1
"""
COUNT_LIVE = "SELECT COUNT(*) FROM falproxy_keys WHERE revoked_at IS NULL"
END_EXPIRED = """
    UPDATE falproxy_keys SET revoked_at = expires_at
    WHERE name = $1 AND revoked_at IS NULL AND expires_at <= NOW
"""
EXPIRES_AT = "COALESCE(CAST($%d AS BIGINT), NOW + CAST($%d AS BIGINT))"
INSERT_KEY = f"""
    INSERT INTO falproxy_keys (id, name, creator, created_at, expires_at, limits, endpoints)
    VALUES ($1, $2, $3, NOW, {EXPIRES_AT % (4, 5)}, $6, $7)
"""
IS_ACTIVE = "revoked_at IS NULL AND (expires_at IS NULL OR expires_at > NOW)"
INSERT_SECRET = """
    INSERT INTO falproxy_key_secrets (digest, key_id, created_at) VALUES ($1, $2, NOW)
"""
ADD_SECRET = f"""
    INSERT INTO falproxy_key_secrets (digest, key_id, created_at)
    SELECT $1, id, NOW FROM falproxy_keys WHERE id = $2 AND {IS_ACTIVE}
"""
UPDATE_KEY = """
    UPDATE falproxy_keys SET limits = $2, endpoints = $3 WHERE id = $1 AND revoked_at IS NULL
"""
UPDATE_EXPIRY = f"""
    UPDATE falproxy_keys SET expires_at = {EXPIRES_AT % (2, 3)}
    WHERE id = $1 AND revoked_at IS NULL
"""
END_SECRETS = f"""
    UPDATE falproxy_key_secrets SET expires_at = NOW + CAST($2 AS BIGINT)
    WHERE key_id = $1 AND (expires_at IS NULL OR expires_at > NOW + CAST($2 AS BIGINT))
        AND key_id IN (SELECT id FROM falproxy_keys WHERE {IS_ACTIVE})
"""
DELETE_ENDED = f"""
    DELETE FROM falproxy_key_secrets WHERE key_id = $1 AND digest NOT IN (
        SELECT digest FROM falproxy_key_secrets WHERE key_id = $1
        ORDER BY created_at DESC LIMIT {ENDED_SECRETS_MAX}
    )
"""
SELECT_SECRET = "SELECT 1 FROM falproxy_key_secrets WHERE digest = $1"
REVOKE = "UPDATE falproxy_keys SET revoked_at = NOW WHERE id = $1 AND revoked_at IS NULL"
RECORD_USE = f"""
    UPDATE falproxy_keys SET last_used_at = NOW
    WHERE id = $1 AND (last_used_at IS NULL OR last_used_at < NOW - {int(LAST_USE_INTERVAL * 1000)})
"""


class SqlKeyStore:
    """A `KeyStore`. It has connections of its own: queries of the ledger may take long."""

    def __init__(self, database: LedgerDatabase) -> None:
        self._database = database

    def __repr__(self) -> str:
        return f"<SqlKeyStore {self._database}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        with map_errors():
            await self._database.close()

    async def disconnect(self) -> None:
        """Close the connections until they are needed again."""
        with map_errors():
            await self._database.disconnect()

    async def version(self) -> KeysVersion:
        rows = await self._read(SELECT_GENERATION)
        return KeysVersion(rows[0][0], rows[0][1] / 1000) if rows else NO_KEYS

    async def secrets(self, now: float) -> list[StoredSecret]:
        rows = await self._read(SELECT_SECRETS, (to_ms(now - ENDED_RETENTION),))
        return [StoredSecret(row[0], from_ms(row[1]), key_from_row(row[2:])) for row in rows]

    async def list_keys(self, *, revoked: bool = False) -> list[AccessKey]:
        return [
            key_from_row(row) for row in await self._read(SELECT_ALL if revoked else SELECT_LIVE)
        ]

    async def find(self, name_or_id: str) -> AccessKey | None:
        text = name_or_id.encode(errors="replace").decode().replace("\0", "\ufffd")
        rows = await self._read(SELECT_BY_ID, (text,)) or await self._read(SELECT_BY_NAME, (text,))
        return key_from_row(rows[0]) if rows else None

    async def create(self, new: NewKey) -> tuple[AccessKey, str]:
        key_id, secret = token_hex(ID_BYTES), new_secret()
        ((count,),) = await self._read(COUNT_LIVE) or [(0,)]
        if count >= KEYS_MAX:
            raise TooManyKeysError
        values = (to_row(new.limits), json.dumps(new.endpoints))
        row = (key_id, new.name, new.creator, *expiry_to_row(new.expiry), *values)
        try:
            await self._write(
                (END_EXPIRED, ((new.name,),)),
                (INSERT_KEY, (row,)),
                (INSERT_SECRET, ((digest_of(secret), key_id),)),
            )
        except InvalidRowError as error:
            raise KeyNameTakenError from error
        return await self._get(key_id), secret

    async def change(self, key_id: str, change: KeyChange) -> AccessKey | None:
        statements: list[StatementRows] = [
            (UPDATE_KEY, ((key_id, to_row(change.limits), json.dumps(change.endpoints)),))
        ]
        if change.expiry is not None:
            statements.append((UPDATE_EXPIRY, ((key_id, *expiry_to_row(change.expiry)),)))
        await self._write(*statements)
        key = await self.find(key_id)
        if key is not None and key.revoked_at is not None:
            raise KeyEndedError
        return key

    async def rotate(self, key_id: str, grace: float) -> tuple[AccessKey, str] | None:
        secret = new_secret()
        digest = digest_of(secret)
        await self._write(
            (END_SECRETS, ((key_id, to_ms(grace)),)),
            (ADD_SECRET, ((digest, key_id),)),
            (DELETE_ENDED, ((key_id,),)),
        )
        key = await self.find(key_id)
        if key is None:
            return None
        if not await self._read(SELECT_SECRET, (digest,)):
            raise KeyEndedError
        return key, secret

    async def revoke(self, key_id: str) -> AccessKey | None:
        await self._write((REVOKE, ((key_id,),)))
        return await self.find(key_id)

    async def record_uses(self, key_ids: Sequence[str]) -> None:
        with map_errors():
            rows = [(key_id,) for key_id in sorted(key_ids)]  # in one order: no deadlock
            await self._database.run_transaction([(RECORD_USE, rows)])

    async def _get(self, key_id: str) -> AccessKey:
        key = await self.find(key_id)
        if key is None:
            raise KeyStoreError("the key was deleted")
        return key

    async def _read(self, statement: str, row: Row = ()) -> list[Row]:
        """Return no rows if there are no tables: only a writer creates them."""
        with map_errors():
            if not await self._database.is_created():
                return []
            return await self._database.execute(statement, row)

    async def _write(self, *statements: StatementRows) -> None:
        """Raises: InvalidRowError, KeyStoreError."""
        changes = (*statements, (COUNT_CHANGE, ((),)))
        with map_errors():
            await self._database.run_transaction(changes)


@contextmanager
def map_errors() -> Iterator[None]:
    try:
        yield
    except InvalidRowError:
        raise
    except LedgerError as error:
        raise KeyStoreError(str(error)) from error


def key_from_row(row: Row) -> AccessKey:
    values: dict[str, Any] = dict(zip(COLUMNS, row, strict=True))
    times = {name: from_ms(values[name]) for name in COLUMNS if name.endswith("_at")}
    limits = json.loads(values["limits"])
    return AccessKey(
        **{
            **values,
            **times,
            "limits": CallerLimits(
                rate=parse_rate(limits["rate"]) if limits.get("rate") else None,
                concurrency=limits.get("concurrency"),
                budget=parse_budget(limits["budget"]) if limits.get("budget") else None,
            ),
            "endpoints": tuple(json.loads(values["endpoints"])),
        }
    )


def to_row(limits: CallerLimits) -> str:
    return json.dumps(
        {
            "rate": limits.rate and format_rate(limits.rate),
            "concurrency": limits.concurrency,
            "budget": limits.budget and format_budget(limits.budget),
        }
    )


def expiry_to_row(expiry: Expiry) -> tuple[int | None, int | None]:
    """Return the time and the duration in milliseconds."""
    at, after = expiry.at, expiry.after
    return None if at is None else to_ms(at), None if after is None else to_ms(after)


def to_ms(seconds: float) -> int:
    return round(seconds * 1000)


def from_ms(milliseconds: int | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000


def choose_key_store(database_url: str | None, data_dir: Path) -> SqlKeyStore:
    """Return the store beside the ledger. Raises: SettingsError."""
    return SqlKeyStore(choose_database(database_url, data_dir, SCHEMA))
