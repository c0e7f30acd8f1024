"""What clients of `/api/images` and `/api/templates` send and get, as pydantic models."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

JobStatus = Literal["queued", "running", "completed", "failed"]
USER_MAX = 200


class CamelModel(BaseModel):
    """Names are in camel case on the wire."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True)


class BaseJobRequest(CamelModel):
    """What both kinds of requests have."""

    model_config = ConfigDict(extra="forbid", strict=True)

    options: dict[str, object] = Field(
        default_factory=dict,
        description="Further inputs of the model; the same as putting them into `inputs`.",
        examples=[{"width": 1024, "height": 768, "seed": 7}],
    )
    user_id: str | None = Field(
        default=None,
        max_length=USER_MAX,
        description="Whose call it is, for your own accounts.",
        examples=["user-42"],
    )


class GenerateRequest(BaseJobRequest):
    """A picture by one of the models."""

    model: str = Field(
        min_length=1, description="One of `GET /api/images/models`.", examples=["flux-schnell"]
    )
    inputs: dict[str, object] = Field(
        default_factory=dict,
        description="The model's inputs by name: its required ones, and any of its optional ones.",
        examples=[{"prompt": "a lighthouse at dusk"}],
    )


class TemplateRequest(BaseJobRequest):
    """A picture by a template."""

    variables: dict[str, object] = Field(
        default_factory=dict,
        description="The template's variables; those with a default may be left out.",
        examples=[{"product": "a bar of soap"}],
    )
    model: str | None = Field(
        default=None, description="Another model than the template's.", examples=["flux-schnell"]
    )
    inputs: dict[str, object] = Field(
        default_factory=dict,
        description="Inputs of the model beside the prompt, such as `image_url`.",
        examples=[{"image_size": "square"}],
    )


class JobImage(BaseModel):
    """One picture of a result. width, height: pixels, where fal says them."""

    url: str
    width: int | None = None
    height: int | None = None


class JobError(BaseModel):
    """Why a job failed. code: stable, for programs."""

    code: str
    message: str


class JobResponse(CamelModel):
    """A job. cost: USD; null while or where it is not known, 0 for what was kept from before."""

    job_id: str
    status: JobStatus
    model: str
    image_url: str | None = None
    images: list[JobImage] = Field(default_factory=list)
    cost: float | None = None
    user_id: str | None = None
    error: JobError | None = None


class RegistryModelInfo(BaseModel):
    """A model that can be asked for. price: USD for one `unit`; null where nobody knows it."""

    name: str
    endpoint: str
    description: str
    required: list[str]
    optional: list[str]
    lora: bool
    price: float | None
    unit: Literal["image", "megapixel"]
    defaults: dict[str, object]


class VariableInfo(BaseModel):
    name: str
    description: str
    default: str | None


class TemplateInfo(BaseModel):
    """A template that can be asked for."""

    name: str
    description: str
    model: str
    variables: list[VariableInfo]


class RegistryModelList(BaseModel):
    """All that can be asked for."""

    models: list[RegistryModelInfo]
    templates: list[TemplateInfo]
