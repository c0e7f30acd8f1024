"""Image inputs of model calls: what is no picture is refused before fal hears of it."""

import asyncio
import hashlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from falproxy.errors import ProxyError
from falproxy.fal.file_urls import is_fal_file
from falproxy.fal.image_fields import may_name_images
from falproxy.fal.input_json import Loc, Text, parse_input
from falproxy.fal.target import MODEL_CALLS
from falproxy.media.fetch import Fetcher, FetchFailed, FetchRefused, FetchTooLarge, UnreadUrl
from falproxy.media.image_format import HEAD, dimensions, sniff
from falproxy.media.image_rules import (
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
from falproxy.proxy.call import CALL, IMAGE_RULES
from falproxy.proxy.head_only import head_only
from falproxy.spool import Room, Spool, hold
from falproxy.stores.cache.eligibility import Reuse

# Bytes of a body that are gone through on the event loop; more take a thread.
AT_ONCE = 16 * 2**10
SHORT_HEAD = 8 * 2**10  # bytes of a picture that say what it is as a rule
READ_AT_ONCE = 4  # images of one call
# Images of one call that are looked at, as they stand there or behind addresses. Models take a
# dozen; a call with more than these goes on unseen, and is not shared.
IMAGES_MAX = 100
REMOTE_MAX = 32
REMOTE_SECONDS = 30.0  # for all of them
# Large bodies of a process: more at a time hold up the event loop, and are no faster.
PARSED_AT_ONCE = 2
HELD_MAX = 4 * 2**30  # bytes on disk of all bodies of a process


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
NOT_COVERED = "other"  # the objection to sharing what the cache is not for
UNREAD = Input({}, {}, {}, "input")


def check_images(
    rules: ImageRules, fetcher: Fetcher, reuse: Reuse | None, *, check_remote: bool
) -> Middleware:
    """Middleware: a model call with an image that is none is a 422 in fal's own shape.

    reuse: which calls' images are read whole, to know them again; None for no calls at all.
    check_remote: whether the first bytes of other calls' images are read from their addresses,
    as they always are for a path with rules of its own.
    """

    turns, room = asyncio.Semaphore(PARSED_AT_ONCE), Room(HELD_MAX)

    @head_only
    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        call = request[CALL]
        if call.method != hdrs.METH_POST or call.target.operation not in MODEL_CALLS:
            return await handler(request)
        request[INPUT] = UNREAD
        if call.body is None or call.headers.get(hdrs.CONTENT_ENCODING, "identity") != "identity":
            return await handler(request)
        spool = await hold(call.body, room)
        request[CALL] = replace(call, body=spool.chunks(), length=spool.size)
        objection: str | None = NOT_COVERED
        if reuse is not None and reuse.covers(call.method, call.target):
            objection = reuse.objection(call.target, call.headers)
        own = request.get(IMAGE_RULES)
        inspection = Inspection(rules.narrowed(own), fetcher, turns, is_told_apart=not objection)
        is_read = check_remote or own is not None
        request[INPUT] = await inspection.inspect(spool, objection, check_remote=is_read)
        try:
            return await handler(request)
        finally:
            # A connection refers to its last request, whose body need not stay on the disk.
            request[INPUT] = replace(UNREAD, objection=request[INPUT].objection)

    return middleware


def names_images(spool: Spool) -> bool:
    """Whether a small body could have an image in it."""
    return may_name_images(spool.read(0, spool.size))


def judge_text(value: str | Text, rules: ImageRules, loc: Loc) -> None:
    """Lets a data URI pass by its first bytes: by few of them where they say enough.

    Raises: InputRefused; ValueError, it is broken.
    """
    head = leading_bytes(value, SHORT_HEAD)
    known = sniff(head)
    if known is None or dimensions(head, known) is None:
        head = leading_bytes(value, HEAD)
    judge(head, None, rules, loc)


class Inspection:
    """A look at one call's images. is_told_apart: whether all of their bytes are read, because the
    call may share its result with others that have the same ones. turns: for large bodies."""

    def __init__(
        self,
        rules: ImageRules,
        fetcher: Fetcher,
        turns: asyncio.Semaphore | None = None,
        *,
        is_told_apart: bool,
    ) -> None:
        self._rules = rules
        self._fetcher = fetcher
        self._turns = turns or asyncio.Semaphore()
        self._is_told_apart = is_told_apart
        self._digests: dict[Loc, str] = {}
        self._remote: dict[Loc, str] = {}
        self._foreign: dict[Loc, str] = {}
        self._is_known = True  # whether every image's bytes are

    async def inspect(self, spool: Spool, objection: str | None, *, check_remote: bool) -> Input:
        """Raises: InputRefused."""
        if objection is not None and spool.is_small and not names_images(spool):
            return replace(UNREAD, objection=objection)
        is_large = spool.size > AT_ONCE
        if is_large:
            async with self._turns:
                tree = await asyncio.to_thread(self._read, spool)
        else:
            tree = self._read(spool)
        if tree is None:
            return replace(UNREAD, objection=objection or UNREAD.objection)
        if self._is_told_apart or check_remote:
            await self._fetch()
        if objection is None and not self._is_known:
            objection = "image"
        return Input(tree, self._digests, self._foreign, objection, is_large)

    def _read(self, spool: Spool) -> dict[str, object] | None:
        """The call's JSON. Its images are checked, as far as they stand in it."""
        tree = parse_input(spool, secrets.token_hex(8), to_the_end=self._is_told_apart)
        try:
            self._look_at(find_images(tree))
        except ValueError:  # a string that turned out broken: fal says so
            return None
        return tree

    def _look_at(self, images: Sequence[ImageInput]) -> None:
        """Raises: InputRefused; ValueError, a string is broken."""
        if len(images) > IMAGES_MAX:
            self._is_known = False
            return
        for image in images:
            known_as = kind(image.value)
            if known_as is Kind.DATA:
                judge_text(image.value, self._rules, image.loc)
                if self._is_told_apart:
                    self._digest(image)
            elif known_as is Kind.REMOTE and isinstance(image.value, str):
                self._check_url(image.value, image.loc)
            else:
                self._is_known = False

    def _digest(self, image: ImageInput) -> None:
        """Raises: InputRefused, it has too many bytes."""
        digest, size = hashlib.sha256(), 0
        pieces = decoded(image.value)
        for piece in pieces:
            digest.update(piece)
            size += len(piece)
            if size > self._rules.max_bytes:
                raise too_large(self._rules, image.loc)
        # Of a text that is no plain base64 fal may read something else than we do.
        self._is_known &= pieces.is_whole and pieces.is_plain
        self._digests[image.loc] = digest.hexdigest()

    def _check_url(self, url: str, loc: Loc) -> None:
        """Raises: InputRefused, the address can only point inside."""
        try:
            self._fetcher.check_url(url)
        except UnreadUrl:
            self._is_known = False
        except FetchRefused as error:
            raise image_load_error(str(error), loc) from error
        else:
            self._remote[loc] = url

    async def _fetch(self) -> None:
        """Reads some at a time. Raises: InputRefused."""
        if len(self._remote) > REMOTE_MAX:
            self._is_known = False
            return
        slots = asyncio.Semaphore(READ_AT_ONCE)

        async def fetch(url: str, loc: Loc) -> None:
            async with slots:
                await self._fetch_one(url, loc)

        try:
            async with asyncio.timeout(REMOTE_SECONDS), asyncio.TaskGroup() as group:
                for loc, url in self._remote.items():
                    group.create_task(fetch(url, loc))
        except* ProxyError as refusals:
            raise refusals.exceptions[0] from None
        except* TimeoutError:
            self._is_known = False

    async def _fetch_one(self, url: str, loc: Loc) -> None:
        try:
            if self._is_told_apart:
                fetched = await self._fetcher.digest(url, self._rules.max_bytes)
                judge(fetched.head, fetched.size, self._rules, loc)
                self._digests[loc] = fetched.digest
            else:
                judge(await self._fetcher.head(url, HEAD), None, self._rules, loc)
        except (FetchFailed, UnreadUrl):
            self._is_known = False  # fal may have more luck, and says so if not
        except FetchRefused as error:
            raise image_load_error(str(error), loc) from error
        except FetchTooLarge as error:
            raise too_large(self._rules, loc) from error
        if not self._fetcher.is_trusted(url) and not is_fal_file(url):
            self._foreign[loc] = url  # somebody else's, who may show others something else
