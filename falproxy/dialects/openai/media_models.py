"""The models that make videos or sound, by names or endpoint ids."""

import re
from collections.abc import Callable, Mapping, Sequence

from falproxy.dialects.openai.errors import invalid_parameter, model_not_found
from falproxy.dialects.openai.models import (
    ModelNames,
    ModelResolver,
    ResolvedModel,
    kind_not_supported,
)
from falproxy.fal.endpoint import NamedEndpoint
from falproxy.fal.registry import Kind, Registry, RegistryModel
from falproxy.proxy.model_schemas import SchemaClient
from falproxy.proxy.upstream import Upstream

# Endpoint ids of models that the operator has given a name, by kind.
KIND_ENDPOINTS: Mapping[Kind, re.Pattern[str]] = {
    "video": re.compile(r"video|veo|sora|kling|hailuo|/wan"),
    "audio": re.compile(r"speech|tts|kokoro|text-to-audio|voice"),
}


class MediaModels:
    """The models of one kind.

    names: those that the operator has listed.
    is_allowed: returns True if an endpoint may be called.
    """

    def __init__(
        self,
        kind: Kind,
        names: Sequence[NamedEndpoint],
        registry: Registry,
        schemas: SchemaClient,
        is_allowed: Callable[[str], bool],
    ) -> None:
        self._kind = kind
        self._listed = dict(names)
        registered = ((name, model.endpoint) for name, model in registry.models.items())
        self._resolver = ModelResolver(ModelNames([*registered, *names]), schemas)
        self._registry = registry
        self._is_allowed = is_allowed

    async def find(
        self,
        upstream: Upstream,
        name: str | None,
        inputs: Sequence[str] = (),
        others: Sequence[str] = (),
    ) -> tuple[str, ResolvedModel]:
        """Return the name and the model that a request names, or the first one of the kind.

        inputs: of the registry's models, whose variants have different ones.
        others: inputs that decide between variants that have the same number of `inputs`.
        Raises: ImagesError 400, 404.
        """
        name = name or self._default_name()
        model = self._registry.models.get(name)
        if name not in self._listed and model is not None:
            return name, await self._resolve(
                upstream, name, self._variant(model, inputs, others).endpoint
            )
        endpoint = self._resolver.names.endpoint(name)
        if endpoint is None:
            raise model_not_found(name)
        return name, await self._resolve(upstream, name, endpoint)

    async def _resolve(self, upstream: Upstream, name: str, endpoint: str) -> ResolvedModel:
        """Raises: ImagesError 400, 404."""
        kinds = {
            each.kind
            for model in self._registry.models.values()
            for each in (model, *model.variants)
            if each.endpoint == endpoint
        }
        if not self._is_allowed(endpoint):
            raise model_not_found(name)
        if kinds and self._kind not in kinds:
            raise kind_not_supported(name, self._kind)
        model = await self._resolver.resolve(upstream, name, endpoint)
        if not model.makes(self._kind):
            raise kind_not_supported(name, self._kind)
        return model

    def _default_name(self) -> str:
        """Raises: ImagesError 400, there is no model of the kind."""
        listed = [
            name
            for name, endpoint in self._listed.items()
            if KIND_ENDPOINTS[self._kind].search(endpoint)
        ]
        registered = (
            name
            for name, model in self._registry.models.items()
            if model.kind == self._kind and self._is_allowed(model.endpoint)
        )
        if (name := next(iter(listed), None) or next(registered, None)) is None:
            raise invalid_parameter("model", "Name the model.", "missing_required_parameter")
        return name

    def _variant(
        self, model: RegistryModel, inputs: Sequence[str], others: Sequence[str]
    ) -> RegistryModel:
        """Return the model, or the first of its variants that has the most of these inputs."""

        def count_unaccepted(each: RegistryModel) -> tuple[int, int]:
            return len(each.unaccepted(inputs)), len(each.unaccepted(others))

        return min((model, *model.variants), key=count_unaccepted)


def registry_names(
    registry: Registry, kinds: Sequence[Kind], is_allowed: Callable[[str], bool]
) -> list[NamedEndpoint]:
    """Return the names and endpoints of the registry's models of some kinds."""
    return [
        (name, model.endpoint)
        for name, model in registry.models.items()
        if model.kind in kinds and is_allowed(model.endpoint)
    ]
