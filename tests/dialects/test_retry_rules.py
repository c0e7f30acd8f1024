"""Errors of the proxy under the retry rules of fal's own clients."""

import json

import httpx
import pytest
from fal_client import client as fal_client
from multidict import CIMultiDict, CIMultiDictProxy

from falproxy.dialects.transparent import refuse
from falproxy.errors import ProxyError, TemporaryError
from falproxy.proxy.upstream import UpstreamUnreachable, connection_lost, timed_out

# retry.js of @fal-ai/client 1.x.
JS_STATUSES = (429, 502, 503, 504)
TIMEOUT_TYPE = "x-fal-request-timeout-type"


def is_repeated_by_python(error: ProxyError) -> bool:
    response = refuse(error, "id")
    assert isinstance(response.body, bytes)
    reply = httpx.Response(response.status, headers=dict(response.headers), content=response.body)
    return fal_client._should_retry_response(reply)


def is_repeated_by_javascript(error: ProxyError) -> bool:
    response = refuse(error, "id")
    is_user_timeout = response.status == 504 and response.headers.get(TIMEOUT_TYPE) == "user"
    return response.status in JS_STATUSES and not is_user_timeout


TEMPORARY = [
    pytest.param(TemporaryError(503, "store_unavailable", "."), id="the owner is unknown"),
    pytest.param(TemporaryError(503, "cache_unavailable", "."), id="the virtual id is unknown"),
    pytest.param(UpstreamUnreachable(), id="fal cannot be reached"),
    pytest.param(connection_lost(is_repeatable=True), id="a poll lost its connection"),
    pytest.param(timed_out(is_repeatable=True), id="a poll timed out"),
]
FINAL = [
    pytest.param(connection_lost(is_repeatable=False), id="a submit lost its connection"),
    pytest.param(timed_out(is_repeatable=False), id="a submit timed out"),
    pytest.param(ProxyError(404, "request_not_found", "."), id="no such request"),
]


@pytest.mark.parametrize("error", TEMPORARY)
def test_both_clients_repeat_a_request_that_is_safe_to_repeat(error: ProxyError) -> None:
    assert is_repeated_by_python(error)
    assert is_repeated_by_javascript(error)


@pytest.mark.parametrize("error", FINAL)
def test_no_client_repeats_a_request_that_may_be_paid_twice(error: ProxyError) -> None:
    assert not is_repeated_by_python(error)
    assert not is_repeated_by_javascript(error)


def test_the_note_is_beside_the_message() -> None:
    error = TemporaryError(503, "store_unavailable", "The request cannot be looked up now.")
    response = refuse(error, "id")
    assert isinstance(response.body, bytes)
    document = json.loads(response.body)
    assert document["message"] == document["detail"] == error.message
    assert CIMultiDictProxy(CIMultiDict(response.headers)).get("x-fal-request-id") is None
