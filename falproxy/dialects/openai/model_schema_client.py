"""The OpenAPI documents that fal publishes of its models: fetched when first needed, and kept."""

import asyncio
import json
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import quote

from aiohttp import hdrs
from multidict import CIMultiDict, CIMultiDictProxy

from falproxy.background import Background
from falproxy.dialects.openai.model_schema import ModelSchema, parse_document
from falproxy.errors import ProxyError
from falproxy.fal.target import Target
from falproxy.proxy.call import Call
from falproxy.proxy.transport import TransportResponse
from falproxy.proxy.upstream import Upstream, read_chunk

logger = logging.getLogger(__name__)

HOST, PATH = "fal.ai", "/api/openapi/queue/openapi.json"
DOCUMENT_MAX = 4 * 2**20
CACHE_SIZE = 500
# Seconds that fal has to answer; a caller waits for no longer.
FETCH_TIMEOUT = 5.0
# Seconds that a document is good for, and until fal is asked again that did not answer, or that
# did not know the model.
SCHEMA_TTL, RETRY_AFTER = 3600.0, 60.0
HEADERS = CIMultiDictProxy(CIMultiDict({hdrs.ACCEPT: "application/json"}))


class SchemaUnavailable(Exception):
    """fal did not answer, or with nothing that could be read."""


@dataclass(frozen=True, slots=True)
class CachedSchema:
    """What is known of a model, and until when. takes: None where fal does not know it."""

    schema: ModelSchema | None
    expires_at: float


class SchemaClient:
    """What the models take. All who ask for the same one at the same time share one answer.

    background: where fal is asked, so that a caller who leaves takes nothing from the others.
    clock: seconds that only grow. patience: seconds that fal has to answer.
    """

    def __init__(
        self,
        background: Background,
        *,
        clock: Callable[[], float] = time.monotonic,
        timeout: float = FETCH_TIMEOUT,
    ) -> None:
        self._background = background
        self._timeout = timeout
        self._clock = clock
        self._cache: OrderedDict[str, CachedSchema] = OrderedDict()
        self._retry_at: dict[str, float] = {}  # by model: fal did not answer
        self._pending: dict[str, asyncio.Future[None]] = {}

    async def get_schema(self, upstream: Upstream, endpoint: str) -> ModelSchema | None:
        """None: fal does not know the model. What was known before is told while fal is away.

        Raises: SchemaUnavailable, nobody can say.
        """
        known = self._cache.get(endpoint)
        if known is None or known.expires_at <= self._clock():
            await self._join_or_start(upstream, endpoint)
            known = self._cache.get(endpoint)
        if known is None:
            raise SchemaUnavailable(endpoint)
        self._cache.move_to_end(endpoint)
        return known.schema

    async def _join_or_start(self, upstream: Upstream, endpoint: str) -> None:
        """Returns when the answer is there, or there is none."""
        if self._retry_at.get(endpoint, 0.0) > self._clock():
            return
        asked = self._pending.get(endpoint)
        if asked is None:
            asked = self._pending[endpoint] = asyncio.get_running_loop().create_future()
            self._background.spawn(self._refresh(upstream, endpoint, asked))
        await asyncio.shield(asked)

    async def _refresh(self, upstream: Upstream, endpoint: str, done: asyncio.Future[None]) -> None:
        try:
            async with asyncio.timeout(self._timeout):
                takes = await fetch_schema(upstream, endpoint)
        except (ProxyError, SchemaUnavailable, TimeoutError):
            logger.warning("What %s takes could not be read", endpoint)
            self._retry_at[endpoint] = self._clock() + RETRY_AFTER
        else:
            self._store(endpoint, takes)
        finally:
            del self._pending[endpoint]
            done.set_result(None)

    def _store(self, endpoint: str, schema: ModelSchema | None) -> None:
        seconds = RETRY_AFTER if schema is None else SCHEMA_TTL
        self._cache[endpoint] = CachedSchema(schema, self._clock() + seconds)
        self._cache.move_to_end(endpoint)
        self._retry_at.pop(endpoint, None)
        if len(self._cache) > CACHE_SIZE:
            self._cache.popitem(last=False)
        if len(self._retry_at) > CACHE_SIZE:
            self._retry_at.clear()


async def fetch_schema(upstream: Upstream, endpoint: str) -> ModelSchema | None:
    """None: fal does not know the model.

    Raises: SchemaUnavailable, ProxyError.
    """
    query = f"?endpoint_id={quote(endpoint, safe='')}"
    call = Call(hdrs.METH_GET, Target(HOST, PATH, query), HEADERS, needs_identity=True)
    response = await upstream.send(call)
    try:
        if response.status == 404:
            return None
        takes = parse_document(await read_json(response), endpoint)
    finally:
        response.close()
    if takes is None:
        raise SchemaUnavailable(endpoint)
    return takes


async def read_json(response: TransportResponse) -> object:
    """Raises: SchemaUnavailable, ProxyError."""
    body = b""
    while chunk := await read_chunk(response):
        body += chunk
        if len(body) > DOCUMENT_MAX:
            raise SchemaUnavailable
    try:
        document: object = json.loads(body) if response.status == 200 else None
    except (ValueError, RecursionError) as error:
        raise SchemaUnavailable from error
    return document
