"""Errors of connections to the ledger: they have no part of DATABASE_URL, and leave no thread."""

import asyncio
import threading
import traceback
from pathlib import Path

import pytest

from falproxy.errors import SettingsError
from falproxy.stores.ledger import LedgerError
from falproxy.stores.ledger.postgres import connect_error_message
from falproxy.stores.ledger.sqlite import SqliteFactory
from falproxy.stores.ledger.writer import choose_ledger
from tests.support.waiting import wait_until

CANARY = "c4nary"
URLS = [
    pytest.param("postgresql://{0}:{0}@127.0.0.1:1/{0}", id="nothing listens"),
    pytest.param("postgresql://{0}:{0}@{0}.invalid/{0}", id="an unknown host"),
    pytest.param("postgresql://u:{0}@127.0.0.1:1/db?sslmode={0}", id="an unknown mode of TLS"),
    pytest.param(
        "postgresql://u:{0}@127.0.0.1:1/db?sslmode=verify-full&sslrootcert=/{0}",
        id="no certificate",
    ),
    pytest.param("postgresql://u:{0}@127.0.0.1:1/db?{0}=1", id="an unknown option"),
    pytest.param("postgresql://u:{0}%2Fx@127.0.0.1:1/db", id="an escaped password"),
    pytest.param("postgresql://u:p@%2F{0}/db", id="a socket that is missing"),
    pytest.param("postgresql:///{0}?host=/{0}&port={0}", id="a port that is no number"),
    pytest.param("postgresql://u:{0}@/db", id="no host"),
]


@pytest.mark.parametrize("url", URLS)
async def test_an_error_has_no_part_of_the_url(url: str, tmp_path: Path) -> None:
    with pytest.raises((LedgerError, SettingsError)) as error:
        async with choose_ledger(url.format(CANARY), tmp_path) as ledger:
            await ledger.probe()
    assert CANARY not in "".join(traceback.format_exception(error.value))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (TimeoutError(CANARY), "it did not respond in time"),
        (ConnectionRefusedError(111, CANARY), "it cannot be reached (ECONNREFUSED)"),
        (ValueError(CANARY), "DATABASE_URL cannot be used (ValueError): check its options"),
    ],
)
def test_the_message_names_the_cause(error: Exception, message: str) -> None:
    assert connect_error_message(error) == message


async def test_a_connection_is_terminated_if_its_caller_leaves_while_it_is_opened(
    tmp_path: Path,
) -> None:
    factory, before = SqliteFactory(tmp_path / "ledger.sqlite"), set(threading.enumerate())
    for turns in range(4):
        connecting = asyncio.ensure_future(factory.connect())
        for _ in range(turns):
            await asyncio.sleep(0)
        connecting.cancel()
        await asyncio.wait([connecting])
    await factory.wait_terminated()
    # The thread ends just after it has reported
    await wait_until(lambda: not set(threading.enumerate()) - before, seconds=5)
