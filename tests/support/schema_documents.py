"""Responses of fal's server of OpenAPI documents."""

from aiohttp import web

from falproxy.sandbox.model_metadata import openapi_document
from falproxy.sandbox.models import MODELS


async def send_document(request: web.Request) -> web.StreamResponse:
    assert request.host == "fal.ai"
    model = MODELS.get(request.query["endpoint_id"])
    if model is None:
        return web.json_response(None, status=404)
    return web.json_response(openapi_document(model))


async def send_503(request: web.Request) -> web.StreamResponse:
    return web.Response(status=503)
