"""What the fake does about requests that are as they should be."""

import asyncio
import base64
import json
from datetime import UTC, datetime
from urllib.parse import parse_qs, urlsplit
from uuid import uuid4

from aiohttp import BodyPartReader, web

from tests.support.fake_supabase.errors import (
    BAD_BODY,
    BAD_VALUE,
    BUCKET_EXISTS,
    KEY_EXISTS,
    NO_BUCKET,
    NO_CONTENT,
    NO_KEY,
    NO_POLICY,
    NOT_EMPTY,
    TOO_LARGE,
    Refusal,
)
from tests.support.fake_supabase.serving import serve
from tests.support.fake_supabase.store import (
    PLACEHOLDER,
    Bucket,
    Object,
    check_bucket_name,
    check_key,
    row_of,
)
from tests.support.fake_supabase.tokens import Tokens

SERVICE = "service_role"
OCTETS = "application/octet-stream"


class Storage:
    """The rules of the observed server over a store. size_max: the server's limit in bytes."""

    def __init__(self, tokens: Tokens, size_max: int) -> None:
        self.tokens = tokens
        self.size_max = size_max
        self.buckets: dict[str, Bucket] = {}

    # Buckets

    async def make_bucket(self, request: web.Request) -> web.Response:
        given = await document(request, "name")
        name = check_bucket_name(given["name"])
        self._check_service(request)
        if name in self.buckets:
            raise Refusal(BUCKET_EXISTS)
        bucket = Bucket(name)
        bucket.change(given)
        self.buckets[name] = bucket
        return web.json_response({"name": name})

    async def list_buckets(self, request: web.Request) -> web.Response:
        may_see = self.tokens.role(request.headers) == SERVICE
        return web.json_response([one.row() for one in self.buckets.values() if may_see])

    async def show_bucket(self, request: web.Request, name: str) -> web.Response:
        return web.json_response(self._visible_bucket(request, name).row())

    async def change_bucket(self, request: web.Request, name: str) -> web.Response:
        bucket = self._visible_bucket(request, name)
        bucket.change(await document(request))
        bucket.updated = datetime.now(UTC)
        return web.json_response({"message": "Successfully updated"})

    async def empty_bucket(self, request: web.Request, name: str) -> web.Response:
        self._visible_bucket(request, name).objects.clear()
        reported = "Empty bucket has been queued. Completion may take up to an hour."
        return web.json_response({"message": reported})

    async def delete_bucket(self, request: web.Request, name: str) -> web.Response:
        if self._visible_bucket(request, name).objects:
            raise Refusal(NOT_EMPTY)
        del self.buckets[name]
        return web.json_response({"message": "Successfully deleted"})

    # Objects in

    async def write(self, request: web.Request, name: str, key: str) -> web.Response:
        """Check for a duplicate at the start only, so that concurrent requests all succeed."""
        role = self.tokens.role(request.headers)
        bucket = self._bucket(name)
        check_key(key)
        if role != SERVICE:
            raise Refusal(NO_POLICY)
        may_replace = request.method == "PUT" or request.headers.get("x-upsert") == "true"
        if key in bucket.objects and not may_replace:
            raise Refusal(KEY_EXISTS)
        is_form = request.content_type == "multipart/form-data"
        new = await (self._read_form if is_form else self._read_raw)(request, bucket)
        if key.endswith(PLACEHOLDER) and new.content:
            raise Refusal(TOO_LARGE)
        if self.buckets.get(name) is not bucket:
            raise Refusal(NO_BUCKET)
        if (old := bucket.objects.get(key)) is not None:
            new.id, new.created = old.id, old.created
        bucket.objects[key] = new
        return web.json_response({"Key": f"{name}/{key}", "Id": new.id})

    async def _read_raw(self, request: web.Request, bucket: Bucket) -> Object:
        """Read a raw body. Without a Content-Length no limit is enforced."""
        content_type = request.headers.get("Content-Type") or OCTETS
        bucket.check_type(content_type)
        bucket.check_size(request.content_length or 0, self.size_max)
        cache_control = request.headers.get("Cache-Control", "no-cache")
        metadata = json.loads(base64.b64decode(request.headers.get("x-metadata", "e30=")))
        content = bytearray()
        async for chunk in request.content.iter_any():
            content += chunk
        return await made(content, content_type, cache_control, metadata)

    async def _read_form(self, request: web.Request, bucket: Bucket) -> Object:
        """Read a form. Fields after the file are ignored."""
        fields: dict[str, str] = {}
        async for part in await request.multipart():
            assert isinstance(part, BodyPartReader)
            if part.filename is None:
                fields[part.name or ""] = await part.text()
                continue
            content_type = fields.get("contentType") or part.headers.get("Content-Type") or OCTETS
            bucket.check_type(content_type)
            content = await part.read()
            bucket.check_size(len(content), self.size_max)
            seconds = fields.get("cacheControl")
            cache_control = "no-cache" if seconds is None else f"max-age={seconds}"
            metadata = json.loads(fields.get("metadata", "{}"))
            return await made(content, content_type, cache_control, metadata)
        raise Refusal(NO_CONTENT)

    # Objects out

    async def read_public(self, request: web.Request, name: str, key: str) -> web.Response:
        bucket = self._bucket(name)
        if not bucket.is_public:
            raise Refusal(NO_BUCKET)
        return serve(request, find(bucket, key))

    async def read(self, request: web.Request, name: str, key: str) -> web.Response:
        """Return the role of a request; without a token it may read public objects."""
        if "Authorization" not in request.headers and "apikey" not in request.headers:
            bucket = self.buckets.get(name)
            if bucket is not None and bucket.is_public:
                return serve(request, find(bucket, key))
        return await self.read_authenticated(request, name, key)

    async def read_authenticated(self, request: web.Request, name: str, key: str) -> web.Response:
        return serve(request, self._visible(request, name, key))

    async def read_signed(self, request: web.Request, name: str, key: str) -> web.Response:
        token = parse_qs(urlsplit(request.raw_path).query).get("token", [""])[0]
        self.tokens.check_url_token(token, f"{name}/{key}")
        return serve(request, find(self._bucket(name), key), is_signed=True)

    async def info(self, request: web.Request, name: str, key: str) -> web.Response:
        found = self._visible(request, name, key)
        reported = {
            "id": found.id,
            "name": key,
            "version": str(uuid4()),
            "bucket_id": name,
            "size": len(found.content),
            "content_type": found.content_type,
            "cache_control": found.cache_control,
            "etag": found.etag,
            "metadata": found.metadata,
            "last_modified": found.updated.isoformat(),
            "created_at": found.created.isoformat(),
        }
        return web.json_response(reported)

    async def sign(self, request: web.Request, name: str, key: str) -> web.Response:
        seconds = lifetime(await document(request, "expiresIn"))
        self._visible(request, name, key)
        return web.json_response({"signedURL": self._signed(name, key, seconds)})

    async def sign_many(self, request: web.Request, name: str) -> web.Response:
        given = await document(request, "expiresIn", "paths")
        seconds, paths = lifetime(given), given["paths"]
        self.tokens.role(request.headers)
        objects = self._bucket(name).objects
        no = "Either the object does not exist or you do not have access to it"
        rows = [
            {"error": None, "path": path, "signedURL": self._signed(name, path, seconds)}
            if path in objects
            else {"error": no, "path": path, "signedURL": None}
            for path in (paths if isinstance(paths, list) else [])
        ]
        return web.json_response(rows)

    def _signed(self, name: str, key: str, seconds: int) -> str:
        token = self.tokens.make_url_token(f"{name}/{key}", seconds)
        return f"/object/sign/{name}/{key}?token={token}"

    async def list_objects(self, request: web.Request, name: str) -> web.Response:
        given = await document(request, "prefix")
        prefix = str(given["prefix"])
        folder = f"{prefix.rstrip('/')}/" if prefix else ""
        may_see = self.tokens.role(request.headers) == SERVICE
        objects = self.buckets[name].objects if may_see and name in self.buckets else {}
        rows: dict[str, dict[str, object]] = {}
        for key, found in sorted(objects.items()):
            if key.startswith(folder):
                first, slash, _ = key.removeprefix(folder).partition("/")
                rows[first] = {"name": first, "id": None} if slash else row_of(first, found)
        start, limit = int(str(given.get("offset", 0))), int(str(given.get("limit", 100)))
        return web.json_response(list(rows.values())[start : start + limit])

    # Objects away

    async def delete(self, request: web.Request, name: str, key: str) -> web.Response:
        self._visible(request, name, key)
        del self.buckets[name].objects[key]
        return web.json_response({"message": "Successfully deleted"})

    async def delete_many(self, request: web.Request, name: str) -> web.Response:
        keys = (await document(request, "prefixes"))["prefixes"]
        if not isinstance(keys, list) or not keys:
            raise Refusal(BAD_VALUE, "prefixes")
        may_delete = self.tokens.role(request.headers) == SERVICE
        objects = self.buckets[name].objects if may_delete and name in self.buckets else {}
        rows = [row_of(key, objects.pop(key)) for key in keys if key in objects]
        return web.json_response(rows)

    async def copy(self, request: web.Request) -> web.Response:
        name, key, found = await self._copied(request)
        return web.json_response({"Key": f"{name}/{key}", "Id": found.id, "name": key})

    async def move(self, request: web.Request) -> web.Response:
        given = await document(request)
        await self._copied(request)
        del self.buckets[str(given["bucketId"])].objects[str(given["sourceKey"])]
        return web.json_response({"message": "Successfully moved"})

    async def _copied(self, request: web.Request) -> tuple[str, str, Object]:
        given = await document(request, "bucketId", "sourceKey", "destinationKey")
        name, key = str(given["bucketId"]), str(given["destinationKey"])
        found = self._visible(request, name, str(given["sourceKey"]))
        check_key(key)
        name = str(given.get("destinationBucket", name))
        there = self._bucket(name).objects
        if key in there:
            raise Refusal(KEY_EXISTS)
        content_type, cache_control = found.content_type, found.cache_control
        there[key] = await made(found.content, content_type, cache_control, found.metadata)
        return name, key, there[key]

    # Listing by role

    def _check_service(self, request: web.Request) -> None:
        if self.tokens.role(request.headers) != SERVICE:
            raise Refusal(NO_POLICY)

    def _bucket(self, name: str) -> Bucket:
        if name not in self.buckets:
            raise Refusal(NO_BUCKET)
        return self.buckets[name]

    def _visible_bucket(self, request: web.Request, name: str) -> Bucket:
        if self.tokens.role(request.headers) != SERVICE:
            raise Refusal(NO_BUCKET)
        return self._bucket(name)

    def _visible(self, request: web.Request, name: str, key: str) -> Object:
        role = self.tokens.role(request.headers)
        found = find(self._bucket(name), key)
        if role != SERVICE:
            raise Refusal(NO_KEY)
        return found


def find(bucket: Bucket, key: str) -> Object:
    if key not in bucket.objects:
        raise Refusal(NO_KEY)
    return bucket.objects[key]


def lifetime(given: dict[str, object]) -> int:
    """Parse a number, or a string of digits."""
    text = str(given["expiresIn"])
    if not text.isdecimal() or int(text) < 1:
        raise Refusal(BAD_VALUE, "expiresIn")
    return int(text)


async def document(request: web.Request, *needed: str) -> dict[str, object]:
    """Raises: Refusal."""
    given = json.loads(await request.read() or b"{}")
    for name in needed:
        if not isinstance(given, dict) or name not in given:
            raise Refusal(BAD_BODY, name)
    return dict(given)


async def made(
    content: bytes | bytearray,
    content_type: str,
    cache_control: str,
    metadata: dict[str, object],
) -> Object:
    """Create an object in a thread, since hashing 100 MB blocks the event loop."""
    now = datetime.now(UTC)

    def make() -> Object:
        return Object(str(uuid4()), bytes(content), content_type, cache_control, now, now, metadata)

    return await asyncio.to_thread(make)
