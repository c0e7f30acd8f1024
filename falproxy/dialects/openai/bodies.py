"""Request bodies that contain files: forms of clients (`multipart/form-data`, RFC 7578), read as
they arrive, and the JSON sent to fal, encoded while it is sent."""

import asyncio
import base64
import json
import re
import secrets
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field

from aiohttp import BodyPartReader, MultipartReader, web
from aiohttp.http_exceptions import HttpProcessingError

from falproxy.dialects.openai.errors import invalid_parameter
from falproxy.dialects.transparent import BodyPace, too_large
from falproxy.errors import ProxyError
from falproxy.media.content_type import sniff_content_type
from falproxy.media.image_format import SNIFF_BYTES
from falproxy.spool import Spool, SpoolQuota, spool_body

IMAGE_FIELDS = ("image", "image[]")
MASK_FIELD = "mask"
FILES_MAX = 16
FILE_MAX = 50 * 2**20  # bytes
TEXT_MAX = 256 * 2**10  # bytes
PARTS_MAX = 100
SPOOL_QUOTA_BYTES = 4 * 2**30  # disk space for the forms of a process
READ_BYTES = 2**16  # bytes of a form that are read at once
ENCODE_BYTES = 3 * 2**16  # bytes of a file that are encoded at once; base64 needs a multiple of 3


@dataclass(frozen=True, slots=True)
class Upload:
    """A file of a form. It becomes a data URI in the input of a call."""

    content: Spool
    content_type: str


@dataclass(frozen=True, slots=True)
class FormLimits:
    """Limits for forms.

    max_body: bytes of a form.
    max_file: bytes of one of its files.
    quota: disk space for the files of all forms.
    """

    max_body: int
    max_file: int = FILE_MAX
    quota: SpoolQuota = field(default_factory=lambda: SpoolQuota(SPOOL_QUOTA_BYTES))


@dataclass(slots=True)
class Form:
    """The contents of a form. files: the images, in their order."""

    texts: dict[str, str] = field(default_factory=dict)
    files: list[Upload] = field(default_factory=list)
    mask: Upload | None = None


async def read_form(request: web.Request, limits: FormLimits) -> Form:
    """Raises: ProxyError 400, 408, 413, 415, 499, 503."""
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
        raise ProxyError(499, "client_disconnected", "The client disconnected.") from error


class FormReader:
    def __init__(self, reader: MultipartReader, limits: FormLimits) -> None:
        self._reader = reader
        self._limits = limits
        self._form = Form()
        self._remaining = limits.max_body
        self._pace = BodyPace()

    async def read(self) -> Form:
        """Raises: ProxyError 400, 413, 503; TimeoutError and the errors of aiohttp's reader."""
        for _ in range(PARTS_MAX):
            async with self._pace.wait():
                part = await self._reader.next()
            if part is None:
                return self._form
            if not isinstance(part, BodyPartReader) or not part.name:
                raise invalid_parameter(None, "The form has a part without a name.", "body_broken")
            await self._read_part(part, part.name)
        raise invalid_parameter(None, f"The form has more than {PARTS_MAX} parts.", "body_broken")

    async def _read_part(self, part: BodyPartReader, name: str) -> None:
        is_image = name in (*IMAGE_FIELDS, MASK_FIELD)
        if not is_image and part.filename is None:
            await self._read_text(part, name)
            return
        if not is_image:
            async for _ in self._chunks(part):
                pass  # a file in an unknown field is ignored
            return
        upload = await self._read_file(part, name.removesuffix("[]"))
        if name == MASK_FIELD:
            self._form.mask = upload
        else:
            self._form.files.append(upload)
        if len(self._form.files) > FILES_MAX:
            message = f"At most {FILES_MAX} images are accepted."
            raise invalid_parameter("image", message, "too_many_images")

    async def _read_text(self, part: BodyPartReader, name: str) -> None:
        text = b""
        async for chunk in self._chunks(part):
            text += chunk
            if len(text) > TEXT_MAX:
                raise invalid_parameter(name, f"{name} is too long.", "string_above_max_length")
        if text:
            self._form.texts[name] = text.decode()

    async def _read_file(self, part: BodyPartReader, param: str) -> Upload:
        max_file = self._limits.max_file
        message = f"The file has more than {max_file} bytes."

        async def limited_chunks() -> AsyncIterator[bytes]:
            size = 0
            async for chunk in self._chunks(part):
                size += len(chunk)
                if size > max_file:
                    raise invalid_parameter(param, message, "file_too_large")
                yield chunk

        content = await spool_body(limited_chunks(), self._limits.quota)
        if not content.size:
            raise invalid_parameter(param, "The file is empty.", "empty_file")
        return Upload(content, await content_type_of(content))

    async def _chunks(self, part: BodyPartReader) -> AsyncIterator[bytes]:
        """Yield a part as it arrives. Raises: ProxyError 413, the form is too large."""
        while not part.at_eof():
            async with self._pace.wait():
                chunk = await part.read_chunk(READ_BYTES)
            self._pace.add(len(chunk))
            self._remaining -= len(chunk)
            if self._remaining < 0:
                raise too_large(self._limits.max_body)
            yield chunk


async def content_type_of(content: Spool) -> str:
    """Return the content type of a file according to its first bytes. The client's is ignored."""
    if content.is_small:
        return sniff_content_type(content.read(0, SNIFF_BYTES)).content_type
    return sniff_content_type(await asyncio.to_thread(content.read, 0, SNIFF_BYTES)).content_type


class JsonBody:
    """A call's input as JSON, in which the files are data URIs. It can be read more than once.

    size: bytes.
    """

    def __init__(self, inputs: Mapping[str, object]) -> None:
        self._token = secrets.token_hex(16)
        self._files: list[Upload] = []
        text = serialize(inputs, self._placeholder)
        pieces = re.split(rf"{self._token}-(\d+)", text)
        self._parts: list[bytes | Upload] = [
            self._files[int(piece)] if index % 2 else piece.encode()
            for index, piece in enumerate(pieces)
        ]
        self.size = sum(map(encoded_size, self._parts))

    def _placeholder(self, upload: object) -> str:
        """Return the string that represents a file in the JSON text. Its random token keeps clients
        from writing it themselves."""
        if not isinstance(upload, Upload):
            raise TypeError(type(upload).__name__)
        self._files.append(upload)
        return f"{self._token}-{len(self._files) - 1}"

    async def chunks(self) -> AsyncIterator[bytes]:
        for part in self._parts:
            if isinstance(part, bytes):
                yield part
                continue
            yield data_uri_prefix(part)
            for start in range(0, part.content.size, ENCODE_BYTES):
                yield await encode_chunk(part.content, start)


def serialize(inputs: Mapping[str, object], placeholder: Callable[[object], str]) -> str:
    """Raises: ImagesError 400, the inputs are nested too deeply."""
    try:
        return json.dumps(inputs, default=placeholder)
    except RecursionError:
        message = "The request is nested too deeply."
        raise invalid_parameter(None, message, "invalid_json") from None


def data_uri_prefix(upload: Upload) -> bytes:
    return f"data:{upload.content_type};base64,".encode()


def encoded_size(part: bytes | Upload) -> int:
    if isinstance(part, bytes):
        return len(part)
    return len(data_uri_prefix(part)) + 4 * -(-part.content.size // 3)


async def encode_chunk(content: Spool, start: int) -> bytes:
    if content.is_small:
        return base64.b64encode(content.read(start, ENCODE_BYTES))
    return base64.b64encode(await asyncio.to_thread(content.read, start, ENCODE_BYTES))
