"""Pydantic classes of the OpenAPI document by the names of their components."""

from collections.abc import Callable, Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from falproxy.dialects.generate import schema as generate
from falproxy.dialects.kontext.requests import (
    KontextDevRequest,
    KontextImage,
    KontextProRequest,
    KontextResult,
)
from falproxy.dialects.openai import schema as openai
from falproxy.dialects.speech.schema import SpeechRequest, VoiceId
from falproxy.dialects.videos import schema as videos
from falproxy.fal.endpoint import ENDPOINT_MAX

Json = dict[str, object]
ENDPOINT_PATTERN = r"^[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*){1,8}$"
SchemaClasses = Mapping[str, type[BaseModel]]

REF = "#/components/schemas/"


class EstimateRequest(BaseModel):
    """A call that is not made."""

    model_config = ConfigDict(extra="forbid")

    endpoint: str = Field(
        max_length=ENDPOINT_MAX,
        pattern=ENDPOINT_PATTERN,
        description="An endpoint id of fal.",
        examples=["fal-ai/flux/dev"],
    )
    input: dict[str, object] = Field(
        default_factory=dict,
        description="The inputs of the model; missing ones have the model's own defaults.",
        examples=[{"prompt": "a lighthouse", "num_images": 2}],
    )


class EstimatedLimit(BaseModel):
    """A limit of the caller. Budgets are in USD."""

    name: str = Field(examples=["rate", "user-budget"])
    maximum: float
    remaining: float
    window: int | None = Field(description="Seconds; null for calls under way at once.")


class EstimatedRefusal(BaseModel):
    """The response that the call would get."""

    status: int = Field(examples=[402])
    type: str = Field(examples=["budget_exceeded"])
    detail: str


class EstimatedLimits(BaseModel):
    """The response of the limits to the call, if it were sent now."""

    refusal: EstimatedRefusal | None = Field(description="null if the call would be admitted.")
    limits: list[EstimatedLimit]


class EstimateResponse(BaseModel):
    """The expected cost of a call. Amounts are in USD."""

    endpoint: str
    price: float | None = Field(description="USD for one unit; null if fal has no price.")
    unit: str | None
    units: float | None = Field(description="null if it depends on the result.")
    cost: float | None
    currency: Literal["USD"]
    source: Literal["registry", "fal"] | None = Field(
        description="Where the price is from: the proxy's registry, or fal's pricing API."
    )
    limits: EstimatedLimits | None = Field(default=None, description="If calls are limited.")


class UsageTotals(BaseModel):
    """Totals of a number of calls. Amounts are in USD."""

    calls: int
    errors: int = Field(description="Responses with a status of 400 or above, and failed jobs.")
    hits: int = Field(
        description="Calls that got a cached result, or shared the job of another call."
    )
    misses: int
    hit_rate: float | None = Field(description="Hits per cacheable call.")
    spent: float | None = Field(description="null if no price is known.")
    saved: float | None = Field(description="The price of the hits; null if it is unknown.")
    unpriced: int = Field(description="Calls of unknown price, which `spent` does not include.")
    own_seconds: float | None = Field(description="Average time in the proxy per call.")
    upstream_seconds: float | None = Field(description="Average time at fal per call.")


class UsageRow(UsageTotals):
    name: str = Field(description="The name of the group; may be empty.")
    principal: str | None = Field(
        default=None, description="The caller who named the user, in rows of users only."
    )


class UsageBucket(UsageTotals):
    at: str = Field(description="Start of the interval.")


class LatestCall(BaseModel):
    """One call, without its inputs."""

    at: str
    route: str
    status: int
    principal: str | None
    user: str | None
    operation: str | None
    endpoint: str | None
    request_id: str | None
    error: str | None = Field(description="The proxy's error code, or else `error_type`.")
    error_type: str | None = Field(description="The type of fal's error.")
    cache: Literal["hit", "miss", "collapsed", "bypass", "replayed"] | None
    seconds: float
    upstream_seconds: float
    stored_seconds: float | None = Field(
        description="Time to store the files of the result; null if it has none."
    )
    proxy_request_id: str | None = Field(description="As in the access log and `X-Request-ID`.")
    spent: float | None


class Percentiles(BaseModel):
    """Durations in seconds, estimated from histograms. `operation` is empty for all requests."""

    operation: str
    count: int
    p50: float | None
    p95: float | None
    p99: float | None


class LiveMetrics(BaseModel):
    """Metrics since the start of the processes."""

    since: str | None
    in_progress: int
    requests: int
    own_seconds: list[Percentiles]
    upstream_seconds: list[Percentiles]


class UsageReport(BaseModel):
    """Usage in a period. `principal` is the caller whose calls are included; null for all."""

    since: str
    until: str
    principal: str | None
    totals: UsageTotals
    step: Literal["minute", "hour", "day"]
    series: list[UsageBucket]
    endpoints: list[UsageRow]
    routes: list[UsageRow]
    principals: list[UsageRow] | None
    users: list[UsageRow]
    latest: list[LatestCall]
    starts: list[dict[str, str | int | bool]] | None = Field(
        description="Starts of processes, each with those of the same `version` in the minute "
        "after `at`: `processes`, `hosts`, and `is_new_version` if the start before was of another "
        "version. Null for callers who see their own calls only."
    )
    live: LiveMetrics | None


class UsageTable(BaseModel):
    """Usage in a period, grouped by one property."""

    since: str
    until: str
    principal: str | None
    by: Literal["endpoint", "principal", "route", "minute", "hour", "day", "user"]
    totals: UsageTotals = Field(description="Of all rows, on whichever page.")
    rows: list[UsageRow]
    has_more: bool = Field(description="There are rows after this page.")


# Component name → class, with the classes of nested fields. The names are public and stay the same
# when a class is renamed.
#
# Requests are described as they are validated, responses as they are serialized. The images of the
# OpenAI API are the exception: their responses leave out empty fields, as only the schema for
# validation allows.
VALIDATED: SchemaClasses = {
    "KontextProRequest": KontextProRequest,
    "KontextDevRequest": KontextDevRequest,
    "EstimateRequest": EstimateRequest,
    "GenerateRequest": generate.GenerateRequest,
    "TemplateRequest": generate.TemplateRequest,
    "OpenAIGenerationRequest": openai.GenerationRequest,
    "OpenAIEditRequest": openai.EditRequest,
    "OpenAIImagesResponse": openai.ImagesResponse,
    "OpenAIPicture": openai.ImageData,
    "OpenAIImageEvent": openai.ImageEvent,
    "OpenAIVideoRequest": videos.VideoRequest,
    "OpenAISpeechRequest": SpeechRequest,
    "OpenAIVoiceId": VoiceId,
}
SERIALIZED: SchemaClasses = {
    "KontextResult": KontextResult,
    "KontextImage": KontextImage,
    "JobAnswer": generate.JobResponse,
    "JobError": generate.JobError,
    "JobFile": generate.JobFile,
    "Picture": generate.JobImage,
    "Jobs": generate.JobList,
    "FoundModels": generate.FoundModelList,
    "FoundModel": generate.FoundModel,
    "Templates": generate.TemplateList,
    "ModelsAnswer": generate.RegistryModelList,
    "ModelAnswer": generate.RegistryModelInfo,
    "TemplateAnswer": generate.TemplateInfo,
    "VariableAnswer": generate.VariableInfo,
    "Estimate": EstimateResponse,
    "EstimatedLimit": EstimatedLimit,
    "EstimatedLimits": EstimatedLimits,
    "EstimatedRefusal": EstimatedRefusal,
    "Usage": UsageReport,
    "UsageTable": UsageTable,
    "Sums": UsageTotals,
    "NamedSums": UsageRow,
    "TimedSums": UsageBucket,
    "LatestCall": LatestCall,
    "Live": LiveMetrics,
    "Spread": Percentiles,
    "OpenAIModelInfo": openai.ModelInfo,
    "OpenAIModelList": openai.ModelList,
    "OpenAIErrorResponse": openai.ErrorResponse,
    "OpenAIErrorDetail": openai.ErrorDetail,
    "OpenAIVideo": videos.Video,
    "OpenAIVideoError": videos.VideoError,
    "OpenAIVideoList": videos.VideoList,
    "OpenAIDeletedVideo": videos.DeletedVideo,
}


def component_schemas() -> dict[str, Json]:
    """Return the JSON schemas of all classes by component name."""
    components: dict[tuple[type[BaseModel], JsonSchemaMode], str] = {
        **{(cls, "validation"): name for name, cls in VALIDATED.items()},
        **{(cls, "serialization"): name for name, cls in SERIALIZED.items()},
    }
    refs, definitions = models_json_schema(list(components), ref_template=REF + "{model}")
    # pydantic names the schemas by class.
    names = {refs[key]["$ref"].removeprefix(REF): name for key, name in components.items()}

    def rename_ref(node: Json) -> Json:
        ref = node.get("$ref")
        return (
            {**node, "$ref": REF + names[ref.removeprefix(REF)]} if isinstance(ref, str) else node
        )

    return {
        names[class_name]: {
            **map_objects(schema, rename_ref),
            # Unique, because some generators name classes by it.
            "title": names[class_name],
        }
        for class_name, schema in definitions["$defs"].items()
    }


def map_objects(node: Json, change: Callable[[Json], Json]) -> Json:
    """Return a copy of a JSON object, after `change` of it and then of all objects inside."""

    def copy(value: object) -> object:
        if isinstance(value, dict):
            return map_objects(value, change)
        return [copy(each) for each in value] if isinstance(value, list) else value

    return {key: copy(value) for key, value in change(node).items()}
