"""The images of a result: their URLs, and their bytes in base64."""

import asyncio
import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from aiohttp import web

from falproxy.concurrency import map_concurrently
from falproxy.errors import ProxyError
from falproxy.fal.results import IMAGE_KEY, IMAGES_KEY, FalImage, parse_dimension
from falproxy.json_object import parse_object
from falproxy.media.fetch import Fetcher, FetchFailed, FetchRefused, FetchTooLarge
from falproxy.media.image_format import sniff
from falproxy.media.image_rules import decode_data_uri
from falproxy.spool import Spool
from falproxy.storage_backends import FILES_PATH
from falproxy.stores.files import FILE_CHUNK, FILE_NAME, LocalFiles

IMAGE_MAX_BYTES = 50 * 2**20
MAX_CONCURRENCY = 4
DATA_SCHEME = "data:"

# Returns the file that the proxy serves at a URL; None for other URLs. Blocking.
ReadLocal = Callable[[web.Request, str], Spool | None]


@dataclass(frozen=True, slots=True)
class ModelOutput:
    """The result of a call. prompt: as the model reports it; None if it does not."""

    images: tuple[FalImage, ...]
    prompt: str | None = None


def parse_output(document: bytes) -> ModelOutput:
    """Parse a result. Its images are in `images` or `image`; each is a URL, or an object with a
    `url`."""
    output = parse_object(document) or {}
    images = output.get(IMAGES_KEY)
    entries = images if isinstance(images, list) else [output.get(IMAGE_KEY)]
    prompt = output.get("prompt")
    return ModelOutput(
        tuple(image for entry in entries if (image := parse_image(entry)) is not None),
        prompt if isinstance(prompt, str) and prompt else None,
    )


def parse_image(entry: object) -> FalImage | None:
    if isinstance(entry, str):
        return FalImage(entry)
    if not isinstance(entry, dict) or not isinstance(url := entry.get("url"), str):
        return None
    return FalImage(url, parse_dimension(entry.get("width")), parse_dimension(entry.get("height")))


def format_size(image: FalImage) -> str | None:
    """Return `WIDTHxHEIGHT`; None if unknown."""
    return f"{image.width}x{image.height}" if image.width and image.height else None


def local_file_reader(files: LocalFiles, base_url: Callable[[web.Request], str]) -> ReadLocal:
    """Create a function that reads files that the proxy serves. The fetcher cannot download them if
    the proxy has a private address, which it refuses.

    base_url: returns the URL below which the client of a request finds FILES_PATH.
    """

    def read_local_file(request: web.Request, url: str) -> Spool | None:
        prefix = base_url(request) + FILES_PATH
        name = url.removeprefix(prefix)
        if not url.startswith(prefix) or not FILE_NAME.fullmatch(name):
            return None
        size = files.size(name) or 0
        chunks = [files.read(name, start, FILE_CHUNK) for start in range(0, size, FILE_CHUNK)]
        return Spool(b"".join(chunks)) if size else None

    return read_local_file


def no_local_files(request: web.Request, url: str) -> Spool | None:
    """Return None: the ReadLocal of a proxy that serves no files itself."""
    return None


class ImageReader:
    """Reads images by URL. read_local: reads files that the proxy itself serves."""

    def __init__(self, fetcher: Fetcher, read_local: ReadLocal = no_local_files) -> None:
        self._fetcher = fetcher
        self._read_local = read_local

    async def read_all(self, request: web.Request, urls: Sequence[str]) -> list[str]:
        """Return images in base64, in the order of the URLs. At most MAX_CONCURRENCY are read at
        once.

        Raises: ProxyError 502.
        """
        return await map_concurrently(partial(self.read, request), urls, MAX_CONCURRENCY)

    async def read(self, request: web.Request, url: str) -> str:
        """Return an image in base64. Raises: ProxyError 502 `picture_unreadable`."""
        if url[: len(DATA_SCHEME)].lower() == DATA_SCHEME:
            return await asyncio.to_thread(base64_from_data_uri, url)
        try:
            content = await asyncio.to_thread(self._read_local, request, url)
            if content is None:
                content = (await self._fetcher.download(url, IMAGE_MAX_BYTES)).content
        except (FetchRefused, FetchFailed, FetchTooLarge, OSError) as error:
            raise image_unreadable() from error
        image = b"".join([chunk async for chunk in content.chunks()])
        return await asyncio.to_thread(to_base64, image)


def base64_from_data_uri(url: str) -> str:
    return to_base64(b"".join(decode_data_uri(url)))


def to_base64(image: bytes) -> str:
    return base64.b64encode(image).decode()


def image_format(image: str) -> str | None:
    """Return the format of an image in base64, according to its first bytes."""
    sniffed = sniff(base64.b64decode(image[:64]))
    return None if sniffed is None else str(sniffed)


def image_unreadable() -> ProxyError:
    message = "The image was generated, but could not be read from its URL."
    return ProxyError(502, "picture_unreadable", message)
