"""Image inputs of model calls: what is no picture is refused before fal hears of it."""

import asyncio
import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware
from yarl import URL

from falproxy.call import CALL
from falproxy.errors import ProxyError
from falproxy.fetch import Fetcher, FetchFailed, FetchRefused, FetchTooLarge, UnreadUrl
from falproxy.images import (
    ImageInput,
    ImageRules,
    Kind,
    decoded,
    find_images,
    image_load_error,
    judge,
    kind,
    leading_bytes,
    too_large,
)
from falproxy.inputs import parse_input
from falproxy.reuse import Reuse
from falproxy.signatures import HEAD
from falproxy.spool import Spool, hold
from falproxy.target import MODEL_CALLS, host_matches

Loc = tuple[str | int, ...]

# Where fal keeps files. What is there never changes: every file has an address of its own.
FILE_HOSTS = ("fal.media", "*.fal.media")
FILE_BUCKET = "https://storage.googleapis.com/falserverless/"
# Bytes of a body that are gone through on the event loop; more take a thread.
AT_ONCE = 64 * 2**10
READ_AT_ONCE = 4  # images of one call
# Large bodies of a process: more at a time hold up the event loop, and are no faster.
PARSED_AT_ONCE = 2


@dataclass(frozen=True, slots=True)
class Input:
    """What a model is asked, as far as it was looked at. tree: the JSON object. digests: of the
    images' bytes, by where they are. foreign: the addresses of those that somebody else serves.
    objection: one word for why the result cannot be shared, None where it can. is_large: whether
    going through it takes a thread.
    """

    tree: dict[str, object]
    digests: Mapping[Loc, str]
    foreign: Mapping[Loc, str]
    objection: str | None = None
    is_large: bool = False


INPUT = web.RequestKey("falproxy.input", Input)
UNREAD = Input({}, {}, {}, "input")


def check_images(
    rules: ImageRules, fetcher: Fetcher, reuse: Reuse | None, *, check_remote: bool
) -> Middleware:
    """Middleware: a model call with an image that is none is a 422 in fal's own shape.

    reuse: which calls' images are read whole, to know them again; None for no calls at all.
    check_remote: whether the first bytes of other calls' images are read from their addresses.
    """

    turns = asyncio.Semaphore(PARSED_AT_ONCE)

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        call = request[CALL]
        if call.method != hdrs.METH_POST or call.target.operation not in MODEL_CALLS:
            return await handler(request)
        request[INPUT] = UNREAD
        if call.body is None or hdrs.CONTENT_ENCODING in call.headers:
            return await handler(request)
        spool = await hold(call.body)
        request[CALL] = replace(call, body=spool.chunks(), length=spool.size)
        is_covered = reuse is not None and reuse.covers(call.method, call.target)
        objection = reuse.objection(call.target, call.headers) if reuse and is_covered else "other"
        inspection = Inspection(rules, fetcher, is_told_apart=not objection)
        inspection.turns = turns
        request[INPUT] = await inspection.inspect(spool, objection, check_remote=check_remote)
        return await handler(request)

    return middleware


class Inspection:
    """A look at one call's images. is_told_apart: whether all of their bytes are read, because the
    call may share its result with others that have the same ones. turns: for large bodies."""

    def __init__(self, rules: ImageRules, fetcher: Fetcher, *, is_told_apart: bool) -> None:
        self._rules = rules
        self._fetcher = fetcher
        self._is_told_apart = is_told_apart
        self._digests: dict[Loc, str] = {}
        self._foreign: dict[Loc, str] = {}
        self._is_known = True  # whether every image's bytes are
        self.turns = asyncio.Semaphore(1)

    async def inspect(self, spool: Spool, objection: str | None, *, check_remote: bool) -> Input:
        """Raises: InputRefused."""
        is_large = spool.size > AT_ONCE
        if is_large:
            async with self.turns:
                tree = await asyncio.to_thread(self._read, spool)
        else:
            tree = self._read(spool)
        if tree is None:
            return replace(UNREAD, objection=objection or UNREAD.objection)
        remote = [image for image in find_images(tree) if kind(image.value) is Kind.REMOTE]
        for image in remote:
            self._check_url(image)
        if self._is_told_apart or check_remote:
            await self._fetch(remote)
        if objection is None and not self._is_known:
            objection = "image"
        return Input(tree, self._digests, self._foreign, objection, is_large)

    def _read(self, spool: Spool) -> dict[str, object] | None:
        tree = parse_input(spool, secrets.token_hex(8))
        for image in find_images(tree):
            if kind(image.value) is Kind.DATA:
                judge(leading_bytes(image.value, HEAD), None, self._rules, image.loc)
                if self._is_told_apart:
                    self._digest(image)
            elif kind(image.value) is Kind.OTHER:
                self._is_known = False
        return tree

    def _digest(self, image: ImageInput) -> None:
        """Raises: InputRefused, it has too many bytes."""
        digest, size = hashlib.sha256(), 0
        pieces = decoded(image.value)
        for piece in pieces:
            digest.update(piece)
            size += len(piece)
            if size > self._rules.max_bytes:
                raise too_large(self._rules, image.loc)
        # Of a text that is no plain base64 fal may read more than we do.
        self._is_known &= pieces.is_whole
        self._digests[image.loc] = digest.hexdigest()

    def _check_url(self, image: ImageInput) -> None:
        """Raises: InputRefused, the address can only point inside."""
        try:
            self._fetcher.check_url(url_of(image))
        except UnreadUrl:
            self._is_known = False
        except FetchRefused as error:
            raise image_load_error(str(error), image.loc) from error

    async def _fetch(self, images: list[ImageInput]) -> None:
        """Reads some at a time. Raises: InputRefused."""
        slots = asyncio.Semaphore(READ_AT_ONCE)

        async def fetch(image: ImageInput) -> None:
            async with slots:
                await self._fetch_one(image)

        try:
            async with asyncio.TaskGroup() as group:
                for image in images:
                    group.create_task(fetch(image))
        except* ProxyError as refusals:
            raise refusals.exceptions[0] from None

    async def _fetch_one(self, image: ImageInput) -> None:
        url = url_of(image)
        try:
            if self._is_told_apart:
                fetched = await self._fetcher.digest(url, self._rules.max_bytes)
                judge(fetched.head, fetched.size, self._rules, image.loc)
                self._digests[image.loc] = fetched.digest
            else:
                head = await self._fetcher.head(url, HEAD)
                judge(head, None, self._rules, image.loc)
        except (FetchFailed, UnreadUrl):
            self._is_known = False  # fal may have more luck, and says so if not
        except FetchRefused as error:
            raise image_load_error(str(error), image.loc) from error
        except FetchTooLarge as error:
            raise too_large(self._rules, image.loc) from error
        if not self._is_kept_by_fal(url):
            self._foreign[image.loc] = url

    def _is_kept_by_fal(self, url: str) -> bool:
        """Whether an address is of fal's own store, or of the sandbox's."""
        host = URL(url).host or ""
        is_fal_s = host_matches(host.lower(), FILE_HOSTS) or url.startswith(FILE_BUCKET)
        return is_fal_s or self._fetcher.is_trusted(url)


def url_of(image: ImageInput) -> str:
    """Raises: InputRefused, it is longer than any address."""
    if not isinstance(image.value, str):
        raise image_load_error("The URL is too long.", image.loc)
    return image.value
