"""`falproxy trace`: the story of a request, by any of its ids and on any machine."""

import json
from collections.abc import AsyncIterator, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from falproxy.fal.results import FalImage
from falproxy.stores.ledger import CallRecord, JobRow, Lease, Ledger, Outcome
from falproxy.stores.ledger.request_trace import CALLS_MAX
from falproxy.stores.ledger.writer import choose_ledger
from tests.support.cli_process import start_command
from tests.support.postgres_server import PostgresServer, postgres_server
from tests.support.sandbox_proxy import SandboxProxy, open_sandbox_proxy
from tests.support.urls import SUBMIT

pytestmark = pytest.mark.slow

FAL_ID, PROXY_ID = "7e2f0b8a-0001-4000-8000-000000000000", "0192-of-the-proxy"
AT = 1_790_000_000.0


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with postgres_server() as started:
        yield started


@pytest.fixture(params=["sqlite", "postgres"])
def variables(request: pytest.FixtureRequest) -> dict[str, str]:
    """The variables that select a ledger."""
    if request.param == "sqlite":
        return {}
    return {"DATABASE_URL": request.getfixturevalue("server").fresh()}


@pytest.fixture
async def ledger(variables: dict[str, str], tmp_path: Path) -> AsyncIterator[Ledger]:
    async with choose_ledger(variables.get("DATABASE_URL"), tmp_path) as opened:
        yield opened


def record(**changes: Any) -> CallRecord:
    fields: dict[str, Any] = {
        "at": AT,
        "route": "/api/fal/proxy",
        "status": 200,
        "principal": "ann",
        "user_id": "eve",
        "operation": "submit",
        "endpoint": "fal-ai/flux/dev",
        "request_id": FAL_ID,
        "cache": "miss",
        "seconds": 0.25,
        "upstream_seconds": 0.2,
        "estimated": 25_000,
        "proxy_request_id": PROXY_ID,
    }
    return CallRecord(**fields | changes)


async def run_trace(*arguments: str, folder: Path, **env: str) -> tuple[int | None, str, str]:
    env = {"FALPROXY_DATA_DIR": str(folder), "CWD": str(folder)} | env
    process = await start_command("trace", *arguments, **env)
    out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


async def run_json(request_id: str, folder: Path, env: dict[str, str]) -> Any:
    code, out, err = await run_trace(request_id, "--json", folder=folder, **env)
    assert (code, err) == (0, "")
    return json.loads(out)


@pytest.mark.parametrize("request_id", [FAL_ID, PROXY_ID])
async def test_a_job_is_found_by_either_id(
    ledger: Ledger, variables: dict[str, str], tmp_path: Path, request_id: str
) -> None:
    other = {"request_id": "other", "proxy_request_id": "another"}
    await ledger.write([record(), record(**other), Outcome(request_id="other", status=500)])
    outcome = Outcome(
        request_id=FAL_ID,
        status=200,
        units=Decimal("1.50"),
        settled=37_500,
        ended_at=1.79e9,
        run_seconds=2.5,
        stored_seconds=0.25,
    )
    await ledger.write([outcome])
    document = await run_json(request_id, tmp_path, variables)
    (call,) = document["calls"]
    assert document["id"] == request_id
    assert (call["request_id"], call["proxy_request_id"]) == (FAL_ID, PROXY_ID)
    assert (call["status"], call["cache"], call["spent"]) == (200, "miss", 0.025)
    assert (call["principal"], call["user"]) == ("ann", "eve")
    result = call["result"]
    assert (result["status"], result["units"], result["spent"]) == (200, 1.5, 0.0375)
    assert result["error"] is None
    assert (result["run_seconds"], result["stored_seconds"]) == (2.5, 0.25)
    assert result["ended_at"] == "2026-09-21T14:13:20.000Z"
    assert document["jobs"] == []
    code, out, _ = await run_trace(request_id, folder=tmp_path, **variables)
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == "2026-09-21T14:13:20.000Z  submit  fal-ai/flux/dev  status 200"
    assert lines[1:-1] == [
        f"    request id: {PROXY_ID}",
        f"    fal's request id: {FAL_ID}",
        "    through: /api/fal/proxy",
        "    caller: ann",
        "    user: eve",
        "    duration: 50.0 ms in falproxy, 200.0 ms at fal",
        "    cache: miss",
        "    cost: $0.025 expected",
    ]
    end = "Z  result  status 200  1.5 units  $0.0375  ran 2.50 s  files stored in 250.0 ms"
    assert lines[-1].endswith(end)


async def test_the_type_of_fal_s_error_and_the_time_to_store_files_are_shown(
    ledger: Ledger, variables: dict[str, str], tmp_path: Path
) -> None:
    failed = {"status": 422, "error_type": "content_policy_violation"}
    await ledger.write([record(**failed, stored_seconds=0.125)])
    await ledger.write([Outcome(request_id=FAL_ID, status=422, error_type="bad_image")])
    code, out, _ = await run_trace(FAL_ID, folder=tmp_path, **variables)
    assert code == 0
    assert "    error: content_policy_violation" in out.splitlines()
    assert "    files: stored in 125.0 ms" in out.splitlines()
    assert "result  status 422  bad_image" in out


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        pytest.param({"cache": "hit", "settled": 0}, "cost: $0.00, $0.025 saved", id="hit"),
        pytest.param({"settled": 25_000}, "cost: $0.025", id="charged"),
        pytest.param(
            {"status": 502, "error": "upstream_unreachable", "estimated": None, "settled": 0},
            "error: upstream_unreachable",
            id="failure",
        ),
        pytest.param({"cache": "collapsed"}, "cache: collapsed", id="shared"),
    ],
)
async def test_the_outcome_of_a_call_is_shown(
    tmp_path: Path, changes: dict[str, Any], shown: str
) -> None:
    async with choose_ledger(None, tmp_path) as ledger:
        await ledger.write([record(**changes)])
    _, out, _ = await run_trace(PROXY_ID, folder=tmp_path)
    assert f"    {shown}" in out.splitlines()


async def test_a_job_of_an_api_is_found_by_its_own_id_too(
    ledger: Ledger, variables: dict[str, str], tmp_path: Path
) -> None:
    job = JobRow(owner="key:ann", model="flux-dev", endpoint="fal-ai/flux/dev")
    await ledger.add_job(job, Lease("process", 30.0))
    files = (FalImage(url="https://fal.media/a.png"),)
    ended = JobRow(
        id=job.id,
        owner=job.owner,
        model=job.model,
        endpoint=job.endpoint,
        app="fal-ai/flux",
        request_id=FAL_ID,
        status="completed",
        images=files,
    )
    await ledger.save_job(ended)
    await ledger.write([record()])
    for request_id in (job.id, FAL_ID, PROXY_ID):
        document = await run_json(request_id, tmp_path, variables)
        assert [call["request_id"] for call in document["calls"]] == [FAL_ID]
        (shown,) = document["jobs"]
        assert (shown["id"], shown["status"], shown["files"]) == (job.id, "completed", 1)
        assert shown["finished_at"] >= shown["created_at"]
        assert "fal.media" not in json.dumps(document)


async def test_a_result_whose_call_is_not_recorded_is_shown(
    ledger: Ledger, variables: dict[str, str], tmp_path: Path
) -> None:
    await ledger.write([Outcome(request_id=FAL_ID, status=422, error="bad_input", settled=0)])
    document = await run_json(FAL_ID, tmp_path, variables)
    assert document["calls"] == []
    assert (document["result"]["status"], document["result"]["error"]) == (422, "bad_input")


async def test_an_id_that_clients_repeat_shows_the_first_calls(tmp_path: Path) -> None:
    async with choose_ledger(None, tmp_path) as ledger:
        await ledger.write([record(at=AT + n, request_id=f"r{n}") for n in range(CALLS_MAX + 5)])
    document = await run_json(PROXY_ID, tmp_path, {})
    assert [call["request_id"] for call in document["calls"]] == [f"r{n}" for n in range(CALLS_MAX)]
    assert document["has_more"] is True


@pytest.mark.parametrize("request_id", ["unknown", "", "x" * 5000, "'; DROP TABLE falproxy_jobs"])
async def test_an_unknown_id_is_an_error(
    ledger: Ledger, variables: dict[str, str], tmp_path: Path, request_id: str
) -> None:
    await ledger.write([record()])
    code, out, err = await run_trace(request_id, folder=tmp_path, **variables)
    assert (code, out) == (1, "")
    assert err.startswith("falproxy: The ledger has nothing about this id.")
    assert err.count("\n") == 1


async def test_without_a_ledger_nothing_is_created(tmp_path: Path) -> None:
    code, _, err = await run_trace(FAL_ID, folder=tmp_path / "none", CWD=str(tmp_path))
    assert code == 1
    assert "nothing about this id" in err
    assert not (tmp_path / "none").exists()


async def test_names_cannot_change_the_terminal(tmp_path: Path) -> None:
    async with choose_ledger(None, tmp_path) as ledger:
        await ledger.write([record(user_id="eve\x1b[2J", endpoint="a/b\x07")])
    _, out, _ = await run_trace(FAL_ID, folder=tmp_path)
    assert "\x1b" not in out
    assert "\x07" not in out


async def test_a_database_that_is_away_is_an_error(tmp_path: Path, unused_tcp_port: int) -> None:
    url = f"postgresql://user:s3cret@127.0.0.1:{unused_tcp_port}/none"
    code, out, err = await run_trace(FAL_ID, folder=tmp_path, DATABASE_URL=url)
    assert (code, out) == (1, "")
    assert err.startswith("falproxy: The ledger cannot be read")
    assert "s3cret" not in err


async def test_a_real_job_is_followed_from_submit_to_result(tmp_path: Path) -> None:
    async with open_sandbox_proxy(tmp_path) as proxy:
        reply = await proxy.call_target(SUBMIT, {"prompt": "a fox", "seed": 1})
        request_id, proxy_id = reply.document["request_id"], reply.headers["X-Request-ID"]
        await finish(proxy, reply.document)
        await proxy.records()
        for name in (request_id, proxy_id):
            document = await run_json(name, tmp_path, {})
            (call,) = document["calls"]
            assert (call["request_id"], call["proxy_request_id"]) == (request_id, proxy_id)
            assert (call["operation"], call["status"]) == ("submit", 200)
            assert call["result"]["status"] == 200
            assert call["result"]["spent"] > 0


async def finish(proxy: SandboxProxy, submitted: Any) -> None:
    """Wait for a job and fetch its result."""
    while True:
        status = await proxy.call_target(submitted["status_url"])
        if status.document["status"] == "COMPLETED":
            break
    assert (await proxy.call_target(submitted["response_url"])).status == 200
