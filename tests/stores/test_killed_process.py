"""A process that is killed while it writes groups has lost nothing that it confirmed."""

import signal
import subprocess
import sys
from pathlib import Path

from falproxy.stores.cache.sqlite_owners import SqliteOwnerStore
from falproxy.stores.idempotency.sqlite import SqliteIdempotencyStore
from falproxy.stores.limits import Limit
from falproxy.stores.limits.sqlite import SqliteLimitsStore
from falproxy.windows import DAY, Window

CALLERS, LINES = 40, 600
BUDGET = Limit("budget", "total", 10**9, Window(1000 * DAY))
WORKER = """
import asyncio, sys
from pathlib import Path
from falproxy.stores.cache import RequestOwner
from falproxy.stores.cache.sqlite_owners import SqliteOwnerStore
from falproxy.stores.idempotency.sqlite import SqliteIdempotencyStore
from falproxy.stores.limits import Limit, ReserveRequest
from falproxy.stores.limits.sqlite import SqliteLimitsStore
from falproxy.windows import DAY, Window

BUDGET = Limit("budget", "total", 10**9, Window(1000 * DAY))

async def call(name, owners, records, limits):
    for number in range(10**6):
        token = f"{name}-{number}"
        await records.begin(token, "digest", token, 60.0)
        await limits.reserve(ReserveRequest(token, [BUDGET], 1, 600.0))
        await records.mark_sent(token, token, 60.0)
        await limits.attach(token, f"id-{token}", "details", 600.0)
        await owners.put_owner(f"id-{token}", RequestOwner("ann", "mark"))
        await records.finish(token, token, b"outcome")
        print(token, flush=True)

async def work(folder):
    owners = SqliteOwnerStore(folder / "owners")
    async with SqliteIdempotencyStore(folder / "i") as records:
        async with SqliteLimitsStore(folder / "l") as limits:
            names = range(int(sys.argv[2]))
            await asyncio.gather(*(call(name, owners, records, limits) for name in names))

asyncio.run(work(Path(sys.argv[1])))
"""


async def test_what_was_confirmed_is_in_the_files(tmp_path: Path) -> None:
    tokens = killed_while_writing(tmp_path)
    owners = SqliteOwnerStore(tmp_path / "owners")
    async with (
        SqliteIdempotencyStore(tmp_path / "i") as records,
        SqliteLimitsStore(tmp_path / "l") as limits,
    ):
        for token in tokens:
            reservation = await limits.find(f"id-{token}")
            assert reservation is not None
            assert (reservation.token, reservation.amount) == (token, 1)
            owner = await owners.get_owner(f"id-{token}")
            assert owner is not None
            reply = await records.begin(token, "digest", "another", 60.0)
            assert (reply.state, reply.outcome) == ("done", b"outcome")
        (state,) = await limits.count([BUDGET])
        assert len(tokens) <= state.used <= len(tokens) + CALLERS
    await owners.close()


def killed_while_writing(folder: Path) -> list[str]:
    """Return the tokens of the calls that ended before the process was killed."""
    command = [sys.executable, "-c", WORKER, str(folder), str(CALLERS)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    tokens = [process.stdout.readline().strip() for _ in range(LINES)]
    process.send_signal(signal.SIGKILL)
    return tokens + process.communicate()[0].split("\n")[:-1]
