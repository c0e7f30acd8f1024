"""Middleware that stores the image inputs of model calls, after fal has returned their results.

The URLs of stored files are public. Inputs are therefore only stored if the call succeeded and its
result is not flagged by fal's safety checker. They are read when the call is sent, since a client
may delete its files once it has the result. No call waits for its inputs, or fails with them.
"""

import asyncio
import logging
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import islice

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from falproxy.concurrency import offload
from falproxy.fal.input_json import parse_query
from falproxy.fal.policy import app_of, normalized_path
from falproxy.fal.queue_documents import parse_submit_response
from falproxy.fal.target import MODEL_CALLS, Operation
from falproxy.media.image_rules import InputKind, find_images, input_kind
from falproxy.middleware.image_inputs import IMAGES_MAX, INSPECTED_INPUT, NOT_INSPECTED
from falproxy.middleware.rehost import EVENT_STREAM, read_document
from falproxy.proxy.call import CALL, Call
from falproxy.proxy.forward import DOCUMENT_MAX, JSON_TYPE, LINE_MAX, RelayedResponse
from falproxy.proxy.queue_job import JOB_TIMEOUT, JobFollower
from falproxy.proxy.upstream import UPSTREAM, Upstream
from falproxy.spool import SpoolQuota
from falproxy.stores.cache.eligibility import is_storable, storing_refusal
from falproxy.stores.files.inputs import ImageText, InputStore, PendingInputs

logger = logging.getLogger(__name__)

SUBMIT_RESPONSE_MAX = 2**20  # bytes
STREAMS_MAX = 20  # status streams of jobs; the status of further jobs is polled
RESULTS_MAX = 4  # results of jobs that are read at once
# Keys of an event that is about an error, or that flags an image.
VERDICT_KEYS = (b'"has_nsfw_concepts"', b'"error"', b'"detail"')


def store_inputs(inputs: InputStore, quota: SpoolQuota) -> Middleware:
    """Return the middleware, which sees only calls that are sent to fal.

    quota: for all large documents together.
    """
    decisions = Decisions(inputs, quota)

    @web.middleware
    async def store_inputs_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        call = request[CALL]
        if call.target.operation not in MODEL_CALLS or storing_refusal(call.headers):
            return await handler(request)
        images = await find_inputs(request)
        if not images:
            return await handler(request)
        pending = inputs.start(images)
        del images
        request[CALL] = replace(call, needs_identity=True)
        try:
            response = await handler(request)
            await decisions.decide(request, response, pending)
        except BaseException:
            pending.decide(False)
            raise
        return response

    return store_inputs_middleware


class Decisions:
    """Decides about the inputs of calls by fal's responses.

    quota: for all large documents together.
    """

    def __init__(self, inputs: InputStore, quota: SpoolQuota) -> None:
        self._inputs = inputs
        self._quota = quota
        self._stream_slots = asyncio.Semaphore(STREAMS_MAX)
        self._result_slots = asyncio.Semaphore(RESULTS_MAX)

    def __repr__(self) -> str:
        return f"<Decisions about {self._inputs!r}>"

    async def decide(
        self, request: web.Request, response: web.StreamResponse, pending: PendingInputs
    ) -> None:
        """Decide about inputs by a response, or start to wait for the result.

        Raises: ProxyError 502, 504, the response cannot be read.
        """
        if response.status != web.HTTPOk.status_code or not isinstance(response, RelayedResponse):
            pending.decide(False)
        elif pending.is_decided:
            return
        elif request[CALL].target.operation is Operation.SUBMIT:
            await self._decide_by_job(request[CALL], request.app[UPSTREAM], response, pending)
        elif response.content_type == EVENT_STREAM:
            decide_at_end(response, pending)
        elif JSON_TYPE.match(response.content_type):
            document = await read_document(response, self._quota)
            pending.decide(document is not None and await is_accepted(response.status, document))
        else:
            pending.decide(True)  # a file, which has no flags

    async def _decide_by_job(
        self, call: Call, upstream: Upstream, response: RelayedResponse, pending: PendingInputs
    ) -> None:
        submitted = parse_submit_response(await response.read(SUBMIT_RESPONSE_MAX) or b"")
        if submitted is None:
            pending.decide(False)
            return
        request_id, app = submitted
        app = app or app_of(normalized_path(call.target).strip("/"))
        follower = JobFollower(upstream, app, request_id, call.key, self._stream_slots)
        self._inputs.decide_by(pending, self._is_job_accepted(follower))

    async def _is_job_accepted(self, follower: JobFollower) -> bool:
        """Wait for the end of a job, and return whether its inputs may be stored.

        Raises: TimeoutError, ProxyError, the result cannot be read.
        """
        async with asyncio.timeout(JOB_TIMEOUT):
            await follower.wait_completed()
            async with self._result_slots:
                result = await follower.read_result(DOCUMENT_MAX)
                return result.body is not None and await is_accepted(result.status, result.body)


async def find_inputs(request: web.Request) -> list[ImageText]:
    """Return the images in the body and the query of a call, as far as these could be parsed."""
    query, inspected = request[CALL].target.query, request.get(INSPECTED_INPUT, NOT_INSPECTED)
    find = partial(find_texts, inspected.tree, query)
    return await asyncio.to_thread(find) if inspected.is_large else find()


def find_texts(tree: object, query: str) -> list[ImageText]:
    images = [*find_images(tree), *(find_images(parse_query(query)) if query else ())]
    texts = (each.value for each in images if input_kind(each.value) is not InputKind.OTHER)
    if len(images) > IMAGES_MAX:
        logger.warning("%d inputs of a call are not stored", len(images) - IMAGES_MAX)
    return [*islice(texts, IMAGES_MAX)]


async def is_accepted(status: int, document: bytes) -> bool:
    return await offload(document, partial(is_storable, status, document))


def decide_at_end(response: RelayedResponse, pending: PendingInputs) -> None:
    """Decide about the inputs when all events of a stream have been received."""
    verdict, reference = EventVerdict(), weakref.ref(response)

    def decide() -> None:
        verdict.add(b"")
        unsent = reference()  # which refers to this function
        is_complete = unsent is not None and unsent.is_body_complete
        pending.decide(is_complete and verdict.is_accepted)

    response.on_body_end(decide, verdict.add)
    weakref.finalize(response, in_loop(pending)).atexit = False


def in_loop(pending: PendingInputs) -> Callable[[], None]:
    """Return a function that gives inputs up, unless the event loop is closed."""
    loop = asyncio.get_running_loop()
    return lambda: None if loop.is_closed() else pending.decide(False)


class EventVerdict:
    """Whether the events of a stream have results, and none is an error or flagged."""

    def __init__(self) -> None:
        self._incomplete = b""  # the beginning of a line
        self._has_results = self._is_refused = False

    def __repr__(self) -> str:
        return f"<EventVerdict {'accepted' if self.is_accepted else 'not accepted'}>"

    @property
    def is_accepted(self) -> bool:
        return self._has_results and not self._is_refused

    def add(self, chunk: bytes) -> None:
        """Judge the events whose lines end in a chunk; an empty one is the end of the stream."""
        *lines, self._incomplete = (self._incomplete + chunk).split(b"\n")
        if not chunk:
            lines.append(self._incomplete)
        if len(self._incomplete) > LINE_MAX:
            self._is_refused, self._incomplete = True, b""
        for line in lines:
            if line.startswith(b"data:"):
                self._has_results = True
                if any(key in line for key in VERDICT_KEYS):
                    self._is_refused |= not is_storable(web.HTTPOk.status_code, line[5:])
