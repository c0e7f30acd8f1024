"""`/openapi.json`: what the proxy takes and answers, from the models that check it."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler

from falproxy.dialects.public_url import seen_origin
from falproxy.fal.endpoint import Named
from falproxy.fal.registry import Registry
from falproxy.version import __version__
from falproxy.web.docs import DOCUMENT
from falproxy.web.openapi.components import components
from falproxy.web.openapi.generate import generate_paths
from falproxy.web.openapi.kontext import kontext_paths
from falproxy.web.openapi.openai import images_paths
from falproxy.web.openapi.operations import Json
from falproxy.web.openapi.service import file_paths, health_paths
from falproxy.web.openapi.usage import number_paths

PATH = DOCUMENT

ABOUT = """\
Pictures by the models of [fal.ai](https://fal.ai), behind one address that keeps the key.

Every call that makes a picture takes the same way: input pictures are checked, an equal call may \
get a result that is there already (`Cache-Status` says so; send `Cache-Control: no-store` for a \
new one), and results may be kept by the proxy (`x-falproxy-rehost`).

fal's own clients do not need this document: they send through `/api/fal/proxy`, which speaks \
fal's API as it is."""
TAGS = {
    "Kontext": "A picture edited by FLUX.1 Kontext, in one request.",
    "OpenAI images": "The images API of OpenAI, for its clients: their `baseURL` ends in `/v1`.",
    "Generate": "One endpoint for every model of the registry, with jobs and templates.",
    "Service": "For whoever runs the proxy, and the files that it keeps.",
}
SECURITY: Json = {
    "key": {
        "type": "apiKey",
        "in": "header",
        "name": "x-falproxy-key",
        "description": "An access key of this proxy.",
    },
    "bearer": {
        "type": "http",
        "scheme": "bearer",
        "description": "An access key of this proxy, or a token that it accepts.",
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """What a proxy's document depends on. models: names and endpoints of the OpenAI API.
    is_locked: callers say who they are; the names of models are for them alone. has_files: kept
    files are served from the disk. public_url: None is what a client says."""

    registered: Registry
    models: Sequence[Named]
    is_locked: bool
    has_files: bool
    public_url: str | None


def describe(proxy: Described) -> Handler:
    """Handler for GET of PATH, whatever prefix is before it."""

    @cache
    def text() -> str:
        return json.dumps(document_of(proxy))

    async def handle(request: web.Request) -> web.Response:
        servers = json.dumps([{"url": proxy.public_url or seen_here(request)}])
        body = f'{{"servers": {servers}, {text()[1:]}'.encode()
        tag = hashlib.sha256(body).hexdigest()[:32]
        # Another version may be there at any time, and every address gets a document of its own.
        headers = {hdrs.CACHE_CONTROL: "no-cache", hdrs.ETAG: f'"{tag}"'}
        if any(known.value in (tag, "*") for known in request.if_none_match or ()):
            return web.Response(status=304, headers=headers)
        return web.Response(body=body, content_type="application/json", headers=headers)

    return handle


def seen_here(request: web.Request) -> str:
    """Where a client sees the proxy, with the prefixes that it is below."""
    return seen_origin(request) + request.rel_url.raw_path.removesuffix(PATH)


def document_of(proxy: Described) -> Json:
    """The document without its servers."""
    registry = None if proxy.is_locked else proxy.registered
    names = [] if proxy.is_locked else [name for name, _ in proxy.models]
    operations = {
        **kontext_paths(),
        **images_paths(names),
        **generate_paths(registry),
        **number_paths(),
        **health_paths(),
        **(file_paths() if proxy.has_files else {}),
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "falproxy", "version": __version__, "description": ABOUT},
        "tags": [{"name": name, "description": text} for name, text in TAGS.items()],
        "paths": {
            path: {method: operation.document(is_locked=proxy.is_locked)}
            for path, (method, operation) in operations.items()
        },
        "components": {
            **components(registry),
            **({"securitySchemes": SECURITY} if proxy.is_locked else {}),
        },
    }
