"""Request targets, authentication, unknown routes, CORS and request records of the sandbox."""

import pytest
from aiohttp.pytest_plugin import AiohttpClient
from yarl import URL

from falproxy.sandbox.request import resolve_target
from falproxy.sandbox.state import SeenRequest
from tests.support.offline_fal import DEV, KEY, SMALL, OfflineFal, offline_fal


@pytest.fixture
async def fal(aiohttp_client: AiohttpClient) -> OfflineFal:
    return await offline_fal(aiohttp_client)


@pytest.mark.parametrize(
    ("host", "raw_path", "service", "path"),
    [
        pytest.param("fal.run", "/fal-ai/flux/dev", "fal.run", "/fal-ai/flux/dev", id="header"),
        pytest.param("FAL.RUN:8081", "/x/y", "fal.run", "/x/y", id="capitals and a port"),
        pytest.param("localhost", "/fal.run/x/y", "fal.run", "/x/y", id="first segment"),
        pytest.param("localhost", "/queue.fal.run/x/y", "queue.fal.run", "/x/y", id="queue"),
        pytest.param(
            "queue.falrun.com", "/x/y", "queue.fal.run", "/x/y", id="backup host of the queue"
        ),
        pytest.param("falrun.com", "/x/y", "fal.run", "/x/y", id="backup host of run"),
        pytest.param(
            "rest.alpha.fal.ai", "/tokens/", "rest.fal.ai", "/tokens/", id="old rest host"
        ),
        pytest.param("api.fal.ai", "/v1/x", "api.fal.ai", "/v1/x", id="platform"),
        pytest.param("v3b.fal.media", "/files/b/p/n", "cdn", "/files/b/p/n", id="outputs"),
        pytest.param("localhost", "/files/b/p/n", "cdn", "/files/b/p/n", id="CDN path for files"),
        pytest.param("localhost", "/upload/x", "cdn", "/upload/x", id="CDN path for uploads"),
        pytest.param("localhost", "/sandbox/state", "local", "/sandbox/state", id="local page"),
        pytest.param("fal.run.evil.tld", "/x/y", "local", "/x/y", id="not a host of fal"),
    ],
)
def test_a_request_is_resolved_to_a_service(
    host: str, raw_path: str, service: str, path: str
) -> None:
    target = resolve_target(f"{raw_path}?a=%2F", host)
    assert (target.service, target.path, target.query) == (service, path, "a=%2F")


async def test_every_response_has_the_sandbox_header(fal: OfflineFal) -> None:
    for path in ("/", "/sandbox/state", "/files/b/none/none", "/fal.run/x/y", "/nothing"):
        response = await fal.client.get(path)
        assert response.headers["x-falproxy-sandbox"] == "1"


async def test_the_index_page_lists_the_models(fal: OfflineFal) -> None:
    text = await (await fal.client.get("/")).text()
    assert "SANDBOX" in text
    assert "fal-ai/flux/schnell" in text


async def test_a_call_is_routed_by_its_host_header(fal: OfflineFal) -> None:
    headers = {**KEY, "Host": "fal.run"}
    body = {"prompt": "x", "image_size": SMALL}
    response = await fal.client.post(f"/{DEV}", json=body, headers=headers)
    assert response.status == 200


async def test_a_request_is_recorded_byte_for_byte(fal: OfflineFal) -> None:
    url = URL(f"{fal.sandbox.public_url}/fal.run/{DEV}?a=%2F&b=%20", encoded=True)
    headers = {**KEY, "X-Fal-Tags": "a=b"}
    await fal.client.session.post(url, json={"prompt": "!error 500"}, headers=headers)
    seen = fal.sandbox.seen[-1]
    assert (seen.method, seen.host, seen.status) == ("POST", "fal.run", 500)
    assert (seen.path, seen.query) == (f"/{DEV}", "a=%2F&b=%20")
    assert seen.headers["x-fal-tags"] == "a=b"
    assert fal.sandbox.keys_seen == {"Key id:secret"}


async def test_only_the_last_1000_requests_are_recorded(fal: OfflineFal) -> None:
    for _ in range(1010):
        fal.sandbox.record_request(
            fal.sandbox.seen[0] if fal.sandbox.seen else await send_request(fal)
        )
    assert len(fal.sandbox.seen) == 1000


async def send_request(fal: OfflineFal) -> SeenRequest:
    await fal.client.get("/fal.run/x/y")
    return fal.sandbox.seen[-1]


async def test_the_state_counts_jobs_and_cost(fal: OfflineFal) -> None:
    await fal.run(DEV, {"prompt": "x", "image_size": SMALL})
    await fal.run("fal-ai/nano-banana", {"prompt": "x", "num_images": 2})
    state = await (await fal.client.get("/sandbox/state")).json()
    assert state == {
        "jobs": 2,
        "spent": 0.103,
        "calls": 2,
        "jobs_by_endpoint": {DEV: 1, "fal-ai/nano-banana": 1},
    }


async def test_requests_for_local_pages_are_not_counted(fal: OfflineFal) -> None:
    for path in ("/", "/sandbox/state", "/favicon.ico"):
        await fal.client.get(path)
    assert fal.sandbox.calls == 0


async def test_a_reset_clears_all_counters(fal: OfflineFal) -> None:
    await fal.run(DEV, {"prompt": "x", "image_size": SMALL})
    fal.sandbox.reset()
    assert fal.sandbox.jobs == fal.sandbox.cost == fal.sandbox.calls == 0
    assert fal.sandbox.seen == []
    assert fal.sandbox.paid == []


AUTH_REQUIRED = "Authentication is required to access this application."
FLUX_REFUSED = f'Cannot access application "fal-ai/flux". {AUTH_REQUIRED}'
MALFORMED = "Invalid Key Authorization header format. Expected '<key_id>:<key_secret>'."
INVALID_CREDENTIALS = "Cannot access request: invalid key credentials"
METHOD_NOT_ALLOWED = {"detail": "Method Not Allowed"}
UNAUTHORIZED = [
    pytest.param("POST", f"/fal.run/{DEV}", "", FLUX_REFUSED, id="run, no key"),
    pytest.param("POST", f"/fal.run/{DEV}", "Key a:b", FLUX_REFUSED, id="run, wrong key"),
    pytest.param("POST", f"/fal.run/{DEV}", "Key", MALFORMED, id="malformed"),
    pytest.param("POST", f"/queue.fal.run/{DEV}", "", FLUX_REFUSED, id="submit"),
    pytest.param(
        "GET",
        f"/queue.fal.run/{DEV}/requests/x/status",
        "Key a:b",
        INVALID_CREDENTIALS,
        id="status, wrong key",
    ),
    pytest.param(
        "POST", "/rest.fal.ai/tokens/", "", "Authorization header is required", id="rest, no key"
    ),
    pytest.param(
        "POST",
        "/rest.fal.ai/tokens/",
        "Key a:b",
        "No user found for Key ID and Secret",
        id="rest, wrong key",
    ),
    pytest.param(
        "GET", f"/fal.run/{DEV}", "", FLUX_REFUSED, id="the key is checked before the method"
    ),
    pytest.param(
        "POST",
        "/fal.run/x/y",
        "Bearer abc",
        f'Cannot access application "x/y". {AUTH_REQUIRED}',
        id="another scheme",
    ),
]


@pytest.mark.parametrize(("method", "path", "authorization", "detail"), UNAUTHORIZED)
async def test_a_bad_key_is_refused_in_the_wording_of_the_host(
    aiohttp_client: AiohttpClient, method: str, path: str, authorization: str, detail: str
) -> None:
    fal = await offline_fal(aiohttp_client, key="id:secret")
    headers = {"Authorization": authorization} if authorization else {}
    response = await fal.client.request(method, path, headers=headers)
    assert response.status == 401
    assert await response.json() == {"detail": detail}
    assert fal.sandbox.jobs == 0


async def test_the_platform_api_refuses_with_its_own_error_shape(fal: OfflineFal) -> None:
    response = await fal.client.get("/api.fal.ai/v1/models/pricing")
    assert response.status == 401
    assert (await response.json())["error"]["type"] == "authorization_error"


async def test_the_configured_key_is_accepted(aiohttp_client: AiohttpClient) -> None:
    fal = await offline_fal(aiohttp_client, key="id:secret")
    assert (await fal.run(DEV, {"prompt": "x", "image_size": SMALL})).status == 200


async def test_without_a_configured_key_any_key_is_accepted(fal: OfflineFal) -> None:
    body = {"prompt": "x", "image_size": SMALL}
    assert (await fal.run(DEV, body, Authorization="Key whatever")).status == 200


@pytest.mark.parametrize(
    ("path", "status", "document"),
    [
        pytest.param(
            "/fal.run/fal-ai/none",
            404,
            {"detail": 'Application "none" not found'},
            id="unknown app",
        ),
        pytest.param(
            "/queue.fal.run/fal-ai/none",
            404,
            {"detail": 'Application "none" not found'},
            id="submit",
        ),
        pytest.param(
            "/fal.run/single",
            404,
            {"detail": 'Application "single" not found'},
            id="app without an owner",
        ),
        pytest.param(
            "/fal.run/fal-ai/flux/x", 404, {"detail": "Path /x not found"}, id="unknown path"
        ),
        pytest.param(
            "/fal.run/fal-ai/flux-pro", 404, {"detail": "Path / not found"}, id="app without a path"
        ),
        pytest.param(
            f"/fal.run/{DEV}/stream",
            404,
            {"detail": "Path /dev/stream not found"},
            id="a model without streaming",
        ),
        pytest.param("/rest.fal.ai/keys", 404, {"detail": "Not Found"}, id="unknown rest path"),
        pytest.param("/nothing", 404, {"detail": "Not Found"}, id="unknown local path"),
        pytest.param(
            "/queue.fal.run/fal-ai/flux/requests/x/cancel",
            405,
            METHOD_NOT_ALLOWED,
            id="cancel is PUT",
        ),
        pytest.param(
            "/fal.ai/api/openapi/queue/openapi.json", 405, METHOD_NOT_ALLOWED, id="schema is GET"
        ),
    ],
)
async def test_an_unknown_route_is_an_error_of_its_host(
    fal: OfflineFal, path: str, status: int, document: object
) -> None:
    response = await fal.client.post(path, json={"prompt": "x"}, headers=KEY)
    assert (response.status, await response.json()) == (status, document)


async def test_an_unknown_path_is_not_billed(fal: OfflineFal) -> None:
    response = await fal.run("fal-ai/flux/x", {"prompt": "x"})
    assert response.headers["X-Fal-Billable-Units"] == "0"


async def test_a_model_accepts_only_post(fal: OfflineFal) -> None:
    response = await fal.client.get(f"/fal.run/{DEV}", headers=KEY)
    assert (response.status, response.headers["Allow"]) == (405, "POST")


async def test_every_origin_may_call(fal: OfflineFal) -> None:
    headers = {
        "Origin": "https://app.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    response = await fal.client.options(f"/fal.run/{DEV}", headers=headers)
    assert response.status == 200
    assert response.headers["Access-Control-Allow-Origin"] == "https://app.example"
    assert response.headers["Access-Control-Allow-Headers"] == "authorization,content-type"
    assert "POST" in response.headers["Access-Control-Allow-Methods"]


async def test_a_body_beyond_the_limit_is_413(aiohttp_client: AiohttpClient) -> None:
    fal = await offline_fal(aiohttp_client)
    fal.client.app._client_max_size = 1000
    response = await fal.run(DEV, {"prompt": "x" * 2000})
    assert response.status == 413
