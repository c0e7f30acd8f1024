"""The parts that operations refer to: schemas by pydantic, and headers."""

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, Field
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from falproxy.dialects.generate.schema import (
    GenerateRequest,
    JobAnswer,
    JobError,
    ModelsAnswer,
    TemplateRequest,
)
from falproxy.dialects.kontext.requests import KontextDevRequest, KontextProRequest, KontextResult
from falproxy.dialects.openai.schema import (
    EditRequest,
    ErrorResponse,
    GenerationRequest,
    ImageEvent,
    ImagesResponse,
    ModelInfo,
    ModelList,
)
from falproxy.fal.registry import Registry
from falproxy.web.openapi.operations import Json
from falproxy.web.openapi.usage import Usage, UsageTable

Models = Sequence[tuple[type[BaseModel], JsonSchemaMode]]


class Error(BaseModel):
    """Any failure. code: stable, for programs; message: a sentence for a person."""

    error: JobError


class Health(BaseModel):
    """How the process is."""

    status: Literal["ok", "draining"] = Field(description="draining: it is about to stop.")


# What is sent is described as it is checked, what is answered as it is written. OpenAI's pictures
# leave out what they do not have, which is what their checks say.
OURS: Models = (
    (KontextProRequest, "validation"),
    (KontextDevRequest, "validation"),
    (GenerateRequest, "validation"),
    (TemplateRequest, "validation"),
    (KontextResult, "serialization"),
    (JobAnswer, "serialization"),
    (ModelsAnswer, "serialization"),
    (Error, "serialization"),
    (Health, "serialization"),
    (Usage, "serialization"),
    (UsageTable, "serialization"),
)
OPENAI: Models = (
    (GenerationRequest, "validation"),
    (EditRequest, "validation"),
    (ImagesResponse, "validation"),
    (ImageEvent, "validation"),
    (ModelInfo, "serialization"),
    (ModelList, "serialization"),
    (ErrorResponse, "serialization"),
)


def components(registry: Registry | None) -> Json:
    """registry: whose names may be told; None where they may not."""
    schemas = schemas_of(OURS, "")
    if registry is not None:
        name_models(schemas, list(registry.models))
    return {"schemas": schemas | schemas_of(OPENAI, "OpenAI"), "headers": HEADERS}


def schemas_of(models: Models, prefix: str) -> Json:
    """By their names. prefix: of all of these, since two APIs call different things alike."""
    _, definitions = models_json_schema(
        models, ref_template=f"#/components/schemas/{prefix}{{model}}"
    )
    found = definitions["$defs"]
    return {prefix + name: found[name] for name in sorted(found)}


def name_models(schemas: Json, names: list[str]) -> None:
    """Says which models there are where one is to be named."""
    for request in ("GenerateRequest", "TemplateRequest"):
        schema = part(part(part(schemas, request), "properties"), "model")
        alternatives = schema.get("anyOf")
        text = alternatives[0] if isinstance(alternatives, list) else schema
        text["enum"] = names


def part(schema: Json, name: str) -> Json:
    found = schema[name]
    assert isinstance(found, dict)
    return found


def text(about: str, example: str, **schema: object) -> Json:
    return {"description": about, "schema": {"type": "string", **schema}, "example": example}


HEADERS: Json = {
    "Age": {
        "description": "Seconds since the result was kept, where it is one from before.",
        "schema": {"type": "integer", "minimum": 0},
        "example": 12,
    },
    "Cache-Control": text("For how long it stays as it is.", "public, max-age=31536000, immutable"),
    "Cache-Status": text(
        "Whether the result was there already (RFC 9211).", "falproxy; hit; ttl=3588"
    ),
    "ETag": text("By which one is known to have it.", '"5d41402abc4b2a76b9719d911017c592"'),
    "Location": text(
        "Where the job can be asked for.", "/api/images/jobs/1f0c7f1f7a5b4a4f9f5d0c9e2b1a3c4d"
    ),
    "Preference-Applied": text("`respond-async` where it was asked for.", "respond-async"),
    "Retry-After": text("Seconds after which to try again.", "5"),
    "WWW-Authenticate": text("How to say who you are.", "Bearer"),
    "X-Request-ID": text(
        "The request's name in the proxy's log: the client's own, or a new one.",
        "9e2b1a3c4d1f0c7f1f7a5b4a4f9f5d0c",
    ),
    "x-fal-request-id": text("fal's name of the job.", "7e2f0b8a-0001-4000-8000-000000000000"),
    "x-falproxy-rehost": text(
        "What became of the result's files: those that the proxy keeps, and those that stay where "
        "they are.",
        "stored; count=1",
    ),
    "x-should-retry": text(
        "`false` where a job may have been bought: OpenAI's clients do not buy another.", "false"
    ),
}
