"""Responses with images: a document or a stream of events."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from aiohttp import web

from falproxy.dialects.openai.errors import SERVER, ImagesError, OpenAIErrorInfo, error_response
from falproxy.dialects.openai.result_images import (
    DATA_SCHEME,
    ImageReader,
    ModelOutput,
    format_size,
    image_format,
    parse_output,
)
from falproxy.dialects.openai.schema import (
    EditRequest,
    ImageData,
    ImageEvent,
    ImageRequest,
    ImagesResponse,
)
from falproxy.dialects.queue_client import BufferedResponse
from falproxy.errors import ProxyError
from falproxy.fal.pricing import sum_usd
from falproxy.fal.results import FalImage
from falproxy.proxy.event_recording import RecordedEventStream
from falproxy.proxy.forward import RelayedResponse
from falproxy.proxy.local_responses import CACHE_STATUS, LocalEventStream
from falproxy.proxy.prices import COST_HEADER, SAVED_HEADER

logger = logging.getLogger(__name__)

FORWARDED_RESPONSE_HEADERS = (CACHE_STATUS, "Age")
REHOST_HEADER, STORED = "x-falproxy-rehost", "stored"
HIT = "; hit"
B64 = "b64_json"
# Beginnings of the names of OpenAI's models that always return base64.
BASE64_MODELS = ("gpt-image", "chatgpt-image")
LINE_MAX = 64 * 2**20  # bytes


@dataclass(frozen=True, slots=True)
class ImageSet:
    """The images of a response. prompts: of each image, as the model reports it."""

    images: tuple[FalImage, ...]
    prompts: tuple[str | None, ...]


def collect_images(params: ImageRequest, results: Sequence[ModelOutput]) -> ImageSet:
    """Return the requested number of images, or fewer if the model generated fewer.

    Raises: ImagesError 502, there are none.
    """
    pairs = [(image, result.prompt) for result in results for image in result.images]
    pairs = pairs[: params.n or 1]
    if not pairs:
        raise no_image()
    images, prompts = zip(*pairs, strict=True)
    return ImageSet(images, prompts)


def no_image() -> ImagesError:
    return ImagesError(
        OpenAIErrorInfo(502, SERVER, "no_picture"), "The model's result has no image."
    )


async def write_document(
    request: web.Request,
    params: ImageRequest,
    responses: Sequence[BufferedResponse],
    image_reader: ImageReader,
) -> web.StreamResponse:
    """Raises: ProxyError 502."""
    image_set = collect_images(params, [parse_output(response.body) for response in responses])
    urls = [image.url for image in image_set.images]
    is_base64 = returns_base64(params)
    contents = await image_reader.read_all(request, urls) if is_base64 else []
    data = [
        ImageData(
            url=None if is_base64 else url,
            b64_json=contents[index] if is_base64 else None,
            revised_prompt=prompt if prompt != params.prompt else None,
        )
        for index, (url, prompt) in enumerate(zip(urls, image_set.prompts, strict=True))
    ]
    document = ImagesResponse(
        created=int(time.time()),
        data=data,
        output_format=image_format(contents[0]) if contents else None,
        size=format_size(image_set.images[0]),
    )
    body = await asyncio.to_thread(document.model_dump_json, exclude_none=True)
    return web.json_response(text=body, headers=merge_headers(responses))


def returns_base64(params: ImageRequest) -> bool:
    """Return whether the response has the images themselves. Without `response_format`, this
    depends on what OpenAI's API would return for the same request."""
    if params.response_format is not None:
        return params.response_format == B64
    name = (params.model or "").lower()
    return isinstance(params, EditRequest) or name.startswith(BASE64_MODELS)


def merge_headers(responses: Sequence[BufferedResponse]) -> dict[str, str]:
    """Return the headers that describe several responses together: the cache status of the first
    that was not a hit, and the re-hosting status of the first whose images were not stored."""
    charged = (each for each in responses if HIT not in each.headers.get(CACHE_STATUS, HIT))
    source = next(charged, responses[0]).headers
    headers = {name: source[name] for name in FORWARDED_RESPONSE_HEADERS if name in source}
    statuses = [
        response.headers[REHOST_HEADER]
        for response in responses
        if REHOST_HEADER in response.headers
    ]
    if statuses:
        headers[REHOST_HEADER] = min(statuses, key=lambda status: status.startswith(STORED))
    for name in (COST_HEADER, SAVED_HEADER):
        amounts = [each.headers[name] for each in responses if name in each.headers]
        # The sum of all calls; a part of it would not be the cost of the request.
        if amounts and (name == SAVED_HEADER or len(amounts) == len(responses)):
            headers[name] = sum_usd(amounts)
    return headers


async def write_events(
    request: web.Request,
    params: ImageRequest,
    responses: Sequence[BufferedResponse],
    image_reader: ImageReader,
) -> web.StreamResponse:
    """Write one event per image. All images are read before the stream begins, while an error can
    still be sent with a status.

    Raises: ProxyError 502.
    """
    image_set = collect_images(params, [parse_output(response.body) for response in responses])
    contents = await image_reader.read_all(request, [image.url for image in image_set.images])

    async def completed_events() -> AsyncIterator[bytes]:
        for image, content in zip(image_set.images, contents, strict=True):
            yield build_event(params, image, content)

    response = LocalEventStream(completed_events())
    response.headers.update(merge_headers(responses))
    return response


def build_event(
    params: ImageRequest, image: FalImage, content: str, index: int | None = None
) -> bytes:
    """Return the JSON of an event.

    content: the image in base64.
    index: of an unfinished image; None for the finished one.
    """
    operation = "image_edit" if isinstance(params, EditRequest) else "image_generation"
    event = {
        "type": f"{operation}.{'completed' if index is None else 'partial_image'}",
        "b64_json": content,
        "created_at": int(time.time()),
        "size": format_size(image) or params.size or "auto",
        "output_format": image_format(content) or params.output_format or "jpeg",
        "partial_image_index": index,
    }
    return ImageEvent.model_validate(event).model_dump_json(exclude_none=True).encode()


def stream_partial_images(
    request: web.Request,
    params: ImageRequest,
    fal_stream: RelayedResponse | RecordedEventStream,
    image_reader: ImageReader,
    time_limit: float,
) -> web.StreamResponse:
    """Translate fal's stream into OpenAI's events as it arrives.

    time_limit: seconds for the whole stream.
    """
    stream = PartialImageStream(request, params, image_reader)
    response = LocalEventStream(stream.events(fal_stream, time_limit))
    if (cost := fal_stream.headers.get(COST_HEADER)) is not None:
        response.headers[COST_HEADER] = cost
    return response


class PartialImageStream:
    """The events of one image, finished and unfinished."""

    def __init__(
        self, request: web.Request, params: ImageRequest, image_reader: ImageReader
    ) -> None:
        self._request = request
        self._params = params
        self._image_reader = image_reader
        self._sent_count = 0
        self._last_output = ModelOutput(())

    async def events(
        self, fal_stream: RelayedResponse | RecordedEventStream, time_limit: float
    ) -> AsyncIterator[bytes]:
        """Yield the events. The response has begun, so errors are events too."""
        try:
            async for line in read_lines(fal_stream, time_limit):
                if (event := await self._partial(line)) is not None:
                    yield event
            yield await self._completed()
        except ProxyError as error:
            logger.warning("A stream ended with %s", error.code)
            yield error_response(error).model_dump_json().encode()
        finally:
            fal_stream.discard()

    async def _partial(self, line: bytes) -> bytes | None:
        """Return the event for an unfinished image, which fal sends as a data URI. None for other
        lines; the finished image, in fal's last event, has a URL."""
        if not line.startswith(b"data:"):
            return None
        self._last_output = parse_output(line[5:])
        image = self._last_output.images[0] if self._last_output.images else None
        if image is None or not image.url.startswith(DATA_SCHEME):
            return None
        if self._sent_count >= (self._params.partial_images or 0):
            return None
        content = await self._image_reader.read(self._request, image.url)
        self._sent_count += 1
        return build_event(self._params, image, content, self._sent_count - 1)

    async def _completed(self) -> bytes:
        """Raises: ProxyError 502."""
        if not self._last_output.images:
            raise no_image()
        image = self._last_output.images[0]
        content = await self._image_reader.read(self._request, image.url)
        return build_event(self._params, image, content)


async def read_lines(
    fal_stream: RelayedResponse | RecordedEventStream, time_limit: float
) -> AsyncIterator[bytes]:
    """Yield the lines of a stream, rewritten as they would be if the stream was relayed.

    Raises: ProxyError 502, 504.
    """
    deadline = asyncio.get_running_loop().time() + time_limit
    rest = bytearray()
    while chunk := await read_chunk_until(fal_stream, deadline):
        lines, newline, incomplete = chunk.rpartition(b"\n")
        if newline:
            for line in await apply_rewrite(fal_stream, bytes(rest + lines)):
                yield line
            rest.clear()
        rest += incomplete
        if len(rest) > LINE_MAX:
            message = "fal.ai's response is too large to be read."
            raise ProxyError(502, "upstream_unreadable", message)
    for line in await apply_rewrite(fal_stream, bytes(rest)):
        yield line


async def apply_rewrite(
    fal_stream: RelayedResponse | RecordedEventStream, lines: bytes
) -> list[bytes]:
    return (await fal_stream.rewrite(lines)).split(b"\n")


async def read_chunk_until(
    fal_stream: RelayedResponse | RecordedEventStream, deadline: float
) -> bytes:
    """Raises: ProxyError 502, 504."""
    try:
        async with asyncio.timeout_at(deadline):
            return await fal_stream.read_chunk()
    except TimeoutError:
        raise ProxyError(504, "upstream_timeout", "fal.ai timed out.") from None
