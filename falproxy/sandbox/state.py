"""State of one offline fal: configuration, files, jobs, and a record of the requests."""

import asyncio
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from decimal import Decimal
from typing import NamedTuple

from aiohttp import web
from multidict import CIMultiDictProxy

from falproxy.sandbox.files import FileStore
from falproxy.sandbox.job_queue import JobQueue
from falproxy.sandbox.live_models import LIVE_MODELS
from falproxy.sandbox.live_sessions import LiveSession, LiveSessions
from falproxy.sandbox.models import MODELS
from falproxy.sandbox.tokens import TokenIssuer
from falproxy.sandbox.webhooks import WebhookSigner

SEEN_MAX, PAID_MAX, TAGS_MAX = 1000, 500, 10_000  # records kept
MICROS_PER_USD = 1_000_000
RUNNERS = 4
ENCODERS = 2  # videos and sounds that are encoded at once; each takes about 80 MB


@dataclass(frozen=True, slots=True)
class SeenRequest:
    """Record of one request.

    host: fal host without port.
    path, query: byte for byte as received.
    status: status of the response, 499 if the client disconnected before it.
    """

    method: str
    host: str
    path: str
    query: str
    headers: CIMultiDictProxy[str]
    status: int


class PaidJob(NamedTuple):
    """Record of one billed job.

    input: the request body, parsed from JSON.
    """

    endpoint: str
    input: object
    request_id: str


@dataclass(frozen=True, slots=True)
class PendingUpload:
    """An upload that was initiated and not completed yet.

    key: key of the future file.
    secret: signature in the upload URL.
    """

    key: str
    content_type: str
    secret: str


class Sandbox:
    """An offline fal.

    public_url: absolute URL of its CDN, the prefix of file and upload URLs.
    speed: divisor of the simulated delays.
    key: the only accepted key, as `id:secret`. None accepts any key.
    runners: number of queued jobs that run at the same time.
    balance: USD left on the account; None for an account without an end. A call that has begun is
        billed completely.
    hosts: further host names to respond to, such as `*.example.com`; see `hosts.py`.
    """

    def __init__(
        self,
        public_url: str = "http://127.0.0.1:8081",
        speed: float = 1.0,
        key: str | None = None,
        *,
        runners: int = RUNNERS,
        balance: Decimal | None = None,
        hosts: Collection[str] = (),
    ) -> None:
        self.public_url = public_url
        self.speed = speed
        self.key = key
        self.balance = balance
        self.hosts = tuple(hosts)
        self.files = FileStore()
        self.queue = JobQueue(runners)
        self.encoders = asyncio.Semaphore(ENCODERS)
        self.tokens = TokenIssuer()
        self.signer = WebhookSigner()
        self.live = LiveSessions(self.bill_session)
        self.uploads: dict[str, PendingUpload] = {}
        self.sockets: set[web.WebSocketResponse] = set()
        self.reset()

    def reset(self) -> None:
        """Clear counters and records. Jobs and files stay."""
        self.calls = 0
        self.cost = Decimal(0)  # USD
        self.jobs_by_endpoint: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        self.seen: list[SeenRequest] = []
        self.paid: list[PaidJob] = []
        self.keys_seen: set[str] = set()
        self.cost_by_tag: Counter[str] = Counter()  # micro-USD

    @property
    def jobs(self) -> int:
        """Number of billed jobs."""
        return self.jobs_by_endpoint.total()

    def record_request(self, seen: SeenRequest) -> None:
        self.calls += 1
        self.seen.append(seen)
        del self.seen[:-SEEN_MAX]
        self.keys_seen.update(seen.headers.getall("Authorization", ()))

    @property
    def is_locked(self) -> bool:
        """Whether the account has run out of balance."""
        return self.balance is not None and self.balance <= 0

    def bill(
        self,
        endpoint: str,
        body: object,
        request_id: str,
        units: Decimal,
        tags: tuple[str, ...] = (),
    ) -> None:
        """Record a finished job, add its price to the cost, and take it from the balance.

        tags: of the request, as `key=value`.
        """
        cost = (MODELS.get(endpoint) or LIVE_MODELS[endpoint]).price * units
        self.cost += cost
        if self.balance is not None:
            self.balance -= cost
        if len(self.cost_by_tag) < TAGS_MAX:
            self.cost_by_tag.update(dict.fromkeys(tags, int(cost * MICROS_PER_USD)))
        self.jobs_by_endpoint[endpoint] += 1
        self.paid.append(PaidJob(endpoint, body, request_id))
        del self.paid[:-PAID_MAX]

    def bill_session(self, session: LiveSession) -> None:
        """Bill a session of live video that has ended."""
        units = Decimal(f"{session.seconds:.3f}")
        self.bill(session.endpoint, {}, session.id, units, session.tags)

    def file_url(self, key: str) -> str:
        return f"{self.public_url.rstrip('/')}/files/b/{key}"

    def __repr__(self) -> str:
        return f"<Sandbox {self.public_url} calls={self.calls} jobs={self.jobs} {self.queue!r}>"
