"""Whether an application accepts keys that are made at run time (FALPROXY_KEYS)."""

import errno
import logging
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from falproxy.settings import Settings
from falproxy.stores.keys import NO_KEYS, KeyStoreError
from falproxy.stores.keys.sql_keys import choose_key_store
from falproxy.stores.ledger.writer import LEDGER_FILE

logger = logging.getLogger(__name__)

BUSY_TIMEOUT = 2.0  # seconds
READ_ONLY = "file:{}?mode=ro"
SELECT_TABLE = "SELECT 1 FROM sqlite_master WHERE name = 'falproxy_keys'"
SELECT_KEY = "SELECT 1 FROM falproxy_keys LIMIT 1"


def resolve_key_mode(
    settings: Settings, *, has_hook: bool = False, has_keys: bool | None = False
) -> Settings:
    """Return settings in which FALPROXY_KEYS is `on` or `off`.

    `auto` is `on` if callers must authenticate by other means. Otherwise it is `on` if a key was
    ever made, or if that is not certain: a proxy that required keys must not be open after a
    restart. The decision is made once, at start.

    has_hook: callers are authenticated by a hook.
    has_keys: whether PostgreSQL has keys; None if it cannot be read. An SQLite file is read here.
    """
    if settings.auth.keys != "auto":
        return settings
    is_on = settings.auth.is_locked or has_hook
    if not is_on:
        if settings.ledger.database_url is None:
            has_keys = file_has_keys(settings.data_dir / LEDGER_FILE)
        is_on = has_keys is not False
        if has_keys:
            logger.warning(
                "Callers need a key, because keys were made (falproxy keys). FALPROXY_KEYS=0 opens "
                "the proxy to everyone who can connect."
            )
        elif has_keys is None:
            logger.warning(
                "Callers need a key, because it is not known whether keys were made: the ledger "
                "cannot be read. FALPROXY_KEYS=0 opens the proxy to everyone who can connect."
            )
    auth = replace(settings.auth, keys="on" if is_on else "off")
    return replace(settings, auth=auth)


def file_has_keys(file: Path) -> bool | None:
    """Return whether a key was ever made; None if the file cannot be read."""
    try:
        if not file.is_file():
            return False
        uri = READ_ONLY.format(str(file.resolve()).replace("?", "%3f").replace("#", "%23"))
        with closing(sqlite3.connect(uri, uri=True, timeout=BUSY_TIMEOUT)) as connection:
            has_table = connection.execute(SELECT_TABLE).fetchone() is not None
            return has_table and connection.execute(SELECT_KEY).fetchone() is not None
    except OSError as error:
        return False if error.errno == errno.ENAMETOOLONG else None
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_NOTADB:
            return False
        return None


async def database_has_keys(settings: Settings) -> bool | None:
    """Return whether PostgreSQL has keys; None if it cannot be read. Raises: SettingsError."""
    if settings.auth.keys != "auto" or settings.ledger.database_url is None:
        return False
    if settings.auth.is_locked:
        return False  # it makes no difference
    try:
        async with choose_key_store(settings.ledger.database_url, settings.data_dir) as store:
            return await store.version() != NO_KEYS
    except KeyStoreError:
        return None
