"""The fake of Supabase Storage behaves like the real one, called by supabase-py and by plain
requests."""

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from hashlib import md5

import httpx
import jwt
import pytest
from storage3 import AsyncStorageClient
from storage3.exceptions import StorageApiError

from tests.support.fake_supabase import FakeSupabase
from tests.support.fake_supabase.errors import DATABASE_BUSY, DATABASE_SLOW
from tests.support.fake_supabase.faults import (
    Fault,
    close_connection,
    delay,
    fail_with,
    hang,
    lose_response,
    respond,
)

PNG = {"content-type": "image/png"}
SECRET_KEY = "sb_secret_of_the_fake"
DUPLICATE = (400, "409", "Duplicate", "The resource already exists", "KeyAlreadyExists")
NO_BUCKET = (400, "404", "Bucket not found", "Bucket not found", "NoSuchBucket")
NO_KEY = (400, "404", "not_found", "Object not found", "NoSuchKey")
TOO_LARGE = (
    400,
    "413",
    "Payload too large",
    "The object exceeded the maximum allowed size",
    "EntityTooLarge",
)
NO_POLICY = (
    400,
    "403",
    "Unauthorized",
    "new row violates row-level security policy",
    "AccessDenied",
)
LATE = '"exp" claim timestamp check failed'


@dataclass(slots=True)
class ApiClient:
    """A plain HTTP client with a key."""

    client: httpx.AsyncClient
    key: str | None

    async def request(self, method: str, path: str, **given: object) -> httpx.Response:
        headers = dict(given.pop("headers", {}))  # type: ignore[call-overload] # of any kind
        if self.key is not None:
            headers.setdefault("Authorization", f"Bearer {self.key}")
        return await self.client.request(method, path, headers=headers, **given)  # type: ignore[arg-type] # httpx accepts it


@pytest.fixture
async def fake() -> AsyncIterator[FakeSupabase]:
    async with FakeSupabase(keys={SECRET_KEY: "service_role"}) as running:
        yield running


@pytest.fixture
async def http(fake: FakeSupabase) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(
        base_url=f"{fake.url}/storage/v1", trust_env=False, timeout=5
    ) as client:
        yield client


@pytest.fixture
def service(fake: FakeSupabase, http: httpx.AsyncClient) -> ApiClient:
    return ApiClient(http, fake.service_key)


@pytest.fixture
def storage(fake: FakeSupabase, http: httpx.AsyncClient) -> AsyncStorageClient:
    headers = {"apikey": fake.service_key, "Authorization": f"Bearer {fake.service_key}"}
    return AsyncStorageClient(f"{fake.url}/storage/v1/", headers, http_client=http)


@pytest.fixture
async def media(service: ApiClient) -> ApiClient:
    """A client of a fake with a public and a private bucket, each with an object `k`."""
    for name, is_public in (("media", True), ("private", False)):
        made = await service.request("POST", "/bucket", json={"name": name, "public": is_public})
        assert made.json() == {"name": name}
        sent = await service.request(
            "POST", f"/object/{name}/k", content=b"0123456789", headers=PNG
        )
        assert sent.json() == {"Key": f"{name}/k", "Id": sent.json()["Id"]}
    return service


def error_of(response: httpx.Response) -> tuple[object, ...]:
    body = response.json()
    assert response.headers["content-type"] == "application/json; charset=utf-8"
    assert {*body} == {"statusCode", "error", "message", "code"}
    names = ("statusCode", "error", "message", "code")
    return (response.status_code, *(body[name] for name in names))


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    method: str = "POST"
    path: str
    given: dict[str, object] = field(default_factory=dict)
    expected: tuple[object, ...]


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            Case(path="/object/media/k", given={"content": b"x"}, expected=DUPLICATE),
            id="a key that exists",
        ),
        pytest.param(
            Case(
                path="/object/media/k",
                given={"content": b"x", "headers": {"x-upsert": "True"}},
                expected=DUPLICATE,
            ),
            id="upsert with a capital is none",
        ),
        pytest.param(
            Case(
                path="/bucket",
                given={"json": {"name": "media"}},
                expected=(*DUPLICATE[:-1], "BucketAlreadyExists"),
            ),
            id="a bucket that exists",
        ),
        pytest.param(
            Case(path="/object/none/k", given={"content": b"x"}, expected=NO_BUCKET),
            id="writing without a bucket",
        ),
        pytest.param(
            Case(method="GET", path="/object/none/k", expected=NO_BUCKET),
            id="reading without a bucket",
        ),
        pytest.param(
            Case(method="GET", path="/bucket/none", expected=NO_BUCKET),
            id="a bucket that is not there",
        ),
        pytest.param(
            Case(method="GET", path="/object/media/none", expected=NO_KEY),
            id="reading a missing object",
        ),
        pytest.param(
            Case(method="GET", path="/object/info/media/none", expected=NO_KEY),
            id="info of a missing object",
        ),
        pytest.param(
            Case(
                path="/object/sign/media/none", given={"json": {"expiresIn": 60}}, expected=NO_KEY
            ),
            id="signing a missing object",
        ),
        pytest.param(
            Case(method="DELETE", path="/object/media/none", expected=NO_KEY),
            id="deleting a missing object",
        ),
        pytest.param(
            Case(
                path="/object/copy",
                given={"json": {"bucketId": "media", "sourceKey": "none", "destinationKey": "b"}},
                expected=NO_KEY,
            ),
            id="copying a missing object",
        ),
        pytest.param(
            Case(
                path="/object/copy",
                given={"json": {"bucketId": "media", "sourceKey": "k", "destinationKey": "k"}},
                expected=DUPLICATE,
            ),
            id="copying to an existing object",
        ),
        pytest.param(
            Case(method="GET", path="/object/public/private/k", expected=NO_BUCKET),
            id="a private bucket has no public URLs",
        ),
        pytest.param(
            Case(
                path="/object/media/a%23b",
                given={"content": b"x"},
                expected=(400, "400", "InvalidKey", "Invalid key: a#b", "InvalidKey"),
            ),
            id="a key with a number sign",
        ),
        pytest.param(
            Case(
                path="/object/media/%C3%A9",
                given={"content": b"x"},
                expected=(400, "400", "InvalidKey", "Invalid key: é", "InvalidKey"),
            ),
            id="a key that is not ASCII",
        ),
        pytest.param(
            Case(
                path="/object/media/",
                given={"content": b"x"},
                expected=(400, "400", "InvalidKey", "Invalid key: ", "InvalidKey"),
            ),
            id="an empty key",
        ),
        pytest.param(
            Case(
                path="/bucket",
                given={"json": {"name": "a/b"}},
                expected=(400, "400", "Invalid Input", "Bucket name invalid", "InvalidBucketName"),
            ),
            id="a bucket with a slash",
        ),
        pytest.param(
            Case(
                path="/object/media/a",
                given={"content": b"x", "headers": {"content-type": "image"}},
                expected=(
                    400,
                    "415",
                    "invalid_mime_type",
                    "Invalid Content-Type header",
                    "InvalidMimeType",
                ),
            ),
            id="half a type",
        ),
        pytest.param(
            Case(
                path="/object/media/a",
                given={
                    "data": {"cacheControl": "1"},
                    "files": {},
                    "headers": {"content-type": "multipart/form-data; boundary=x"},
                },
                expected=(400, "400", "InvalidRequest", "No content provided", "InvalidRequest"),
            ),
            id="a form without a file",
        ),
        pytest.param(
            Case(
                method="DELETE",
                path="/bucket/media",
                expected=(
                    400,
                    "409",
                    "ResourceNotEmpty",
                    "The bucket you tried to delete is not empty",
                    "ResourceNotEmpty",
                ),
            ),
            id="a bucket with something in it",
        ),
        pytest.param(
            Case(
                path="/object/list/media",
                given={"json": {}},
                expected=(
                    400,
                    "400",
                    "Error",
                    "body must have required property 'prefix'",
                    "InvalidRequest",
                ),
            ),
            id="a listing without a prefix",
        ),
        pytest.param(
            Case(
                method="PATCH",
                path="/object/media/k",
                expected=(
                    404,
                    "404",
                    "Not Found",
                    "Route PATCH:/object/media/k not found",
                    "InvalidRequest",
                ),
            ),
            id="no such route below object",
        ),
        pytest.param(
            Case(
                method="GET",
                path="/object/media/k",
                given={"headers": {"Range": "bytes=99-"}},
                expected=(416, "416", "invalid_range", "invalid range provided", "InvalidRange"),
            ),
            id="a range outside",
        ),
        pytest.param(
            Case(
                path="/object/media/.emptyFolderPlaceholder",
                given={"content": b"x"},
                expected=TOO_LARGE,
            ),
            id="a placeholder is empty",
        ),
    ],
)
async def test_it_refuses_with_400_and_the_status_in_the_body(media: ApiClient, case: Case) -> None:
    if case.given.pop("data", None):
        case.given["content"] = (
            b'--x\r\nContent-Disposition: form-data; name="cacheControl"\r\n\r\n1\r\n--x--\r\n'
        )
        case.given.pop("files")
    assert error_of(await media.request(case.method, case.path, **case.given)) == case.expected


async def test_an_unknown_top_route_has_a_numeric_status(http: httpx.AsyncClient) -> None:
    response = await http.get("/nope")
    assert response.status_code == 404
    body = {"message": "Route GET:/nope not found", "error": "Not Found", "statusCode": 404}
    assert response.json() == body


def unauthorized(message: str) -> tuple[object, ...]:
    return (400, "403", "Unauthorized", message, "AccessDenied")


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        pytest.param(
            lambda fake: None,
            (
                400,
                "400",
                "Error",
                "headers must have required property 'authorization'",
                "InvalidRequest",
            ),
            id="no key",
        ),
        pytest.param(
            lambda fake: "sb_secret_unknown",
            unauthorized("Invalid Compact JWS"),
            id="an opaque key without a gateway",
        ),
        pytest.param(lambda fake: "nonsense", unauthorized("Invalid Compact JWS"), id="no token"),
        pytest.param(
            lambda fake: jwt.encode({"role": "service_role"}, "x" * 32),
            unauthorized("signature verification failed"),
            id="another secret",
        ),
        pytest.param(
            lambda fake: fake.token(role="service_role", exp=1), unauthorized(LATE), id="expired"
        ),
        pytest.param(lambda fake: fake.token(role="anon"), NO_POLICY, id="anon"),
        pytest.param(lambda fake: fake.token(), NO_POLICY, id="no role"),
        pytest.param(
            lambda fake: fake.token(role="who"),
            (500, "500", "DatabaseError", "database error, code: 22023", "DatabaseError"),
            id="a role that does not exist",
        ),
    ],
)
async def test_only_the_service_role_may_write(
    fake: FakeSupabase,
    media: ApiClient,
    key: Callable[[FakeSupabase], str | None],
    expected: tuple[object, ...],
) -> None:
    asker = ApiClient(media.client, key(fake))
    assert error_of(await asker.request("POST", "/object/media/new", content=b"x")) == expected
    assert [*fake.objects("media")] == ["k"]


async def test_a_token_needs_neither_an_expiry_nor_the_word_bearer(media: ApiClient) -> None:
    headers = {"Authorization": str(media.key)}
    response = await media.request("POST", "/object/media/a", content=b"x", headers=headers)
    assert response.status_code == 200


async def test_an_apikey_alone_is_no_authorization(fake: FakeSupabase, media: ApiClient) -> None:
    response = await media.client.post("/object/media/a", headers={"apikey": fake.service_key})
    assert error_of(response)[3] == "headers must have required property 'authorization'"


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param({"apikey": SECRET_KEY}, id="as in the documentation"),
        pytest.param(
            {"apikey": SECRET_KEY, "Authorization": f"Bearer {SECRET_KEY}"},
            id="as supabase-py does",
        ),
    ],
)
async def test_a_gateway_exchanges_an_opaque_key(media: ApiClient, headers: dict[str, str]) -> None:
    assert (await media.client.post("/object/media/a", headers=headers)).status_code == 200


async def test_a_gateway_refuses_an_opaque_key_to_a_browser(media: ApiClient) -> None:
    headers = {"apikey": SECRET_KEY, "User-Agent": "Mozilla/5.0"}
    assert (await media.client.post("/object/media/a", headers=headers)).status_code == 401


async def test_the_anonymous_role_sees_no_bucket(fake: FakeSupabase, media: ApiClient) -> None:
    anon = ApiClient(media.client, fake.token(role="anon"))
    assert (await anon.request("GET", "/bucket")).json() == []
    assert error_of(await anon.request("GET", "/bucket/media")) == NO_BUCKET
    assert error_of(await anon.request("POST", "/bucket", json={"name": "new"})) == NO_POLICY


# Buckets


async def test_a_bucket_is_created_changed_emptied_and_deleted(
    fake: FakeSupabase, storage: AsyncStorageClient
) -> None:
    options = {"public": True, "file_size_limit": 1000, "allowed_mime_types": ["image/*"]}
    assert await storage.create_bucket("b", options=options) == {"name": "b"}  # type: ignore[arg-type] # a dict
    seen = await storage.get_bucket("b")
    assert (seen.public, seen.file_size_limit, seen.allowed_mime_types) == (
        True, 1000, ["image/*"],
    )  # fmt: skip
    assert await storage.update_bucket("b", {"public": False}) == {
        "message": "Successfully updated"
    }
    assert [one.public for one in await storage.list_buckets()] == [False]
    await storage.from_("b").upload("k", b"x", {"content-type": "image/png"})
    reported = "Empty bucket has been queued. Completion may take up to an hour."
    assert await storage.empty_bucket("b") == {"message": reported}
    assert await storage.delete_bucket("b") == {"message": "Successfully deleted"}
    assert not fake.buckets


async def test_one_of_eight_concurrent_bucket_creations_succeeds(service: ApiClient) -> None:
    given = {"name": "media"}
    responses = await asyncio.gather(
        *(service.request("POST", "/bucket", json=given) for _ in range(8))
    )
    assert sorted(response.status_code for response in responses) == [200] + [400] * 7


@pytest.mark.parametrize(("name", "passes"), [
    pytest.param("-A b.c_d'e-", True, id="a valid name"),
    pytest.param("b" * 100, True, id="a hundred characters"),
    pytest.param("b" * 101, False, id="one more"),
    pytest.param("", False, id="empty"),
    pytest.param("é", False, id="not ASCII"),
])  # fmt: skip
async def test_names_of_buckets(service: ApiClient, name: str, passes: bool) -> None:
    response = await service.request("POST", "/bucket", json={"name": name})
    assert (response.status_code == 200) is passes


async def test_a_limit_may_be_a_text(fake: FakeSupabase, service: ApiClient) -> None:
    given = {"name": "b", "file_size_limit": "1MB"}
    await service.request("POST", "/bucket", json=given)
    assert fake.buckets["b"].size_max == 1_000_000


# Uploads


@pytest.mark.parametrize(
    ("headers", "stored"),
    [
        pytest.param(
            {"cache-control": "public, max-age=31536000, immutable"},
            "public, max-age=31536000, immutable",
            id="as it is",
        ),
        pytest.param({}, "no-cache", id="none"),
    ],
)
async def test_a_raw_body_s_cache_control_is_kept(
    media: ApiClient, headers: dict[str, str], stored: str
) -> None:
    await media.request("POST", "/object/media/a", content=b"x", headers=headers)
    response = await media.client.get("/object/public/media/a")
    assert response.headers["cache-control"] == stored
    assert response.headers["content-type"] == "application/octet-stream"


@pytest.mark.parametrize(("given", "stored"), [
    pytest.param("3600", "max-age=3600", id="seconds"),
    pytest.param("public, immutable", "max-age=public, immutable", id="anything else is broken"),
])  # fmt: skip
async def test_a_form_s_cache_control_is_seconds(
    media: ApiClient, storage: AsyncStorageClient, given: str, stored: str
) -> None:
    options = {"content-type": "image/png", "cache-control": given}
    sent = await storage.from_("media").upload("a/b.png", b"x", options)  # type: ignore[arg-type] # a dict
    assert sent.full_path == "media/a/b.png"
    response = await media.client.get("/object/public/media/a/b.png")
    assert response.headers["cache-control"] == stored
    assert response.headers["content-type"] == "image/png"


async def test_a_form_without_cache_control_is_not_to_be_cached(media: ApiClient) -> None:
    await media.request("POST", "/object/media/a", files={"file": ("a", b"x", "image/png")})
    response = await media.client.get("/object/public/media/a")
    assert response.headers["cache-control"] == "no-cache"


async def test_put_creates_and_replaces_and_the_id_stays(
    fake: FakeSupabase, media: ApiClient
) -> None:
    first = await media.request("PUT", "/object/media/a", content=b"1")
    second = await media.request("PUT", "/object/media/a", content=b"2")
    third = await media.request(
        "POST", "/object/media/a", content=b"3", headers={"x-upsert": "true"}
    )
    assert first.json() == second.json() == third.json()
    assert fake.objects("media")["a"].content == b"3"


async def test_eight_concurrent_writes_of_one_key_all_succeed(
    fake: FakeSupabase, media: ApiClient
) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b"a"
        while fake.count("POST", "/object/media/a") < 8:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        yield b"b"

    responses = await asyncio.gather(
        *(media.request("POST", "/object/media/a", content=body()) for _ in range(8))
    )
    assert {response.status_code for response in responses} == {200}
    assert len({response.json()["Id"] for response in responses}) == 1
    assert fake.objects("media")["a"].content == b"ab"


async def make_small(media: ApiClient) -> None:
    given = {"name": "small", "file_size_limit": 10, "allowed_mime_types": ["image/png"]}
    await media.request("POST", "/bucket", json=given)


async def test_an_object_at_the_limit_passes(media: ApiClient) -> None:
    await make_small(media)
    ask = media.request
    at = await ask("POST", "/object/small/a", content=b"x" * 10, headers=PNG)
    over = await ask("POST", "/object/small/b", content=b"x" * 11, headers=PNG)
    form = await ask("POST", "/object/small/c", files={"file": ("c", b"x" * 11, "image/png")})
    assert at.status_code == 200
    assert error_of(over) == error_of(form) == TOO_LARGE


async def test_without_a_length_no_limit_is_enforced(fake: FakeSupabase, media: ApiClient) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b"x" * 50_000

    await make_small(media)
    response = await media.request("POST", "/object/small/a", content=body(), headers=PNG)
    assert response.status_code == 200
    assert len(fake.objects("small")["a"].content) == 50_000


async def test_the_server_has_a_limit_of_its_own() -> None:
    async with FakeSupabase(size_max=10) as fake, httpx.AsyncClient(trust_env=False) as client:
        asker, url = ApiClient(client, fake.service_key), f"{fake.url}/storage/v1"
        await asker.request("POST", f"{url}/bucket", json={"name": "b"})
        response = await asker.request("POST", f"{url}/object/b/k", content=b"x" * 11)
        assert error_of(response) == TOO_LARGE


@pytest.mark.parametrize("content_type", ["image/jpeg", "image/png; charset=x"])
async def test_types_are_compared_by_the_letter(media: ApiClient, content_type: str) -> None:
    await make_small(media)
    headers = {"content-type": content_type}
    response = await media.request("POST", "/object/small/a", content=b"x", headers=headers)
    message = f"mime type {content_type} is not supported"
    assert error_of(response) == (400, "415", "invalid_mime_type", message, "InvalidMimeType")


@pytest.mark.parametrize("key", ["a//b", "a/", ".a", "aB0/_-.!*'() &$@=;:+,"])
async def test_valid_keys_are_accepted(fake: FakeSupabase, media: ApiClient, key: str) -> None:
    path = "/object/media/" + "".join(f"%{ord(c):02X}" if c not in "/" else c for c in key)
    assert (await media.request("POST", path, content=b"x")).status_code == 200
    assert key in fake.objects("media")


async def test_a_name_too_long_for_a_disk_is_a_500(media: ApiClient) -> None:
    response = await media.request("POST", f"/object/media/{'a' * 250}", content=b"x")
    assert response.status_code == 500


async def test_an_incomplete_body_leaves_nothing(fake: FakeSupabase, media: ApiClient) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b"x"
        raise ValueError("broken off")

    headers = {"content-length": "100"}
    with pytest.raises(ValueError, match="broken off"):
        await media.request("POST", "/object/media/a", content=body(), headers=headers)
    await media.request("GET", "/bucket")
    assert [*fake.objects("media")] == ["k"]


async def test_metadata_is_returned(media: ApiClient, storage: AsyncStorageClient) -> None:
    given = base64.b64encode(json.dumps({"a": 1}).encode()).decode()
    await media.request("POST", "/object/media/a", content=b"x", headers={"x-metadata": given})
    await storage.from_("media").upload("b", b"x", {"metadata": {"a": 1}})
    for key in ("a", "b"):
        assert (await storage.from_("media").info(key))["metadata"] == {"a": 1}


# Downloads


@pytest.mark.parametrize(("path", "has_key"), [
    pytest.param("/object/public/media/k", False, id="public"),
    pytest.param("/object/media/k", False, id="plain, of a public bucket"),
    pytest.param("/object/media/k", True, id="plain"),
    pytest.param("/object/authenticated/media/k", True, id="authenticated"),
    pytest.param("/object/private/k", True, id="private"),
])  # fmt: skip
async def test_it_is_read_with_its_headers(media: ApiClient, path: str, has_key: bool) -> None:
    response = await ApiClient(media.client, media.key if has_key else None).request("GET", path)
    assert response.content == b"0123456789"
    expected = {
        "content-type": "image/png",
        "content-length": "10",
        "etag": f'"{md5(b"0123456789").hexdigest()}"',
        "cache-control": "no-cache",
        "accept-ranges": "bytes",
        "x-robots-tag": "none",
    }
    assert expected.items() <= dict(response.headers).items()
    assert "last-modified" in response.headers


@pytest.mark.parametrize("path", ["/object/private/k", "/object/authenticated/media/k"])
async def test_private_objects_need_a_key(media: ApiClient, path: str) -> None:
    response = await media.client.get(path)
    assert error_of(response)[3] == "headers must have required property 'authorization'"


async def test_head_is_get_without_a_body(media: ApiClient) -> None:
    response = await media.client.head("/object/public/media/k")
    assert (response.status_code, response.content) == (200, b"")
    assert response.headers["content-length"] == "10"
    missing = await media.client.head("/object/public/media/none")
    assert (missing.status_code, missing.content) == (400, b"")


@pytest.mark.parametrize(
    ("headers", "status", "content"),
    [
        pytest.param(
            {"If-None-Match": f'"{md5(b"0123456789").hexdigest()}"'}, 304, b"", id="a matching etag"
        ),
        pytest.param({"If-None-Match": '"other"'}, 200, b"0123456789", id="another etag"),
        pytest.param(
            {"If-Modified-Since": "Fri, 01 Jan 2100 00:00:00 GMT"},
            200,
            b"0123456789",
            id="times are ignored",
        ),
        pytest.param({"Range": "bytes=2-3"}, 206, b"23", id="a part"),
        pytest.param({"Range": "bytes=8-"}, 206, b"89", id="from there"),
        pytest.param({"Range": "bytes=-3"}, 206, b"789", id="the end"),
    ],
)
async def test_conditions_and_ranges(
    media: ApiClient, headers: dict[str, str], status: int, content: bytes
) -> None:
    response = await media.client.get("/object/public/media/k", headers=headers)
    assert (response.status_code, response.content) == (status, content)
    assert ("content-range" in response.headers) is (status == 206)


async def test_a_download_has_a_name(media: ApiClient) -> None:
    named = await media.client.get("/object/public/media/k?download=a.png")
    assert named.headers["content-disposition"].startswith("attachment; filename=a.png;")
    plain = await media.client.get("/object/public/media/k?download=")
    assert plain.headers["content-disposition"] == "attachment;"


@pytest.mark.parametrize(("given", "shown"), [
    pytest.param("text/html", "text/plain", id="a page"),
    pytest.param("image/svg+xml", "image/svg+xml", id="a drawing"),
])  # fmt: skip
async def test_html_is_served_as_plain_text(media: ApiClient, given: str, shown: str) -> None:
    await media.request("POST", "/object/media/a", content=b"x", headers={"content-type": given})
    response = await media.client.get("/object/public/media/a")
    assert response.headers["content-type"] == shown


async def test_supabase_py_reads_gets_info_and_lists(
    media: ApiClient, storage: AsyncStorageClient
) -> None:
    bucket = storage.from_("media")
    assert await bucket.download("k") == b"0123456789"
    assert await bucket.exists("k")
    assert not await bucket.exists("none")
    info = await bucket.info("k")
    assert (info["size"], info["content_type"], info["bucket_id"]) == (10, "image/png", "media")
    await bucket.upload("folder/a", b"x")
    assert [row["name"] for row in await bucket.list()] == ["folder", "k"]
    assert [row["name"] for row in await bucket.list("folder")] == ["a"]
    assert (await bucket.list())[1]["metadata"]["mimetype"] == "image/png"
    assert await storage.from_("none").list() == []
    url = await bucket.get_public_url("k")
    assert (await media.client.get(url)).content == b"0123456789"


async def test_supabase_py_copies_moves_and_deletes(
    media: ApiClient, storage: AsyncStorageClient, fake: FakeSupabase
) -> None:
    bucket = storage.from_("media")
    assert (await bucket.copy("k", "b"))["Key"] == "media/b"
    assert await bucket.move("b", "c") == {"message": "Successfully moved"}
    assert [*fake.objects("media")] == ["k", "c"]
    assert [row["name"] for row in await bucket.remove(["k", "none"])] == ["k"]
    assert await bucket.remove(["none"]) == await storage.from_("none").remove(["k"]) == []
    with pytest.raises(StorageApiError):
        await bucket.remove([])
    deleted = await media.request("DELETE", "/object/media/c")
    assert deleted.json() == {"message": "Successfully deleted"}


# Signed URLs


async def test_a_signed_url_works_until_it_expires(
    fake: FakeSupabase, media: ApiClient, storage: AsyncStorageClient
) -> None:
    signed = await storage.from_("private").create_signed_url("k", 60)
    url = str(signed["signedURL"])
    response = await media.client.get(url)
    assert response.content == b"0123456789"
    assert "cache-control" not in response.headers
    elsewhere = await media.client.get(url.replace("private/k", "media/k"))
    assert error_of(elsewhere) == (
        400,
        "400",
        "InvalidSignature",
        "Invalid signature",
        "InvalidSignature",
    )
    fake.elapse(61)
    assert error_of(await media.client.get(url)) == (400, "400", "InvalidJWT", LATE, "InvalidJWT")
    nonsense = await media.client.get("/object/sign/private/k?token=x")
    assert error_of(nonsense) == (400, "400", "InvalidJWT", "Invalid Compact JWS", "InvalidJWT")


@pytest.mark.parametrize("given", [{"expiresIn": 0}, {}])
async def test_a_signed_url_needs_an_expiry(media: ApiClient, given: dict[str, int]) -> None:
    response = await media.request("POST", "/object/sign/media/k", json=given)
    assert error_of(response)[:2] == (400, "400")


async def test_many_are_signed_at_once(media: ApiClient, storage: AsyncStorageClient) -> None:
    rows = await storage.from_("private").create_signed_urls(["k", "none"], 60)
    assert [row["error"] is None for row in rows] == [True, False]
    assert (await media.client.get(str(rows[0]["signedURL"]))).status_code == 200
    assert rows[1]["signedURL"] is None


# Faults


@pytest.mark.parametrize(
    ("fault", "status", "error"),
    [
        pytest.param(
            fail_with(DATABASE_BUSY), "429", "too_many_connections", id="as the storage writes it"
        ),
        pytest.param(fail_with(DATABASE_SLOW), "544", "DatabaseTimeout", id="a status of its own"),
        pytest.param(respond(502, "<html>"), 502, "InternalError", id="a page"),
        pytest.param(
            respond(401, {"message": "Invalid API key"}), 401, "InternalError", id="a gateway"
        ),
    ],
)
async def test_a_fault_happens_as_often_as_requested(
    fake: FakeSupabase,
    media: ApiClient,
    storage: AsyncStorageClient,
    fault: Fault,
    status: object,
    error: str,
) -> None:
    fake.fail(fault, 2, method="POST", path="/object/media/")
    for _ in range(2):
        with pytest.raises(StorageApiError) as caught:
            await storage.from_("media").upload("a", b"x")
        assert (caught.value.status, caught.value.code) == (status, error)
    await storage.from_("media").upload("a", b"x")
    assert fake.count("POST", "/object/media/a") == 3


async def test_a_fault_can_be_a_hang(fake: FakeSupabase, media: ApiClient) -> None:
    fake.fail(hang)
    with pytest.raises(httpx.ReadTimeout):
        await media.request("GET", "/bucket", timeout=0.05)
    assert (await media.request("GET", "/bucket")).status_code == 200


async def test_a_fault_can_close_the_connection_before_or_after_the_work(
    fake: FakeSupabase, media: ApiClient
) -> None:
    for fault, has_it in ((close_connection, False), (lose_response, True)):
        fake.fail(fault)
        with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
            await media.request("POST", "/object/media/a", content=b"x")
        assert ("a" in fake.objects("media")) is has_it
    assert error_of(await media.request("POST", "/object/media/a", content=b"x")) == DUPLICATE


async def test_a_fault_can_be_slowness(fake: FakeSupabase, media: ApiClient) -> None:
    fake.fail(delay(0.1))
    before = time.monotonic()
    assert (await media.request("GET", "/bucket")).status_code == 200
    assert time.monotonic() - before >= 0.1


async def test_it_stops_reading_a_rejected_body(fake: FakeSupabase, media: ApiClient) -> None:
    fake.stops_reading = True
    port = int(fake.url.rpartition(":")[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = (
        "POST /storage/v1/object/media/k HTTP/1.1\r\nHost: x\r\nContent-Length: 30000000\r\n"
        f"Authorization: Bearer {media.key}\r\n\r\n"
    )
    writer.write(head.encode())
    response = await reader.readuntil(b"}")
    assert response.startswith(b"HTTP/1.1 400 ")
    assert b'"statusCode": "409"' in response
    writer.write(b"x" * 30_000_000)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(writer.drain(), 0.2)
    writer.transport.abort()


async def test_a_restart_keeps_the_port_and_the_objects(
    fake: FakeSupabase, media: ApiClient
) -> None:
    await fake.stop()
    with pytest.raises(httpx.ConnectError):
        await media.request("GET", "/bucket")
    await fake.start()
    assert (await media.request("GET", "/object/media/k")).content == b"0123456789"
