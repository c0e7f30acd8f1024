"""The requests of the benchmark, the same for every candidate."""

import base64
import json
import struct
import time
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import jwt

PROXY_PATH = "/api/fal/proxy"
ENDPOINT = "fal-ai/flux/dev"
APP = "fal-ai/flux"
SMALL_APP = "fal-ai/flux-small"  # whose results are not large
STATUS_BYTES = 400
SUBMIT_BYTES = 1_000
RESULT_BYTES = 3_000_000
UPLOAD_BYTES = 8_000_000
PREFIX = "data:image/png;base64,"
NOISE = bytes(number * number * 7 % 251 for number in range(4093))
# Of fal's client in a browser. The cookie differs by user.
HEADERS = {
    "accept": "application/json",
    "accept-encoding": "gzip, deflate, br, zstd",
    "accept-language": "en-US,en;q=0.9",
    "connection": "keep-alive",
    "cookie": "theme=dark; session=0e4ac71b52d84cf0a6f3a1c9-@USER@",
    "referer": "https://app.example.com/studio/projects/42",
    "sec-ch-ua": '"Chromium";v="142", "Not_A Brand";v="99"',
    "sec-ch-ua-mobile": "?0",
    "sec-ch-ua-platform": '"Linux"',
    "sec-fetch-dest": "empty",
    "sec-fetch-mode": "cors",
    "sec-fetch-site": "same-origin",
    "user-agent": "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) "
    "Chrome/142.0.0.0 Safari/537.36",
}
# What wrk.lua replaces by the ids of jobs.
ANY_JOB = "@JOB@"


@dataclass(frozen=True, slots=True)
class Call:
    """A request through a proxy to fal.

    length: bytes of the response body, if known.
    plan: of wrk.lua.
    jobs: request ids, each of which may replace the first one.
    """

    method: str
    target: str
    body: bytes = b""
    length: int | None = None
    extra: tuple[tuple[str, str], ...] = ()
    plan: str = "turns"
    jobs: tuple[str, ...] = ()

    @property
    def counted(self) -> float:
        """How many requests the upstream counts for one: it proxies submits to itself."""
        return {"submits": 2.0, "mixed": 1.1}.get(self.plan, 1.0)

    def with_headers(self, extra: dict[str, str]) -> "Call":
        return replace(self, extra=tuple(extra.items()))

    def headers(self) -> dict[str, str]:
        headers = {**HEADERS, "x-fal-target-url": self.target, **dict(self.extra)}
        if self.body:
            headers["content-type"] = "application/json"
        return headers

    def wire(self, port: int) -> bytes:
        """Return the request to a proxy."""
        lines = [f"{self.method} {PROXY_PATH} HTTP/1.1", f"host: 127.0.0.1:{port}"]
        return self._encode(lines)

    def direct(self) -> bytes:
        """Return the request to the upstream without a proxy."""
        host, _, path = self.target.removeprefix("https://").partition("/")
        return self._encode([f"{self.method} /{path} HTTP/1.1", f"host: {host}"])

    def _encode(self, lines: list[str]) -> bytes:
        lines += [f"{name}: {value}" for name, value in self.headers().items()]
        if self.body:
            lines.append(f"content-length: {len(self.body)}")
        return "\r\n".join((*lines, "\r\n")).encode() + self.body


def poll(request_id: str, plan: str = "turns") -> Call:
    return Call(
        "GET",
        f"https://queue.fal.run/{APP}/requests/{request_id}/status?logs=0",
        length=STATUS_BYTES,
        plan=plan,
    )


def mixed(request_id: str) -> Call:
    """Return the poll of the mixed plan, with the body of its submits."""
    return replace(poll(request_id, "mixed"), body=submit().body)


def small_result_url(request_id: str) -> str:
    return f"https://queue.fal.run/{SMALL_APP}/requests/{request_id}"


def small_result() -> bytes:
    image = {"url": "https://v3.fal.media/files/lion/0123456789abcdef.png", "width": 1024}
    document = {"images": [image | {"height": 1024, "content_type": "image/png"}] * 4, "seed": 7}
    return json.dumps(document | {"prompt": "a lighthouse at dusk", "timings": {}}).encode()


def submit() -> Call:
    document = {"prompt": "", "image_size": "square_hd", "num_images": 1, "seed": 7}
    missing = SUBMIT_BYTES - len(json.dumps(document))
    document["prompt"] = ("a lighthouse at dusk, " * 50)[:missing]
    body = json.dumps(document).encode()
    return Call("POST", f"https://queue.fal.run/{ENDPOINT}", body, plan="submits")


def result(request_id: str) -> Call:
    return Call("GET", f"https://queue.fal.run/{APP}/requests/{request_id}", length=RESULT_BYTES)


def upload() -> Call:
    """Return an edit with the image in the body, which falproxy checks before it sends it on."""
    document = {"prompt": "make it autumn", "image_url": ""}
    text = json.dumps(document, separators=(",", ":"))
    size = UPLOAD_BYTES - len(text) - len(PREFIX)
    document["image_url"] = PREFIX + base64.b64encode(image(size // 4 * 3)).decode()
    text = json.dumps(document, separators=(",", ":"))
    document["prompt"] += "." * (UPLOAD_BYTES - len(text))
    body = json.dumps(document, separators=(",", ":")).encode()
    return Call(
        "POST",
        f"https://fal.run/{ENDPOINT}/image-to-image",
        body,
        length=len(json.dumps({"received": UPLOAD_BYTES})),
    )


def stream() -> Call:
    body = json.dumps({"prompt": "a lighthouse at dusk"}).encode()
    return Call("POST", f"https://fal.run/{ENDPOINT}/stream", body)


def image(size: int) -> bytes:
    """Return bytes that begin like a PNG of 1024 x 1024."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 1024, 1024, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header
    start += struct.pack(">I", zlib.crc32(header)) + struct.pack(">I", size) + b"IDAT"
    return (start + NOISE * (size // len(NOISE) + 1))[:size]


def links(request_id: str) -> dict[str, str]:
    base = f"https://queue.fal.run/{APP}/requests/{request_id}"
    return {
        "response_url": base,
        "status_url": f"{base}/status",
        "cancel_url": f"{base}/cancel",
    }


def status_document(request_id: str) -> bytes:
    """Return the status document of a running request, of `STATUS_BYTES`."""
    document = {"status": "IN_PROGRESS", "request_id": request_id, **links(request_id), "logs": []}
    return json.dumps(document, separators=(",", ":")).encode().ljust(STATUS_BYTES)


def submitted_document(request_id: str) -> bytes:
    return json.dumps(
        {
            "status": "IN_QUEUE",
            "request_id": request_id,
            **links(request_id),
            "logs": None,
            "metrics": {},
            "queue_position": 0,
        }
    ).encode()


def write_result(path: Path) -> None:
    """Write a result in sync mode: the image is a data URI in the document."""
    document = {"images": [{"url": "", "width": 1024, "height": 1024}], "seed": 7, "prompt": ""}
    size = RESULT_BYTES - len(json.dumps(document)) - len(PREFIX)
    image_text = PREFIX + base64.b64encode(image(size // 4 * 3)).decode()
    document["images"] = [{"url": image_text, "width": 1024, "height": 1024}]
    document["prompt"] = "." * (RESULT_BYTES - len(json.dumps(document)))
    path.write_text(json.dumps(document))


def token(secret: str) -> str:
    """Return a JWT with the claims of a Supabase project's user, valid for an hour."""
    now = int(time.time())
    claims = {
        "iss": "https://abcdefghijklmnopqrst.supabase.co/auth/v1",
        "sub": "7e2f0b8a-0001-4000-8000-000000000000",
        "aud": "authenticated",
        "exp": now + 3600,
        "iat": now,
        "email": "user@example.com",
        "phone": "",
        "app_metadata": {"provider": "email", "providers": ["email"]},
        "user_metadata": {"email_verified": True},
        "role": "authenticated",
        "aal": "aal1",
        "amr": [{"method": "password", "timestamp": now}],
        "session_id": "7e2f0b8a-0002-4000-8000-000000000000",
        "is_anonymous": False,
    }
    return jwt.encode(claims, secret)
