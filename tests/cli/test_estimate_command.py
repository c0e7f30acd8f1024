"""`falproxy estimate`: offline by the registry, otherwise with fal's price list."""

import json
from pathlib import Path

import pytest
from aiohttp import web

from falproxy.cli.estimate_command import EstimateError, estimate
from falproxy.cli.main import main
from falproxy.errors import SettingsError
from falproxy.settings import SANDBOX_KEY, Settings
from tests.support.fake_fal import FakeFal
from tests.support.key_search import CANARY
from tests.support.settings import make_settings

VIDEO = "fal-ai/some/video"


@pytest.fixture
def offline(tmp_path: Path) -> Settings:
    return make_settings(fal_key=SANDBOX_KEY, sandbox=True, data_dir=tmp_path)


async def lines(
    settings: Settings, tmp_path: Path, call: object, *, is_json: bool = False
) -> list[str]:
    file = tmp_path / "call.json"
    file.write_text(json.dumps(call))
    return [line async for line in estimate(settings, file, is_json=is_json)]


@pytest.mark.parametrize("endpoint", ["fal-ai/flux/dev", "https://queue.fal.run/fal-ai/flux/dev"])
async def test_a_price_of_the_registry_is_known_offline(
    offline: Settings, tmp_path: Path, endpoint: str
) -> None:
    call = {"endpoint": endpoint, "input": {"num_images": 2}}
    assert await lines(offline, tmp_path, call) == [
        "endpoint  fal-ai/flux/dev",
        "price     $0.025 per megapixel, of the registry",
        "units     2",
        "cost      $0.05",
    ]


async def test_offline_other_endpoints_need_a_key(offline: Settings, tmp_path: Path) -> None:
    with pytest.raises(EstimateError, match="set FAL_KEY"):
        await lines(offline, tmp_path, {"endpoint": VIDEO, "input": {}})


@pytest.mark.parametrize(
    "call",
    [{}, {"endpoint": VIDEO, "input": []}, {"endpoint": "https://rest.fal.ai/keys", "input": {}},
     {"endpoint": "https://example.com/a/b", "input": {}}],
)  # fmt: skip
async def test_what_is_no_call_is_an_error(offline: Settings, tmp_path: Path, call: object) -> None:
    with pytest.raises(SettingsError):
        await lines(offline, tmp_path, call)


class TestFal:
    async def ask(
        self, fal: FakeFal, tmp_path: Path, status: int, entry: object, *, is_json: bool = False
    ) -> list[str]:
        async def respond(request: web.Request) -> web.StreamResponse:
            if "pricing" not in request.path:
                return web.json_response(None, status=404)
            assert request.headers["Authorization"] == f"Key {CANARY}"
            return web.json_response({"prices": [entry] if entry else []}, status=status)

        fal.respond = respond
        settings = make_settings(fal_key=CANARY, upstream_origin=fal.origin, data_dir=tmp_path)
        call = {"endpoint": VIDEO, "input": {"prompt": "x"}}
        return await lines(settings, tmp_path, call, is_json=is_json)

    async def test_is_asked(self, fal: FakeFal, tmp_path: Path) -> None:
        entry = {"endpoint_id": VIDEO, "unit_price": 0.05, "unit": "second", "currency": "USD"}
        assert (await self.ask(fal, tmp_path, 200, entry))[1:4] == [
            "price     $0.05 per second, of fal.ai", "units     ?", "cost      ?",
        ]  # fmt: skip
        document = json.loads((await self.ask(fal, tmp_path, 500, None, is_json=True))[0])
        assert (document["price"], document["cost"], document["source"]) == (0.05, None, "fal")

    async def test_may_have_no_price(self, fal: FakeFal, tmp_path: Path) -> None:
        assert (await self.ask(fal, tmp_path, 200, None))[1] == "price     ? (fal.ai has none)"

    async def test_may_not_know_the_endpoint(self, fal: FakeFal, tmp_path: Path) -> None:
        with pytest.raises(EstimateError, match="knows no endpoint"):
            await self.ask(fal, tmp_path, 404, None)

    async def test_may_be_away(self, fal: FakeFal, tmp_path: Path) -> None:
        with pytest.raises(EstimateError, match="cannot be asked"):
            await self.ask(fal, tmp_path, 503, None)


def test_the_command_prints_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FAL_KEY", raising=False)
    (tmp_path / "call.json").write_text('{"endpoint": "fal-ai/flux/schnell", "input": {}}')
    assert main(["estimate", "call.json"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "cost      $0.003"
    (tmp_path / "call.json").write_text('{"endpoint": "fal-ai/none/such", "input": {}}')
    assert main(["estimate", "call.json"]) == 1
    assert capsys.readouterr().err.startswith("falproxy: fal-ai/none/such is not in the registry")
