"""fal's webhooks: signed with ED25519, delivered to this machine only."""

import asyncio
import hashlib
import ipaddress
import json
import logging
import time
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from aiohttp import ClientError, ClientSession, ClientTimeout  # noqa: TID251 - stands alone

from falproxy.sandbox.job_queue import Job
from falproxy.sandbox.tokens import encode64

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

log = logging.getLogger(__name__)

USER_ID = "sandbox-user"
ATTEMPTS = 3
PAUSE = 1.0  # seconds after the first failed attempt, doubled after the next
TIMEOUT = ClientTimeout(total=15)


class Signer:
    """Signs webhooks with a key of its own, made when it is first needed."""

    @cached_property
    def _key(self) -> "Ed25519PrivateKey":
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        return Ed25519PrivateKey.generate()

    def jwks(self) -> dict[str, object]:
        """The public key as rest.fal.ai/.well-known/jwks.json publishes it (RFC 8037)."""
        public = encode64(self._key.public_key().public_bytes_raw())
        key = {"kty": "OKP", "crv": "Ed25519", "alg": "EdDSA", "use": "sig", "kid": "sandbox-1"}
        return {"keys": [{**key, "x": public}]}

    def headers(self, request_id: str, body: bytes) -> dict[str, str]:
        """Signature headers over id, user, time and the digest of the body, joined by newlines."""
        stamp = str(int(time.time()))
        digest = hashlib.sha256(body).hexdigest()
        message = "\n".join((request_id, USER_ID, stamp, digest)).encode()
        return {
            "X-Fal-Webhook-Request-Id": request_id,
            "X-Fal-Webhook-User-Id": USER_ID,
            "X-Fal-Webhook-Timestamp": stamp,
            "X-Fal-Webhook-Signature": self._key.sign(message).hex(),
        }


def is_loopback(url: str) -> bool:
    """Whether a webhook would stay on this machine; nothing else is ever posted to."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        is_here = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
    return is_here and parts.scheme in ("http", "https")


def payload(job: Job) -> Mapping[str, object]:
    """What fal posts when a job has ended."""
    if job.answer is None:
        raise ValueError("the job has not ended")
    failed = job.answer.status >= 400
    body = {
        "request_id": job.id,
        "gateway_request_id": job.id,
        "status": "ERROR" if failed else "OK",
        "payload": job.answer.body,
    }
    return {**body, "error": f"Invalid status code: {job.answer.status}"} if failed else body


async def deliver(signer: Signer, job: Job, speed: float) -> None:
    """Post the job's end to its webhook, if it has one on this machine."""
    if job.webhook is None:
        return
    if not is_loopback(job.webhook):
        log.warning("job %s: the sandbox posts webhooks to this machine only", job.id)
        return
    body = json.dumps(payload(job)).encode()
    headers = {"Content-Type": "application/json", **signer.headers(job.id, body)}
    async with ClientSession(timeout=TIMEOUT, headers=headers) as session:
        for attempt in range(ATTEMPTS):
            if await post(session, job.webhook, body):
                return
            await asyncio.sleep(PAUSE * 2**attempt / speed)
    log.warning("job %s: its webhook failed %d times", job.id, ATTEMPTS)


async def post(session: ClientSession, url: str, body: bytes) -> bool:
    """True when there is nothing left to do: delivered, or redirected, which fal never follows."""
    try:
        async with session.post(url, data=body, allow_redirects=False) as response:
            return response.status < 400
    except (ClientError, TimeoutError) as error:
        log.info("webhook not delivered: %s", type(error).__name__)
        return False
