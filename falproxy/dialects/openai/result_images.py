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
from falproxy.media.image_rules import decoded
from falproxy.spool import Spool
from falproxy.stores.files.disk import CHUNK, NAME, DiskStorage

PICTURE_MAX = 50 * 2**20
AT_ONCE = 4
DATA = "data:"
FILES = "/files/"
SIDES = ("width", "height")

# The file behind an address of the proxy's own; None for any other address.
ReadOwn = Callable[[web.Request, str], Spool | None]


@dataclass(frozen=True, slots=True)
class Shown:
    """A picture as a result names it. width, height: None where the result does not say."""

    url: str
    width: int | None = None
    height: int | None = None

    @property
    def size(self) -> str | None:
        return f"{self.width}x{self.height}" if self.width and self.height else None


@dataclass(frozen=True, slots=True)
class Result:
    """What a model made. prompt: as the model says that it understood it."""

    pictures: tuple[Shown, ...]
    prompt: str | None = None


def result_of(document: bytes) -> Result:
    """Its pictures are in `images` or `image`, each an object with a `url` or a text. Whatever
    else there is, is none of ours."""
    try:
        output = json.loads(document)
    except (ValueError, RecursionError):
        output = None
    if not isinstance(output, dict):
        return Result(())
    images, image = output.get("images"), output.get("image")
    named = images if isinstance(images, list) else [image]
    shown = tuple(found for entry in named if (found := shown_by(entry)) is not None)
    prompt = output.get("prompt")
    return Result(shown, prompt if isinstance(prompt, str) and prompt else None)


def shown_by(entry: object) -> Shown | None:
    if isinstance(entry, str):
        return Shown(entry)
    url = entry.get("url") if isinstance(entry, dict) else None
    if not isinstance(entry, dict) or not isinstance(url, str):
        return None
    sides = [side if isinstance(side := entry.get(name), int) else None for name in SIDES]
    return Shown(url, *sides)


def files_of(storage: DiskStorage, here: Callable[[web.Request], str]) -> ReadOwn:
    """Reads what is kept on this machine's disk, which has no address that may be called. here:
    what its path is put behind, as the request's client sees it."""

    def read(request: web.Request, url: str) -> Spool | None:
        """Blocks."""
        prefix = here(request) + FILES
        name = url.removeprefix(prefix)
        if not url.startswith(prefix) or not NAME.fullmatch(name):
            return None
        size = storage.size(name) or 0
        pieces = [storage.read(name, start, CHUNK) for start in range(0, size, CHUNK)]
        return Spool(b"".join(pieces)) if size else None

    return read


def none_own(request: web.Request, url: str) -> Spool | None:
    """For a proxy that serves no files itself."""
    return None


class Pictures:
    """Reads what results name. read_own: for files that the proxy serves by itself."""

    def __init__(self, fetcher: Fetcher, read_own: ReadOwn = none_own) -> None:
        self._fetcher = fetcher
        self._read_own = read_own

    async def read_all(self, request: web.Request, urls: Sequence[str]) -> list[str]:
        """Each in base64, in their order; some at a time. Raises: ProxyError 502."""
        turns = asyncio.Semaphore(AT_ONCE)

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
        if url[: len(DATA)].lower() == DATA:
            return await asyncio.to_thread(from_data, url)
        try:
            own = await asyncio.to_thread(self._read_own, request, url)
            found = own or (await self._fetcher.download(url, PICTURE_MAX)).content
        except (FetchRefused, FetchFailed, FetchTooLarge, OSError) as error:
            raise unreadable() from error
        content = b"".join([chunk async for chunk in found.chunks()])
        return await asyncio.to_thread(in_base64, content)


def from_data(url: str) -> str:
    return in_base64(b"".join(decoded(url)))


def in_base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def format_of(picture: str) -> str | None:
    """What a picture in base64 is by its first bytes."""
    known = sniff(base64.b64decode(picture[:64]))
    return None if known is None else str(known)


def unreadable() -> ProxyError:
    return ProxyError(
        502, "picture_unreadable", "The picture was made, and could not be read from where it is."
    )
