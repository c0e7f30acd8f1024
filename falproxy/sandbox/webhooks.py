"""Webhooks: signed with Ed25519 as at fal, delivered to the local machine only."""

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
from falproxy.sandbox.tokens import base64url_encode

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

log = logging.getLogger(__name__)

USER_ID = "sandbox-user"
MAX_ATTEMPTS = 3
RETRY_DELAY = 1.0  # seconds after the first failed attempt, doubled after each further one
TIMEOUT = ClientTimeout(total=15)


class WebhookSigner:
    """Signs webhooks with a private key that is generated at first use."""

    @cached_property
    def _key(self) -> "Ed25519PrivateKey":
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        return Ed25519PrivateKey.generate()

    def jwks(self) -> dict[str, object]:
        """Return the public key as in rest.fal.ai/.well-known/jwks.json (RFC 8037)."""
        public = base64url_encode(self._key.public_key().public_bytes_raw())
        key = {"kty": "OKP", "crv": "Ed25519", "alg": "EdDSA", "use": "sig", "kid": "sandbox-1"}
        return {"keys": [{**key, "x": public}]}

    def sign(self, request_id: str, body: bytes) -> dict[str, str]:
        """Return the signature headers.

        The signed message is request id, user id, time and SHA-256 of the body, joined by newlines.
        """
        timestamp = str(int(time.time()))
        digest = hashlib.sha256(body).hexdigest()
        message = "\n".join((request_id, USER_ID, timestamp, digest)).encode()
        return {
            "X-Fal-Webhook-Request-Id": request_id,
            "X-Fal-Webhook-User-Id": USER_ID,
            "X-Fal-Webhook-Timestamp": timestamp,
            "X-Fal-Webhook-Signature": self._key.sign(message).hex(),
        }


def is_loopback(url: str) -> bool:
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        is_local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
    return is_local and parts.scheme in ("http", "https")


def webhook_payload(job: Job) -> Mapping[str, object]:
    """Return the body that fal posts at the end of a job."""
    if job.response is None:
        raise ValueError("the job has not ended")
    is_error = job.response.status >= 400
    body = {
        "request_id": job.id,
        "gateway_request_id": job.id,
        "status": "ERROR" if is_error else "OK",
        "payload": job.response.body,
    }
    return {**body, "error": f"Invalid status code: {job.response.status}"} if is_error else body


async def deliver_webhook(signer: WebhookSigner, job: Job, speed: float) -> None:
    """Post the result of a job to its webhook, if it has one on this machine.

    speed: divisor of the delays between attempts.
    """
    if job.webhook_url is None:
        return
    if not is_loopback(job.webhook_url):
        log.warning("job %s: the sandbox posts webhooks to this machine only", job.id)
        return
    body = json.dumps(webhook_payload(job)).encode()
    headers = {"Content-Type": "application/json", **signer.sign(job.id, body)}
    async with ClientSession(timeout=TIMEOUT, headers=headers) as session:
        for attempt in range(MAX_ATTEMPTS):
            if await post_webhook(session, job.webhook_url, body):
                return
            await asyncio.sleep(RETRY_DELAY * 2**attempt / speed)
    log.warning("job %s: its webhook failed %d times", job.id, MAX_ATTEMPTS)


async def post_webhook(session: ClientSession, url: str, body: bytes) -> bool:
    """Post once and return whether no retry is needed. As at fal, redirects are not followed."""
    try:
        async with session.post(url, data=body, allow_redirects=False) as response:
            return response.status < 400
    except (ClientError, TimeoutError) as error:
        log.info("webhook not delivered: %s", type(error).__name__)
        return False
