"""Files in Supabase Storage. Alone imports storage3, the part of supabase-py that is for it."""

import asyncio
import logging
import math
import re
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import ParamSpec, Self, TypeVar
from urllib.parse import quote, urlsplit
from uuid import uuid4

import httpx
from storage3 import AsyncStorageClient
from storage3.exceptions import StorageApiError
from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt
from tenacity.wait import wait_base, wait_exponential, wait_random

from falproxy.spool import Spool
from falproxy.stores.files import FileSource, Storage, StorageError, StoredFile
from falproxy.stores.files.supabase_errors import (
    BUCKET_IS_PRIVATE,
    CANNOT_CREATE_BUCKET,
    already_exists,
    error_message,
    is_bucket_missing,
    is_created,
    is_retryable,
    map_errors,
    read_error,
)
from falproxy.stores.files.supabase_http import MAX_CONNECTIONS, open_client

logger = logging.getLogger(__name__)

ATTEMPTS = 3
CACHE_CONTROL = "public, max-age=31536000, immutable"  # only a raw body's is stored as it is
PROBE_CONTENT = (
    b"\x89PNG\r\n\x1a\n"  # a picture by name and type, since buckets may take nothing else
)
BUCKET = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9 ._'-]{1,100}")
KEY = re.compile(r"[!-~]+")
SIGNED_PATH = re.compile(r"object/sign/[^?]*/(?P<name>[0-9a-f]{64}\.\w+)\?")
SIGNED_URLS_MAX = 10_000  # signed URLs that are remembered

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageTimeouts:
    """How long things may take, in seconds. write: until some bytes are taken; answer: until some
    come; turn: the wait for a connection; overall: all of one file. wait: between attempts."""

    connect: float = 5.0
    write: float = 20.0
    read: float = 60.0
    pool: float = 60.0
    overall: float = 300.0
    backoff: wait_base = field(
        default_factory=lambda: wait_exponential(multiplier=0.5, max=8) + wait_random(0, 0.5)
    )


class SupabaseStorage(Storage):
    """A bucket, made when it is missing. url: the project's; key: a secret key or a service
    role's JWT. signed_for: seconds that a URL is good for; None makes the bucket public.

    Raises: ValueError, one of these cannot be right.
    """

    def __init__(
        self,
        url: str,
        key: str,
        *,
        bucket: str = "fal_images",
        signed_url_ttl: float | None = None,
        timeouts: StorageTimeouts | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not is_project_url(url):
            raise ValueError("not a URL of a Supabase project")
        if not KEY.fullmatch(key):  # httpx would show it in its complaint
            raise ValueError("not a key of a Supabase project")
        if not BUCKET.fullmatch(bucket):
            raise ValueError("not a name of a bucket")
        if signed_url_ttl is not None and signed_url_ttl < 1:
            raise ValueError("signed URLs are good for a second at least")
        self._origin = f"{url.rstrip('/')}/storage/v1/"
        self._key = key
        self._bucket = bucket
        self._signed_url_ttl = signed_url_ttl
        self.has_permanent_urls = signed_url_ttl is None
        self._timeouts = timeouts or StorageTimeouts()
        self._slots = asyncio.Semaphore(
            MAX_CONNECTIONS
        )  # fifty that start at once hold up the loop
        self._is_bucket_checked = False  # whether the bucket was seen to be there
        self._clock = clock
        self._signed_urls: OrderedDict[str, tuple[str, float]] = OrderedDict()

    async def __aenter__(self) -> Self:
        pace = self._timeouts
        times = httpx.Timeout(
            connect=pace.connect, read=pace.read, write=pace.write, pool=pace.pool
        )
        self._client = await open_client(times, self._add_auth)
        self._buckets = AsyncStorageClient(self._origin, {}, http_client=self._client)
        self._files = self._buckets.from_(self._bucket)
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._client.aclose()

    async def put(self, file: StoredFile) -> str:
        return await map_errors(self._timeouts.overall, self._put(file))

    def is_expiring(self, url: str) -> bool:
        """As the Protocol says; for half of its time, an address is as good as new."""
        name = self._signed_file_name(url)
        if name is None:
            return False
        known, until = self._signed_urls.get(name, ("", 0.0))
        return known != url or self._clock() >= until

    async def renew_url(self, url: str) -> str:
        name = self._signed_file_name(url)
        if name is None:
            return url
        known, until = self._signed_urls.get(name, ("", 0.0))
        if self._clock() < until:
            return known
        return await map_errors(self._timeouts.overall, self._file_url(name))

    def _signed_file_name(self, url: str) -> str | None:
        """The file that a signed address of this storage is for."""
        if self._signed_url_ttl is None or not url.startswith(self._origin):
            return None
        signed = SIGNED_PATH.match(url, len(self._origin))
        return signed["name"] if signed else None

    async def check(self) -> None:
        await map_errors(self._timeouts.overall, self._check())

    async def _put(self, file: StoredFile) -> str:
        async with self._slots:
            await self._upload(file)
            return await self._file_url(file.name)

    async def _check(self) -> None:
        probe = StoredFile(f".falproxy/{uuid4().hex}.png", "image/png", Spool(PROBE_CONTENT))
        self._is_bucket_checked = False
        url = await self._put(probe)
        try:
            await self._with_retries(self._verify_content, url)
        finally:
            await self._delete(probe.name)

    def _add_auth(self, request: httpx.Request) -> httpx.Request:
        """Gateways read `apikey`, also where the other is none of a JWT; the storage behind them,
        and one without a gateway, reads `Authorization`. supabase-py sends both as well."""
        request.headers["apikey"] = self._key
        request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    async def _with_retries(
        self, function: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """What it comes to, with further attempts where one may end differently."""
        attempts = AsyncRetrying(
            stop=stop_after_attempt(ATTEMPTS),
            wait=self._timeouts.backoff,
            retry=retry_if_exception(is_retryable),
            reraise=True,
        )
        return await attempts(function, *args, **kwargs)

    async def _upload(self, file: StoredFile) -> None:
        await self._ensure_bucket()
        try:
            await self._with_retries(self._post_object, file)
        except StorageApiError as error:
            if not is_bucket_missing(error):
                raise
            self._is_bucket_checked = False
            await self._ensure_bucket()
            await self._with_retries(self._post_object, file)

    async def _post_object(self, file: StoredFile) -> None:
        """The one way for small and large: a raw body with its length, as it is read. An object
        that is there already is what was wanted, also where the first attempt's answer was lost.
        """
        path = f"object/{quote(self._bucket)}/{quote(file.name)}"
        headers = {
            "Content-Type": file.content_type,
            "Content-Length": str(file.content.size),
            "Cache-Control": CACHE_CONTROL,
        }
        answer = await self._client.post(
            self._origin + path, content=exact_chunks(file.content), headers=headers
        )
        if not is_created(answer):
            error = read_error(answer)
            if not already_exists(error):
                raise error

    async def _ensure_bucket(self) -> None:
        """At first need, and when the bucket vanished. Who finds it missing at the same time as
        others makes it with them: one does, the rest are told that it exists."""
        if self._is_bucket_checked:
            return
        try:
            bucket = await self._with_retries(self._buckets.get_bucket, self._bucket)
        except StorageApiError as error:
            if not is_bucket_missing(error):
                raise
            await self._create_bucket()
        else:
            if self._signed_url_ttl is None and not bucket.public:
                raise StorageError(BUCKET_IS_PRIVATE)
            if self._signed_url_ttl is not None and bucket.public:
                logger.warning("the bucket is public: its files can be read without a signed URL")
        self._is_bucket_checked = True

    async def _create_bucket(self) -> None:
        is_public = self._signed_url_ttl is None
        try:
            await self._with_retries(
                self._buckets.create_bucket, self._bucket, options={"public": is_public}
            )
        except StorageApiError as error:
            if already_exists(error):
                return
            if is_retryable(error):
                raise
            sentence = error_message(error)
        else:
            return
        raise StorageError(f"{CANNOT_CREATE_BUCKET} {sentence}") from None

    async def _file_url(self, name: str) -> str:
        if self._signed_url_ttl is None:
            return await self._files.get_public_url(name)
        seconds = math.floor(self._signed_url_ttl)
        signed = await self._with_retries(self._files.create_signed_url, name, seconds)
        url = signed["signedURL"]
        if url is None:
            raise ValueError("there is no signed URL in the answer")
        self._signed_urls[name] = url, self._clock() + self._signed_url_ttl / 2
        self._signed_urls.move_to_end(name)
        if len(self._signed_urls) > SIGNED_URLS_MAX:
            self._signed_urls.popitem(last=False)
        return url

    async def _verify_content(self, url: str) -> None:
        answer = await self._client.get(url, auth=None)  # as whoever has the URL
        if answer.status_code != httpx.codes.OK:
            error = read_error(answer)
            raise StorageError(BUCKET_IS_PRIVATE) if is_bucket_missing(error) else error
        if answer.content != PROBE_CONTENT:
            raise StorageError("The bucket's files are not what was written into it.")

    async def _delete(self, name: str) -> None:
        deleted = await self._with_retries(self._files.remove, [name])
        if not deleted and await self._with_retries(self._files.exists, name):
            raise StorageError("The Supabase key has no right to delete: use a secret key.")


async def exact_chunks(content: FileSource) -> AsyncIterator[bytes]:
    """All of it. Raises: OSError, it is not as long as it said, of which Supabase would know only
    when it waits for more."""
    left = content.size
    async for chunk in content.chunks():
        left -= len(chunk)
        if left >= 0:
            yield chunk
    if left:
        raise OSError("the source is not as long as it said")


def is_project_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        is_plain = not (parts.username or parts.password or parts.query or parts.fragment)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and is_plain
    except ValueError:
        return False
