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
from falproxy.fal.image_fields import may_contain_images
from falproxy.fal.input_json import Loc, LongString, parse_input
from falproxy.fal.target import MODEL_CALLS
from falproxy.media.fetch import Fetcher, FetchFailed, FetchRefused, FetchTooLarge, UnsupportedUrl
from falproxy.media.image_format import SNIFF_BYTES, dimensions, sniff
from falproxy.media.image_rules import (
    ImageInput,
    ImageLimits,
    InputKind,
    check_image,
    decode_data_uri,
    file_too_large,
    find_images,
    image_load_error,
    input_kind,
    leading_bytes,
)
from falproxy.proxy.call import CALL, IMAGE_LIMITS
from falproxy.proxy.head_only import head_only
from falproxy.spool import Spool, SpoolQuota, spool_body
from falproxy.stores.cache.eligibility import CacheEligibility

# Bytes of a body that are gone through on the event loop; more take a thread.
INLINE_PARSE_MAX = 16 * 2**10
SHORT_SNIFF_BYTES = 8 * 2**10  # bytes of a picture that say what it is as a rule
FETCH_CONCURRENCY = 4  # images of one call
# Images of one call that are looked at, as they stand there or behind addresses. Models take a
# dozen; a call with more than these goes on unseen, and is not shared.
IMAGES_MAX = 100
REMOTE_MAX = 32
REMOTE_TIMEOUT = 30.0  # for all of them
# Large bodies of a process: more at a time hold up the event loop, and are no faster.
PARSE_CONCURRENCY = 2
SPOOL_MAX = 4 * 2**30  # bytes on disk of all bodies of a process


@dataclass(frozen=True, slots=True)
class InspectedInput:
    """What a model is asked, as far as it was looked at. tree: the JSON object. digests: of the
    images' bytes, by where they are. foreign: the addresses of those that somebody else serves.
    objection: one word for why the result cannot be shared, None where it can. is_large: whether
    going through it takes a thread.
    """

    tree: dict[str, object]
    digests: Mapping[Loc, str]
    third_party_urls: Mapping[Loc, str]
    bypass_reason: str | None = None
    is_large: bool = False


INSPECTED_INPUT = web.RequestKey("falproxy.input", InspectedInput)
NOT_CACHEABLE = "other"  # the objection to sharing what the cache is not for
NOT_INSPECTED = InspectedInput({}, {}, {}, "input")


def check_images(
    limits: ImageLimits,
    fetcher: Fetcher,
    eligibility: CacheEligibility | None,
    *,
    check_remote: bool,
) -> Middleware:
    """Middleware: a model call with an image that is none is a 422 in fal's own shape.

    reuse: which calls' images are read whole, to know them again; None for no calls at all.
    check_remote: whether the first bytes of other calls' images are read from their addresses,
    as they always are for a path with rules of its own.
    """

    turns, room = asyncio.Semaphore(PARSE_CONCURRENCY), SpoolQuota(SPOOL_MAX)

    @head_only
    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        call = request[CALL]
        if call.method != hdrs.METH_POST or call.target.operation not in MODEL_CALLS:
            return await handler(request)
        request[INSPECTED_INPUT] = NOT_INSPECTED
        if call.body is None or call.headers.get(hdrs.CONTENT_ENCODING, "identity") != "identity":
            return await handler(request)
        spool = await spool_body(call.body, room)
        request[CALL] = replace(call, body=spool.chunks(), length=spool.size)
        objection: str | None = NOT_CACHEABLE
        if eligibility is not None and eligibility.is_cacheable(call.method, call.target):
            objection = eligibility.bypass_reason(call.target, call.headers)
        own = request.get(IMAGE_LIMITS)
        inspection = ImageCheck(
            limits.intersection(own), fetcher, turns, needs_digest=not objection
        )
        is_read = check_remote or own is not None
        request[INSPECTED_INPUT] = await inspection.inspect(spool, objection, check_remote=is_read)
        try:
            return await handler(request)
        finally:
            # A connection refers to its last request, whose body need not stay on the disk.
            request[INSPECTED_INPUT] = replace(
                NOT_INSPECTED, bypass_reason=request[INSPECTED_INPUT].bypass_reason
            )

    return middleware


def spool_may_contain_images(spool: Spool) -> bool:
    """Whether a small body could have an image in it."""
    return may_contain_images(spool.read(0, spool.size))


def check_data_uri(value: str | LongString, limits: ImageLimits, loc: Loc) -> None:
    """Lets a data URI pass by its first bytes: by few of them where they say enough.

    Raises: InputRefused; ValueError, it is broken.
    """
    head = leading_bytes(value, SHORT_SNIFF_BYTES)
    known = sniff(head)
    if known is None or dimensions(head, known) is None:
        head = leading_bytes(value, SNIFF_BYTES)
    check_image(head, None, limits, loc)


class ImageCheck:
    """A look at one call's images. is_told_apart: whether all of their bytes are read, because the
    call may share its result with others that have the same ones. turns: for large bodies."""

    def __init__(
        self,
        limits: ImageLimits,
        fetcher: Fetcher,
        parse_slots: asyncio.Semaphore | None = None,
        *,
        needs_digest: bool,
    ) -> None:
        self._limits = limits
        self._fetcher = fetcher
        self._parse_slots = parse_slots or asyncio.Semaphore()
        self._needs_digest = needs_digest
        self._digests: dict[Loc, str] = {}
        self._remote_urls: dict[Loc, str] = {}
        self._third_party_urls: dict[Loc, str] = {}
        self._is_fully_digested = True  # whether every image's bytes are

    async def inspect(
        self, spool: Spool, bypass_reason: str | None, *, check_remote: bool
    ) -> InspectedInput:
        """Raises: InputRefused."""
        if bypass_reason is not None and spool.is_small and not spool_may_contain_images(spool):
            return replace(NOT_INSPECTED, bypass_reason=bypass_reason)
        is_large = spool.size > INLINE_PARSE_MAX
        if is_large:
            async with self._parse_slots:
                tree = await asyncio.to_thread(self._parse, spool)
        else:
            tree = self._parse(spool)
        if tree is None:
            return replace(
                NOT_INSPECTED, bypass_reason=bypass_reason or NOT_INSPECTED.bypass_reason
            )
        if self._needs_digest or check_remote:
            await self._fetch_remote()
        if bypass_reason is None and not self._is_fully_digested:
            bypass_reason = "image"
        return InspectedInput(tree, self._digests, self._third_party_urls, bypass_reason, is_large)

    def _parse(self, spool: Spool) -> dict[str, object] | None:
        """The call's JSON. Its images are checked, as far as they stand in it."""
        tree = parse_input(spool, secrets.token_hex(8), validate_strings=self._needs_digest)
        try:
            self._check_images(find_images(tree))
        except ValueError:  # a string that turned out broken: fal says so
            return None
        return tree

    def _check_images(self, images: Sequence[ImageInput]) -> None:
        """Raises: InputRefused; ValueError, a string is broken."""
        if len(images) > IMAGES_MAX:
            self._is_fully_digested = False
            return
        for image in images:
            known_as = input_kind(image.value)
            if known_as is InputKind.DATA:
                check_data_uri(image.value, self._limits, image.loc)
                if self._needs_digest:
                    self._digest_data_uri(image)
            elif known_as is InputKind.REMOTE and isinstance(image.value, str):
                self._check_url(image.value, image.loc)
            else:
                self._is_fully_digested = False

    def _digest_data_uri(self, image: ImageInput) -> None:
        """Raises: InputRefused, it has too many bytes."""
        digest, size = hashlib.sha256(), 0
        pieces = decode_data_uri(image.value)
        for piece in pieces:
            digest.update(piece)
            size += len(piece)
            if size > self._limits.max_bytes:
                raise file_too_large(self._limits, image.loc)
        # Of a text that is no plain base64 fal may read something else than we do.
        self._is_fully_digested &= pieces.is_complete and pieces.is_canonical
        self._digests[image.loc] = digest.hexdigest()

    def _check_url(self, url: str, loc: Loc) -> None:
        """Raises: InputRefused, the address can only point inside."""
        try:
            self._fetcher.check_url(url)
        except UnsupportedUrl:
            self._is_fully_digested = False
        except FetchRefused as error:
            raise image_load_error(str(error), loc) from error
        else:
            self._remote_urls[loc] = url

    async def _fetch_remote(self) -> None:
        """Reads some at a time. Raises: InputRefused."""
        if len(self._remote_urls) > REMOTE_MAX:
            self._is_fully_digested = False
            return
        slots = asyncio.Semaphore(FETCH_CONCURRENCY)

        async def fetch(url: str, loc: Loc) -> None:
            async with slots:
                await self._fetch_image(url, loc)

        try:
            async with asyncio.timeout(REMOTE_TIMEOUT), asyncio.TaskGroup() as group:
                for loc, url in self._remote_urls.items():
                    group.create_task(fetch(url, loc))
        except* ProxyError as refusals:
            raise refusals.exceptions[0] from None
        except* TimeoutError:
            self._is_fully_digested = False

    async def _fetch_image(self, url: str, loc: Loc) -> None:
        try:
            if self._needs_digest:
                fetched = await self._fetcher.fetch_digest(url, self._limits.max_bytes)
                check_image(fetched.head, fetched.size, self._limits, loc)
                self._digests[loc] = fetched.digest
            else:
                check_image(
                    await self._fetcher.fetch_first_bytes(url, SNIFF_BYTES), None, self._limits, loc
                )
        except (FetchFailed, UnsupportedUrl):
            self._is_fully_digested = False  # fal may have more luck, and says so if not
        except FetchRefused as error:
            raise image_load_error(str(error), loc) from error
        except FetchTooLarge as error:
            raise file_too_large(self._limits, loc) from error
        if not self._fetcher.is_trusted(url) and not is_fal_file(url):
            self._third_party_urls[loc] = url  # somebody else's, who may show others something else
