"""A form with files (`multipart/form-data`, RFC 7578), read as it arrives."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from aiohttp import BodyPartReader, MultipartReader, web
from aiohttp.http_exceptions import HttpProcessingError

from falproxy.dialects.openai.errors import invalid
from falproxy.dialects.openai.model_inputs import Upload
from falproxy.dialects.transparent import BODY_SILENCE, too_large
from falproxy.errors import ProxyError
from falproxy.media.content_type import media_of
from falproxy.media.image_format import HEAD
from falproxy.spool import Room, Spool, hold

IMAGES = ("image", "image[]")
MASK = "mask"
FILES_MAX = 16
FILE_MAX = 50 * 2**20
TEXT_MAX = 256 * 2**10
PARTS_MAX = 100
# Bytes on disk of all forms of a process.
HELD_MAX = 4 * 2**30


@dataclass(frozen=True, slots=True)
class FormRules:
    """max_body: bytes of a whole form. max_file: of one file of it. room: for files of all."""

    max_body: int
    max_file: int = FILE_MAX
    room: Room = field(default_factory=lambda: Room(HELD_MAX))


@dataclass(slots=True)
class Form:
    """What a form says. files: its pictures, in their order."""

    texts: dict[str, str] = field(default_factory=dict)
    files: list[Upload] = field(default_factory=list)
    mask: Upload | None = None


async def read_form(request: web.Request, rules: FormRules) -> Form:
    """Raises: ProxyError 400, 408, 413, 415, 503."""
    if request.content_type != "multipart/form-data":
        message = "The content type must be multipart/form-data."
        raise ProxyError(415, "unsupported_media_type", message)
    if (request.content_length or 0) > rules.max_body:
        raise too_large(rules.max_body)
    try:
        return await FormReader(MultipartReader(request.headers, request.content), rules).read()
    except TimeoutError as error:
        raise ProxyError(408, "body_timeout", "The request's body stopped arriving.") from error
    except (ValueError, EOFError, HttpProcessingError, web.RequestPayloadError) as error:
        raise ProxyError(400, "body_broken", "The form is not framed right.") from error
    except OSError as error:
        raise ProxyError(499, "client_disconnected", "The client left.") from error


class FormReader:
    """A form while it arrives."""

    def __init__(self, reader: MultipartReader, rules: FormRules) -> None:
        self._reader = reader
        self._rules = rules
        self._form = Form()
        self._left = rules.max_body

    async def read(self) -> Form:
        for _ in range(PARTS_MAX):
            async with asyncio.timeout(BODY_SILENCE):
                part = await self._reader.next()
            if part is None:
                return self._form
            if not isinstance(part, BodyPartReader) or not part.name:
                raise invalid(None, "The form has a part without a name.", "body_broken")
            await self._take(part, part.name)
        raise invalid(None, f"The form has more than {PARTS_MAX} parts.", "body_broken")

    async def _take(self, part: BodyPartReader, name: str) -> None:
        is_picture = name in (*IMAGES, MASK)
        if not is_picture and part.filename is None:
            await self._take_text(part, name)
            return
        if not is_picture:
            async for _ in self._chunks(part):
                pass  # a file that nobody asked for
            return
        upload = await self._file(part, name.removesuffix("[]"))
        if name == MASK:
            self._form.mask = upload
        else:
            self._form.files.append(upload)
        if len(self._form.files) > FILES_MAX:
            raise invalid("image", f"At most {FILES_MAX} pictures are taken.", "too_many_images")

    async def _take_text(self, part: BodyPartReader, name: str) -> None:
        text = b""
        async for chunk in self._chunks(part):
            text += chunk
            if len(text) > TEXT_MAX:
                raise invalid(name, f"{name} is too long.", "string_above_max_length")
        if text:
            self._form.texts[name] = text.decode()

    async def _file(self, part: BodyPartReader, param: str) -> Upload:
        most = self._rules.max_file
        message = f"The file has more than {most} bytes."

        async def limited() -> AsyncIterator[bytes]:
            size = 0
            async for chunk in self._chunks(part):
                size += len(chunk)
                if size > most:
                    raise invalid(param, message, "file_too_large")
                yield chunk

        content = await hold(limited(), self._rules.room)
        if not content.size:
            raise invalid(param, "The file is empty.", "empty_file")
        return Upload(content, await content_type_of(content))

    async def _chunks(self, part: BodyPartReader) -> AsyncIterator[bytes]:
        """A part's bytes as they come. Raises: ProxyError 413, the form is too large."""
        while not part.at_eof():
            async with asyncio.timeout(BODY_SILENCE):
                chunk = await part.read_chunk(2**16)
            self._left -= len(chunk)
            if self._left < 0:
                raise too_large(self._rules.max_body)
            yield chunk


async def content_type_of(content: Spool) -> str:
    """What a file is by its bytes, whatever the form says."""
    if content.is_small:
        return media_of(content.read(0, HEAD)).content_type
    return media_of(await asyncio.to_thread(content.read, 0, HEAD)).content_type
