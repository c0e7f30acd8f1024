"""`falproxy usage` and `/api/usage`: the same numbers, for those who may know them."""

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import jwt
import pytest
from aiohttp import ClientSession, web
from aiohttp.pytest_plugin import AiohttpClient

from falproxy import create_app
from falproxy.stores.ledger import CallRecord, Outcome, Totals
from falproxy.stores.ledger.reports import (
    TimeRange,
    check_series_length,
    parse_time_range,
    time_series,
    totals_json,
)
from falproxy.stores.ledger.sqlite import sqlite_ledger
from falproxy.web.usage import TtlCache
from tests.cli.test_main import command
from tests.support.fake_fal import FakeFal
from tests.support.gateway import Gateway, MakeGateway
from tests.support.key_search import CANARY, LEAKS
from tests.support.settings import make_settings
from tests.support.urls import RUN
from tests.web.test_openapi import open_place

NOW = datetime(2026, 11, 21, 9, 30, tzinfo=UTC).timestamp()
HOUR, DAY = 3600.0, 86400.0
SECRET = "a secret of thirty-two characters"
KEYS = (("ann", "s3cret-ann"), ("bob", "s3cret-bob"))


def entry(**given: Any) -> CallRecord:
    named: dict[str, Any] = {"at": time.time() - 60, "route": "/api/fal/proxy", "status": 200}
    return CallRecord(**(named | {"endpoint": "fal-ai/flux/dev", "operation": "run"} | given))


CALLS: tuple[CallRecord | Outcome, ...] = (
    entry(principal="ann", settled=25_000, seconds=2.0, upstream_seconds=1.5),
    entry(principal="ann", settled=0, status=422, seconds=1.0, upstream_seconds=0.5),
    entry(principal="bob", cache="hit", settled=0, estimated=40_000, endpoint="fal-ai/kontext"),
    entry(principal="bob", cache="miss", request_id="r1", endpoint="fal-ai/kontext"),
    Outcome(request_id="r1", status=200, settled=40_000),
    entry(principal="bob", endpoint="me/own"),
)


async def write(folder: Path, rows: Sequence[CallRecord | Outcome] = CALLS) -> None:
    async with sqlite_ledger(folder / "ledger.sqlite") as ledger:
        await ledger.write(rows)


async def usage(*words: str, folder: Path, **env: str) -> tuple[int, str, str]:
    """The exit code of a real process, and what it prints and complains."""
    process = await command("usage", *words, FALPROXY_DATA_DIR=str(folder), **env)
    async with asyncio.timeout(30):
        out, err = await process.communicate()
    LEAKS.look((out + err).decode(), "falproxy usage")
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


@pytest.mark.parametrize(
    ("since", "until", "expected"),
    [
        pytest.param("7d", None, (NOW - 7 * DAY, NOW), id="days ago"),
        pytest.param("90M", None, (NOW - 1.5 * HOUR, NOW), id="minutes ago, in capitals"),
        pytest.param("2d", "1d", (NOW - 2 * DAY, NOW - DAY), id="both are ages"),
        pytest.param("2026-11-21", None, (NOW - 9.5 * HOUR, NOW), id="a day, in UTC"),
        pytest.param("2026-11-21T09:00Z", None, (NOW - 0.5 * HOUR, NOW), id="a time"),
        pytest.param("2026-11-21T09:00+01:00", None, (NOW - 1.5 * HOUR, NOW), id="an offset"),
    ],
)
def test_a_span_is_read(since: str, until: str | None, expected: tuple[float, float]) -> None:
    assert parse_time_range(since, until, NOW) == TimeRange(*expected)


@pytest.mark.parametrize(
    ("since", "until", "problem"),
    [
        pytest.param("", None, "since must be like", id="nothing"),
        pytest.param("yesterday", None, "since must be like", id="a word"),
        pytest.param("2026-02-30", None, "since must be like", id="no such day"),
        pytest.param("2026-W01-1", None, "since must be like", id="a week"),
        pytest.param("7d", "soon", "until must be like", id="the other end"),
        pytest.param("1d", "2d", "since must be before until", id="the wrong way round"),
        pytest.param("401d", None, "at most 400 days", id="too long"),
        pytest.param("999999d", None, "at most 400 days", id="before all time"),
    ],
)
def test_what_is_no_span_is_said(since: str, until: str | None, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        parse_time_range(since, until, NOW)


@pytest.mark.parametrize(
    ("seconds", "step"),
    [
        pytest.param(HOUR, "minute", id="an hour"),
        pytest.param(DAY, "hour", id="a day"),
        pytest.param(7 * DAY, "hour", id="a week"),
        pytest.param(30 * DAY, "day", id="a month"),
    ],
)
def test_a_span_is_shown_by_steps_that_suit_it(seconds: float, step: str) -> None:
    assert TimeRange(NOW - seconds, NOW).interval == step


def test_a_series_has_its_empty_steps() -> None:
    rows = [("2026-11-21T08:00Z", Totals(calls=3))]
    found = time_series(rows, TimeRange(NOW - 4 * HOUR, NOW))
    assert [(each["at"], each["calls"]) for each in found] == [
        ("2026-11-21T05:00:00.000Z", 0),
        ("2026-11-21T06:00:00.000Z", 0),
        ("2026-11-21T07:00:00.000Z", 0),
        ("2026-11-21T08:00:00.000Z", 3),
        ("2026-11-21T09:00:00.000Z", 0),
    ]


@pytest.mark.parametrize(
    ("totals", "spent", "saved"),
    [
        pytest.param(Totals(), 0.0, 0.0, id="no calls cost nothing"),
        pytest.param(Totals(calls=2, unpriced=2), None, 0.0, id="no price is known"),
        pytest.param(Totals(calls=2, unpriced=1, spent=5), 5e-6, 0.0, id="one is known"),
        pytest.param(Totals(calls=1, hits=1), 0.0, None, id="a hit of unknown worth"),
        pytest.param(Totals(calls=1, hits=1, saved=40_000), 0.0, 0.04, id="a hit"),
    ],
)
def test_unknown_money_is_unknown(totals: Totals, spent: float | None, saved: float | None) -> None:
    assert (totals_json(totals)["spent"], totals_json(totals)["saved"]) == (spent, saved)


def test_too_many_rows_are_refused() -> None:
    check_series_length(TimeRange(NOW - 7 * DAY, NOW), "hour")
    with pytest.raises(ValueError, match="1000 times one minute"):
        check_series_length(TimeRange(NOW - 7 * DAY, NOW), "minute")


async def test_the_table_says_it_all(tmp_path: Path) -> None:
    await write(tmp_path)
    code, out, err = await usage(folder=tmp_path)
    assert (code, err) == (0, "")
    lines = [line.split("  ") for line in out.splitlines()]
    found = {words[0]: [word.strip() for word in words[1:] if word.strip()] for words in lines}
    assert found["fal-ai/flux/dev"][:6] == ["2", "1", "0", "-", "$0.025", "$0.00"]
    assert found["fal-ai/kontext"][:6] == ["2", "0", "1", "50%", "$0.04", "$0.04"]
    assert found["me/own"][4] == "?"
    assert found["all"][:6] == ["5", "1", "1", "50%", "$0.065+", "$0.04"]
    assert found["fal-ai/flux/dev"][-2:] == ["500.0 ms", "1.00 s"]
    widths = {len(line) for line in out.splitlines()[2:-3]}
    assert len(widths) == 1
    assert "the price is not known" in out


@pytest.mark.parametrize("by", ["endpoint", "principal", "route", "hour", "day", "minute"])
async def test_json_is_what_the_proxy_answers(
    make_gateway: MakeGateway, fal: FakeFal, tmp_path: Path, by: str
) -> None:
    await write(tmp_path)
    code, out, _ = await usage("--json", "--by", by, "--since", "2h", folder=tmp_path)
    gateway = await make_gateway(fal.origin)
    told = await tell(gateway, since="2h", by=by)
    printed = json.loads(out)
    for answer in (told, printed):
        del answer["since"], answer["until"]
    assert (code, printed) == (0, told)
    assert printed["totals"]["calls"] == 5
    assert fal.seen == []


@pytest.mark.parametrize("words", [(), ("--json",)])
async def test_without_a_ledger_it_says_so(tmp_path: Path, words: tuple[str, ...]) -> None:
    code, out, err = await usage(*words, folder=tmp_path)
    assert (code, err) == (0, "")
    if words:
        assert (json.loads(out)["rows"], json.loads(out)["totals"]["calls"]) == ([], 0)
    else:
        assert out == f"No calls yet: there is no ledger in {tmp_path}.\n"
    assert not list(tmp_path.iterdir())


async def test_a_time_without_calls_is_said(tmp_path: Path) -> None:
    await write(tmp_path)
    code, out, _ = await usage("--since", "2020-01-01", "--until", "2020-01-02", folder=tmp_path)
    assert (code, out) == (0, "No calls from 2020-01-01 00:00 until 2020-01-02 00:00 UTC.\n")


async def test_a_ledger_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "ledger.sqlite").write_text("this is no database, whatever its name says")
    code, out, err = await usage(folder=tmp_path)
    assert (code, out) == (1, "")
    assert err == "falproxy: The ledger cannot be read: file is not a database.\n"


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        pytest.param(("--since", "x"), "falproxy: --since must be like 7d", id="no time"),
        pytest.param(
            ("--since", "7d", "--by", "minute"), "falproxy: --since must be later", id="much"
        ),
    ],
)
async def test_a_question_without_sense_is_refused(
    tmp_path: Path, words: tuple[str, ...], problem: str
) -> None:
    code, out, err = await usage(*words, folder=tmp_path)
    assert (code, out) == (2, "")
    assert err.startswith(problem)
    assert err.count("\n") == 1


async def test_it_reads_while_a_proxy_writes(tmp_path: Path) -> None:
    async with open_place(tmp_path) as place:
        url = f"{place.origin}/api/fal/run/fal-ai/flux/dev"
        async with place.session.post(url, json={"prompt": "a"}) as response:
            assert response.status == 200
        await until(lambda: counted(place.session, place.origin), 1)
        _, out, _ = await usage("--json", folder=tmp_path)
    assert json.loads(out)["totals"]["calls"] == 1


async def counted(session: ClientSession, origin: str, **headers: str) -> int:
    query = {"since": "1h", "by": "route", "until": now()}
    async with session.get(f"{origin}/api/usage", params=query, headers=headers) as response:
        calls: int = (await response.json())["totals"]["calls"]
        return calls


def now() -> str:
    """Another word each time, for which no answer is kept."""
    when = datetime.now(UTC) + timedelta(seconds=1)
    return when.isoformat(timespec="microseconds").replace("+00:00", "Z")


async def until(ask: Callable[[], Any], expected: int) -> None:
    """Waits for the ledger, which is written a little later than the answers."""
    async with asyncio.timeout(20):
        while await ask() != expected:
            await asyncio.sleep(0.05)


async def tell(gateway: Gateway, key: str | None = None, **query: str) -> Any:
    headers = {"Accept-Encoding": "identity"} | ({} if key is None else {"x-falproxy-key": key})
    response = await gateway.client.get("/api/usage", params=query, headers=headers)
    assert response.status == 200, await response.text()
    return await response.json()


async def test_all_that_the_dashboard_needs_is_in_one_answer(
    make_gateway: MakeGateway, fal: FakeFal, tmp_path: Path
) -> None:
    await write(tmp_path)
    told = await tell(await make_gateway(fal.origin), since="2h")
    assert told["totals"]["calls"] == 5
    assert told["totals"]["spent"] == pytest.approx(0.065)
    assert (told["step"], sum(each["calls"] for each in told["series"])) == ("minute", 5)
    assert [each["name"] for each in told["endpoints"]] == [
        "fal-ai/kontext", "fal-ai/flux/dev", "me/own",
    ]  # fmt: skip
    assert [each["name"] for each in told["principals"]] == ["bob", "ann"]
    assert [each["name"] for each in told["routes"]] == ["/api/fal/proxy"]
    assert len(told["latest"]) == 5
    assert told["live"]["requests"] == 0
    costs = {each["request_id"]: each["spent"] for each in told["latest"]}
    assert costs["r1"] == 0.04


@pytest.mark.parametrize(
    "query",
    [
        pytest.param({"since": "x"}, id="no time"),
        pytest.param({"since": ""}, id="an empty time"),
        pytest.param({"since": "1d", "until": "2d"}, id="the wrong way round"),
        pytest.param({"by": "colour"}, id="nothing that is known"),
        pytest.param({"since": "30d", "by": "minute"}, id="too many rows"),
    ],
)
async def test_a_query_without_sense_is_a_400(gateway: Gateway, query: dict[str, str]) -> None:
    response = await gateway.client.get("/api/usage", params=query)
    assert response.status == 400
    told = await response.json()
    assert told["error"]["code"] == "query_invalid"
    assert told["error"]["message"].startswith("The query's ")


async def test_a_ledger_that_is_away_is_a_503_and_calls_go_on(
    make_gateway: MakeGateway, fal: FakeFal, tmp_path: Path
) -> None:
    (tmp_path / "ledger.sqlite").write_text("this is no database, whatever its name says")
    gateway = await make_gateway(fal.origin)
    response = await gateway.client.get("/api/usage")
    assert (response.status, response.headers["Retry-After"]) == (503, "5")
    assert (await response.json())["error"]["code"] == "ledger_away"
    assert (await gateway.call(RUN, json={})).status == 200
    assert (await gateway.client.get("/metrics")).status == 200


@pytest.mark.parametrize(
    ("key", "admins", "calls"),
    [
        pytest.param("s3cret-ann", (), 2, id="one's own alone, by default"),
        pytest.param("s3cret-bob", ("ann",), 3, id="one's own"),
        pytest.param("s3cret-ann", ("ann",), 5, id="an admin sees all"),
    ],
)
async def test_callers_of_a_locked_proxy_see_their_own(
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
    told = await tell(gateway, key)
    assert told["totals"]["calls"] == len(told["latest"]) == calls
    if calls < 5:
        name = key.removeprefix("s3cret-")
        assert told["principal"] == name
        assert {each["principal"] for each in told["latest"]} == {name}
        assert (told["principals"], told["live"]) == (None, None)


def token(subject: str) -> str:
    claims = {"sub": subject, "aud": "authenticated", "exp": time.time() + 60}
    return jwt.encode(claims, SECRET, "HS256")


@pytest.mark.parametrize(
    ("subject", "admins", "status", "calls"),
    [
        pytest.param("eve", ("ann", "eve"), 200, 0, id="a name in a token makes no admin"),
        pytest.param("eve", ("jwt:eve",), 200, 5, id="unless it is named as a token's"),
        pytest.param("ann", ("ann",), 403, None, id="the name of a key is no way to its calls"),
    ],
)
async def test_a_token_s_name_is_not_a_key_s(
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
    told = await response.json()
    assert response.status == status, told
    if calls is not None:
        assert told["totals"]["calls"] == calls


async def test_whom_the_hook_knows_may_be_an_admin(
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


async def test_those_who_ask_at_the_same_time_get_one_answer() -> None:
    kept, made = TtlCache(), 0

    async def answer() -> bytes:
        nonlocal made
        made += 1
        await asyncio.sleep(0.01)
        return b"%d" % made

    found = await asyncio.gather(*(kept.get("a", answer) for _ in range(10)))
    assert set(found) == {b"1"}
    assert await kept.get("a", answer) == b"1"  # for a while
    assert await kept.get("b", answer) == b"2"


async def test_a_failure_is_not_given_again() -> None:
    kept, made = TtlCache(), 0

    async def answer() -> bytes:
        nonlocal made
        made += 1
        if made == 1:
            raise OSError("the first one fails")
        return b"well"

    with pytest.raises(OSError, match="first"):
        await kept.get("a", answer)
    assert await kept.get("a", answer) == b"well"
