"""The request of the OpenAI speech API."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

INPUT_MAX = 100_000  # characters
AudioFormat = Literal["mp3", "opus", "aac", "flac", "wav", "pcm"]


class VoiceId(BaseModel):
    """A voice by its id."""

    id: str = Field(min_length=1, max_length=200)


class SpeechRequest(BaseModel):
    """The body of `POST /v1/audio/speech`. Other parameters are inputs of the model, by the names
    that fal gives them (`extra_body` in OpenAI's clients)."""

    model_config = ConfigDict(extra="allow")

    input: str = Field(
        min_length=1,
        max_length=INPUT_MAX,
        description="The text that is read aloud.",
        examples=["The heron takes off at dawn."],
    )
    model: str | None = Field(
        default=None,
        max_length=200,
        description="A name from `GET /v1/models`, or any of fal's endpoint ids that makes speech. "
        "The default is the first name of such a model.",
        examples=["kokoro-speech", "fal-ai/elevenlabs/tts/multilingual-v2"],
    )
    voice: str | VoiceId | None = Field(
        default=None,
        description="A voice of the model. `auto` is the model's default, for models without a "
        "choice as well. One that the model does not have is an error.",
        examples=["af_heart"],
    )
    response_format: AudioFormat | None = Field(
        default=None,
        description="The format of the sound. The default is what the model makes. `pcm` has "
        "samples of 16 bits, 24,000 in a second.",
        examples=["mp3"],
    )
    speed: float | None = Field(
        default=None, ge=0.25, le=4, description="For models that support it.", examples=[1]
    )
    instructions: str | None = Field(
        default=None,
        max_length=INPUT_MAX,
        description="How the text is read, for models that support it.",
    )
    stream_format: Literal["audio"] | None = Field(
        default=None, description="Events (`sse`) are not supported."
    )
    user: str | None = Field(
        default=None,
        description="An id of the end user, as `x-falproxy-user`: up to 128 characters.",
        examples=["user-42"],
    )
    safety_identifier: str | None = Field(
        default=None, description="Same as `user`, which is used if both are sent."
    )
