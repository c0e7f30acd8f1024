"""Pydantic models of the requests and responses of `/api/images` and `/api/templates`."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

RARE_FIELDS = ("position", "video_url", "audio_url", "files")
JobStatus = Literal["queued", "running", "completed", "failed"]


class CamelModel(BaseModel):
    """JSON names are in camel case."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True)


class BaseJobRequest(CamelModel):
    """The common fields of requests."""

    model_config = ConfigDict(extra="forbid", strict=True)

    options: dict[str, object] = Field(
        default_factory=dict,
        description="Further inputs of the model; the same as putting them into `inputs`.",
        examples=[{"width": 1024, "height": 768, "seed": 7}],
    )
    user_id: str | None = Field(
        default=None,
        description="The user of your application, as `x-falproxy-user`: up to 128 characters.",
        examples=["user-42"],
    )


class GenerateRequest(BaseJobRequest):
    """An image from one of the models."""

    model: str = Field(
        min_length=1, description="One of `GET /api/images/models`.", examples=["flux-schnell"]
    )
    inputs: dict[str, object] = Field(
        default_factory=dict,
        description="The model's inputs by name: its required ones, and any of its optional ones.",
        examples=[{"prompt": "a lighthouse at dusk"}],
    )


class TemplateRequest(BaseJobRequest):
    """An image from a template."""

    template: str | None = Field(
        default=None,
        description="The template's name, as in the path.",
        examples=["billboard"],
    )
    variables: dict[str, object] = Field(
        default_factory=dict,
        description="The template's variables; those with a default may be left out.",
        examples=[{"product": "a bar of soap"}],
    )
    model: str | None = Field(
        default=None,
        description="A model to use instead of the template's.",
        examples=["flux-schnell"],
    )
    inputs: dict[str, object] = Field(
        default_factory=dict,
        description="Inputs of the model beside the prompt, such as `image_url`.",
        examples=[{"image_size": "square"}],
    )


class JobImage(BaseModel):
    """One image of a result, or another file. width, height: pixels, if fal reports them."""

    url: str
    width: int | None = None
    height: int | None = None


class JobError(BaseModel):
    """The error of a failed job. code: stable, for programs."""

    code: str
    message: str


class JobFile(BaseModel):
    """A file of a result that is no image. kind: video, audio or file."""

    url: str
    kind: str


class JobResponse(CamelModel):
    """A job.

    cost: USD; null while it is unknown, 0 for a cached result.
    position: number of jobs before it in fal's queue.
    files: those that are no images.
    """

    job_id: str
    status: JobStatus
    model: str
    image_url: str | None = None
    images: list[JobImage] = Field(default_factory=list)
    cost: float | None = None
    user_id: str | None = None
    error: JobError | None = None
    position: int | None = None
    video_url: str | None = None
    audio_url: str | None = None
    files: list[JobFile] | None = None

    def to_document(self) -> dict[str, object]:
        """Return the JSON object, with the fields that few jobs have only if they have a value."""
        missing = {name for name in RARE_FIELDS if getattr(self, name) is None}
        return self.model_dump(mode="json", by_alias=True, exclude=missing)


class JobList(CamelModel):
    """Jobs of the caller, newest first. next_cursor: of the next page; null for the last one."""

    jobs: list[JobResponse]
    next_cursor: str | None


class RegistryModelInfo(BaseModel):
    """An available model. kind: what it makes. price: USD for one `unit`; null if unknown."""

    name: str
    endpoint: str
    kind: Literal["image", "video", "audio"] = "image"
    description: str
    required: list[str]
    optional: list[str]
    lora: bool
    price: float | None
    unit: str
    defaults: dict[str, object]


class VariableInfo(BaseModel):
    name: str
    description: str
    default: str | None


class TemplateInfo(BaseModel):
    """An available template."""

    name: str
    description: str
    model: str
    variables: list[VariableInfo]


class TemplateList(BaseModel):
    templates: list[TemplateInfo]


class FoundModel(CamelModel):
    """A model at fal, which a call names by its endpoint id.

    price: USD for one `unit`; null if unknown.
    schema_url: of the OpenAPI document that describes its inputs.
    """

    name: str
    endpoint: str
    title: str
    description: str
    category: str
    price: float | None
    unit: str | None
    schema_url: str
    model_url: str


class FoundModelList(CamelModel):
    """Models that a search has found. next_cursor: of the next page; null for the last one."""

    models: list[FoundModel]
    next_cursor: str | None


class RegistryModelList(BaseModel):
    """All available models and templates."""

    models: list[RegistryModelInfo]
    templates: list[TemplateInfo]
