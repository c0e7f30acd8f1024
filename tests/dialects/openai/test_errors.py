"""What is said to OpenAI's clients about trying again, and the limits of forms."""

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
    ("outcomes", "may_be_bought"),
    [
        pytest.param([200], True, id="taken"),
        pytest.param([422], False, id="refused by fal"),
        pytest.param([429], False, id="no room in the queue"),
        pytest.param([502], True, id="nobody knows"),
        pytest.param([UpstreamUnreachable()], False, id="never sent"),
        pytest.param([ProxyError(503, "busy", "")], False, id="no room here"),
        pytest.param([ProxyError(403, "target_forbidden", "")], False, id="refused by us"),
        pytest.param([ProxyError(504, "upstream_timeout", "")], True, id="no answer"),
        pytest.param([200, 429], True, id="the second of two refused"),
        pytest.param([429, 200], True, id="taken at the second attempt"),
        pytest.param([200, UpstreamUnreachable()], True, id="the second of two never sent"),
    ],
)
async def test_what_may_be_bought_is_not_bought_again(
    outcomes: list[Outcome], may_be_bought: bool
) -> None:
    following = iter(outcomes)

    async def handler(request: web.Request) -> web.StreamResponse:
        outcome = next(following)
        if isinstance(outcome, ProxyError):
            raise outcome
        return web.Response(status=outcome)

    request = make_mocked_request("POST", "/v1/images/generations")
    request[CALL] = submit_call(DEV, b"{}", CIMultiDict())
    purchase = RetryGuard(handler)
    for _ in outcomes:
        with contextlib.suppress(ProxyError):
            await purchase(request)
    error = ProxyError(500, "anything", "")
    purchase.forbid_retry(error)
    told = refuse(error, "id").headers.get("x-should-retry")
    assert told == ("false" if may_be_bought else None)


@pytest.mark.parametrize(
    ("error", "status", "code", "is_final"),
    [
        pytest.param(ProxyError(402, "budget_spent", ""), 429, "insufficient_quota", True,
                     id="a spent budget"),
        pytest.param(ProxyError(429, "rate_limited", ""), 429, "rate_limit_exceeded", False,
                     id="too many requests"),
        pytest.param(ProxyError(500, "internal_error", ""), 500, "internal_error", True,
                     id="a fault of ours"),
        pytest.param(ProxyError(401, "unauthenticated", ""), 401, "invalid_api_key", False,
                     id="nobody known"),
        pytest.param(ProxyError(503, "busy", "", {"Retry-After": "5"}), 503, "busy", False,
                     id="no room"),
    ],
)  # fmt: skip
def test_the_proxy_s_own_failures_in_openai_s_words(
    error: ProxyError, status: int, code: str, is_final: bool
) -> None:
    response = refuse(error, "id")
    assert response.status == status
    assert f'"code":"{code}"' in (response.text or "")
    assert ("x-should-retry" in response.headers) is is_final
    assert response.headers.get("Retry-After") == error.headers.get("Retry-After")


@pytest.mark.parametrize(
    ("rules", "code"),
    [
        pytest.param(FormLimits(10**6, max_file=99), "file_too_large", id="a large file"),
        pytest.param(FormLimits(10**6, quota=SpoolQuota(100)), "busy", id="no room for it"),
        pytest.param(FormLimits(1000), "body_too_large", id="a large form"),
    ],
)
async def test_files_have_limits(
    aiohttp_client: AiohttpClient, rules: FormLimits, code: str
) -> None:
    async def handle(request: web.Request) -> web.StreamResponse:
        try:
            await read_form(request, rules)
        except ProxyError as error:
            return web.Response(text=error.code)
        return web.Response(text="taken")

    app = web.Application()
    app.router.add_post("/", handle)
    client = await aiohttp_client(app)
    for content, expected in ((png()[:90], "taken"), (png() + bytes(300_000), code)):
        data = FormData()
        data.add_field("image", content, filename="a.png")
        assert await (await client.post("/", data=data)).text() == expected


def test_the_schemas_describe_what_is_checked() -> None:
    asked = GenerationRequest.model_json_schema()["properties"]
    assert all("description" in given for given in asked.values())
    form = EditRequest.model_json_schema()["properties"]
    assert asked.keys() | {"image", "image[]", "mask"} == form.keys()
