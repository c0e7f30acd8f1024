"""The pictures of a result: where its document names them, and their bytes."""

import asyncio
import base64
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from aiohttp import web

from falproxy.errors import ProxyError
from falproxy.media.fetch import Fetcher, FetchFailed, FetchRefused, FetchTooLarge
from falproxy.media.image_format import sniff
from falproxy.media.image_rules import decode_data_uri
from falproxy.spool import Spool
from falproxy.storage_backends import FILES_PATH
from falproxy.stores.files import FILE_CHUNK, FILE_NAME, LocalFiles

IMAGE_MAX_BYTES = 50 * 2**20
MAX_CONCURRENCY = 4
DATA_SCHEME = "data:"
SIDES = ("width", "height")

# The file behind an address of the proxy's own; None for any other address.
ReadLocal = Callable[[web.Request, str], Spool | None]


@dataclass(frozen=True, slots=True)
class ResultImage:
    """A picture as a result names it. width, height: None where the result does not say."""

    url: str
    width: int | None = None
    height: int | None = None

    @property
    def size(self) -> str | None:
        return f"{self.width}x{self.height}" if self.width and self.height else None


@dataclass(frozen=True, slots=True)
class ModelOutput:
    """What a model made. prompt: as the model says that it understood it."""

    images: tuple[ResultImage, ...]
    prompt: str | None = None


def parse_output(document: bytes) -> ModelOutput:
    """Its pictures are in `images` or `image`, each an object with a `url` or a text. Whatever
    else there is, is none of ours."""
    try:
        output = json.loads(document)
    except (ValueError, RecursionError):
        output = None
    if not isinstance(output, dict):
        return ModelOutput(())
    images, image = output.get("images"), output.get("image")
    named = images if isinstance(images, list) else [image]
    shown = tuple(found for entry in named if (found := parse_image(entry)) is not None)
    prompt = output.get("prompt")
    return ModelOutput(shown, prompt if isinstance(prompt, str) and prompt else None)


def parse_image(entry: object) -> ResultImage | None:
    if isinstance(entry, str):
        return ResultImage(entry)
    url = entry.get("url") if isinstance(entry, dict) else None
    if not isinstance(entry, dict) or not isinstance(url, str):
        return None
    sides = [side if isinstance(side := entry.get(name), int) else None for name in SIDES]
    return ResultImage(url, *sides)


def local_file_reader(files: LocalFiles, base_url: Callable[[web.Request], str]) -> ReadLocal:
    """Reads what is kept on this machine's disk, which has no address that may be called. here:
    what its path is put behind, as the request's client sees it."""

    def read(request: web.Request, url: str) -> Spool | None:
        """Blocks."""
        prefix = base_url(request) + FILES_PATH
        name = url.removeprefix(prefix)
        if not url.startswith(prefix) or not FILE_NAME.fullmatch(name):
            return None
        size = files.size(name) or 0
        pieces = [files.read(name, start, FILE_CHUNK) for start in range(0, size, FILE_CHUNK)]
        return Spool(b"".join(pieces)) if size else None

    return read


def no_local_files(request: web.Request, url: str) -> Spool | None:
    """For a proxy that serves no files itself."""
    return None


class ImageReader:
    """Reads what results name. read_own: for files that the proxy serves by itself."""

    def __init__(self, fetcher: Fetcher, read_local: ReadLocal = no_local_files) -> None:
        self._fetcher = fetcher
        self._read_local = read_local

    async def read_all(self, request: web.Request, urls: Sequence[str]) -> list[str]:
        """Each in base64, in their order; some at a time. Raises: ProxyError 502."""
        turns = asyncio.Semaphore(MAX_CONCURRENCY)

        async def read(url: str) -> str:
            async with turns:
                return await self.read(request, url)

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(read(url)) for url in urls]
        except* ProxyError as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def read(self, request: web.Request, url: str) -> str:
        """Raises: ProxyError 502 `picture_unreadable`."""
        if url[: len(DATA_SCHEME)].lower() == DATA_SCHEME:
            return await asyncio.to_thread(base64_from_data_uri, url)
        try:
            own = await asyncio.to_thread(self._read_local, request, url)
            found = own or (await self._fetcher.download(url, IMAGE_MAX_BYTES)).content
        except (FetchRefused, FetchFailed, FetchTooLarge, OSError) as error:
            raise image_unreadable() from error
        content = b"".join([chunk async for chunk in found.chunks()])
        return await asyncio.to_thread(to_base64, content)


def base64_from_data_uri(url: str) -> str:
    return to_base64(b"".join(decode_data_uri(url)))


def to_base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def image_format(image: str) -> str | None:
    """What a picture in base64 is by its first bytes."""
    known = sniff(base64.b64decode(image[:64]))
    return None if known is None else str(known)


def image_unreadable() -> ProxyError:
    return ProxyError(
        502, "picture_unreadable", "The picture was made, and could not be read from where it is."
    )
