"""The models that requests may name."""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from falproxy.concurrency import map_concurrently
from falproxy.dialects.openai.errors import ImagesError, invalid_parameter, model_not_found
from falproxy.fal.endpoint import DEFAULT_MODELS, NamedEndpoint, is_endpoint
from falproxy.fal.model_schema import IMAGE_INPUTS, ModelSchema
from falproxy.fal.registry import Kind
from falproxy.fal.results import IMAGE_KEY, IMAGES_KEY
from falproxy.proxy.model_schemas import SchemaClient, SchemaUnavailable
from falproxy.proxy.upstream import Upstream

# Endpoint ids of models that edit images, for models whose schema is unavailable.
EDIT_MODEL = re.compile(r"kontext(?!.*text-to-image)|/(?:edit|image-to-image|inpaint)")
# Fields of results with files of a kind.
KIND_OUTPUTS: Mapping[Kind, tuple[str, ...]] = {
    "image": (IMAGES_KEY, IMAGE_KEY),
    "video": ("video", "videos", "video_url", "output_video", "output"),
    "audio": ("audio", "audio_file", "audio_url", "audios", "output"),
}
KIND_NAMES: Mapping[Kind, str] = {"video": "videos", "audio": "sound", "image": "images"}
SCHEMA_CONCURRENCY = 8  # schemas that are fetched at once


class ModelNames:
    """Maps names of models to endpoint ids. models: the names that the operator has listed."""

    def __init__(self, models: Iterable[NamedEndpoint] = DEFAULT_MODELS) -> None:
        self.endpoint_by_name = dict(models)

    def endpoint(self, name: str) -> str | None:
        """Return the endpoint id of a listed name, or the name itself if it is an endpoint id. None
        for other names."""
        return self.endpoint_by_name.get(name) or (name if is_endpoint(name) else None)

    def is_listed_endpoint(self, endpoint: str) -> bool:
        return endpoint in self.endpoint_by_name.values()


class ResolvedModel(NamedTuple):
    """A model that a request names.

    schema: None if it is unavailable.
    is_listed: the operator vouches for it. The inputs of other models are checked by their schema
        before a call.
    """

    endpoint: str
    schema: ModelSchema | None
    is_listed: bool = True

    def makes(self, kind: Kind) -> bool:
        """Return whether results can have files of a kind, as far as the schema shows."""
        outputs = frozenset() if self.schema is None else self.schema.outputs
        return not outputs or not outputs.isdisjoint(KIND_OUTPUTS[kind])


class ModelResolver:
    def __init__(self, names: ModelNames, schema_client: SchemaClient) -> None:
        self.names = names
        self._schema_client = schema_client

    async def find(
        self, upstream: Upstream, name: str | None, *, accepts_image: bool
    ) -> ResolvedModel:
        """Return the model of images with a name or endpoint id.

        name: None for the first listed model that needs an image if accepts_image is true, or that
            needs none if it is false. If there is no such model, the first listed model.
        Raises: ImagesError 400, 404.
        """
        if name:
            endpoint = self.names.endpoint(name)
            if endpoint is None:
                raise model_not_found(name)
            model = await self.resolve(upstream, name, endpoint)
            if not model.makes("image"):
                raise kind_not_supported(name, "image")
            return model
        if not self.names.endpoint_by_name:
            raise invalid_parameter("model", "Name the model.", "missing_required_parameter")
        listed = self.names.endpoint_by_name.items()
        models = await map_concurrently(
            lambda item: self.resolve(upstream, *item), listed, SCHEMA_CONCURRENCY
        )
        makers = [model for model in models if model.makes("image")]
        return next((each for each in makers if needs_image(each) is accepts_image), models[0])

    async def resolve(self, upstream: Upstream, name: str, endpoint: str) -> ResolvedModel:
        """Add the schema to an endpoint. fal may have no document of a listed model, such as a
        private app of the account.

        name: as the client calls the model, for the error.
        Raises: ImagesError 404.
        """
        is_listed = self.names.is_listed_endpoint(endpoint)
        try:
            schema = await self._schema_client.get_schema(upstream, endpoint)
        except SchemaUnavailable:
            return ResolvedModel(endpoint, None, is_listed)
        if schema is None and not is_listed:
            raise model_not_found(name)
        return ResolvedModel(endpoint, schema, is_listed)


def kind_not_supported(name: str, kind: Kind) -> ImagesError:
    message = f"{name} does not make {KIND_NAMES[kind]}."
    return invalid_parameter("model", message, "model_not_supported")


def needs_image(model: ResolvedModel) -> bool:
    if model.schema is None:
        return EDIT_MODEL.search(model.endpoint) is not None
    return bool(model.schema.required & set(IMAGE_INPUTS))
