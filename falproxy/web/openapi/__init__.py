"""`/openapi.json`: the OpenAPI document of a proxy, from `openapi.yaml` and pydantic classes."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler

from falproxy.dialects.public_url import public_base_url
from falproxy.fal.endpoint import NamedEndpoint
from falproxy.fal.registry import Registry
from falproxy.media.content_type import CONTENT_TYPES
from falproxy.version import __version__
from falproxy.web.docs import OPENAPI_PATH
from falproxy.web.openapi.model_requests import add_alternatives
from falproxy.web.openapi.schemas import Json, component_schemas, map_objects
from falproxy.web.page import StaticFile, compress_file, file_response

PATH = OPENAPI_PATH
SOURCE = Path(__file__).with_name("openapi.yaml")

COMPRESSED_MAX = 8  # copies of the document, for the URLs by which the proxy is called
# Keys of the source that do not appear in the document. Its first comment describes them.
IF, FILL = "x-falproxy-if", "x-falproxy-fill"
LOCKED_ONLY = frozenset({"security", "securitySchemes", "401", "WWW-Authenticate"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiDescription:
    """The properties of a proxy that its document depends on.

    registry: models and templates of `/api/images`.
    models: names and endpoints of the models of the OpenAI API.
    is_locked: requests require an access key or a token. The document, which is public, then has
        no names of models and templates.
    has_files: the proxy serves stored files.
    public_url: base URL of the proxy; None takes it from the request.
    has_keys: keys can be made at run time.
    """

    registry: Registry
    models: Sequence[NamedEndpoint]
    is_locked: bool
    has_files: bool
    public_url: str | None
    has_keys: bool = False


def openapi_handler(api: ApiDescription) -> Handler:
    """Build the document, and return the handler for GET of PATH below any prefix.

    Blocks for about 100 ms: call it in a thread.
    """
    document = json.dumps(build_document(api))

    @lru_cache(COMPRESSED_MAX)
    def render(url: str) -> StaticFile:
        """Return the document with the URL of the proxy, compressed once for each URL."""
        servers = json.dumps([{"url": url}])
        body = f'{{"servers": {servers}, {document[1:]}'.encode()
        return compress_file(PATH, body)

    render(api.public_url or "http://localhost")  # now, in this thread

    async def serve_document(request: web.Request) -> web.Response:
        # Clients revalidate: an update of the proxy may change the document.
        file = render(api.public_url or base_url(request))
        return file_response(request, file, {hdrs.CACHE_CONTROL: "no-cache"})

    return serve_document


def base_url(request: web.Request) -> str:
    """Return the URL of the proxy as the client sees it, including prefixes."""
    return public_base_url(request) + request.rel_url.raw_path.removesuffix(PATH)


def build_document(api: ApiDescription) -> Json:
    """Return the document without `servers`."""
    conditions = {"files": api.has_files, "keys": api.has_keys, "locked": api.is_locked}

    def is_included(key: str, value: object) -> bool:
        if key in LOCKED_ONLY and not api.is_locked:
            return False
        return not isinstance(value, dict) or IF not in value or conditions[value[IF]]

    def resolve(node: Json) -> Json:
        name = node.get(FILL)
        included = {
            key: value
            for key, value in node.items()
            if key not in (IF, FILL) and is_included(key, value)
        }
        return FILLS[name](included, api) if isinstance(name, str) else included

    document = map_objects(read_source(), resolve)
    document["security"] = []  # operations without their own need no authentication
    schemas = component_schemas()
    if not api.is_locked:
        add_alternatives(schemas, api.registry)
    member(document, "components", "schemas").update(schemas)
    return document


def read_source() -> Json:
    import yaml  # only this document needs it

    # The parser in C is faster by a factor of six; builds of PyYAML without libyaml lack it.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    source = yaml.load(SOURCE.read_bytes(), loader)
    assert isinstance(source, dict)
    return source


def fill_version(info: Json, api: ApiDescription) -> Json:
    return {**info, "version": __version__}


def fill_model_names(parameter: Json, api: ApiDescription) -> Json:
    """Add the models of the OpenAI API to a parameter."""
    names = [name for name, _ in api.models]
    if api.is_locked or not names:
        return parameter
    description = f"{parameter['description']} The names are {', '.join(names)}."
    return {**parameter, "description": description, "example": names[0]}


def fill_template_names(schema: Json, api: ApiDescription) -> Json:
    return schema if api.is_locked else {"type": "string", "enum": list(api.registry.templates)}


def fill_file_name_pattern(schema: Json, api: ApiDescription) -> Json:
    """Add the pattern of stored files: the digest of the content and an extension."""
    return {**schema, "pattern": rf"^[0-9a-f]{{64}}\.({'|'.join(CONTENT_TYPES)})$"}


def fill_file_content(content: Json, api: ApiDescription) -> Json:
    """Add all content types that stored files have."""
    binary = {"type": "string", "format": "binary"}
    return {**content, **{kind: {"schema": binary} for kind in sorted({*CONTENT_TYPES.values()})}}


FILLS: Mapping[str, Callable[[Json, ApiDescription], Json]] = {
    "version": fill_version,
    "model-names": fill_model_names,
    "template-names": fill_template_names,
    "file-name-pattern": fill_file_name_pattern,
    "file-content": fill_file_content,
}


def member(node: Json, *path: str) -> Json:
    """Return an object inside of a JSON object."""
    for key in path:
        inner = node[key]
        assert isinstance(inner, dict)
        node = inner
    return node
