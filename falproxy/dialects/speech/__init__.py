"""The OpenAI speech API: `/v1/audio/speech`, whose response is a sound."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from falproxy.dialects import DialectRoute
from falproxy.dialects.openai import require_method
from falproxy.dialects.openai.bodies import FormLimits, JsonBody
from falproxy.dialects.openai.errors import (
    SERVER,
    ImagesError,
    OpenAIErrorInfo,
    error_from_response,
    invalid_parameter,
    refuse,
)
from falproxy.dialects.openai.handlers import RetryGuard, name_openai_user
from falproxy.dialects.openai.media_files import FILE_HEADERS, MediaFiles
from falproxy.dialects.openai.media_models import MediaModels
from falproxy.dialects.openai.models import KIND_OUTPUTS
from falproxy.dialects.openai.requests import JSON_TYPE, read_json, reject_encoded, validate
from falproxy.dialects.openai.responses import merge_headers
from falproxy.dialects.queue_client import QueueClient, WaitPolicy, submit_call
from falproxy.dialects.speech.model_inputs import build_inputs
from falproxy.dialects.speech.schema import AudioFormat, SpeechRequest
from falproxy.dialects.transparent import BodyLimits, check_body
from falproxy.errors import ProxyError
from falproxy.json_object import parse_object
from falproxy.media.audio_conversion import ConversionError, can_convert, convert
from falproxy.media.content_type import sniff_content_type
from falproxy.proxy.limit_fields import openai_rate_fields
from falproxy.proxy.upstream import UPSTREAM

__all__ = ["SpeechDeps", "speech_routes"]

SOUND_MAX = 50 * 2**20  # bytes
CONTENT_TYPES: Mapping[AudioFormat, str] = {
    "mp3": "audio/mpeg",
    "opus": "audio/ogg",
    "aac": "audio/aac",
    "flac": "audio/flac",
    "wav": "audio/wav",
    "pcm": "audio/pcm",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeechDeps:
    """Dependencies of the API."""

    models: MediaModels
    files: MediaFiles
    wait_policy: WaitPolicy
    json_limits: BodyLimits
    form_limits: FormLimits


def speech_routes(deps: SpeechDeps) -> dict[str, DialectRoute]:
    post = require_method(hdrs.METH_POST)
    return {"/v1/audio/speech": DialectRoute(post, create_speech(deps), refuse)}


def create_speech(deps: SpeechDeps) -> Middleware:
    """Middleware: read a text aloud, and respond with the sound."""

    @web.middleware
    async def create_speech_middleware(
        request: web.Request, handler: Handler
    ) -> web.StreamResponse:
        params = await read_request(request, deps)
        name_openai_user(request, params)
        name, model = await deps.models.find(request.app[UPSTREAM], params.model)
        built = build_inputs(params, model)
        wanted = None if built.has_format else params.response_format
        if wanted is not None and not can_convert():
            message = (
                f"response_format: the format of {name} cannot be chosen. Leave it out, or install "
                "falproxy[audio] to convert it."
            )
            raise invalid_parameter("response_format", message)
        retry_guard = RetryGuard(handler)
        try:
            call = submit_call(model.endpoint, JsonBody(built.inputs), request.headers)
            client = QueueClient(request, retry_guard, deps.wait_policy)
            responses = await client.submit_and_wait([call])
            if responses[-1].status != web.HTTPOk.status_code:
                raise error_from_response(responses[-1])
            url = sound_url(responses[-1].body)
            content = await deps.files.read(url, SOUND_MAX)
            if wanted is not None:
                content = await convert_to(wanted, content)
        except ProxyError as error:
            retry_guard.forbid_retry(error)
            error.headers = {**openai_rate_fields(request), **error.headers}
            raise
        headers = {**FILE_HEADERS, **merge_headers(responses), **openai_rate_fields(request)}
        content_type = content_type_of(content, params.response_format)
        return web.Response(body=content, headers=headers, content_type=content_type)

    return create_speech_middleware


async def read_request(request: web.Request, deps: SpeechDeps) -> SpeechRequest:
    """Raises: ProxyError 400, 408, 413, 415, 499, 503."""
    reject_encoded(request)
    if request.content_type != JSON_TYPE:
        message = f"The content type must be {JSON_TYPE}."
        raise ProxyError(415, "unsupported_media_type", message)
    check_body(request, deps.json_limits)
    document = await read_json(request, deps.json_limits, deps.form_limits)
    return validate(SpeechRequest, document, is_strict=True)


def sound_url(document: bytes) -> str:
    """Return the URL of the sound in a result. Raises: ImagesError 502."""
    result = parse_object(document) or {}
    for name in KIND_OUTPUTS["audio"]:
        value = result.get(name)
        value = value[0] if isinstance(value, list) and value else value
        url = value.get("url") if isinstance(value, dict) else value
        if isinstance(url, str) and url:
            return url
    info = OpenAIErrorInfo(502, SERVER, "no_sound")
    raise ImagesError(info, "The model's result has no sound.")


def content_type_of(content: bytes, audio_format: AudioFormat | None) -> str:
    """Return the type that the bytes have, which samples without a header do not show."""
    if audio_format is not None:
        return CONTENT_TYPES[audio_format]
    return sniff_content_type(content).content_type


async def convert_to(audio_format: AudioFormat, content: bytes) -> bytes:
    """Convert a sound, unless it has the format already. Raises: ImagesError 502."""
    if sniff_content_type(content).content_type == CONTENT_TYPES[audio_format]:
        return content
    try:
        return await asyncio.to_thread(convert, content, audio_format)
    except ConversionError as error:
        info = OpenAIErrorInfo(502, SERVER, "conversion_failed")
        message = f"The sound was made, but cannot be converted to {audio_format}."
        raise ImagesError(info, message) from error
