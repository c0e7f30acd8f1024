"""Pydantic models of the requests and responses of `/api/images` and `/api/templates`."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

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


class JobResponse(CamelModel):
    """A job. image_url, images: its files, also of a model that makes videos or sounds. cost: USD;
    null while it is unknown, 0 for a cached result."""

    job_id: str
    status: JobStatus
    model: str
    image_url: str | None = None
    images: list[JobImage] = Field(default_factory=list)
    cost: float | None = None
    user_id: str | None = None
    error: JobError | None = None


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


class RegistryModelList(BaseModel):
    """All available models and templates."""

    models: list[RegistryModelInfo]
    templates: list[TemplateInfo]
