"""The schemas of models: the OpenAPI documents that fal publishes, fetched on first use and cached,
in memory and on the disk."""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from urllib.parse import quote

from aiohttp import hdrs
from cachetools import LRUCache
from multidict import CIMultiDict, CIMultiDictProxy

from falproxy.errors import ProxyError
from falproxy.fal.model_schema import ModelSchema, parse_document
from falproxy.fal.target import Target
from falproxy.json_object import parse_object
from falproxy.proxy.call import Call
from falproxy.proxy.transport import TransportResponse
from falproxy.proxy.upstream import Upstream, read_chunk
from falproxy.shared_tasks import SharedTasks
from falproxy.stores.schema_files import SchemaFiles

logger = logging.getLogger(__name__)

HOST, PATH = "fal.ai", "/api/openapi/queue/openapi.json"
DOCUMENT_MAX = 4 * 2**20  # bytes
CACHE_SIZE = 500  # models
CACHE_BYTES = 32 * 2**20  # of all schemas
ENTRY_MIN = CACHE_BYTES // CACHE_SIZE  # so that the bound on bytes is one on the number as well
FETCH_TIMEOUT = 5.0  # seconds
# Seconds until a document is fetched again, and until a failed request is repeated: with an expired
# document, which is used meanwhile, and without any.
SCHEMA_TTL, RETRY_AFTER, FIRST_RETRY_AFTER = 3600.0, 60.0, 5.0
HEADERS = CIMultiDictProxy(CIMultiDict({hdrs.ACCEPT: "application/json"}))


class SchemaUnavailable(Exception):
    """fal did not respond, or not with a document of the model."""


@dataclass(frozen=True, slots=True)
class CachedSchema:
    """The schema of a model, until `expires_at`. schema: None if fal has no such model."""

    schema: ModelSchema | None
    expires_at: float


def size_in_memory(cached: CachedSchema) -> int:
    return max(ENTRY_MIN, 2 * len(repr(cached.schema)))


class SchemaClient:
    """Fetches and caches the schemas of models. Concurrent callers share one request.

    timeout: seconds of a request.
    clock: a monotonic clock in seconds.
    files: the schemas that earlier processes and other processes have fetched.
    """

    def __init__(
        self,
        *,
        timeout: float = FETCH_TIMEOUT,
        clock: Callable[[], float] = time.monotonic,
        files: SchemaFiles | None = None,
    ) -> None:
        self._timeout = timeout
        self._clock = clock
        self._files = files
        # Expired schemas stay in the cache, and are used while fal does not respond.
        self._cache: LRUCache[str, CachedSchema] = LRUCache(CACHE_BYTES, size_in_memory)
        # Endpoint → time until which fal is not asked again, because a request has failed.
        self._paused: LRUCache[str, float] = LRUCache(CACHE_SIZE)
        self._refreshes: SharedTasks[str, None] = SharedTasks()

    async def get_schema(self, upstream: Upstream, endpoint: str) -> ModelSchema | None:
        """Return the schema of a model; None if fal has no such model.

        Raises: SchemaUnavailable.
        """
        cached = self._cache.get(endpoint)
        if cached is None or cached.expires_at <= self._clock():
            if self._paused.get(endpoint, 0.0) <= self._clock():
                await self._refreshes.run(endpoint, partial(self._refresh, upstream, endpoint))
            cached = self._cache.get(endpoint)
        if cached is None:
            raise SchemaUnavailable(endpoint)
        return cached.schema

    async def _refresh(self, upstream: Upstream, endpoint: str) -> None:
        if endpoint not in self._cache and self._files is not None:
            await self._load(self._files, endpoint)
        cached = self._cache.get(endpoint)
        if cached is None or cached.expires_at <= self._clock():
            await self._fetch(upstream, endpoint)

    async def _load(self, files: SchemaFiles, endpoint: str) -> None:
        if (stored := await asyncio.to_thread(files.load, endpoint)) is not None:
            schema, age = stored
            self._cache[endpoint] = CachedSchema(schema, self._clock() + SCHEMA_TTL - age)

    async def _fetch(self, upstream: Upstream, endpoint: str) -> None:
        try:
            async with asyncio.timeout(self._timeout):
                schema = await fetch_schema(upstream, endpoint)
        except (ProxyError, SchemaUnavailable, TimeoutError):
            logger.warning("The schema of %s is unavailable", endpoint)
            pause = RETRY_AFTER if endpoint in self._cache else FIRST_RETRY_AFTER
            self._paused[endpoint] = self._clock() + pause
            return
        ttl = RETRY_AFTER if schema is None else SCHEMA_TTL
        self._cache[endpoint] = CachedSchema(schema, self._clock() + ttl)
        if schema is not None and self._files is not None:
            await asyncio.to_thread(self._files.save, endpoint, schema)


async def fetch_schema(upstream: Upstream, endpoint: str) -> ModelSchema | None:
    """Return the schema of a model; None if fal has no such model.

    Raises: SchemaUnavailable, ProxyError.
    """
    query = f"?endpoint_id={quote(endpoint, safe='')}"
    call = Call(hdrs.METH_GET, Target(HOST, PATH, query), HEADERS, needs_identity=True)
    response = await upstream.send(call)
    try:
        if response.status == 404:
            return None
        schema = parse_document(await read_object(response), endpoint)
    finally:
        response.close()
    if schema is None:
        raise SchemaUnavailable(endpoint)
    return schema


async def read_object(response: TransportResponse) -> dict[str, object] | None:
    """Return the JSON object of a response; None if it has none, or its status is not 200.

    Raises: SchemaUnavailable, ProxyError.
    """
    body = b""
    while chunk := await read_chunk(response):
        body += chunk
        if len(body) > DOCUMENT_MAX:
            raise SchemaUnavailable
    return parse_object(body) if response.status == 200 else None
