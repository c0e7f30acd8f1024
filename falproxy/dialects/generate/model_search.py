"""`/api/images/models?search=`: models at fal, with their prices and the URLs of their schemas."""

import asyncio
import logging
import re
from collections.abc import Mapping
from urllib.parse import quote, urlencode

from aiohttp import hdrs
from multidict import CIMultiDict, CIMultiDictProxy, MultiMapping

from falproxy.dialects.generate.schema import FoundModel, FoundModelList
from falproxy.errors import ProxyError, TemporaryError
from falproxy.fal.endpoint import is_endpoint
from falproxy.fal.policy import Globs
from falproxy.fal.target import Target
from falproxy.proxy.call import Call
from falproxy.proxy.model_schemas import HOST as SCHEMA_HOST
from falproxy.proxy.model_schemas import PATH as SCHEMA_PATH
from falproxy.proxy.model_schemas import SchemaUnavailable, read_object
from falproxy.proxy.prices import PriceBook
from falproxy.proxy.upstream import Upstream

logger = logging.getLogger(__name__)

HOST, PATH = "api.fal.ai", "/v1/models"
HEADERS = CIMultiDictProxy(CIMultiDict({hdrs.ACCEPT: "application/json"}))
SEARCH_PARAMETERS = ("search", "category", "cursor", "limit")
TEXT_MAX = 500  # characters of a parameter
PAGE_SIZE, PAGE_SIZE_MAX = 20, 50  # models; fal gives the prices of 50 at once
REFUSED_STATUSES = (400, 422)  # of parameters
TIMEOUT = 10.0  # seconds of the request to fal


class ModelSearch:
    """Searches fal's models API, without the fal key.

    endpoints: allowed endpoints; empty allows all. Others are left out.
    """

    def __init__(self, endpoints: Globs, prices: PriceBook) -> None:
        self._endpoints = endpoints
        self._prices = prices

    async def find(self, upstream: Upstream, query: MultiMapping[str]) -> FoundModelList:
        """Raises: ProxyError 400; 503, fal cannot be asked."""
        document = await fetch_models(upstream, fal_query(query))
        entries = document.get("models")
        models = [
            model
            for entry in (entries if isinstance(entries, list) else [])
            if (model := parse_model(entry)) is not None
            and (not self._endpoints or self._endpoints.match(model.endpoint))
        ]
        prices = await self._prices.find_many([model.endpoint for model in models])
        for model in models:
            if (price := prices.get(model.endpoint)) is not None:
                model.price, model.unit = float(price.usd), price.unit
        cursor = document.get("next_cursor")
        has_more = isinstance(cursor, str) and document.get("has_more") is not False
        return FoundModelList(models=models, next_cursor=str(cursor) if has_more else None)


def fal_query(query: MultiMapping[str]) -> str:
    """Return the query of fal's models API for that of a client. Raises: ProxyError 400."""
    for name, value in query.items():
        if name not in SEARCH_PARAMETERS:
            message = (
                f"There is no parameter {name[:50]!r}. There are {', '.join(SEARCH_PARAMETERS)}."
            )
            raise ProxyError(400, "invalid_request", message)
        if len(value) > TEXT_MAX:
            message = f"{name} must have at most {TEXT_MAX} characters."
            raise ProxyError(400, "invalid_request", message)
    limit = query.get("limit", str(PAGE_SIZE))
    is_number = re.fullmatch(r"\d{1,4}", limit, re.ASCII) is not None
    if not is_number or not 1 <= int(limit) <= PAGE_SIZE_MAX:
        message = f"limit must be a whole number from 1 to {PAGE_SIZE_MAX}."
        raise ProxyError(400, "invalid_request", message)
    parameters = {"limit": limit, "status": "active", "q": query.get("search", "")}
    parameters |= {name: query[name] for name in ("category", "cursor") if query.get(name)}
    return f"?{urlencode({name: value for name, value in parameters.items() if value})}"


async def fetch_models(upstream: Upstream, query: str) -> Mapping[str, object]:
    """Return the response of fal's models API. Raises: ProxyError 400, 503."""
    call = Call(hdrs.METH_GET, Target(HOST, PATH, query), HEADERS, needs_identity=True)
    try:
        async with asyncio.timeout(TIMEOUT):
            response = await upstream.send(call)
            try:
                status, document = response.status, await read_object(response)
            finally:
                response.close()
    except (ProxyError, SchemaUnavailable, TimeoutError):
        status, document = 0, None
    if status in REFUSED_STATUSES:
        raise ProxyError(400, "invalid_request", "fal.ai does not accept these parameters.")
    if document is None:
        logger.warning("fal's models API is unavailable (status %d)", status)
        message = "fal.ai's list of models cannot be read now. Try again soon."
        raise TemporaryError(503, "models_unavailable", message, {hdrs.RETRY_AFTER: "5"})
    return document


def parse_model(entry: object) -> FoundModel | None:
    """Return a model of fal's list; None if the entry has no valid endpoint id."""
    fields = entry if isinstance(entry, dict) else {}
    endpoint, metadata = fields.get("endpoint_id"), fields.get("metadata")
    if not isinstance(endpoint, str) or not is_endpoint(endpoint):
        return None
    texts = {
        name: value
        for name, value in (metadata.items() if isinstance(metadata, dict) else ())
        if isinstance(value, str)
    }
    return FoundModel(
        name=endpoint,
        endpoint=endpoint,
        title=texts.get("display_name", endpoint),
        description=texts.get("description", ""),
        category=texts.get("category", ""),
        price=None,
        unit=None,
        schema_url=f"https://{SCHEMA_HOST}{SCHEMA_PATH}?endpoint_id={quote(endpoint, safe='')}",
        model_url=texts.get("model_url", f"https://fal.ai/models/{endpoint}"),
    )
