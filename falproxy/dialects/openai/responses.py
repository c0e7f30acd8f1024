"""What a client gets: a document with the pictures, or a stream of events."""

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
    ResultImage,
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
from falproxy.proxy.forward import RelayedResponse
from falproxy.proxy.local_responses import CACHE_STATUS, LocalEventStream

logger = logging.getLogger(__name__)

# What an answer says about itself, and hands on.
FORWARDED_RESPONSE_HEADERS = (CACHE_STATUS, "Age")
REHOST_HEADER, STORED = "x-falproxy-rehost", "stored"
HIT = "; hit"
B64 = "b64_json"
LINE_MAX = 64 * 2**20


@dataclass(frozen=True, slots=True)
class ImageSet:
    """Pictures that are there. prompts: of each, as its model understood it."""

    images: tuple[ResultImage, ...]
    prompts: tuple[str | None, ...]


def collect_images(params: ImageRequest, results: Sequence[ModelOutput]) -> ImageSet:
    """Exactly as many as were asked for, unless the model made fewer.

    Raises: ImagesError 502, it made none.
    """
    pairs = [(shown, result.prompt) for result in results for shown in result.images]
    pairs = pairs[: params.n or 1]
    if not pairs:
        raise no_image()
    shown, prompts = zip(*pairs, strict=True)
    return ImageSet(shown, prompts)


def no_image() -> ImagesError:
    return ImagesError(
        OpenAIErrorInfo(502, SERVER, "no_picture"), "The model's result has no picture."
    )


async def write_document(
    request: web.Request,
    params: ImageRequest,
    responses: Sequence[BufferedResponse],
    image_reader: ImageReader,
) -> web.StreamResponse:
    """Raises: ProxyError 502."""
    made = collect_images(params, [parse_output(answer.body) for answer in responses])
    urls = [shown.url for shown in made.images]
    is_read = params.response_format == B64
    contents = await image_reader.read_all(request, urls) if is_read else []
    data = [
        ImageData(
            url=None if is_read else shown.url,
            b64_json=contents[place] if is_read else None,
            revised_prompt=prompt if prompt != params.prompt else None,
        )
        for place, (shown, prompt) in enumerate(zip(made.images, made.prompts, strict=True))
    ]
    document = ImagesResponse(
        created=int(time.time()),
        data=data,
        output_format=image_format(contents[0]) if contents else None,
        size=made.images[0].size,
    )
    body = await asyncio.to_thread(document.model_dump_json, exclude_none=True)
    return web.json_response(text=body, headers=merge_headers(responses))


def merge_headers(responses: Sequence[BufferedResponse]) -> dict[str, str]:
    """Of several answers, what says the least good: of the first that was not kept, and of the
    first whose pictures were not stored."""
    paid = (answer for answer in responses if HIT not in answer.headers.get(CACHE_STATUS, HIT))
    told = next(paid, responses[0])
    headers = {
        name: told.headers[name] for name in FORWARDED_RESPONSE_HEADERS if name in told.headers
    }
    kept = [
        answer.headers[REHOST_HEADER] for answer in responses if REHOST_HEADER in answer.headers
    ]
    if kept:
        headers[REHOST_HEADER] = min(kept, key=lambda word: word.startswith(STORED))
    return headers


async def write_events(
    request: web.Request,
    params: ImageRequest,
    responses: Sequence[BufferedResponse],
    image_reader: ImageReader,
) -> web.StreamResponse:
    """One event for each finished picture. They are read first: until the stream begins, what goes
    wrong has a status. Raises: ProxyError 502."""
    made = collect_images(params, [parse_output(answer.body) for answer in responses])
    contents = await image_reader.read_all(request, [shown.url for shown in made.images])

    async def events() -> AsyncIterator[bytes]:
        for shown, content in zip(made.images, contents, strict=True):
            yield build_event(params, shown, content)

    response = LocalEventStream(events())
    response.headers.update(merge_headers(responses))
    return response


def build_event(
    params: ImageRequest, image: ResultImage, content: str, index: int | None = None
) -> bytes:
    """index: of an unfinished picture; None for a finished one."""
    kind = "image_edit" if isinstance(params, EditRequest) else "image_generation"
    event = {
        "type": f"{kind}.{'completed' if index is None else 'partial_image'}",
        "b64_json": content,
        "created_at": int(time.time()),
        "size": image.size or params.size or "auto",
        "output_format": image_format(content) or params.output_format or "jpeg",
        "partial_image_index": index,
    }
    return ImageEvent.model_validate(event).model_dump_json(exclude_none=True).encode()


def stream_partial_images(
    request: web.Request,
    params: ImageRequest,
    upstream: RelayedResponse,
    image_reader: ImageReader,
    time_limit: float,
) -> web.StreamResponse:
    """fal's stream in OpenAI's events, as it comes. patience: seconds for all of it."""
    following = PartialImageStream(request, params, image_reader)
    return LocalEventStream(following.events(upstream, time_limit))


class PartialImageStream:
    """A picture on its way, told while it is made."""

    def __init__(
        self, request: web.Request, params: ImageRequest, image_reader: ImageReader
    ) -> None:
        self._request = request
        self._params = params
        self._image_reader = image_reader
        self._sent_count = 0
        self._last_output = ModelOutput(())

    async def events(self, upstream: RelayedResponse, time_limit: float) -> AsyncIterator[bytes]:
        """The status is out: what goes wrong now is an event as well."""
        try:
            async for line in read_lines(upstream, time_limit):
                if (event := await self._partial(line)) is not None:
                    yield event
            yield await self._completed()
        except ProxyError as error:
            logger.warning("A stream ended with %s", error.code)
            yield error_response(error).model_dump_json().encode()
        finally:
            upstream.discard()

    async def _partial(self, line: bytes) -> bytes | None:
        """What a line tells of an unfinished picture; fal's last event is the finished one, which
        stands at an address of its own."""
        if not line.startswith(b"data:"):
            return None
        self._last_output = parse_output(line[5:])
        shown = self._last_output.images[0] if self._last_output.images else None
        if shown is None or not shown.url.startswith(DATA_SCHEME):
            return None
        if self._sent_count >= (self._params.partial_images or 0):
            return None
        content = await self._image_reader.read(self._request, shown.url)
        self._sent_count += 1
        return build_event(self._params, shown, content, self._sent_count - 1)

    async def _completed(self) -> bytes:
        """Raises: ProxyError 502."""
        if not self._last_output.images:
            raise no_image()
        shown = self._last_output.images[0]
        return build_event(
            self._params, shown, await self._image_reader.read(self._request, shown.url)
        )


async def read_lines(upstream: RelayedResponse, time_limit: float) -> AsyncIterator[bytes]:
    """The lines of an answer that is not relayed, changed as they would be.

    Raises: ProxyError 502, 504.
    """
    deadline = asyncio.get_running_loop().time() + time_limit
    rest = bytearray()
    while chunk := await read_chunk_until(upstream, deadline):
        lines, end, begun = chunk.rpartition(b"\n")
        if end:
            for line in await apply_rewrite(upstream, bytes(rest + lines)):
                yield line
            rest.clear()
        rest += begun
        if len(rest) > LINE_MAX:
            message = "fal.ai's response is too large to be read."
            raise ProxyError(502, "upstream_unreadable", message)
    for line in await apply_rewrite(upstream, bytes(rest)):
        yield line


async def apply_rewrite(upstream: RelayedResponse, lines: bytes) -> list[bytes]:
    return (await upstream.rewrite(lines)).split(b"\n")


async def read_chunk_until(upstream: RelayedResponse, deadline: float) -> bytes:
    """Raises: ProxyError 502, 504."""
    try:
        async with asyncio.timeout_at(deadline):
            return await upstream.read_chunk()
    except TimeoutError:
        raise ProxyError(504, "upstream_timeout", "fal.ai timed out.") from None
