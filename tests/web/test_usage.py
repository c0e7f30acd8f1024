"""`falproxy usage` and `/api/usage`: the same reports, with access control."""

import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

import jwt
import pytest
from aiohttp import web
from aiohttp.pytest_plugin import AiohttpClient

from falproxy import __version__, create_app
from falproxy.cli.usage_command import align_columns
from falproxy.stores.ledger import CallRecord, Outcome, ProcessStart, Totals
from falproxy.stores.ledger.postgres import postgres_ledger
from falproxy.stores.ledger.reports import (
    TimeRange,
    check_series_length,
    format_time,
    parse_time_range,
    time_series,
    totals_json,
)
from falproxy.stores.ledger.sqlite import sqlite_ledger
from falproxy.web.usage import TtlCache
from tests.support.fake_fal import FakeFal
from tests.support.gateway import Gateway, MakeGateway
from tests.support.key_search import CANARY
from tests.support.postgres_server import PostgresServer, postgres_server
from tests.support.running_proxy import open_running_proxy
from tests.support.settings import make_settings
from tests.support.urls import RUN
from tests.support.usage import count_calls, run_usage, wait_until_equal
from tests.support.waiting import SOON

NOW = datetime(2026, 11, 21, 9, 30, tzinfo=UTC).timestamp()
HOUR, DAY = 3600.0, 86400.0
SECRET = "a secret of thirty-two characters"
KEYS = (("ann", "s3cret-ann"), ("bob", "s3cret-bob"))


def record(**columns: Any) -> CallRecord:
    defaults: dict[str, Any] = {"at": time.time() - 60, "route": "/api/fal/proxy", "status": 200}
    return CallRecord(**(defaults | {"endpoint": "fal-ai/flux/dev", "operation": "run"} | columns))


CALLS: tuple[CallRecord | Outcome, ...] = (
    record(principal="ann", settled=25_000, seconds=2.0, upstream_seconds=1.5),
    record(principal="ann", settled=0, status=422, seconds=1.0, upstream_seconds=0.5),
    record(principal="bob", cache="hit", settled=0, estimated=40_000, endpoint="fal-ai/kontext"),
    record(principal="bob", cache="miss", request_id="r1", endpoint="fal-ai/kontext"),
    Outcome(request_id="r1", status=200, settled=40_000),
    record(principal="bob", endpoint="me/own"),
)


async def write(folder: Path, rows: Sequence[CallRecord | Outcome] = CALLS) -> None:
    async with sqlite_ledger(folder / "ledger.sqlite") as ledger:
        await ledger.write(rows)


@pytest.mark.parametrize(
    ("since", "until", "expected"),
    [
        pytest.param("7d", None, (NOW - 7 * DAY, NOW), id="an age in days"),
        pytest.param("90M", None, (NOW - 1.5 * HOUR, NOW), id="an age in minutes, upper case"),
        pytest.param("2d", "1d", (NOW - 2 * DAY, NOW - DAY), id="two ages"),
        pytest.param("2026-11-21", None, (NOW - 9.5 * HOUR, NOW), id="a date, in UTC"),
        pytest.param("2026-11-21T09:00Z", None, (NOW - 0.5 * HOUR, NOW), id="a time"),
        pytest.param(
            "2026-11-21T09:00+01:00", None, (NOW - 1.5 * HOUR, NOW), id="a time with an offset"
        ),
    ],
)
def test_a_time_range_is_parsed(
    since: str, until: str | None, expected: tuple[float, float]
) -> None:
    assert parse_time_range(since, until, NOW) == TimeRange(*expected)


@pytest.mark.parametrize(
    ("since", "until", "message"),
    [
        pytest.param("", None, "since must be like", id="empty"),
        pytest.param("yesterday", None, "since must be like", id="a word"),
        pytest.param("2026-02-30", None, "since must be like", id="an invalid date"),
        pytest.param("2026-W01-1", None, "since must be like", id="a week"),
        pytest.param("7d", "soon", "until must be like", id="an invalid end"),
        pytest.param("1d", "2d", "since must be before until", id="the wrong way round"),
        pytest.param("401d", None, "at most 400 days", id="too long"),
        pytest.param("999999d", None, "at most 400 days", id="before 1970"),
    ],
)
def test_an_invalid_time_range_is_rejected_with_a_reason(
    since: str, until: str | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        parse_time_range(since, until, NOW)


@pytest.mark.parametrize(
    ("seconds", "interval"),
    [
        pytest.param(HOUR, "minute", id="an hour"),
        pytest.param(DAY, "hour", id="a day"),
        pytest.param(7 * DAY, "hour", id="a week"),
        pytest.param(30 * DAY, "day", id="a month"),
    ],
)
def test_the_interval_of_a_series_depends_on_its_length(seconds: float, interval: str) -> None:
    assert TimeRange(NOW - seconds, NOW).interval == interval


def test_a_series_includes_intervals_without_calls() -> None:
    rows = [("2026-11-21T08:00Z", Totals(calls=3))]
    series = time_series(rows, TimeRange(NOW - 4 * HOUR, NOW))
    assert [(bucket["at"], bucket["calls"]) for bucket in series] == [
        ("2026-11-21T05:00:00.000Z", 0),
        ("2026-11-21T06:00:00.000Z", 0),
        ("2026-11-21T07:00:00.000Z", 0),
        ("2026-11-21T08:00:00.000Z", 3),
        ("2026-11-21T09:00:00.000Z", 0),
    ]


@pytest.mark.parametrize(
    ("totals", "spent", "saved"),
    [
        pytest.param(Totals(), 0.0, 0.0, id="no calls"),
        pytest.param(Totals(calls=2, unpriced=2), None, 0.0, id="no price is known"),
        pytest.param(Totals(calls=2, unpriced=1, spent=5), 5e-6, 0.0, id="one price is known"),
        pytest.param(Totals(calls=1, hits=1), 0.0, None, id="a hit of unknown price"),
        pytest.param(Totals(calls=1, hits=1, saved=40_000), 0.0, 0.04, id="a hit"),
    ],
)
def test_unknown_amounts_are_null(totals: Totals, spent: float | None, saved: float | None) -> None:
    assert (totals_json(totals)["spent"], totals_json(totals)["saved"]) == (spent, saved)


def test_a_series_that_is_too_long_is_rejected() -> None:
    check_series_length(TimeRange(NOW - 7 * DAY, NOW), "hour")
    with pytest.raises(ValueError, match="1000 times one minute"):
        check_series_length(TimeRange(NOW - 7 * DAY, NOW), "minute")


async def test_the_table_has_all_groups_and_totals(tmp_path: Path) -> None:
    await write(tmp_path)
    code, out, err = await run_usage(folder=tmp_path)
    assert (code, err) == (0, "")
    lines = [line.split("  ") for line in out.splitlines()]
    cells = {row[0]: [cell.strip() for cell in row[1:] if cell.strip()] for row in lines}
    assert cells["fal-ai/flux/dev"][:6] == ["2", "1", "0", "-", "$0.025", "$0.00"]
    assert cells["fal-ai/kontext"][:6] == ["2", "0", "1", "50%", "$0.04", "$0.04"]
    assert cells["me/own"][4] == "?"
    assert cells["all"][:6] == ["5", "1", "1", "50%", "$0.065+", "$0.04"]
    assert cells["fal-ai/flux/dev"][-2:] == ["500.0 ms", "1.00 s"]
    widths = {len(line) for line in out.splitlines()[2:-3]}
    assert len(widths) == 1
    assert "the price is not known" in out


@pytest.mark.parametrize("by", ["endpoint", "principal", "user", "route", "hour", "day", "minute"])
async def test_the_json_of_the_command_is_that_of_the_proxy(
    make_gateway: MakeGateway, fal: FakeFal, tmp_path: Path, by: str
) -> None:
    await write(tmp_path)
    code, out, _ = await run_usage("--json", "--by", by, "--since", "2h", folder=tmp_path)
    gateway = await make_gateway(fal.origin)
    report = await get_usage(gateway, since="2h", by=by)
    printed = json.loads(out)
    for document in (report, printed):
        del document["since"], document["until"]
    assert (code, printed) == (0, report)
    assert printed["totals"]["calls"] == 5
    assert fal.seen == []


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with postgres_server() as started:
        yield started


USERS: tuple[CallRecord, ...] = (
    record(principal="web", user_id="ada", settled=25_000, seconds=2.0, upstream_seconds=1.5),
    record(principal="web", user_id="bob\x1b[2J", settled=5_000),
    record(principal="batch", user_id="ada", settled=7_000, status=422, error="bad"),
    record(principal="web", settled=1_000),
)


@pytest.fixture(params=["sqlite", "postgres"])
async def user_ledger(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    """A ledger with the calls of users, as variables of the command."""
    if request.param == "sqlite":
        await write(tmp_path, USERS)
        return {}
    url = request.getfixturevalue("server").fresh()
    async with postgres_ledger(url) as ledger:
        await ledger.write(USERS)
    return {"DATABASE_URL": url}


async def test_the_table_by_user_has_a_row_for_each_user_of_a_caller(
    tmp_path: Path, user_ledger: dict[str, str]
) -> None:
    code, out, err = await run_usage("--by", "user", folder=tmp_path, **user_ledger)
    assert (code, err) == (0, "")
    lines = out.splitlines()[2:]
    assert [line.split()[:4] for line in lines[:5]] == [
        ["user", "principal", "calls", "errors"],
        ["ada", "web", "1", "0"],
        ["ada", "batch", "1", "1"],
        ["bob\ufffd[2J", "web", "1", "0"],
        ["-", "web", "1", "0"],
    ]
    assert lines[-1].split()[:3] == ["all", "4", "1"]
    assert len({len(line) for line in lines}) == 1


def test_columns_are_aligned_by_the_width_in_a_terminal() -> None:
    grid = [["user", "calls"], ["艾达", "2"], ["zoe\u0308", "10"], ["all", "12"]]
    assert align_columns(grid, 1) == [
        "user  calls", "艾达      2", "zoe\u0308      10", "-----------", "all      12",
    ]  # fmt: skip


async def test_usage_by_user_of_the_proxy_and_of_the_command_are_equal(
    make_gateway: MakeGateway, fal: FakeFal, tmp_path: Path, user_ledger: dict[str, str]
) -> None:
    options = ("--json", "--by", "user", "--since", "2h", "--limit", "2", "--offset", "1")
    _, out, _ = await run_usage(*options, folder=tmp_path, **user_ledger)
    settings = {"database_url": user_ledger.get("DATABASE_URL")}
    gateway = await make_gateway(fal.origin, **settings)
    report = await get_usage(gateway, since="2h", by="user", limit="2", offset="1")
    printed = json.loads(out)
    for document in (report, printed):
        del document["since"], document["until"]
    assert printed == report
    assert [(row["principal"], row["name"], row["spent"]) for row in report["rows"]] == [
        ("batch", "ada", 0.007), ("web", "bob\x1b[2J", 0.005),
    ]  # fmt: skip
    assert (report["has_more"], report["totals"]["calls"]) == (True, 4)
    last = await get_usage(gateway, since="2h", by="user", limit="2", offset="3")
    assert ([row["name"] for row in last["rows"]], last["has_more"]) == ([""], False)
    assert last["totals"]["calls"] == 4
    beyond = await get_usage(gateway, since="2h", by="user", offset="1000")
    assert (beyond["rows"], beyond["has_more"], beyond["totals"]["calls"]) == ([], False, 4)


@pytest.mark.parametrize(
    ("key", "admins", "users"),
    [
        pytest.param("s3cret-web", (), ["ada", "bob\x1b[2J", ""], id="users of the caller"),
        pytest.param("s3cret-batch", ("web",), ["ada"], id="users of the other caller"),
        pytest.param("s3cret-web", ("web",), ["ada", "ada", "bob\x1b[2J", ""], id="an admin"),
    ],
)
async def test_callers_see_their_own_users(
    make_gateway: MakeGateway,
    fal: FakeFal,
    tmp_path: Path,
    key: str,
    admins: tuple[str, ...],
    users: list[str],
) -> None:
    await write(tmp_path, USERS)
    keys = (("web", "s3cret-web"), ("batch", "s3cret-batch"))
    gateway = await make_gateway(fal.origin, access_keys=keys, admins=admins)
    report = await get_usage(gateway, key, since="2h")
    table = await get_usage(gateway, key, since="2h", by="user")
    for rows in (report["users"], table["rows"]):
        assert [row["name"] for row in rows] == users
    assert {call["user"] or "" for call in report["latest"]} == set(users)


async def test_a_report_of_many_users_is_bounded(
    make_gateway: MakeGateway, fal: FakeFal, tmp_path: Path
) -> None:
    await write(tmp_path, [record(user_id=f"user {n}", principal="web") for n in range(2500)])
    gateway = await make_gateway(fal.origin)
    assert len((await get_usage(gateway, since="2h"))["users"]) == 100
    table = await get_usage(gateway, since="2h", by="user")
    assert (len(table["rows"]), table["has_more"], table["totals"]["calls"]) == (1000, True, 2500)
    code, out, _ = await run_usage("--by", "user", "--limit", "3", folder=tmp_path)
    assert (code, len(out.splitlines())) == (0, 2 + 1 + 3 + 2 + 1 + 2)
    assert out.endswith("There are more rows: see --limit and --offset.\n")


@pytest.mark.parametrize("arguments", [(), ("--json",)])
async def test_a_missing_ledger_is_reported_and_not_created(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    code, out, err = await run_usage(*arguments, folder=tmp_path)
    assert (code, err) == (0, "")
    if arguments:
        assert (json.loads(out)["rows"], json.loads(out)["totals"]["calls"]) == ([], 0)
    else:
        assert out == f"No calls yet: there is no ledger in {tmp_path}.\n"
    assert not list(tmp_path.iterdir())


async def test_a_period_without_calls_is_reported(tmp_path: Path) -> None:
    await write(tmp_path)
    code, out, _ = await run_usage(
        "--since", "2020-01-01", "--until", "2020-01-02", folder=tmp_path
    )
    assert (code, out) == (0, "No calls from 2020-01-01 00:00 until 2020-01-02 00:00 UTC.\n")


async def test_an_unreadable_ledger_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "ledger.sqlite").write_text("this is not a database, in spite of its name")
    code, out, err = await run_usage(folder=tmp_path)
    assert (code, out) == (1, "")
    assert err == "falproxy: The ledger cannot be read: file is not a database.\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(("--since", "x"), "falproxy: --since must be like 7d", id="an invalid time"),
        pytest.param(("--limit", "0"), "falproxy: --limit must be a number from 1", id="no rows"),
        pytest.param(
            ("--since", "7d", "--by", "minute"),
            "falproxy: --since must be later",
            id="too many intervals",
        ),
    ],
)
async def test_invalid_options_are_an_error(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    code, out, err = await run_usage(*arguments, folder=tmp_path)
    assert (code, out) == (2, "")
    assert err.startswith(message)
    assert err.count("\n") == 1


async def test_the_command_works_while_a_proxy_writes(tmp_path: Path) -> None:
    async with open_running_proxy(tmp_path) as proxy:
        url = f"{proxy.origin}/api/fal/run/fal-ai/flux/dev"
        async with proxy.session.post(url, json={"prompt": "a"}) as response:
            assert response.status == 200
        await wait_until_equal(lambda: count_calls(proxy.session, proxy.origin), 1)
        _, out, _ = await run_usage("--json", folder=tmp_path)
    assert json.loads(out)["totals"]["calls"] == 1


async def get_usage(gateway: Gateway, key: str | None = None, **query: str) -> Any:
    headers = {"Accept-Encoding": "identity"} | ({} if key is None else {"x-falproxy-key": key})
    response = await gateway.client.get("/api/usage", params=query, headers=headers)
    assert response.status == 200, await response.text()
    return await response.json()


async def test_one_response_has_all_data_of_the_dashboard(
    make_gateway: MakeGateway, fal: FakeFal, tmp_path: Path
) -> None:
    await write(tmp_path)
    report = await get_usage(await make_gateway(fal.origin), since="2h")
    assert report["totals"]["calls"] == 5
    assert report["totals"]["spent"] == pytest.approx(0.065)
    assert (report["step"], sum(row["calls"] for row in report["series"])) == ("minute", 5)
    assert [row["name"] for row in report["endpoints"]] == [
        "fal-ai/kontext", "fal-ai/flux/dev", "me/own",
    ]  # fmt: skip
    assert [row["name"] for row in report["principals"]] == ["bob", "ann"]
    assert [row["name"] for row in report["routes"]] == ["/api/fal/proxy"]
    assert len(report["latest"]) == 5
    assert report["live"]["requests"] == 0
    costs = {row["request_id"]: row["spent"] for row in report["latest"]}
    assert costs["r1"] == 0.04


async def test_a_report_has_the_starts_of_processes(
    make_gateway: MakeGateway, fal: FakeFal, tmp_path: Path
) -> None:
    at = float(int(time.time() - 20 * DAY))
    async with sqlite_ledger(tmp_path / "ledger.sqlite") as ledger:
        for version, host, after in (("0.8", "a", 0.0), ("0.9", "a", 60.0), ("0.9", "b", 61.0)):
            await ledger.add_start(ProcessStart(version, host, at + after))
    gateway = await make_gateway(fal.origin)
    report = await get_usage(gateway, since=format_time(at + 30), until=format_time(at + 90))
    assert report["starts"] == [
        {
            "at": format_time(at + 60),
            "version": "0.9",
            "processes": 2,
            "hosts": 2,
            "is_new_version": True,
        }
    ]


async def test_a_proxy_records_its_start(make_gateway: MakeGateway, fal: FakeFal) -> None:
    gateway = await make_gateway(fal.origin)
    until = count(1)
    async with asyncio.timeout(SOON):
        while not (starts := (await get_usage(gateway, since=f"{100 + next(until)}d"))["starts"]):
            await asyncio.sleep(0.01)
    assert [(start["version"], start["processes"]) for start in starts] == [(__version__, 1)]


@pytest.mark.parametrize(
    "query",
    [
        pytest.param({"since": "x"}, id="an invalid time"),
        pytest.param({"since": ""}, id="an empty time"),
        pytest.param({"since": "1d", "until": "2d"}, id="the wrong way round"),
        pytest.param({"by": "colour"}, id="an unknown group"),
        pytest.param({"by": "user", "limit": "0"}, id="no rows"),
        pytest.param({"by": "user", "limit": "1001"}, id="too many rows at once"),
        pytest.param({"by": "user", "limit": "1e3"}, id="a limit that is not whole"),
        pytest.param({"by": "user", "offset": "-1"}, id="a negative offset"),
        pytest.param({"by": "user", "offset": "9" * 30}, id="an offset of many digits"),
        pytest.param({"limit": ""}, id="an empty limit"),
        pytest.param({"since": "30d", "by": "minute"}, id="too many rows"),
    ],
)
async def test_an_invalid_query_is_a_400(gateway: Gateway, query: dict[str, str]) -> None:
    response = await gateway.client.get("/api/usage", params=query)
    assert response.status == 400
    report = await response.json()
    assert report["error"]["code"] == "query_invalid"
    assert report["error"]["message"].startswith("The query's ")


async def test_an_unavailable_ledger_is_a_503_and_does_not_affect_calls(
    make_gateway: MakeGateway, fal: FakeFal, tmp_path: Path
) -> None:
    (tmp_path / "ledger.sqlite").write_text("this is not a database, in spite of its name")
    gateway = await make_gateway(fal.origin)
    response = await gateway.client.get("/api/usage")
    assert (response.status, response.headers["Retry-After"]) == (503, "5")
    assert (await response.json())["error"]["code"] == "ledger_away"
    assert (await gateway.call(RUN, json={})).status == 200
    assert (await gateway.client.get("/metrics")).status == 200


@pytest.mark.parametrize(
    ("key", "admins", "calls"),
    [
        pytest.param("s3cret-ann", (), 2, id="own calls, without admins"),
        pytest.param("s3cret-bob", ("ann",), 3, id="own calls"),
        pytest.param("s3cret-ann", ("ann",), 5, id="all calls, as an admin"),
    ],
)
async def test_callers_of_a_locked_proxy_see_their_own_calls(
    make_gateway: MakeGateway,
    fal: FakeFal,
    tmp_path: Path,
    key: str,
    admins: tuple[str, ...],
    calls: int,
) -> None:
    await write(tmp_path)
    gateway = await make_gateway(fal.origin, access_keys=KEYS, admins=admins)
    assert (await gateway.client.get("/api/usage")).status == 401
    report = await get_usage(gateway, key)
    assert report["totals"]["calls"] == len(report["latest"]) == calls
    if calls < 5:
        name = key.removeprefix("s3cret-")
        assert report["principal"] == name
        assert {row["principal"] for row in report["latest"]} == {name}
        assert (report["principals"], report["live"], report["starts"]) == (None, None, None)


def token(subject: str) -> str:
    claims = {"sub": subject, "aud": "authenticated", "exp": time.time() + 60}
    return jwt.encode(claims, SECRET, "HS256")


@pytest.mark.parametrize(
    ("subject", "admins", "status", "calls"),
    [
        pytest.param("eve", ("ann", "eve"), 200, 0, id="an admin's name as the subject"),
        pytest.param("eve", ("jwt:eve",), 200, 5, id="a subject that is an admin"),
        pytest.param("ann", ("ann",), 403, None, id="the name of a key as the subject"),
    ],
)
async def test_the_subject_of_a_token_is_not_the_name_of_a_key(
    make_gateway: MakeGateway,
    fal: FakeFal,
    tmp_path: Path,
    subject: str,
    admins: tuple[str, ...],
    status: int,
    calls: int | None,
) -> None:
    await write(tmp_path)
    gateway = await make_gateway(fal.origin, access_keys=KEYS, admins=admins, jwt_secret=SECRET)
    headers = {"Authorization": f"Bearer {token(subject)}", "Accept-Encoding": "identity"}
    response = await gateway.client.get("/api/usage", headers=headers)
    report = await response.json()
    assert response.status == status, report
    if calls is not None:
        assert report["totals"]["calls"] == calls


async def test_a_caller_from_the_hook_can_be_an_admin(
    aiohttp_client: AiohttpClient, fal: FakeFal, tmp_path: Path
) -> None:
    async def authenticate(request: web.Request) -> str | None:
        return request.headers.get("x-user")

    await write(tmp_path)
    settings = make_settings(
        fal_key=CANARY, upstream_origin=fal.origin, data_dir=tmp_path, admins=("ann",)
    )
    client = await aiohttp_client(create_app(settings, authenticate=authenticate))
    calls = {}
    for user in ("ann", "bob"):
        response = await client.get("/api/usage", headers={"x-user": user})
        calls[user] = (await response.json())["totals"]["calls"]
    assert calls == {"ann": 5, "bob": 3}
    assert (await client.get("/api/usage")).status == 401


async def test_concurrent_requests_share_one_computation() -> None:
    cache, computed = TtlCache(), 0

    async def compute() -> bytes:
        nonlocal computed
        computed += 1
        await asyncio.sleep(0.01)
        return b"%d" % computed

    bodies = await asyncio.gather(*(cache.get("a", compute) for _ in range(10)))
    assert set(bodies) == {b"1"}
    assert await cache.get("a", compute) == b"1"  # cached
    assert await cache.get("b", compute) == b"2"


async def test_a_failure_is_not_cached() -> None:
    cache, computed = TtlCache(), 0

    async def compute() -> bytes:
        nonlocal computed
        computed += 1
        if computed == 1:
            raise OSError("the first one fails")
        return b"well"

    with pytest.raises(OSError, match="first"):
        await cache.get("a", compute)
    assert await cache.get("a", compute) == b"well"
