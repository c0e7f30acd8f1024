"""Middleware that checks the image inputs of model calls and refuses invalid ones."""

import asyncio
import hashlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from falproxy.concurrency import map_concurrently
from falproxy.fal.estimates import call_inputs
from falproxy.fal.file_urls import is_fal_file
from falproxy.fal.image_fields import may_contain_images
from falproxy.fal.input_json import Loc, LongString, has_few_values, parse_input, parse_query
from falproxy.fal.target import MODEL_CALLS
from falproxy.json_object import parse_object
from falproxy.media.fetch import Fetcher, FetchFailed, FetchRefused, FetchTooLarge, UnsupportedUrl
from falproxy.media.image_format import SNIFF_BYTES, dimensions, sniff
from falproxy.media.image_rules import (
    ImageInput,
    ImageLimits,
    InputKind,
    InputRefused,
    check_image,
    decode_data_uri,
    file_too_large,
    find_images,
    image_load_error,
    input_kind,
    leading_bytes,
)
from falproxy.proxy.call import CALL, IMAGE_LIMITS, PRICED_INPUTS
from falproxy.proxy.head_only import any_request_id
from falproxy.proxy.headers import is_identity
from falproxy.spool import Spool, SpoolQuota, spool_body
from falproxy.stores.cache.eligibility import CacheEligibility

INLINE_PARSE_MAX = 16 * 2**10  # bytes of a body that is parsed on the event loop, not in a thread
SHORT_SNIFF_BYTES = 8 * 2**10  # bytes that contain the dimensions of most images
FETCH_CONCURRENCY = 4  # images of one call
# Images of one call that are checked, in all and behind URLs. Models accept about a dozen. Calls
# with more images are forwarded unchecked, and their results are not cached.
IMAGES_MAX = 100
REMOTE_MAX = 32
REMOTE_TIMEOUT = 30.0  # seconds for all images of one call
# Large bodies of a process at once; more would block the event loop and be no faster.
PARSE_CONCURRENCY = 2
SPOOL_MAX = 4 * 2**30  # bytes on disk for all bodies of a process


@dataclass(frozen=True, slots=True)
class InspectedInput:
    """The input of a model call, as far as it was inspected.

    tree: the JSON object.
    digests: digests of the images, by location in the input.
    third_party_urls: URLs of images on hosts that are neither fal's nor ours, by location.
    bypass_reason: one word for why the result is not cacheable, or None.
    is_large: traverse the tree in a thread.
    is_parsed: the tree is the whole input.
    """

    tree: dict[str, object]
    digests: Mapping[Loc, str]
    third_party_urls: Mapping[Loc, str]
    bypass_reason: str | None = None
    is_large: bool = False
    is_parsed: bool = False


# Set for a call whose input has to be parsed: its cost depends on it.
NEEDS_INPUT = web.RequestKey("falproxy.needs_input", bool)
INSPECTED_INPUT = web.RequestKey("falproxy.input", InspectedInput)
NOT_CACHEABLE = "other"  # bypass reason of calls that the cache is not configured for
NOT_INSPECTED = InspectedInput({}, {}, {}, "input")


def check_images(
    limits: ImageLimits,
    fetcher: Fetcher,
    eligibility: CacheEligibility | None,
    *,
    check_remote: bool,
) -> Middleware:
    """Return the middleware that responds to invalid images with 422 in fal's format.

    eligibility: the calls whose results are cached, for which all images are read completely; None
        if nothing is cached.
    check_remote: whether the first bytes of images behind URLs are fetched for other calls too.
        They always are for a path with limits of its own.
    """

    parse_slots, quota = asyncio.Semaphore(PARSE_CONCURRENCY), SpoolQuota(SPOOL_MAX)

    @any_request_id
    @web.middleware
    async def check_images_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        call = request[CALL]
        if call.target.operation not in MODEL_CALLS:
            return await handler(request)
        request[INSPECTED_INPUT] = NOT_INSPECTED
        route_limits = request.get(IMAGE_LIMITS)
        call_limits = limits.intersection(route_limits)
        must_fetch = check_remote or route_limits is not None
        if call.target.query:
            check = ImageCheck(call_limits, fetcher, needs_digest=False)
            await check.inspect_query(call.target.query, check_remote=must_fetch)
        if call.body is None:
            request[PRICED_INPUTS] = call_inputs(call.target.query, {})
        if call.body is None or not is_identity(call.headers):
            return await handler(request)
        spool = await spool_body(call.body, quota)
        request[CALL] = replace(call, body=spool.chunks(), length=spool.size)
        bypass_reason: str | None = NOT_CACHEABLE
        if eligibility is not None and eligibility.is_cacheable(call.target):
            bypass_reason = eligibility.bypass_reason(call.target, call.headers)
        check = ImageCheck(call_limits, fetcher, parse_slots, needs_digest=not bypass_reason)
        needs_input = request.get(NEEDS_INPUT, False)
        inspected = await check.inspect(
            spool, bypass_reason, check_remote=must_fetch, needs_input=needs_input
        )
        request[INSPECTED_INPUT] = inspected
        if (tree := inspected.tree or await read_object(spool)) is not None:
            request[PRICED_INPUTS] = call_inputs(call.target.query, tree)
        try:
            return await handler(request)
        finally:
            # A connection refers to its last request; the body must not stay on the disk with it.
            request[INSPECTED_INPUT] = replace(
                NOT_INSPECTED, bypass_reason=request[INSPECTED_INPUT].bypass_reason
            )

    return check_images_middleware


async def read_object(spool: Spool) -> dict[str, object] | None:
    """Return the JSON object of a body that was not inspected, for its price; None for other or
    large bodies."""
    if not spool.is_small:
        return None
    body = spool.read(0, spool.size)
    if len(body) <= INLINE_PARSE_MAX:
        return parse_object(body)
    return await asyncio.to_thread(parse_object, body) if has_few_values(body) else None


def spool_may_contain_images(spool: Spool) -> bool:
    return may_contain_images(spool.read(0, spool.size))


def check_data_uri(value: str | LongString, limits: ImageLimits, loc: Loc) -> None:
    """Check a data URI by its first bytes, by more of them only if the format or the dimensions are
    not among the first few.

    Raises: InputRefused; ValueError, it is malformed.
    """
    head = leading_bytes(value, SHORT_SNIFF_BYTES)
    image_format = sniff(head)
    if image_format is None or dimensions(head, image_format) is None:
        head = leading_bytes(value, SNIFF_BYTES)
    if sniff(head) is None:
        joined = leading_bytes(value, SNIFF_BYTES, without_line_ends=True)
        head = head if sniff(joined) is None else joined
    check_image(head, None, limits, loc)


class ImageCheck:
    """The check of one call's images.

    parse_slots: limits the large bodies that are parsed at the same time.
    needs_digest: read all images completely, since their digests are part of the cache key.
    """

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
        self._is_fully_digested = True  # every image has a digest

    async def inspect(
        self,
        spool: Spool,
        bypass_reason: str | None,
        *,
        check_remote: bool,
        needs_input: bool = False,
    ) -> InspectedInput:
        """Check the images of a body.

        check_remote: fetch images behind URLs, even if no digests are needed.
        needs_input: parse the body, even if it has no images.
        Raises: InputRefused.
        """
        may_skip = bypass_reason is not None and not needs_input
        if may_skip and spool.is_small and not spool_may_contain_images(spool):
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
        return InspectedInput(
            tree, self._digests, self._third_party_urls, bypass_reason, is_large, is_parsed=True
        )

    async def inspect_query(self, query: str, *, check_remote: bool) -> None:
        """Check the images in the query of a target: fal takes inputs there too.

        check_remote: fetch images behind URLs.
        Raises: InputRefused.
        """
        images = find_images(parse_query(query))
        if not images:
            return
        try:
            self._check_images(images)
            if check_remote:
                await self._fetch_remote()
        except InputRefused as error:
            error.move_to_query()
            raise

    def _parse(self, spool: Spool) -> dict[str, object] | None:
        """Return the JSON object of a body, after a check of its inline images. None if it is
        malformed: fal reports that."""
        tree = parse_input(spool, secrets.token_hex(8), validate_strings=self._needs_digest)
        try:
            self._check_images(find_images(tree))
        except ValueError:  # a malformed string
            return None
        return tree

    def _check_images(self, images: Sequence[ImageInput]) -> None:
        """Raises: InputRefused; ValueError, a string is malformed."""
        if len(images) > IMAGES_MAX:
            self._is_fully_digested = False
            return
        for image in images:
            kind = input_kind(image.value)
            if kind is InputKind.DATA:
                check_data_uri(image.value, self._limits, image.loc)
                if self._needs_digest:
                    self._digest_data_uri(image)
            elif kind is InputKind.REMOTE and isinstance(image.value, str):
                self._check_url(image.value, image.loc)
            else:
                self._is_fully_digested = False

    def _digest_data_uri(self, image: ImageInput) -> None:
        """Raises: InputRefused, it has too many bytes."""
        digest, size = hashlib.sha256(), 0
        chunks = decode_data_uri(image.value)
        for chunk in chunks:
            digest.update(chunk)
            size += len(chunk)
            if size > self._limits.max_bytes:
                raise file_too_large(self._limits, image.loc)
        # fal may decode text that is not plain base64 to other bytes than we do.
        self._is_fully_digested &= chunks.is_complete and chunks.is_canonical
        self._digests[image.loc] = digest.hexdigest()

    def _check_url(self, url: str, loc: Loc) -> None:
        """Raises: InputRefused, the URL points to a private address."""
        try:
            self._fetcher.check_url(url)
        except UnsupportedUrl:
            self._is_fully_digested = False
        except FetchRefused as error:
            raise image_load_error(str(error), loc) from error
        else:
            self._remote_urls[loc] = url

    async def _fetch_remote(self) -> None:
        """Fetch the images behind URLs concurrently. Raises: InputRefused."""
        if len(self._remote_urls) > REMOTE_MAX:
            self._is_fully_digested = False
            return
        try:
            async with asyncio.timeout(REMOTE_TIMEOUT):
                await map_concurrently(self._fetch_image, self._remote_urls, FETCH_CONCURRENCY)
        except TimeoutError:
            self._is_fully_digested = False

    async def _fetch_image(self, loc: Loc) -> None:
        url = self._remote_urls[loc]
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
            self._is_fully_digested = False  # fal may be able to fetch it, or reports the error
        except FetchRefused as error:
            raise image_load_error(str(error), loc) from error
        except FetchTooLarge as error:
            raise file_too_large(self._limits, loc) from error
        if not self._fetcher.is_trusted(url) and not is_fal_file(url):
            self._third_party_urls[loc] = url  # its host may send other bytes to other clients
