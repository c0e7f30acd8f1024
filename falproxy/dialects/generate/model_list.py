"""`/api/images/models` and `/api/templates`: the public part of the registry."""

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from falproxy.dialects.generate.model_search import SEARCH_PARAMETERS, ModelSearch
from falproxy.dialects.generate.schema import (
    RegistryModelInfo,
    RegistryModelList,
    TemplateInfo,
    TemplateList,
    VariableInfo,
)
from falproxy.fal.policy import Globs
from falproxy.fal.registry import Registry
from falproxy.proxy.prices import PriceBook
from falproxy.proxy.upstream import UPSTREAM

# Fields of a model that clients see as they are.
LISTED_FIELDS = {
    "name", "endpoint", "kind", "description", "required", "optional", "lora", "unit", "defaults",
}  # fmt: skip


def list_models(registry: Registry, endpoints: Globs, prices: PriceBook) -> Middleware:
    """Middleware: respond with all allowed models and templates, or with the models at fal that a
    search finds.

    endpoints: allowed endpoints; empty allows all.
    """
    body = build_model_list(allowed_registry(registry, endpoints)).model_dump_json()
    search = ModelSearch(endpoints, prices)

    @web.middleware
    async def list_models_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if {*request.query} & {*SEARCH_PARAMETERS}:
            found = await search.find(request.app[UPSTREAM], request.query)
            return compressed(found.model_dump_json(by_alias=True))
        return compressed(body)

    return list_models_middleware


def list_templates(registry: Registry, endpoints: Globs) -> Middleware:
    """Middleware: respond with the templates of allowed models, and their variables."""
    listed = build_model_list(allowed_registry(registry, endpoints)).templates
    body = TemplateList(templates=listed).model_dump_json()

    @web.middleware
    async def list_templates_middleware(
        request: web.Request, handler: Handler
    ) -> web.StreamResponse:
        return compressed(body)

    return list_templates_middleware


def compressed(text: str) -> web.Response:
    response = web.json_response(text=text)
    response.enable_compression()
    return response


def allowed_registry(registry: Registry, endpoints: Globs) -> Registry:
    """Return the models of allowed endpoints, and their templates."""
    if not endpoints:
        return registry
    models = {
        name: model for name, model in registry.models.items() if endpoints.match(model.endpoint)
    }
    templates = {
        name: template for name, template in registry.templates.items() if template.model in models
    }
    return Registry(models, templates)


def build_model_list(registry: Registry) -> RegistryModelList:
    models = [
        RegistryModelInfo(
            price=None if model.price is None else float(model.price),
            **model.model_dump(include=LISTED_FIELDS),
        )
        for model in registry.models.values()
    ]
    templates = [
        TemplateInfo(
            name=template.name,
            description=template.description,
            model=template.model,
            variables=[
                VariableInfo(name=name, description=variable.description, default=variable.default)
                for name, variable in template.variables.items()
            ],
        )
        for template in registry.templates.values()
    ]
    return RegistryModelList(models=models, templates=templates)
