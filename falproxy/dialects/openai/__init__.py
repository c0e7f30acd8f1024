"""The OpenAI images API: `/v1/images/generations`, `/v1/images/edits` and `/v1/models`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from aiohttp import hdrs, web

from falproxy.dialects import DialectRoute
from falproxy.dialects.openai.bodies import FormLimits
from falproxy.dialects.openai.errors import refuse
from falproxy.dialects.openai.handlers import images_middleware, list_models, show_model
from falproxy.dialects.openai.models import ModelNames, ModelResolver
from falproxy.dialects.openai.requests import RequestDeps, read_edit, read_generation
from falproxy.dialects.openai.result_images import (
    ImageReader,
    ReadLocal,
    local_file_reader,
    no_local_files,
)
from falproxy.dialects.queue_client import WaitPolicy
from falproxy.dialects.transparent import BodyLimits
from falproxy.errors import ProxyError
from falproxy.fal.endpoint import DEFAULT_MODELS, NamedEndpoint
from falproxy.fal.policy import Globs
from falproxy.media.fetch import Fetcher
from falproxy.proxy.model_schemas import SchemaClient

__all__ = ["ImagesDeps", "images_routes", "local_file_reader"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagesDeps:
    """Settings and services of the API.

    models: names of models with their endpoint ids.
    media_models: further models that are listed, of videos and sound.
    endpoints: the endpoints that may be called; empty for all.
    read_local: reads files that the proxy itself serves.
    schemas: fetches the schemas of models.
    """

    body_limits: BodyLimits
    models: Sequence[NamedEndpoint] = DEFAULT_MODELS
    media_models: Sequence[NamedEndpoint] = ()
    endpoints: Globs = field(default_factory=partial(Globs, ()))
    read_local: ReadLocal = no_local_files
    schemas: SchemaClient = field(default_factory=SchemaClient)


def images_routes(
    deps: ImagesDeps, fetcher: Fetcher, wait_policy: WaitPolicy
) -> dict[str, DialectRoute]:
    is_allowed = partial(is_allowed_endpoint, deps.endpoints)
    names = ModelNames((name, endpoint) for name, endpoint in deps.models if is_allowed(endpoint))
    models = ModelResolver(names, deps.schemas)
    listed = ModelNames({**names.endpoint_by_name, **dict(deps.media_models)}.items())
    request_deps = RequestDeps(models, deps.body_limits, FormLimits(deps.body_limits.max_body))
    image_reader = ImageReader(fetcher, deps.read_local)
    post, get = require_method(hdrs.METH_POST), require_method(hdrs.METH_GET)
    generate = partial(read_generation, deps=request_deps)
    edit = partial(read_edit, deps=request_deps)
    return {
        "/v1/images/generations": DialectRoute(
            post, images_middleware(generate, image_reader, wait_policy), refuse
        ),
        "/v1/images/edits": DialectRoute(
            post, images_middleware(edit, image_reader, wait_policy), refuse
        ),
        "/v1/models": DialectRoute(get, list_models(listed), refuse),
        "/v1/models/{model:(?s:.+)}": DialectRoute(
            get, show_model(ModelResolver(listed, deps.schemas), is_allowed), refuse
        ),
    }


def require_method(method: str) -> Callable[[web.Request], None]:
    def check(request: web.Request) -> None:
        """Raises: ProxyError 405."""
        if request.method != method:
            message = f"Use {method}."
            raise ProxyError(405, "method_not_allowed", message, {hdrs.ALLOW: method})

    return check


def is_allowed_endpoint(endpoints: Globs, endpoint: str) -> bool:
    return not endpoints or endpoints.match(endpoint)
