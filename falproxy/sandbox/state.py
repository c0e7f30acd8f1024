"""What one offline fal knows and counts; every handler works on it."""

from collections import Counter
from dataclasses import dataclass
from decimal import Decimal
from typing import NamedTuple

from aiohttp import web
from multidict import CIMultiDictProxy

from falproxy.sandbox.files import FileStore
from falproxy.sandbox.job_queue import Queue
from falproxy.sandbox.models import MODELS
from falproxy.sandbox.tokens import Tokens
from falproxy.sandbox.webhooks import Signer

SEEN_MAX, PAID_MAX = 1000, 500  # how many are remembered one by one
RUNNERS = 4


@dataclass(frozen=True, slots=True)
class Seen:
    """One request as it arrived. host: fal's, without port; path and query: byte for byte;
    status: what was answered, 499 when the client went away first."""

    method: str
    host: str
    path: str
    query: str
    headers: CIMultiDictProxy[str]
    status: int


class Paid(NamedTuple):
    """One job that produced its result. input: the body as it was sent."""

    endpoint: str
    input: object
    request_id: str


@dataclass(frozen=True, slots=True)
class Upload:
    """An upload that was announced: the file it becomes, and the secret of its URL."""

    key: str
    content_type: str
    secret: str


class Sandbox:
    """An offline fal: how it behaves, what it holds, what it has seen.

    public_url: absolute address of its CDN part; file and upload URLs begin with it.
    speed: believable delays are divided by it. key: the only one accepted, as `id:secret`;
    None accepts any. runners: how many queued jobs run at once.
    """

    def __init__(
        self,
        public_url: str = "http://127.0.0.1:8081",
        speed: float = 1.0,
        key: str | None = None,
        *,
        runners: int = RUNNERS,
    ) -> None:
        self.public_url = public_url
        self.speed = speed
        self.key = key
        self.files = FileStore()
        self.queue = Queue(runners)
        self.tokens = Tokens()
        self.signer = Signer()
        self.uploads: dict[str, Upload] = {}
        self.sockets: set[web.WebSocketResponse] = set()
        self.reset()

    def reset(self) -> None:
        """Forget what was counted and seen; jobs and files stay."""
        self.calls = 0
        self.spent = Decimal(0)
        self.jobs_by_endpoint: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        self.seen: list[Seen] = []
        self.paid: list[Paid] = []
        self.keys_seen: set[str] = set()

    @property
    def jobs(self) -> int:
        """How many jobs were paid."""
        return self.jobs_by_endpoint.total()

    def record(self, seen: Seen) -> None:
        self.calls += 1
        self.seen.append(seen)
        del self.seen[:-SEEN_MAX]
        self.keys_seen.update(seen.headers.getall("Authorization", ()))

    def charge(self, endpoint: str, body: object, request_id: str, units: int) -> None:
        """Count a job that has produced its result."""
        self.spent += MODELS[endpoint].price * units
        self.jobs_by_endpoint[endpoint] += 1
        self.paid.append(Paid(endpoint, body, request_id))
        del self.paid[:-PAID_MAX]

    def file_url(self, key: str) -> str:
        """The public address of a file on the CDN part."""
        return f"{self.public_url.rstrip('/')}/files/b/{key}"
