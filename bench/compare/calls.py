"""The requests that the bench makes, the same for every contestant."""

import base64
import json
import struct
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

PROXY_PATH = "/api/fal/proxy"
ENDPOINT = "fal-ai/flux/dev"
APP = "fal-ai/flux"
STATUS_BYTES = 400
SUBMIT_BYTES = 1_000
ANSWER_BYTES = 3_000_000
UPLOAD_BYTES = 8_000_000
PREFIX = "data:image/png;base64,"
NOISE = bytes(number * number * 7 % 251 for number in range(4093))
HEADERS = {
    "accept": "application/json",
    "user-agent": "@fal-ai/client/1.10.1 (falproxy bench)",
}


@dataclass(frozen=True, slots=True)
class Call:
    """A request through a proxy to fal. length: bytes that the answer's body has, if known.
    jobs: request ids, each of which may stand where the first one does."""

    method: str
    target: str
    body: bytes = b""
    length: int | None = None
    extra: tuple[tuple[str, str], ...] = ()
    jobs: tuple[str, ...] = ()

    def with_headers(self, extra: dict[str, str]) -> "Call":
        return replace(self, extra=tuple(extra.items()))

    def headers(self) -> dict[str, str]:
        given = {**HEADERS, "x-fal-target-url": self.target, **dict(self.extra)}
        if self.body:
            given["content-type"] = "application/json"
        return given

    def wire(self, port: int) -> bytes:
        """What is sent to a proxy."""
        lines = [f"{self.method} {PROXY_PATH} HTTP/1.1", f"host: 127.0.0.1:{port}"]
        return self._encode(lines)

    def direct(self) -> bytes:
        """What is sent to the upstream without a proxy."""
        host, _, path = self.target.removeprefix("https://").partition("/")
        return self._encode([f"{self.method} /{path} HTTP/1.1", f"host: {host}"])

    def _encode(self, lines: list[str]) -> bytes:
        lines += [f"{name}: {value}" for name, value in self.headers().items()]
        if self.body:
            lines.append(f"content-length: {len(self.body)}")
        return "\r\n".join((*lines, "\r\n")).encode() + self.body


def poll(request_id: str) -> Call:
    return Call(
        "GET",
        f"https://queue.fal.run/{APP}/requests/{request_id}/status?logs=0",
        length=STATUS_BYTES,
    )


def submit() -> Call:
    document = {"prompt": "", "image_size": "square_hd", "num_images": 1, "seed": 7}
    missing = SUBMIT_BYTES - len(json.dumps(document))
    document["prompt"] = ("a lighthouse at dusk, " * 50)[:missing]
    return Call("POST", f"https://queue.fal.run/{ENDPOINT}", json.dumps(document).encode())


def answer(request_id: str) -> Call:
    return Call("GET", f"https://queue.fal.run/{APP}/requests/{request_id}", length=ANSWER_BYTES)


def upload() -> Call:
    """An edit of a picture that is sent along, which falproxy looks at before it passes it on."""
    document = {"prompt": "make it autumn", "image_url": ""}
    text = json.dumps(document, separators=(",", ":"))
    size = UPLOAD_BYTES - len(text) - len(PREFIX)
    document["image_url"] = PREFIX + base64.b64encode(picture(size // 4 * 3)).decode()
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


def picture(size: int) -> bytes:
    """So many bytes that start as a PNG of 1024 x 1024 does."""
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
    """What fal says of a request that runs, of just so many bytes."""
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
    """A result of a model in sync mode: the picture is in the document."""
    document = {"images": [{"url": "", "width": 1024, "height": 1024}], "seed": 7, "prompt": ""}
    size = ANSWER_BYTES - len(json.dumps(document)) - len(PREFIX)
    picture_text = PREFIX + base64.b64encode(picture(size // 4 * 3)).decode()
    document["images"] = [{"url": picture_text, "width": 1024, "height": 1024}]
    document["prompt"] = "." * (ANSWER_BYTES - len(json.dumps(document)))
    path.write_text(json.dumps(document))
