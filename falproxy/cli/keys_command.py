"""`falproxy keys`: keys that are made at run time. The proxy may be running meanwhile."""

import argparse
import json
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from falproxy.errors import SettingsError
from falproxy.settings import Settings
from falproxy.stores.keys import (
    KEYS_MAX,
    AccessKey,
    KeyEndedError,
    KeyNameTakenError,
    KeyStore,
    KeyStoreError,
    TooManyKeysError,
)
from falproxy.stores.keys.documents import (
    CHANGE_FIELDS,
    KeyFieldError,
    ReservedNameError,
    key_document,
    parse_grace,
    parse_new_key,
)
from falproxy.stores.keys.sql_keys import choose_key_store
from falproxy.stores.ledger.reports import Json

CREATOR = "cli"
COLUMNS = (
    "name", "state", "created", "expires", "last used", "rate", "concurrency", "budget",
    "endpoints",
)  # fmt: skip
LABELS = ("id", "creator", *COLUMNS)
NO_VALUE = "-"
NO_KEYS_LINE = "There are no keys. Create one with: falproxy keys create NAME"
SECRET_NOTE = "Store the secret now: it is not shown again."
OFF_NOTE = "FALPROXY_KEYS=0 is set here: a proxy with this setting does not accept the key."
START_NOTE = (
    "A proxy that runs without authentication accepts everyone until it is restarted; it then "
    "requires a key."
)

Command = Callable[[Settings, KeyStore, argparse.Namespace], Awaitable[None]]


class KeyCommandError(Exception):
    """The command failed. The message is a sentence."""


async def run_keys(options: argparse.Namespace, settings: Settings) -> int:
    """Run a command. Returns 1 if it failed."""
    try:
        async with choose_key_store(settings.ledger.database_url, settings.data_dir) as store:
            with map_errors():
                await COMMANDS[options.keys_command](settings, store, options)
    except KeyCommandError as error:
        sys.stderr.write(f"falproxy: {error}\n")
        return 1
    return 0


@contextmanager
def map_errors() -> Iterator[None]:
    """Raises: SettingsError, an argument is invalid; KeyCommandError."""
    try:
        yield
    except KeyFieldError as error:
        raise SettingsError(f"{option_of(error.field)} {error}.") from None
    except KeyStoreError as error:
        raise KeyCommandError(f"The keys cannot be read or written: {error}.") from error
    except KeyNameTakenError:
        raise KeyCommandError("There is a key of this name: revoke it first.") from None
    except ReservedNameError:
        raise KeyCommandError(
            "An access key of FALPROXY_ACCESS_KEYS, or a caller in FALPROXY_ADMINS, has this name."
        ) from None
    except KeyEndedError:
        raise KeyCommandError("The key is revoked or has expired.") from None
    except TooManyKeysError:
        raise KeyCommandError(f"There are {KEYS_MAX} keys: revoke some first.") from None


def option_of(field: str) -> str:
    return "NAME" if field == "name" else f"--{field}"


async def create(settings: Settings, store: KeyStore, options: argparse.Namespace) -> None:
    given = {name: getattr(options, name) for name in CHANGE_FIELDS}
    fields: dict[str, object] = {name: text for name, text in given.items() if text is not None}
    for name, value in fields.items():
        if not value:
            raise SettingsError(f"{option_of(name)} must not be empty.")
    reserved = {*settings.auth.names_by_secret.values(), *settings.auth.admins}
    new = parse_new_key({"name": options.name, **fields}, CREATOR, reserved, time.time())
    key, secret = await store.create(new)
    show_secret(key, secret, as_json=options.json)
    if settings.auth.keys == "off":
        sys.stderr.write(f"{OFF_NOTE}\n")
    elif not settings.auth.is_locked:
        sys.stderr.write(f"{START_NOTE}\n")


async def list_keys(settings: Settings, store: KeyStore, options: argparse.Namespace) -> None:
    keys = await store.list_keys(revoked=options.all)
    now = time.time()
    if options.json:
        print_json({"keys": [key_document(key, now) for key in keys]})
    elif keys:
        print_lines(align([COLUMNS, *(cells(key, now) for key in keys)]))
    else:
        print_lines([NO_KEYS_LINE])


async def show(settings: Settings, store: KeyStore, options: argparse.Namespace) -> None:
    show_key(await find(store, options.name), as_json=options.json)


async def rotate(settings: Settings, store: KeyStore, options: argparse.Namespace) -> None:
    key = await find(store, options.name)
    rotated = await store.rotate(key.id, parse_grace(options.grace))
    if rotated is None:
        raise unknown_key()
    show_secret(*rotated, as_json=options.json)


async def revoke(settings: Settings, store: KeyStore, options: argparse.Namespace) -> None:
    key = await find(store, options.name)
    if key.revoked_at is not None:
        raise KeyCommandError("The key is revoked already.")
    revoked = await store.revoke(key.id) or key
    if options.json:
        show_key(revoked, as_json=True)
    else:
        print_lines([f"The key {key.name} is revoked: all proxies refuse it within 5 seconds."])


COMMANDS: Mapping[str, Command] = {
    "create": create,
    "list": list_keys,
    "show": show,
    "rotate": rotate,
    "revoke": revoke,
}


async def find(store: KeyStore, name: str) -> AccessKey:
    """Raises: KeyCommandError."""
    if (key := await store.find(name)) is None:
        raise unknown_key()
    return key


def unknown_key() -> KeyCommandError:
    return KeyCommandError("There is no key of this name or id: see falproxy keys list --all.")


def show_secret(key: AccessKey, secret: str, *, as_json: bool) -> None:
    if as_json:
        print_json({**key_document(key, time.time()), "secret": secret})
    else:
        print_lines([*describe(key), f"{'secret':<12}{secret}", "", SECRET_NOTE])


def show_key(key: AccessKey, *, as_json: bool) -> None:
    if as_json:
        print_json(key_document(key, time.time()))
    else:
        print_lines(describe(key))


def describe(key: AccessKey) -> list[str]:
    values = (key.id, key.creator, *cells(key, time.time()))
    return [f"{label:<12}{text}" for label, text in zip(LABELS, values, strict=True)]


def cells(key: AccessKey, now: float) -> list[str]:
    """Return the values of COLUMNS."""
    document = key_document(key, now)
    names = ("name", "state", "created_at", "expires_at", "last_used_at", "rate", "concurrency",
             "budget")  # fmt: skip
    texts = [format_cell(name, document[name]) for name in names]
    return [*texts, ", ".join(key.endpoints) or "all"]


def format_cell(name: str, value: object) -> str:
    if value is None:
        return NO_VALUE
    text = str(value)
    if name.endswith("_at"):
        return f"{text[:10]} {text[11:16]}"
    return f"${text}" if name == "budget" else text


def align(grid: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in grid]


def print_lines(lines: Sequence[str]) -> None:
    sys.stdout.write("".join(f"{line}\n" for line in lines))


def print_json(document: Json) -> None:
    print_lines([json.dumps(document, indent=2)])
