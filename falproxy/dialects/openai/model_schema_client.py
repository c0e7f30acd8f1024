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
from falproxy.dialects.openai.model_schema import Takes, read_document
from falproxy.errors import ProxyError
from falproxy.fal.target import Target
from falproxy.proxy.call import Call
from falproxy.proxy.transport import Answer
from falproxy.proxy.upstream import Upstream, read_chunk

logger = logging.getLogger(__name__)

HOST, PATH = "fal.ai", "/api/openapi/queue/openapi.json"
DOCUMENT_MAX = 4 * 2**20
KEPT_MAX = 500
# Seconds that fal has to answer; a caller waits for no longer.
PATIENCE = 5.0
# Seconds that a document is good for, and until fal is asked again that did not answer, or that
# did not know the model.
FRESH, AGAIN = 3600.0, 60.0
HEADERS = CIMultiDictProxy(CIMultiDict({hdrs.ACCEPT: "application/json"}))


class NoSchema(Exception):
    """fal did not answer, or with nothing that could be read."""


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a model, and until when. takes: None where fal does not know it."""

    takes: Takes | None
    until: float


class Schemas:
    """What the models take. All who ask for the same one at the same time share one answer.

    background: where fal is asked, so that a caller who leaves takes nothing from the others.
    clock: seconds that only grow. patience: seconds that fal has to answer.
    """

    def __init__(
        self,
        background: Background,
        *,
        clock: Callable[[], float] = time.monotonic,
        patience: float = PATIENCE,
    ) -> None:
        self._background = background
        self._patience = patience
        self._clock = clock
        self._known: OrderedDict[str, Known] = OrderedDict()
        self._absent_until: dict[str, float] = {}  # by model: fal did not answer
        self._asked: dict[str, asyncio.Future[None]] = {}

    async def find(self, upstream: Upstream, endpoint: str) -> Takes | None:
        """None: fal does not know the model. What was known before is told while fal is away.

        Raises: NoSchema, nobody can say.
        """
        known = self._known.get(endpoint)
        if known is None or known.until <= self._clock():
            await self._ask(upstream, endpoint)
            known = self._known.get(endpoint)
        if known is None:
            raise NoSchema(endpoint)
        self._known.move_to_end(endpoint)
        return known.takes

    async def _ask(self, upstream: Upstream, endpoint: str) -> None:
        """Returns when the answer is there, or there is none."""
        if self._absent_until.get(endpoint, 0.0) > self._clock():
            return
        asked = self._asked.get(endpoint)
        if asked is None:
            asked = self._asked[endpoint] = asyncio.get_running_loop().create_future()
            self._background.see_to(self._renew(upstream, endpoint, asked))
        await asyncio.shield(asked)

    async def _renew(self, upstream: Upstream, endpoint: str, asked: asyncio.Future[None]) -> None:
        try:
            async with asyncio.timeout(self._patience):
                takes = await fetch(upstream, endpoint)
        except (ProxyError, NoSchema, TimeoutError):
            logger.warning("What %s takes could not be read", endpoint)
            self._absent_until[endpoint] = self._clock() + AGAIN
        else:
            self._keep(endpoint, takes)
        finally:
            del self._asked[endpoint]
            asked.set_result(None)

    def _keep(self, endpoint: str, takes: Takes | None) -> None:
        seconds = AGAIN if takes is None else FRESH
        self._known[endpoint] = Known(takes, self._clock() + seconds)
        self._known.move_to_end(endpoint)
        self._absent_until.pop(endpoint, None)
        if len(self._known) > KEPT_MAX:
            self._known.popitem(last=False)
        if len(self._absent_until) > KEPT_MAX:
            self._absent_until.clear()


async def fetch(upstream: Upstream, endpoint: str) -> Takes | None:
    """None: fal does not know the model.

    Raises: NoSchema, ProxyError.
    """
    query = f"?endpoint_id={quote(endpoint, safe='')}"
    call = Call(hdrs.METH_GET, Target(HOST, PATH, query), HEADERS, is_document=True)
    response = await upstream.send(call)
    try:
        if response.status == 404:
            return None
        takes = read_document(await document_of(response), endpoint)
    finally:
        response.close()
    if takes is None:
        raise NoSchema(endpoint)
    return takes


async def document_of(response: Answer) -> object:
    """Raises: NoSchema, ProxyError."""
    body = b""
    while chunk := await read_chunk(response):
        body += chunk
        if len(body) > DOCUMENT_MAX:
            raise NoSchema
    try:
        document: object = json.loads(body) if response.status == 200 else None
    except (ValueError, RecursionError) as error:
        raise NoSchema from error
    return document
