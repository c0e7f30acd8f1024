"""Request bodies that contain files: forms of clients (`multipart/form-data`, RFC 7578), read as
they arrive, and the JSON sent to fal, encoded while it is sent."""

import asyncio
import base64
import json
import re
import secrets
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field

from aiohttp import BodyPartReader, MultipartReader, web
from aiohttp.http_exceptions import HttpProcessingError

from falproxy.dialects.json_body import InvalidTextError, decode_text
from falproxy.dialects.openai.errors import invalid_parameter
from falproxy.dialects.openai.request_images import (
    FORM_NAME,
    IMAGES_MAX,
    ImageValue,
    RequestImages,
    Upload,
    check_url,
)
from falproxy.dialects.transparent import BodyPace, too_large
from falproxy.errors import ProxyError
from falproxy.media.content_type import sniff_content_type
from falproxy.media.image_format import SNIFF_BYTES
from falproxy.media.image_rules import InputKind, input_kind
from falproxy.spool import Spool, SpoolQuota, spool_body

FILE_MAX = 50 * 2**20  # bytes
TEXT_MAX = 256 * 2**10  # bytes
URL_MAX = 32 * 2**20  # bytes of a data URI, which is held in memory
PARTS_MAX = 100
SPOOL_QUOTA_BYTES = 4 * 2**30  # disk space for the forms of a process
READ_BYTES = 2**16  # bytes of a form that are read at once
ENCODE_BYTES = 3 * 2**16  # bytes of a file that are encoded at once; base64 needs a multiple of 3


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
    """The contents of a form. texts: its other parts by name."""

    texts: dict[str, str]
    images: RequestImages

    def parts(self) -> Iterator[str | Spool]:
        """Yield the names and values in a defined order. Unlike the bytes of the form, they do not
        depend on its boundary, which clients choose again for a retry."""
        images = {f"image {number}": image for number, image in enumerate(self.images.images)}
        masks = {} if self.images.mask is None else {"mask": self.images.mask}
        for values in (self.texts, images, masks, self.images.files):
            for name, value in sorted(values.items()):
                yield name
                yield value.content if isinstance(value, Upload) else value
            yield ""


async def read_form(
    request: web.Request,
    limits: FormLimits,
    text_names: Collection[str] = (),
    image_name: re.Pattern[str] = FORM_NAME,
) -> Form:
    """Read a form.

    text_names: parameters that are no files.
    image_name: of the parts that are images, with groups for the parameter and the index.

    Raises: ProxyError 400, 408, 413, 499, 503.
    """
    if (request.content_length or 0) > limits.max_body:
        raise too_large(limits.max_body)
    try:
        reader = MultipartReader(request.headers, request.content)
        return await FormReader(reader, limits, text_names, image_name).read()
    except TimeoutError as error:
        raise ProxyError(408, "body_timeout", "The request's body stopped arriving.") from error
    except (ValueError, EOFError, HttpProcessingError, web.RequestPayloadError) as error:
        raise ProxyError(400, "body_broken", "The form is not framed right.") from error
    except OSError as error:
        raise ProxyError(499, "client_disconnected", "The client disconnected.") from error


class FormReader:
    def __init__(
        self,
        reader: MultipartReader,
        limits: FormLimits,
        text_names: Collection[str],
        image_name: re.Pattern[str],
    ) -> None:
        self._image_name = image_name
        self._reader = reader
        self._limits = limits
        self._text_names = text_names
        self._texts: dict[str, str] = {}
        self._files: dict[str, Upload] = {}
        # Images and masks, with the parameter and the position that their names give.
        self._images: list[tuple[str, int, ImageValue]] = []
        self._remaining = limits.max_body
        self._pace = BodyPace()

    async def read(self) -> Form:
        """Raises: ProxyError 400, 413, 503; TimeoutError and the errors of aiohttp's reader."""
        for _ in range(PARTS_MAX):
            async with self._pace.wait():
                part = await self._reader.next()
            if part is None:
                return Form(self._texts, self._sorted_images())
            if not isinstance(part, BodyPartReader) or not part.name:
                raise invalid_parameter(None, "The form has a part without a name.", "body_broken")
            await self._read_part(part, part.name)
        raise invalid_parameter(None, f"The form has more than {PARTS_MAX} parts.", "body_broken")

    def _sorted_images(self) -> RequestImages:
        """Return the images by the index in their names, otherwise in the order of the form."""
        request_images = RequestImages(files=self._files)
        for param, _, value in sorted(self._images, key=lambda image: image[1]):
            request_images.add(param, value)
        return request_images

    async def _read_part(self, part: BodyPartReader, name: str) -> None:
        if (match := self._image_name.fullmatch(name)) is not None:
            value = await self._read_image(part, name)
            if value is not None:
                position = int(match[2]) if match[2] else len(self._images)
                self._images.append((match[1], position, value))
        elif not part.filename:
            await self._read_text(part, name)
        elif name in self._text_names:
            raise invalid_parameter(name, f"Send {name} as a text, not as a file.")
        elif (upload := await self._read_file(part, name)) is not None:
            check_unique(name, self._files)
            self._files[name] = upload
        if len(self._images) + len(self._files) > IMAGES_MAX + 1:  # and a mask
            message = f"At most {IMAGES_MAX} images are accepted."
            raise invalid_parameter("image", message, "too_many_images")

    async def _read_text(self, part: BodyPartReader, name: str) -> None:
        text = b""
        async for chunk in self._chunks(part):
            text += chunk
            if len(text) > TEXT_MAX:
                raise invalid_parameter(name, f"{name} is too long.", "string_above_max_length")
        if text:
            check_unique(name, self._texts)
            self._texts[name] = text_of(text, name)

    async def _read_image(self, part: BodyPartReader, name: str) -> ImageValue | None:
        """Return a file, or the URL in a part that is no file. None if it is empty."""
        upload = await self._read_file(part, name)
        if upload is None or part.filename or upload.content.size > URL_MAX:
            return upload
        start = await read_content(upload.content, 8)
        if input_kind(start.decode("latin-1")) is InputKind.OTHER:
            return upload
        url = text_of(await read_content(upload.content, upload.content.size), name)
        return check_url(url.strip(), name)

    async def _read_file(self, part: BodyPartReader, name: str) -> Upload | None:
        """Return a file. None for an empty one without a name, which browsers send if the user
        chose no file.

        Raises: ImagesError 400.
        """
        max_file = self._limits.max_file
        message = f"{name} has more than {max_file} bytes."
        param = name.partition("[")[0]

        async def limited_chunks() -> AsyncIterator[bytes]:
            size = 0
            async for chunk in self._chunks(part):
                size += len(chunk)
                if size > max_file:
                    raise invalid_parameter(param, message, "file_too_large")
                yield chunk

        content = await spool_body(limited_chunks(), self._limits.quota)
        if content.size:
            return Upload(content, await content_type_of(content))
        if part.filename:
            raise invalid_parameter(param, f"The file {name} is empty.", "empty_file")
        return None

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


def check_unique(name: str, parts: Collection[str]) -> None:
    """Raises: ImagesError 400, a form has two parts of a name."""
    if name in parts:
        raise invalid_parameter(name, f"{name} was sent more than once.")


def text_of(content: bytes, name: str) -> str:
    """Raises: ImagesError 400."""
    try:
        return decode_text(content, name)
    except InvalidTextError as error:
        raise invalid_parameter(name, str(error), "invalid_text") from None


async def read_content(content: Spool, size: int) -> bytes:
    if content.is_small:
        return content.read(0, size)
    return await asyncio.to_thread(content.read, 0, size)


async def content_type_of(content: Spool) -> str:
    """Return the content type of a file according to its first bytes. The client's is ignored."""
    return sniff_content_type(await read_content(content, SNIFF_BYTES)).content_type


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
