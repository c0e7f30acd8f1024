"""Errors in the format of the OpenAI API, the retry guard, and the limits of forms."""

import contextlib

import pytest
from aiohttp import FormData, web
from aiohttp.pytest_plugin import AiohttpClient
from aiohttp.test_utils import make_mocked_request
from multidict import CIMultiDict

from falproxy.dialects.openai.bodies import FormLimits, read_form
from falproxy.dialects.openai.errors import refuse
from falproxy.dialects.openai.handlers import RetryGuard
from falproxy.dialects.openai.schema import EditRequest, GenerationRequest
from falproxy.dialects.queue_client import submit_call
from falproxy.errors import ProxyError
from falproxy.proxy.call import CALL
from falproxy.proxy.upstream import UpstreamUnreachable
from falproxy.spool import SpoolQuota
from tests.support.offline_fal import png

DEV = "fal-ai/flux/dev"
Outcome = int | ProxyError


@pytest.mark.parametrize(
    ("outcomes", "may_be_billed"),
    [
        pytest.param([200], True, id="accepted"),
        pytest.param([422], False, id="refused by fal"),
        pytest.param([429], False, id="the queue is full"),
        pytest.param([502], True, id="unknown"),
        pytest.param([UpstreamUnreachable()], False, id="not sent"),
        pytest.param([ProxyError(503, "busy", "")], False, id="the proxy is busy"),
        pytest.param([ProxyError(403, "target_forbidden", "")], False, id="refused by the proxy"),
        pytest.param([ProxyError(504, "upstream_timeout", "")], True, id="no response"),
        pytest.param([200, 429], True, id="the second of two refused"),
        pytest.param([429, 200], True, id="accepted at the second attempt"),
        pytest.param([200, UpstreamUnreachable()], True, id="the second of two not sent"),
    ],
)
async def test_clients_do_not_repeat_what_fal_may_have_charged_for(
    outcomes: list[Outcome], may_be_billed: bool
) -> None:
    remaining = iter(outcomes)

    async def handler(request: web.Request) -> web.StreamResponse:
        outcome = next(remaining)
        if isinstance(outcome, ProxyError):
            raise outcome
        return web.Response(status=outcome)

    request = make_mocked_request("POST", "/v1/images/generations")
    request[CALL] = submit_call(DEV, b"{}", CIMultiDict())
    retry_guard = RetryGuard(handler)
    for _ in outcomes:
        with contextlib.suppress(ProxyError):
            await retry_guard(request)
    error = ProxyError(500, "anything", "")
    retry_guard.forbid_retry(error)
    should_retry = refuse(error, "id").headers.get("x-should-retry")
    assert should_retry == ("false" if may_be_billed else None)


@pytest.mark.parametrize(
    ("error", "status", "code", "is_final"),
    [
        pytest.param(ProxyError(402, "budget_spent", ""), 429, "insufficient_quota", True,
                     id="a spent budget"),
        pytest.param(ProxyError(429, "rate_limited", ""), 429, "rate_limit_exceeded", False,
                     id="too many requests"),
        pytest.param(ProxyError(500, "internal_error", ""), 500, "internal_error", True,
                     id="a failure of the proxy"),
        pytest.param(ProxyError(401, "unauthenticated", ""), 401, "invalid_api_key", False,
                     id="unauthenticated"),
        pytest.param(ProxyError(503, "busy", "", {"Retry-After": "5"}), 503, "busy", False,
                     id="busy"),
    ],
)  # fmt: skip
def test_errors_of_the_proxy_are_converted(
    error: ProxyError, status: int, code: str, is_final: bool
) -> None:
    response = refuse(error, "id")
    assert response.status == status
    assert f'"code":"{code}"' in (response.text or "")
    assert ("x-should-retry" in response.headers) is is_final
    assert response.headers.get("Retry-After") == error.headers.get("Retry-After")


@pytest.mark.parametrize(
    ("limits", "code"),
    [
        pytest.param(FormLimits(10**6, max_file=99), "file_too_large", id="a large file"),
        pytest.param(FormLimits(10**6, quota=SpoolQuota(100)), "busy", id="the quota is used up"),
        pytest.param(FormLimits(1000), "body_too_large", id="a large form"),
    ],
)
async def test_files_have_limits(
    aiohttp_client: AiohttpClient, limits: FormLimits, code: str
) -> None:
    async def handle(request: web.Request) -> web.StreamResponse:
        try:
            await read_form(request, limits)
        except ProxyError as error:
            return web.Response(text=error.code)
        return web.Response(text="accepted")

    app = web.Application()
    app.router.add_post("/", handle)
    client = await aiohttp_client(app)
    for content, expected in ((png()[:90], "accepted"), (png() + bytes(300_000), code)):
        data = FormData()
        data.add_field("image", content, filename="a.png")
        assert await (await client.post("/", data=data)).text() == expected


def test_the_schemas_describe_all_parameters() -> None:
    parameters = GenerationRequest.model_json_schema()["properties"]
    assert all("description" in schema for schema in parameters.values())
    form = EditRequest.model_json_schema()["properties"]
    assert parameters.keys() | {"image", "mask"} == form.keys()
