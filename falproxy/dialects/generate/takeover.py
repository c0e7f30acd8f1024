"""Takeover of jobs whose process has died: their results are recorded without a client."""

import asyncio
import copy
import logging
import time

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler

from falproxy.dialects.generate.jobs import FOLLOW_TIMEOUT, JobDeps, refresh
from falproxy.dialects.public_url import ROOT_PATH, root_path
from falproxy.dialects.queue_client import QueueClient, QueuedJob
from falproxy.errors import ProxyError
from falproxy.proxy.call import OWNER
from falproxy.proxy.client_address import client_scheme
from falproxy.stores.ledger import UNFINISHED_STATUSES, JobRow, LedgerError

logger = logging.getLogger(__name__)

FOLLOWED_MAX = 20  # jobs that a process polls at once without a client
RENEWALS_PER_LEASE = 3
POLL_INTERVAL_MIN, POLL_INTERVAL_MAX = 1.0, 10.0  # seconds between the polls of one job


class JobTakeover:
    """Renews the leases of this process's jobs, takes over jobs whose lease has expired, and polls
    fal for these until they end. Nothing is submitted to fal.

    The task starts with the first request to the API. Processes that do not serve the API have no
    jobs to renew, and leave the takeover to others.
    """

    def __init__(self, deps: JobDeps) -> None:
        self._deps = deps
        self._followed: set[str] = set()  # job ids
        self._pipeline: tuple[web.Request, Handler] | None = None  # set by `start`

    def __repr__(self) -> str:
        state = "not started" if self._pipeline is None else "started"
        return f"<JobTakeover {state}, follows {len(self._followed)} jobs>"

    def start(self, request: web.Request, handler: Handler) -> None:
        """Start the task, unless it runs already. It ends when the application shuts down.

        request: its URL gives the base URL of stored files.
        handler: the rest of the middleware pipeline.
        """
        if self._pipeline is None:
            self._pipeline = detached_request(request), handler
            self._deps.wait_policy.background.spawn(self._claim_loop(), cancel_on_close=True)

    def follow(self, row: JobRow) -> None:
        """Poll a job until it ends, unless FOLLOWED_MAX jobs are followed already."""
        if len(self._followed) < FOLLOWED_MAX:
            self.spawn_follow(row)

    def spawn_follow(self, row: JobRow) -> None:
        """Poll a job until it ends."""
        client = self._client_of(row)
        if client is None or row.id in self._followed:
            return
        self._followed.add(row.id)
        self._deps.wait_policy.background.spawn(self._follow(row, client), cancel_on_close=True)

    def read_outcome(self, row: JobRow) -> None:
        """Read the result of a job that is followed no longer, because it was cancelled or deleted:
        the ledger has its cost from there."""
        client = self._client_of(row)
        if client is not None and row.request_id is not None:
            client.read_outcomes([QueuedJob(row.app, row.request_id, is_shared=True)])

    def _client_of(self, row: JobRow) -> QueueClient | None:
        """Return a client with the access rights of a job's owner."""
        if self._pipeline is None:
            return None
        template, handler = self._pipeline
        request = detached_request(template)
        if row.owner:
            request[OWNER] = row.owner
        return QueueClient(request, handler, self._deps.wait_policy)

    async def _claim_loop(self) -> None:
        lease = self._deps.lease
        while True:
            limit = max(0, FOLLOWED_MAX - len(self._followed))
            try:
                rows = await self._deps.jobs.claim_jobs(lease, limit)
            except LedgerError as error:
                logger.info("Leases of jobs were not renewed: %s", error)
                rows = []
            for row in rows:
                logger.info("A job was taken over from another process")
                self.spawn_follow(row)
            await asyncio.sleep(lease.seconds / RENEWALS_PER_LEASE)

    async def _follow(self, row: JobRow, queue_client: QueueClient) -> None:
        """Poll a job until it ends, or until its age exceeds FOLLOW_TIMEOUT."""
        interval = POLL_INTERVAL_MIN
        try:
            while await self._is_unfinished(row, queue_client):
                if time.time() - row.created_at > FOLLOW_TIMEOUT:
                    return
                await asyncio.sleep(interval)
                interval = min(POLL_INTERVAL_MAX, interval * 2)
        finally:
            self._followed.discard(row.id)

    async def _is_unfinished(self, row: JobRow, queue_client: QueueClient) -> bool:
        """Refresh a job once. Temporary errors count as unfinished."""
        try:
            async with asyncio.timeout(self._deps.wait_policy.total):
                # Another process, or a client's request, may have changed the job meanwhile.
                unsaved = self._deps.unsaved.get(row.id, row.owner)
                current = unsaved or await self._deps.jobs.get_job(row.id, row.owner)
                if current is None or current.status not in UNFINISHED_STATUSES:
                    return False
                current = await refresh(current, queue_client, self._deps)
        except (LedgerError, TimeoutError) as error:
            logger.info("A job was not refreshed: %s", str(error) or "no response in time")
            return True
        except ProxyError as error:
            logger.info("A job was not refreshed: %s", error.code)
            return error.status >= web.HTTPInternalServerError.status_code
        return current.status in UNFINISHED_STATUSES


def detached_request(request: web.Request) -> web.Request:
    """Return a copy of a request without its caller, credentials and state. It remains usable after
    the response, when aiohttp has reset the current application of the original."""
    protocol = {hdrs.X_FORWARDED_PROTO: client_scheme(request)}
    detached = request.clone(headers=protocol, scheme=request.scheme, host=request.host)
    detached.clear()
    detached[ROOT_PATH] = root_path(request)
    detached._match_info = copy.copy(request.match_info)
    return detached
