"""Reading of requests for videos, in JSON or as a form."""

import re
from dataclasses import dataclass

from aiohttp import web

from falproxy.dialects.openai.bodies import FormLimits, JsonBody, read_form
from falproxy.dialects.openai.errors import invalid_parameter
from falproxy.dialects.openai.media_models import MediaModels
from falproxy.dialects.openai.models import ResolvedModel
from falproxy.dialects.openai.request_images import (
    RequestImages,
    Upload,
    check_url,
    url_in,
)
from falproxy.dialects.openai.requests import (
    FORM_TYPE,
    JSON_TYPE,
    read_json,
    reject_encoded,
    validate,
)
from falproxy.dialects.transparent import BodyLimits, check_body
from falproxy.dialects.videos.model_inputs import REFERENCE, build_inputs
from falproxy.dialects.videos.schema import VideoRequest
from falproxy.errors import ProxyError
from falproxy.proxy.idempotency_key import set_client_digest
from falproxy.proxy.upstream import UPSTREAM

# Names in forms: a file, or the URL of one as OpenAI's client for Python sends it.
REFERENCE_NAME = re.compile(r"(input_reference)(?:\[(?:image_url|(\d{0,4}))\])?", re.ASCII)
FILE_ID_NAME = f"{REFERENCE}[file_id]"
IMAGE_INPUT = ("image_url",)  # of the variants that begin with an image


@dataclass(frozen=True, slots=True)
class VideoSpec:
    """A request for a video. name: of the model, as the client or the default has it."""

    params: VideoRequest
    name: str
    model: ResolvedModel
    body: JsonBody


@dataclass(frozen=True, slots=True)
class VideoReader:
    """Reads requests."""

    models: MediaModels
    json_limits: BodyLimits
    form_limits: FormLimits

    async def read(self, request: web.Request) -> VideoSpec:
        """Raises: ProxyError 400, 404, 408, 413, 415, 499, 503."""
        reject_encoded(request)
        is_form = request.content_type == FORM_TYPE
        if is_form:
            names = VideoRequest.model_fields
            form = await read_form(request, self.form_limits, names, REFERENCE_NAME)
            await set_client_digest(request, form.parts())
            references = form.images
            if FILE_ID_NAME in form.texts:
                url_in({"file_id": form.texts[FILE_ID_NAME]}, REFERENCE)
            params = validate(VideoRequest, form.texts, is_strict=False)
        elif request.content_type == JSON_TYPE:
            check_body(request, self.json_limits)
            document = await read_json(request, self.json_limits, self.form_limits)
            references = take_references(document)
            params = validate(VideoRequest, document, is_strict=True)
        else:
            message = f"The content type must be {JSON_TYPE} or {FORM_TYPE}."
            raise ProxyError(415, "unsupported_media_type", message)
        check_uploads(references)
        inputs = IMAGE_INPUT if references.images else ()
        others = [key for key, value in (params.model_extra or {}).items() if value is not None]
        upstream = request.app[UPSTREAM]
        name, model = await self.models.find(upstream, params.model, inputs, others)
        built = build_inputs(params, model, references.images, references.files, is_form=is_form)
        return VideoSpec(params, name, model, JsonBody(built))


def take_references(document: dict[str, object]) -> RequestImages:
    """Remove `input_reference` from a JSON body, and return it: a URL or a data URI, as a string or
    in an object, or a list of them. Raises: ImagesError 400."""
    references = RequestImages()
    value = document.pop(REFERENCE, None)
    if value in (None, ""):
        return references
    for each in value if isinstance(value, list) else [value]:
        references.add(REFERENCE, check_url(url_in(each, REFERENCE), REFERENCE))
    return references


def check_uploads(references: RequestImages) -> None:
    """Raises: ImagesError 400, a file is neither an image nor a video."""
    for reference in references.images:
        if isinstance(reference, Upload) and not reference.content_type.startswith(
            ("image/", "video/")
        ):
            message = f"{REFERENCE} must be an image or a video file, or the URL of one."
            raise invalid_parameter(REFERENCE, message)
