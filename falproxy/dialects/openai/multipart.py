"""A form with files (`multipart/form-data`, RFC 7578), read as it arrives."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from aiohttp import BodyPartReader, MultipartReader, web
from aiohttp.http_exceptions import HttpProcessingError

from falproxy.dialects.openai.errors import invalid_parameter
from falproxy.dialects.openai.model_inputs import Upload
from falproxy.dialects.transparent import BODY_IDLE_TIMEOUT, too_large
from falproxy.errors import ProxyError
from falproxy.media.content_type import sniff_content_type
from falproxy.media.image_format import SNIFF_BYTES
from falproxy.spool import Spool, SpoolQuota, spool_body

IMAGE_FIELDS = ("image", "image[]")
MASK_FIELD = "mask"
FILES_MAX = 16
FILE_MAX = 50 * 2**20
TEXT_MAX = 256 * 2**10
PARTS_MAX = 100
# Bytes on disk of all forms of a process.
SPOOL_QUOTA_BYTES = 4 * 2**30


@dataclass(frozen=True, slots=True)
class FormLimits:
    """max_body: bytes of a whole form. max_file: of one file of it. room: for files of all."""

    max_body: int
    max_file: int = FILE_MAX
    quota: SpoolQuota = field(default_factory=lambda: SpoolQuota(SPOOL_QUOTA_BYTES))


@dataclass(slots=True)
class Form:
    """What a form says. files: its pictures, in their order."""

    texts: dict[str, str] = field(default_factory=dict)
    files: list[Upload] = field(default_factory=list)
    mask: Upload | None = None


async def read_form(request: web.Request, limits: FormLimits) -> Form:
    """Raises: ProxyError 400, 408, 413, 415, 503."""
    if request.content_type != "multipart/form-data":
        message = "The content type must be multipart/form-data."
        raise ProxyError(415, "unsupported_media_type", message)
    if (request.content_length or 0) > limits.max_body:
        raise too_large(limits.max_body)
    try:
        return await FormReader(MultipartReader(request.headers, request.content), limits).read()
    except TimeoutError as error:
        raise ProxyError(408, "body_timeout", "The request's body stopped arriving.") from error
    except (ValueError, EOFError, HttpProcessingError, web.RequestPayloadError) as error:
        raise ProxyError(400, "body_broken", "The form is not framed right.") from error
    except OSError as error:
        raise ProxyError(499, "client_disconnected", "The client left.") from error


class FormReader:
    """A form while it arrives."""

    def __init__(self, reader: MultipartReader, limits: FormLimits) -> None:
        self._reader = reader
        self._limits = limits
        self._form = Form()
        self._remaining = limits.max_body

    async def read(self) -> Form:
        for _ in range(PARTS_MAX):
            async with asyncio.timeout(BODY_IDLE_TIMEOUT):
                part = await self._reader.next()
            if part is None:
                return self._form
            if not isinstance(part, BodyPartReader) or not part.name:
                raise invalid_parameter(None, "The form has a part without a name.", "body_broken")
            await self._read_part(part, part.name)
        raise invalid_parameter(None, f"The form has more than {PARTS_MAX} parts.", "body_broken")

    async def _read_part(self, part: BodyPartReader, name: str) -> None:
        is_picture = name in (*IMAGE_FIELDS, MASK_FIELD)
        if not is_picture and part.filename is None:
            await self._read_text(part, name)
            return
        if not is_picture:
            async for _ in self._chunks(part):
                pass  # a file that nobody asked for
            return
        upload = await self._read_file(part, name.removesuffix("[]"))
        if name == MASK_FIELD:
            self._form.mask = upload
        else:
            self._form.files.append(upload)
        if len(self._form.files) > FILES_MAX:
            raise invalid_parameter(
                "image", f"At most {FILES_MAX} pictures are taken.", "too_many_images"
            )

    async def _read_text(self, part: BodyPartReader, name: str) -> None:
        text = b""
        async for chunk in self._chunks(part):
            text += chunk
            if len(text) > TEXT_MAX:
                raise invalid_parameter(name, f"{name} is too long.", "string_above_max_length")
        if text:
            self._form.texts[name] = text.decode()

    async def _read_file(self, part: BodyPartReader, param: str) -> Upload:
        most = self._limits.max_file
        message = f"The file has more than {most} bytes."

        async def limited() -> AsyncIterator[bytes]:
            size = 0
            async for chunk in self._chunks(part):
                size += len(chunk)
                if size > most:
                    raise invalid_parameter(param, message, "file_too_large")
                yield chunk

        content = await spool_body(limited(), self._limits.quota)
        if not content.size:
            raise invalid_parameter(param, "The file is empty.", "empty_file")
        return Upload(content, await content_type_of(content))

    async def _chunks(self, part: BodyPartReader) -> AsyncIterator[bytes]:
        """A part's bytes as they come. Raises: ProxyError 413, the form is too large."""
        while not part.at_eof():
            async with asyncio.timeout(BODY_IDLE_TIMEOUT):
                chunk = await part.read_chunk(2**16)
            self._remaining -= len(chunk)
            if self._remaining < 0:
                raise too_large(self._limits.max_body)
            yield chunk


async def content_type_of(content: Spool) -> str:
    """What a file is by its bytes, whatever the form says."""
    if content.is_small:
        return sniff_content_type(content.read(0, SNIFF_BYTES)).content_type
    return sniff_content_type(await asyncio.to_thread(content.read, 0, SNIFF_BYTES)).content_type
