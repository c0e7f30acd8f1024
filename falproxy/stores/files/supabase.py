"""The Supabase Storage backend. Only this module imports supabase-py.

supabase-py does everything except two requests. It can neither stream a request body nor store a
Cache-Control header other than `max-age`, so files are posted as raw bodies over its HTTP client.
And the storage check reads its test file as a user without credentials would.
"""

import asyncio
import logging
import math
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import NamedTuple, ParamSpec, Self, TypeVar
from urllib.parse import quote, urlsplit
from uuid import uuid4

import httpx
from cachetools import TLRUCache, TTLCache
from storage3.exceptions import StorageApiError
from supabase import AsyncClientOptions, acreate_client
from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt
from tenacity.wait import wait_base, wait_exponential, wait_random

from falproxy.concurrency import close_within
from falproxy.errors import SettingsError
from falproxy.settings import Settings
from falproxy.spool import Spool
from falproxy.stores.files import FileSource, Storage, StorageError, StoredFile, UnusedFile
from falproxy.stores.files.supabase_errors import (
    BUCKET_IS_PRIVATE,
    CANNOT_CREATE_BUCKET,
    NO_RIGHT_TO_DELETE,
    already_exists,
    error_message,
    is_bucket_missing,
    is_created,
    is_object_missing,
    is_retryable,
    map_errors,
    read_error,
)
from falproxy.stores.files.supabase_http import MAX_CONNECTIONS, open_client
from falproxy.stores.files.supabase_rows import last_use, unused_file

logger = logging.getLogger(__name__)

ATTEMPTS = 3
CACHE_CONTROL = "public, max-age=31536000, immutable"
# An image by name and type, since a bucket may be restricted to images.
PROBE_CONTENT = b"\x89PNG\r\n\x1a\n"
BUCKET = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9 ._'-]{1,100}")
KEY = re.compile(r"[!-~]+")
SIGNED_PATH = re.compile(r"object/sign/[^?]*/(?P<name>[0-9a-f]{64}\.\w+)\?")
# supabase-py keeps its key in a header that its repr shows. Our HTTP client replaces this key by
# the real one in each request.
PLACEHOLDER_KEY = "placeholder"
SIGNED_URLS_MAX = 10_000  # signed URLs in the cache
# Seconds since the last change of an object after which it is written again when it is stored
# again. The storage records no other use.
REFRESH_AGE = 3600.0
PAGE_SIZE = 100  # objects of a list, and objects that are deleted with one request
# Folder of objects that are not outputs. While a garbage collection deletes objects, one of them
# has a name with this prefix; it is written again for each page.
OWN_FOLDER, COLLECTION_PREFIX = ".falproxy", "gc-"
COLLECTION_MAX = 900.0  # seconds after which a page that was not ended is ignored
COLLECTION_POLL = 0.5  # seconds between two looks at a running collection

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageTimeouts:
    """Time-outs in seconds.

    connect: opening a connection.
    write, read: until the next bytes are sent or received.
    pool: waiting for a free connection.
    overall: storing one file, with all attempts.
    backoff: pause between attempts.
    """

    connect: float = 5.0
    write: float = 20.0
    read: float = 60.0
    pool: float = 60.0
    overall: float = 300.0
    backoff: wait_base = field(
        default_factory=lambda: wait_exponential(multiplier=0.5, max=8) + wait_random(0, 0.5)
    )


class SignedUrl(NamedTuple):
    """A cached signed URL. fresh_for: seconds since it was created during which it is used."""

    url: str
    fresh_for: float


def refresh_at(name: str, signed: SignedUrl, now: float) -> float:
    return now + signed.fresh_for


class SupabaseStorage(Storage):
    """A bucket of a Supabase project, created if it is missing.

    url: URL of the project.
    key: a secret key, or the JWT of the service role.
    signed_url_ttl: lifetime of signed URLs in seconds; None for a public bucket.
    clock: a monotonic clock in seconds.
    Raises: ValueError, an argument is invalid.
    """

    use_resolution = REFRESH_AGE

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
        if not KEY.fullmatch(key):  # httpx would show it in its error message
            raise ValueError("not a key of a Supabase project")
        if not BUCKET.fullmatch(bucket):
            raise ValueError("not a name of a bucket")
        if signed_url_ttl is not None and signed_url_ttl < 1:
            raise ValueError("signed URLs are good for a second at least")
        self._project_url = url.rstrip("/")
        self._storage_url = f"{self._project_url}/storage/v1/"
        self._key = key
        self._bucket = bucket
        self._signed_url_ttl = signed_url_ttl
        self.has_permanent_urls = signed_url_ttl is None
        self._timeouts = timeouts or StorageTimeouts()
        # Fifty uploads that start at once would block the event loop for too long.
        self._slots = asyncio.Semaphore(MAX_CONNECTIONS)
        self._is_bucket_checked = False
        # Names of files that were written by this process within REFRESH_AGE.
        self._fresh: TTLCache[str, bool] = TTLCache(SIGNED_URLS_MAX, REFRESH_AGE, timer=clock)
        self._signed_urls: TLRUCache[str, SignedUrl] = TLRUCache(
            SIGNED_URLS_MAX, ttu=refresh_at, timer=clock
        )

    def __repr__(self) -> str:
        kind = "public" if self.has_permanent_urls else "signed"
        return f"<SupabaseStorage {self._project_url}, bucket {self._bucket!r}, {kind} URLs>"

    async def __aenter__(self) -> Self:
        timeouts = self._timeouts
        self._http = await open_client(
            httpx.Timeout(
                connect=timeouts.connect,
                read=timeouts.read,
                write=timeouts.write,
                pool=timeouts.pool,
            ),
            self._add_key,
            is_tls=self._project_url.startswith("https:"),
        )
        # Opens no connections. No user signs in, so that there is no token to refresh.
        options = AsyncClientOptions(
            httpx_client=self._http, auto_refresh_token=False, persist_session=False
        )
        client = await acreate_client(self._project_url, PLACEHOLDER_KEY, options)
        self._buckets = client.storage
        self._files = self._buckets.from_(self._bucket)
        return self

    async def __aexit__(self, *error: object) -> None:
        # supabase-py does not close a client that it was given.
        await close_within(self._http.aclose(), "The connection to Supabase")

    async def put(self, file: StoredFile) -> str:
        return await map_errors(self._timeouts.overall, self._put(file))

    def is_expiring(self, url: str) -> bool:
        """Return whether a signed URL is past half of its lifetime, or not known to this
        process."""
        name = self._signed_file_name(url)
        if name is None:
            return False
        signed = self._signed_urls.get(name)
        return signed is None or signed.url != url

    async def renew_url(self, url: str) -> str:
        name = self._signed_file_name(url)
        if name is None:
            return url
        if (signed := self._signed_urls.get(name)) is not None:
            return signed.url
        return await map_errors(self._timeouts.overall, self._file_url(name))

    def _signed_file_name(self, url: str) -> str | None:
        """Return the name of the file that a signed URL of this storage is for, or None."""
        if self._signed_url_ttl is None or not url.startswith(self._storage_url):
            return None
        match = SIGNED_PATH.match(url, len(self._storage_url))
        return match["name"] if match else None

    async def check(self) -> None:
        await map_errors(self._timeouts.overall, self._check())

    async def collect_garbage(
        self, older_than: float, now: float, *, delete: bool
    ) -> AsyncIterator[UnusedFile]:
        """The object that marks the collection is written before each page is listed. A file whose
        time is refreshed before that is seen as used; one that is refreshed later is checked again
        by `_refresh`, after the page."""
        mark = f"{OWN_FOLDER}/{COLLECTION_PREFIX}{uuid4().hex}.png"
        if not await map_errors(self._timeouts.overall, self._list()):
            return  # it is empty, or there is no bucket
        offset, previous = 0, list[dict[str, object]]()
        try:
            while True:
                if delete:
                    await map_errors(self._timeouts.overall, self._mark_collection(mark))
                rows = await map_errors(self._timeouts.overall, self._list(offset=offset))
                if not rows or rows == previous:  # neither offset nor deletion has an effect
                    return
                previous = rows
                unused = [file for row in rows if (file := unused_file(row, now - older_than))]
                if delete and unused:
                    names = [file.name for file in unused]
                    await map_errors(self._timeouts.overall, self._delete(names))
                    offset -= len(names)
                offset += len(rows)
                for file in unused:
                    yield file
        finally:
            if delete:
                await map_errors(self._timeouts.overall, self._with_retries(self._delete, [mark]))

    async def _list(
        self, folder: str = "", offset: int = 0, search: str = ""
    ) -> list[dict[str, object]]:
        rows = await self._with_retries(
            self._files.list,
            folder,
            {
                "limit": PAGE_SIZE,
                "offset": offset,
                "sortBy": {"column": "name", "order": "asc"},
                **({"search": search} if search else {}),
            },
        )
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError("not a list of objects")
        return rows

    async def _mark_collection(self, mark: str) -> None:
        """Raises: StorageError, another collection is running."""
        await self._with_retries(
            self._send_object, "PUT", StoredFile(mark, "image/png", Spool(PROBE_CONTENT))
        )
        if any(f"{OWN_FOLDER}/{name}" != mark for name in await self._collections()):
            raise StorageError("Another garbage collection is running: try again when it is over.")

    async def _collections(self) -> dict[str, float]:
        """Return the names of the objects that mark running collections, and their times."""
        now = time.time()
        rows = await self._list(OWN_FOLDER, search=COLLECTION_PREFIX)
        times = {str(row.get("name")): last_use(row) for row in rows}
        return {
            name: at
            for name, at in times.items()
            if name.startswith(COLLECTION_PREFIX) and at is not None and at > now - COLLECTION_MAX
        }

    async def _delete(self, names: list[str]) -> None:
        """Delete objects, some of which may not exist. Files are deleted without retries: if a
        response was lost, they may have been stored again since."""
        deleted = await self._files.remove(names)
        if not deleted and await self._with_retries(self._files.exists, names[0]):
            raise StorageError(NO_RIGHT_TO_DELETE)

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
            await self._with_retries(self._delete, [probe.name])

    def _add_key(self, request: httpx.Request) -> httpx.Request:
        """Set the headers with the key. Gateways read `apikey`; the storage service behind them, or
        without one, reads `Authorization`. supabase-py sends both as well."""
        request.headers["apikey"] = self._key
        request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    async def _with_retries(
        self, function: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Return the result of a function, which is called again after a retryable error."""
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
            is_new = await self._with_retries(self._send_object, "POST", file)
        except StorageApiError as error:
            if not is_bucket_missing(error):
                raise
            self._is_bucket_checked = False
            await self._ensure_bucket()
            is_new = await self._with_retries(self._send_object, "POST", file)
        if not is_new and file.name not in self._fresh:
            await self._refresh(file)
        self._fresh[file.name] = True

    async def _refresh(self, file: StoredFile) -> None:
        """Write an existing file again if its last change is old, or if it was deleted just now. Of
        the same bytes, nothing changes but the time."""
        while not await self._was_used(file.name):
            await self._with_retries(self._send_object, "PUT", file)
            if not (collections := await self._collections()):
                return
            # One of them may have listed the file before, and delete it yet.
            while await self._collections() == collections:  # noqa: ASYNC110 - of other processes
                await asyncio.sleep(COLLECTION_POLL)

    async def _was_used(self, name: str) -> bool:
        """Return whether an object exists and was written within REFRESH_AGE."""
        try:
            info = await self._with_retries(self._files.info, name)
        except StorageApiError as error:
            if not is_object_missing(error):
                raise
            return False
        return (last_use(info) or 0.0) > time.time() - REFRESH_AGE

    async def _send_object(self, method: str, file: StoredFile) -> bool:
        """Upload a file as a raw body, streamed and with its length. Return False if it exists,
        maybe since the response to an earlier attempt was lost.

        method: POST to create it, PUT to replace it as well.
        """
        path = f"object/{quote(self._bucket)}/{quote(file.name)}"
        headers = {
            "Content-Type": file.content_type,
            "Content-Length": str(file.content.size),
            "Cache-Control": CACHE_CONTROL,
        }
        response = await self._http.request(
            method, self._storage_url + path, content=exact_chunks(file.content), headers=headers
        )
        if is_created(response):
            return True
        error = read_error(response)
        if not already_exists(error):
            raise error
        return False

    async def _ensure_bucket(self) -> None:
        """Check on first use that the bucket exists, and create it if it does not. Concurrent
        callers may create it at the same time: one succeeds, and the others get `Duplicate`."""
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
            reason = error_message(error)
        else:
            return
        raise StorageError(f"{CANNOT_CREATE_BUCKET} {reason}") from None

    async def _file_url(self, name: str) -> str:
        if self._signed_url_ttl is None:
            return await self._files.get_public_url(name)
        seconds = math.floor(self._signed_url_ttl)
        signed = await self._with_retries(self._files.create_signed_url, name, seconds)
        url = signed["signedURL"]
        if url is None:
            raise ValueError("there is no signed URL in the response")
        self._signed_urls[name] = SignedUrl(url, self._signed_url_ttl / 2)
        return url

    async def _verify_content(self, url: str) -> None:
        response = await self._http.get(url, auth=None)
        if response.status_code != httpx.codes.OK:
            error = read_error(response)
            raise StorageError(BUCKET_IS_PRIVATE) if is_bucket_missing(error) else error
        if response.content != PROBE_CONTENT:
            raise StorageError("The bucket does not return the bytes that were written to it.")


# Words of the messages of `SupabaseStorage` → the setting that the message is about.
VARIABLES = {
    "signed": "SUPABASE_SIGNED_URLS",
    "URL": "SUPABASE_URL",
    "key": "SUPABASE_KEY",
    "bucket": "SUPABASE_BUCKET",
}


def create_storage(settings: Settings) -> SupabaseStorage:
    """Raises: SettingsError, a setting is missing or invalid."""
    project = settings.storage.project
    if project is None:
        raise SettingsError("FALPROXY_REHOST=supabase needs SUPABASE_URL and SUPABASE_KEY.")
    try:
        return SupabaseStorage(
            project.url, project.key, bucket=project.bucket, signed_url_ttl=project.signed_url_ttl
        )
    except ValueError as error:
        variable = next(name for word, name in VARIABLES.items() if word in str(error))
        raise SettingsError(f"{variable} cannot be right: {error}.") from None


async def exact_chunks(content: FileSource) -> AsyncIterator[bytes]:
    """Iterate over all bytes of a source.

    Raises: OSError, the source does not have the size that it declared. Supabase would wait for the
        missing bytes.
    """
    remaining = content.size
    async for chunk in content.chunks():
        remaining -= len(chunk)
        if remaining >= 0:
            yield chunk
    if remaining:
        raise OSError("the source does not have the size that it declared")


def is_project_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        has_extras = parts.username or parts.password or parts.query or parts.fragment
        return parts.scheme in ("http", "https") and bool(parts.hostname) and not has_extras
    except ValueError:
        return False
