"""The doctor's findings: each with its mend, and whether it is safe to start."""

import pytest
from aiohttp import web

from conftest import CANARY, SECRET, FakeFal
from falproxy import Settings
from falproxy.config import SANDBOX_KEY
from falproxy.doctor import Finding, Level, examine

LONG = "a-secret-of-many-characters-that-nobody-guesses"


async def found(**given: object) -> list[Finding]:
    settings = Settings(**{"fal_key": SANDBOX_KEY, "sandbox": True} | given)  # type: ignore[arg-type]
    return await examine(settings)


@pytest.mark.parametrize(
    ("given", "level", "text"),
    [
        pytest.param({"fal_key": "noc0lon"}, Level.PROBLEM, "id:secret", id="shape of the key"),
        pytest.param({"host": "0.0.0.0"}, Level.PROBLEM, "OPEN", id="open to everybody"),
        pytest.param({"host": "::"}, Level.PROBLEM, "OPEN", id="open to everybody by IPv6"),
        pytest.param({"host": "proxy.lan"}, Level.PROBLEM, "OPEN", id="open to a network"),
        pytest.param({"host": "127.0.0.1"}, Level.OK, "nobody else", id="open to this machine"),
        pytest.param({"host": "localhost"}, Level.OK, "nobody else", id="by name"),
        pytest.param(
            {"host": "0.0.0.0", "access_key": LONG}, Level.OK, "who they are", id="locked"
        ),
        pytest.param(
            {"access_keys": (("ann", "short"),)}, Level.PROBLEM, "of ann has", id="a short key"
        ),
        pytest.param({"jwt_secret": "short"}, Level.PROBLEM, "guessed", id="a short secret"),
        pytest.param(
            {"allowed_origins": ("http://a.example",)}, Level.NOTE, "encryption", id="http"
        ),
        pytest.param(
            {"allowed_origins": ("https://a.example",)}, Level.NOTE, "programs", id="CORS only"
        ),
        pytest.param({"allowed_targets": ("**",)}, Level.PROBLEM, "v1/keys", id="all targets"),
        pytest.param({"allowed_targets": ("api.fal.ai/**",)}, Level.PROBLEM, "v1/keys", id="host"),
        pytest.param(
            {"allowed_targets": ("*.fal.ai/v1/keys",)}, Level.PROBLEM, "v1/keys", id="one address"
        ),
        pytest.param(
            {"allowed_targets": ("**/billing",)}, Level.PROBLEM, "/billing", id="an ending"
        ),
        pytest.param({"fal_key": CANARY}, Level.NOTE, "not used", id="sandbox and key"),
        pytest.param({"ai_keys": (CANARY,)}, Level.NOTE, "AI_KEYS is set", id="both kinds of keys"),
        pytest.param({}, Level.NOTE, "sandbox answers", id="the sandbox"),
    ],
)
async def test_a_finding(
    tmp_path: object, given: dict[str, object], level: Level, text: str
) -> None:
    findings = await found(
        **{"data_dir": tmp_path, "upstream_origin": "http://127.0.0.1:9"} | given
    )
    (finding,) = [finding for finding in findings if text in finding.text]
    assert finding.level == level
    assert finding.mend or level is Level.OK
    assert SECRET not in str(findings)


@pytest.mark.parametrize(
    ("status", "level"),
    [(200, Level.OK), (401, Level.PROBLEM), (403, Level.PROBLEM), (500, Level.NOTE)],
)
async def test_fal_is_asked_whether_it_takes_each_key(
    tmp_path: object, fal: FakeFal, status: int, level: Level
) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        return web.json_response({}, status=status)

    fal.answer = answer
    findings = await found(
        ai_keys=("one:a", "two:b"), data_dir=tmp_path, upstream_origin=fal.origin, sandbox=False
    )
    told = [finding for finding in findings if "position" in finding.text]
    assert [finding.level for finding in told] == [level] * 2
    assert [(seen.method, seen.header("authorization")) for seen in fal.seen] == [
        ("GET", "Key one:a"),
        ("GET", "Key two:b"),
    ]


async def test_an_unreachable_fal_is_a_problem(tmp_path: object) -> None:
    findings = await found(
        fal_key=CANARY, data_dir=tmp_path, upstream_origin="http://127.0.0.1:9", sandbox=False
    )
    assert findings[0].level is Level.PROBLEM
    assert "could not be reached" in findings[0].text
