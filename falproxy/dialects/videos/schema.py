"""Pydantic classes for the requests and responses of the OpenAI videos API."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from falproxy.dialects.openai.schema import PROMPT_MAX

EXAMPLE_ID = "video_0f8fad5bd9cb469fa16570867728950e"


class VideoRequest(BaseModel):
    """The parameters of `POST /v1/videos`, without the files. Other parameters are inputs of the
    model, by the names that fal gives them (`extra_body` in OpenAI's clients)."""

    model_config = ConfigDict(extra="allow")

    prompt: str = Field(
        min_length=1,
        max_length=PROMPT_MAX,
        description="A description of the video.",
        examples=["a heron takes off at dawn"],
    )
    model: str | None = Field(
        default=None,
        max_length=200,
        description="A name from `GET /v1/models`, or any of fal's endpoint ids that makes videos. "
        "The default is the first name of such a model.",
        examples=["kling-video", "fal-ai/ltx-video"],
    )
    seconds: str | int | float | None = Field(
        default=None,
        description="The length of the video. One that the model cannot make is an error.",
        examples=["5"],
    )
    size: str | None = Field(
        default=None,
        description="`WIDTHxHEIGHT`, `auto`, or a value that the model itself accepts. It is "
        "converted to the model's aspect ratio and resolution; a size that the model cannot make "
        "is an error.",
        examples=["1280x720"],
    )
    user: str | None = Field(
        default=None,
        description="An id of the end user, as `x-falproxy-user`: up to 128 characters.",
        examples=["user-42"],
    )
    safety_identifier: str | None = Field(
        default=None, description="Same as `user`, which is used if both are sent."
    )


class VideoError(BaseModel):
    """Why a video was not made."""

    code: str = Field(examples=["content_policy_violation"])
    message: str


class Video(BaseModel):
    """A video, or the job that makes it."""

    id: str = Field(examples=[EXAMPLE_ID])
    object: Literal["video"] = "video"
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int = Field(
        ge=0, le=100, description="Percent, as far as the model's log in fal's queue has it."
    )
    model: str = Field(examples=["kling-video"])
    prompt: str | None
    seconds: str | None = Field(description="null if it is not known.", examples=["5"])
    size: str | None = Field(description="null if it is not known.", examples=["1280x720"])
    created_at: int = Field(description="Unix time in seconds.", examples=[1_764_000_000])
    completed_at: int | None
    expires_at: None = Field(default=None, description="Always null: fal does not publish it.")
    remixed_from_video_id: None = None
    error: VideoError | None


class VideoList(BaseModel):
    """A page of videos. The next one begins `after` the `last_id`."""

    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedVideo(BaseModel):
    """A video that was deleted."""

    id: str = Field(examples=[EXAMPLE_ID])
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True
