"""The base URL routes: the transparent dialect for clients that can be given a base URL."""

import gzip
import json

import pytest
from aiohttp import web

from tests.support.fake_fal import FakeFal
from tests.support.gateway import Gateway, MakeGateway
from tests.support.key_search import CANARY

pytestmark = pytest.mark.both_transports

ID = "7e2f0b8a-0001-4000-8000-000000000000"
FAL_URL = f"https://queue.fal.run/fal-ai/flux/requests/{ID}"
PROXY_PATH = "/api/fal/queue/fal-ai/flux/requests/" + ID


@pytest.mark.parametrize(
    ("path", "host", "target"),
    [
        ("run/fal-ai/flux/dev", "fal.run", "/fal-ai/flux/dev"),
        ("run/fal-ai/flux/dev/stream", "fal.run", "/fal-ai/flux/dev/stream"),
        ("queue/fal-ai/flux?fal_webhook=https%3A%2F%2Fa.b%2Fc", "queue.fal.run", None),
        ("queue/fal-ai/a%20b/%C3%A9", "queue.fal.run", None),
        ("rest/tokens/", "rest.fal.ai", "/tokens/"),
        ("rest/storage/upload/initiate?storage_type=x", "rest.fal.ai", None),
    ],
)
async def test_a_path_below_a_base_url_is_a_path_of_fal(
    gateway: Gateway, fal: FakeFal, path: str, host: str, target: str | None
) -> None:
    response = await gateway.send_raw(
        f"POST /api/fal/{path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        "Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{}".encode()
    )
    assert response.startswith(b"HTTP/1.1 200 ")
    (seen,) = fal.seen
    assert (seen.header("host"), seen.target) == (host, target or "/" + path.partition("/")[2])
    assert seen.header("authorization") == f"Key {CANARY}"


@pytest.mark.parametrize(
    "path",
    [
        "run/../rest/keys",
        "run/fal-ai/%2e%2e/x",
        "run//fal-ai/flux",
        "run/fal-ai%2fflux",
        "run/fal-ai/flux?fal_jwt_token=x",
        "queue/@evil.tld/x;y",
    ],
)
async def test_ambiguous_paths_are_refused_as_on_the_header_route(
    gateway: Gateway, fal: FakeFal, path: str
) -> None:
    response = await gateway.send_raw(
        f"GET /api/fal/{path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()
    )
    assert response.split()[1] in (b"412", b"404")
    assert fal.seen == []


@pytest.mark.parametrize("path", ["run", "run/", "other/x", "queue"])
async def test_a_base_url_alone_is_refused(gateway: Gateway, fal: FakeFal, path: str) -> None:
    assert (await gateway.client.get(f"/api/fal/{path}")).status in (404, 412)
    assert fal.seen == []


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("PUT", f"queue/fal-ai/flux/requests/{ID}/cancel", 200),
        ("PUT", f"queue/fal-ai/flux/requests/{ID}", 405),
        ("PUT", "run/fal-ai/flux", 405),
        ("DELETE", "run/fal-ai/flux", 405),
        ("HEAD", "run/fal-ai/flux", 405),
        ("OPTIONS", "run/fal-ai/flux", 405),
    ],
)
async def test_the_methods_are_those_of_the_header_route(
    gateway: Gateway, fal: FakeFal, method: str, path: str, status: int
) -> None:
    response = await gateway.client.request(method, f"/api/fal/{path}")
    assert response.status == status
    assert bool(fal.seen) is (status == 200)


async def test_authentication_and_allowed_targets_apply(
    make_gateway: MakeGateway, fal: FakeFal
) -> None:
    gateway = await make_gateway(fal.origin, allowed_targets=(), access_key="s3cret")
    headers = {"Authorization": "Key s3cret"}
    assert (await gateway.client.get("/api/fal/rest/keys")).status == 401
    response = await gateway.client.get("/api/fal/rest/keys", headers=headers)
    assert (response.status, (await response.json())["type"]) == (403, "target_forbidden")
    assert fal.seen == []


def queue_urls(base: str) -> dict[str, str]:
    return {
        "request_id": ID,
        "status_url": f"{base}/status",
        "response_url": base,
        "cancel_url": f"{base}/cancel",
    }


@pytest.mark.parametrize(
    ("headers", "base"),
    [
        pytest.param({"Host": "proxy.example:8443"}, "http://proxy.example:8443", id="by host"),
        pytest.param(
            {"Host": "proxy.example", "X-Forwarded-Proto": "https"},
            "https://proxy.example",
            id="behind a load balancer",
        ),
        pytest.param({"Host": '"evil'}, "http://localhost", id="an invalid host"),
    ],
)
@pytest.mark.parametrize("path", ["fal-ai/flux/dev", f"fal-ai/flux/requests/{ID}/status"])
async def test_urls_in_a_document_point_to_the_proxy(
    gateway: Gateway, fal: FakeFal, headers: dict[str, str], base: str, path: str
) -> None:
    async def respond(request: web.Request) -> web.StreamResponse:
        assert request.headers["Accept-Encoding"] == "identity"
        return web.json_response(queue_urls(FAL_URL) | {"logs": [{"message": FAL_URL}]})

    fal.respond = respond
    url = f"/api/fal/queue/{path}"
    response = await gateway.client.post(url, json={}, headers=headers)
    assert await response.json() == queue_urls(base + PROXY_PATH) | {"logs": [{"message": FAL_URL}]}


async def test_a_public_url_has_priority_over_the_request(
    make_gateway: MakeGateway, fal: FakeFal
) -> None:
    async def respond(request: web.Request) -> web.StreamResponse:
        text = json.dumps(queue_urls(FAL_URL.replace("fal.run", "falrun.com")))
        return web.json_response(text=text.replace("/", r"\/"))

    fal.respond = respond
    gateway = await make_gateway(fal.origin, public_url="https://a.example/ai")
    response = await gateway.client.post("/api/fal/queue/fal-ai/flux/dev", json={})
    assert await response.json() == queue_urls(f"https://a.example/ai{PROXY_PATH}")


async def test_urls_in_a_status_stream_point_to_the_proxy_wherever_it_is_cut(
    gateway: Gateway, fal: FakeFal
) -> None:
    text = b"".join(
        b"data: " + json.dumps(queue_urls(FAL_URL) | {"n": n}).encode() + b"\n\n" for n in range(3)
    )

    async def respond(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for cut in range(0, len(text), 7):
            await response.write(text[cut : cut + 7])
        return response

    fal.respond = respond
    response = await gateway.client.get(
        f"/api/fal/queue/fal-ai/flux/requests/{ID}/status/stream", headers={"Host": "a.example"}
    )
    events = (await response.read()).split(b"\n\n")
    assert [json.loads(event[6:]) for event in events[:-1]] == [
        queue_urls(f"http://a.example{PROXY_PATH}") | {"n": n} for n in range(3)
    ]


@pytest.mark.parametrize("path", [f"queue/fal-ai/flux/requests/{ID}", "run/fal-ai/flux/dev"])
async def test_results_are_not_changed(gateway: Gateway, fal: FakeFal, path: str) -> None:
    body = json.dumps(queue_urls(FAL_URL)).encode()

    async def respond(request: web.Request) -> web.StreamResponse:
        headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
        return web.Response(body=gzip.compress(body), headers=headers)

    fal.respond = respond
    response = await gateway.client.post(f"/api/fal/{path}", json={})
    assert gzip.decompress(await response.read()) == body


@pytest.mark.parametrize("path", ["api/fal/ru%6e/a/b%20c?d=%7C|", "%61pi/fal/run/a/b%20c?d=%7C|"])
async def test_a_route_in_another_spelling_keeps_its_target(
    gateway: Gateway, fal: FakeFal, path: str
) -> None:
    head = f"POST /{path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    response = await gateway.send_raw(
        f"{head}Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{{}}".encode()
    )
    assert response.startswith(b"HTTP/1.1 200 ")
    assert [seen.target for seen in fal.seen] == ["/a/b%20c?d=%7C|"]


@pytest.mark.parametrize(
    ("types", "is_isolated"),
    [
        (["application/json"], False),
        (["Application/Problem+JSON; charset=utf-8"], False),
        (["text/event-stream"], False),
        (["text/html"], True),
        (["image/svg+xml"], True),
        (["text/plain"], True),
        ([], True),
        (["application/json, text/html"], True),
        (["application/json;, text/html"], True),
        (["application/jsonp"], True),
    ],
)
async def test_other_responses_than_data_are_isolated(
    gateway: Gateway, fal: FakeFal, types: list[str], is_isolated: bool
) -> None:
    async def respond(request: web.Request) -> web.StreamResponse:
        response = web.Response(body=b"{}")
        response.headers.popall("Content-Type", None)
        for value in types:
            response.headers.add("Content-Type", value)
        return response

    fal.respond = respond
    for path, method in ((PROXY_PATH, "GET"), ("/api/fal/rest/storage/x", "GET")):
        response = await gateway.client.request(method, path)
        assert response.status == 200
        csp = response.headers.getall("Content-Security-Policy", [])
        assert csp == (["sandbox"] if is_isolated else [])
        assert response.headers.getall("X-Content-Type-Options") == ["nosniff"]


async def test_the_header_route_does_not_change_urls(gateway: Gateway, fal: FakeFal) -> None:
    async def respond(request: web.Request) -> web.StreamResponse:
        return web.json_response(queue_urls(FAL_URL))

    fal.respond = respond
    response = await gateway.call("https://queue.fal.run/fal-ai/flux/dev", json={})
    assert await response.json() == queue_urls(FAL_URL)


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", ""])
@pytest.mark.parametrize("body", [b"", b"{}"])
async def test_a_post_without_a_cors_preflight_is_a_415(
    gateway: Gateway, fal: FakeFal, content_type: str, body: bytes
) -> None:
    response = await gateway.client.post(
        "/api/fal/run/fal-ai/flux/dev",
        data=body or None,
        headers={"Content-Type": content_type} if content_type else {},
        skip_auto_headers=["Content-Type"],
    )
    assert response.status == 415
    assert fal.seen == []


@pytest.mark.parametrize(
    ("site", "origin", "status"),
    [
        ("cross-site", "https://evil.example", 403),
        ("same-site", "https://other.example", 403),
        ("cross-site", None, 403),
        ("cross-site", "https://good.example", 200),
        ("same-origin", None, 200),
        ("none", None, 200),
        (None, None, 200),
    ],
)
@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", f"queue/fal-ai/flux/requests/{ID}/status"), ("POST", "run/fal-ai/flux/dev")],
)
async def test_a_page_of_a_foreign_origin_is_a_403(
    make_gateway: MakeGateway,
    fal: FakeFal,
    method: str,
    path: str,
    site: str | None,
    origin: str | None,
    status: int,
) -> None:
    gateway = await make_gateway(fal.origin, allowed_origins=("https://good.example",))
    fields = {"Sec-Fetch-Site": site, "Origin": origin, "Content-Type": "application/json"}
    headers = {name: value for name, value in fields.items() if value}
    response = await gateway.client.request(method, f"/api/fal/{path}", headers=headers)
    assert response.status == status
    assert len(fal.seen) == (status == 200)


@pytest.mark.parametrize("path", ["run/fal-ai/flux/dev?prompt=x", "queue/fal-ai/flux/dev"])
async def test_a_get_does_not_call_a_model(gateway: Gateway, fal: FakeFal, path: str) -> None:
    response = await gateway.client.get(f"/api/fal/{path}")
    assert (response.status, response.headers["Allow"]) == (405, "POST")
    assert fal.seen == []


@pytest.mark.parametrize(
    ("origin", "is_refused"),
    [
        pytest.param("http://evil.example", True, id="of another page"),
        pytest.param("null", True, id="of an opaque origin, such as a sandboxed frame"),
        pytest.param(None, False, id="not of a page"),
        pytest.param("own", False, id="of our own page"),
    ],
)
async def test_a_form_of_another_origin_is_refused_without_sec_fetch_site(
    gateway: Gateway, fal: FakeFal, origin: str | None, is_refused: bool
) -> None:
    """Browsers send no `Sec-Fetch-Site` to http URLs, and no CORS preflight for forms."""
    headers = {"Origin": gateway.origin if origin == "own" else origin} if origin else {}
    form = {"prompt": "a cat"}
    response = await gateway.client.post("/v1/images/edits", data=form, headers=headers)
    assert (response.status == 403) is is_refused
    assert not [seen for seen in fal.seen if seen.method == "POST"]
