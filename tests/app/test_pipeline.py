"""The pipeline of each path, as it is logged at debug level."""

import logging
from pathlib import Path

import pytest

from falproxy import create_app
from falproxy.app.pipeline import layer_names
from tests.support.fake_fal import FakeFal
from tests.support.gateway import MakeGateway
from tests.support.key_search import CANARY
from tests.support.settings import make_settings

EVERYTHING = {
    "access_key": "s3cret",
    "allowed_origins": ("https://app.example",),
    "ai_keys": (CANARY, "c:d"),
    "rehost": "disk",
    "rehost_on_error": "error",
}


@pytest.fixture(autouse=True)
def capture_pipelines(caplog: pytest.LogCaptureFixture, capture_all_logs: None) -> None:
    caplog.set_level(logging.DEBUG, "falproxy.app.pipeline")


def pipelines(caplog: pytest.LogCaptureFixture) -> dict[str, str]:
    """Return the logged layers by the name of the pipeline; each is logged once."""
    messages = [
        record.getMessage()
        for record in caplog.records
        if record.name == "falproxy.app.pipeline" and record.levelno == logging.DEBUG
    ]
    named = [message.removeprefix("Pipeline of ").split(": ", 1) for message in messages]
    pairs = [(name, layers) for name, layers in named]
    assert len(pairs) == len(dict(pairs))
    return dict(pairs)


def test_the_layers_are_logged_outermost_first(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    create_app(make_settings(fal_key=CANARY, data_dir=tmp_path, **EVERYTHING))
    logged = pipelines(caplog)
    layers = [name.removesuffix("_middleware") for name in logged["/api/fal/proxy"].split(" > ")]
    assert layers == [
        "cors",
        "access_log",
        "handle_errors",
        "method_check",
        "check_origin",
        "authenticate",
        "add_limit_fields",
        "identify_user",
        "dialect",
        "authorize",
        "require_owner",
        "rotate_keys",
        "dispatch_by_operation",
    ]
    assert logged["poll calls"] == "serve_virtual_requests > observe_jobs > forward"
    assert logged["post calls"] == (
        "limit_rates > keep_idempotent > account_calls > rehost_outputs > serve_virtual_requests"
        " > check_images > cache_results > refuse_unstorable > reserve_costs > record_sending"
        " > forward"
    )
    assert logged["other calls"] == (
        "account_calls > rehost_outputs > serve_virtual_requests > limit_tokens > settle_jobs"
        " > forward"
    )


def test_middleware_that_is_turned_off_is_not_in_the_pipeline(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    create_app(make_settings(fal_key=CANARY, data_dir=tmp_path, cache=False))
    logged = pipelines(caplog)
    assert logged["poll calls"] == "observe_jobs > forward"
    assert logged["post calls"] == (
        "keep_idempotent > account_calls > check_images > record_sending > forward"
    )


def test_nothing_is_logged_above_debug(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "falproxy.app.pipeline")
    create_app(make_settings(fal_key=CANARY, data_dir=tmp_path))
    assert pipelines(caplog) == {}


async def test_a_dialect_s_pipeline_is_logged_with_its_first_request(
    fal: FakeFal, make_gateway: MakeGateway, caplog: pytest.LogCaptureFixture
) -> None:
    gateway = await make_gateway(fal.origin)
    assert pipelines(caplog)["/kontext"].endswith(" > lazy_handler")
    caplog.clear()
    for _ in range(2):
        async with gateway.client.get("/kontext") as response:
            assert response.status == 405
    (layers,) = pipelines(caplog).values()
    assert layers.startswith("handle_errors > method_check")
    assert layers.endswith(" > dispatch_by_operation")


def test_a_function_without_middleware_is_its_own_pipeline() -> None:
    async def handler(request: object) -> None: ...

    assert [*layer_names(handler)] == [  # type: ignore[arg-type]  # the request is not read
        "test_a_function_without_middleware_is_its_own_pipeline"
    ]


def test_tracing_adds_one_layer_and_only_if_it_is_configured(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("opentelemetry.sdk")
    settings = {"fal_key": CANARY, "data_dir": tmp_path}
    create_app(make_settings(**settings))
    without = pipelines(caplog)
    caplog.clear()
    create_app(make_settings(endpoint="http://collector:4318", **settings))
    traced = pipelines(caplog)
    # The fast path would skip the layer, so it is not used.
    assert traced["/api/fal/proxy"] == f"keep_off_fast_path > {without['/api/fal/proxy']}"
    assert traced["poll calls"] == without["poll calls"]
    assert traced["post calls"] == without["post calls"]
