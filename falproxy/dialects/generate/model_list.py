"""`/api/images/models`: the public part of the registry."""

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from falproxy.dialects.generate.schema import (
    RegistryModelInfo,
    RegistryModelList,
    TemplateInfo,
    VariableInfo,
)
from falproxy.fal.policy import Globs
from falproxy.fal.registry import Registry

# Fields of a model that clients see as they are.
LISTED_FIELDS = {
    "name", "endpoint", "kind", "description", "required", "optional", "lora", "unit", "defaults",
}  # fmt: skip


def list_models(registry: Registry, endpoints: Globs) -> Middleware:
    """Middleware: respond with all allowed models and templates.

    endpoints: allowed endpoints; empty allows all.
    """
    body = build_model_list(allowed_registry(registry, endpoints)).model_dump_json()

    @web.middleware
    async def list_models_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        response = web.json_response(text=body)
        response.enable_compression()
        return response

    return list_models_middleware


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
