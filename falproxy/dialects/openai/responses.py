"""What a client gets: a document with the pictures, or a stream of events."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from aiohttp import web

from falproxy.dialects.openai.errors import SERVER, Fault, ImagesError, document_of
from falproxy.dialects.openai.result_images import (
    DATA,
    Pictures,
    Result,
    Shown,
    format_of,
    result_of,
)
from falproxy.dialects.openai.schema import (
    EditRequest,
    ImageEvent,
    ImageRequest,
    ImagesResponse,
    Picture,
)
from falproxy.dialects.queue_client import Answer
from falproxy.errors import ProxyError
from falproxy.proxy.forward import UpstreamResponse
from falproxy.proxy.local_responses import CACHE_STATUS, OwnEvents

logger = logging.getLogger(__name__)

# What an answer says about itself, and hands on.
HANDED_ON = (CACHE_STATUS, "Age")
REHOST, STORED = "x-falproxy-rehost", "stored"
HIT = "; hit"
B64 = "b64_json"
LINE_MAX = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Finished:
    """Pictures that are there. prompts: of each, as its model understood it."""

    shown: tuple[Shown, ...]
    prompts: tuple[str | None, ...]


def finished_of(asked: ImageRequest, results: Sequence[Result]) -> Finished:
    """Exactly as many as were asked for, unless the model made fewer.

    Raises: ImagesError 502, it made none.
    """
    pairs = [(shown, result.prompt) for result in results for shown in result.pictures]
    pairs = pairs[: asked.n or 1]
    if not pairs:
        raise no_picture()
    shown, prompts = zip(*pairs, strict=True)
    return Finished(shown, prompts)


def no_picture() -> ImagesError:
    return ImagesError(Fault(502, SERVER, "no_picture"), "The model's result has no picture.")


async def write_document(
    request: web.Request, asked: ImageRequest, answers: Sequence[Answer], pictures: Pictures
) -> web.StreamResponse:
    """Raises: ProxyError 502."""
    made = finished_of(asked, [result_of(answer.body) for answer in answers])
    urls = [shown.url for shown in made.shown]
    is_read = asked.response_format == B64
    contents = await pictures.read_all(request, urls) if is_read else []
    data = [
        Picture(
            url=None if is_read else shown.url,
            b64_json=contents[place] if is_read else None,
            revised_prompt=prompt if prompt != asked.prompt else None,
        )
        for place, (shown, prompt) in enumerate(zip(made.shown, made.prompts, strict=True))
    ]
    document = ImagesResponse(
        created=int(time.time()),
        data=data,
        output_format=format_of(contents[0]) if contents else None,
        size=made.shown[0].size,
    )
    body = await asyncio.to_thread(document.model_dump_json, exclude_none=True)
    return web.json_response(text=body, headers=headers_of(answers))


def headers_of(answers: Sequence[Answer]) -> dict[str, str]:
    """Of several answers, what says the least good: of the first that was not kept, and of the
    first whose pictures were not stored."""
    paid = (answer for answer in answers if HIT not in answer.headers.get(CACHE_STATUS, HIT))
    told = next(paid, answers[0])
    headers = {name: told.headers[name] for name in HANDED_ON if name in told.headers}
    kept = [answer.headers[REHOST] for answer in answers if REHOST in answer.headers]
    if kept:
        headers[REHOST] = min(kept, key=lambda word: word.startswith(STORED))
    return headers


async def write_events(
    request: web.Request, asked: ImageRequest, answers: Sequence[Answer], pictures: Pictures
) -> web.StreamResponse:
    """One event for each finished picture. They are read first: until the stream begins, what goes
    wrong has a status. Raises: ProxyError 502."""
    made = finished_of(asked, [result_of(answer.body) for answer in answers])
    contents = await pictures.read_all(request, [shown.url for shown in made.shown])

    async def events() -> AsyncIterator[bytes]:
        for shown, content in zip(made.shown, contents, strict=True):
            yield event_of(asked, shown, content)

    response = OwnEvents(events())
    response.headers.update(headers_of(answers))
    return response


def event_of(asked: ImageRequest, shown: Shown, content: str, index: int | None = None) -> bytes:
    """index: of an unfinished picture; None for a finished one."""
    kind = "image_edit" if isinstance(asked, EditRequest) else "image_generation"
    event = {
        "type": f"{kind}.{'completed' if index is None else 'partial_image'}",
        "b64_json": content,
        "created_at": int(time.time()),
        "size": shown.size or asked.size or "auto",
        "output_format": format_of(content) or asked.output_format or "jpeg",
        "partial_image_index": index,
    }
    return ImageEvent.model_validate(event).model_dump_json(exclude_none=True).encode()


def follow(
    request: web.Request,
    asked: ImageRequest,
    upstream: UpstreamResponse,
    pictures: Pictures,
    patience: float,
) -> web.StreamResponse:
    """fal's stream in OpenAI's events, as it comes. patience: seconds for all of it."""
    following = Following(request, asked, pictures)
    return OwnEvents(following.events(upstream, patience))


class Following:
    """A picture on its way, told while it is made."""

    def __init__(self, request: web.Request, asked: ImageRequest, pictures: Pictures) -> None:
        self._request = request
        self._asked = asked
        self._pictures = pictures
        self._told = 0
        self._last = Result(())

    async def events(self, upstream: UpstreamResponse, patience: float) -> AsyncIterator[bytes]:
        """The status is out: what goes wrong now is an event as well."""
        try:
            async for line in lines_of(upstream, patience):
                if (event := await self._partial(line)) is not None:
                    yield event
            yield await self._completed()
        except ProxyError as error:
            logger.warning("A stream ended with %s", error.code)
            yield document_of(error).model_dump_json().encode()
        finally:
            upstream.drop()

    async def _partial(self, line: bytes) -> bytes | None:
        """What a line tells of an unfinished picture; fal's last event is the finished one, which
        stands at an address of its own."""
        if not line.startswith(b"data:"):
            return None
        self._last = result_of(line[5:])
        shown = self._last.pictures[0] if self._last.pictures else None
        if shown is None or not shown.url.startswith(DATA):
            return None
        if self._told >= (self._asked.partial_images or 0):
            return None
        content = await self._pictures.read(self._request, shown.url)
        self._told += 1
        return event_of(self._asked, shown, content, self._told - 1)

    async def _completed(self) -> bytes:
        """Raises: ProxyError 502."""
        if not self._last.pictures:
            raise no_picture()
        shown = self._last.pictures[0]
        return event_of(self._asked, shown, await self._pictures.read(self._request, shown.url))


async def lines_of(upstream: UpstreamResponse, patience: float) -> AsyncIterator[bytes]:
    """The lines of an answer that is not relayed, changed as they would be.

    Raises: ProxyError 502, 504.
    """
    deadline = asyncio.get_running_loop().time() + patience
    rest = bytearray()
    while chunk := await chunk_of(upstream, deadline):
        lines, end, begun = chunk.rpartition(b"\n")
        if end:
            for line in await changed(upstream, bytes(rest + lines)):
                yield line
            rest.clear()
        rest += begun
        if len(rest) > LINE_MAX:
            raise ProxyError(502, "upstream_unreadable", "fal.ai's answer is too large to be read.")
    for line in await changed(upstream, bytes(rest)):
        yield line


async def changed(upstream: UpstreamResponse, lines: bytes) -> list[bytes]:
    return (await upstream.changed(lines)).split(b"\n")


async def chunk_of(upstream: UpstreamResponse, deadline: float) -> bytes:
    """Raises: ProxyError 502, 504."""
    try:
        async with asyncio.timeout_at(deadline):
            return await upstream.chunk()
    except TimeoutError:
        raise ProxyError(504, "upstream_timeout", "fal.ai timed out.") from None
