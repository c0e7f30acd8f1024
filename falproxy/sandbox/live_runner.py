"""The runner of a live video session: generates a moving image and sends it by WebRTC.

It needs the packages of `falproxy[live]`. Without them, sessions are opened, but send no video.
"""

import colorsys
import hashlib
import json
import logging
import re
from typing import Protocol

from PIL import Image, ImageDraw

log = logging.getLogger(__name__)

WIDTH, HEIGHT = 320, 240
SQUARE = 60  # pixels
SQUARE_COLOR = (255, 255, 255)
LAP_FRAMES = 60  # in which the square crosses the image
MEDIA_LINE = re.compile(r"m=(\S+) \d+ (.*)")
Color = tuple[int, int, int]


class Runner(Protocol):
    """A runner of one session. sdp: its answer to the client's offer."""

    sdp: str

    async def close(self) -> None: ...


class InvalidOfferError(Exception):
    """The client's session description cannot be used."""


def background(endpoint: str, prompt: str = "") -> Color:
    """Return the color of the image behind the moving square."""
    digest = hashlib.sha256(f"{endpoint}\n{prompt}".encode()).digest()
    red, green, blue = colorsys.hls_to_rgb(digest[0] / 255, 0.4, 0.6)
    return round(red * 255), round(green * 255), round(blue * 255)


def square_position(number: int) -> tuple[int, int]:
    """Return the left upper corner of the square in a frame."""
    step = number % (2 * LAP_FRAMES)
    share = 1 - abs(step - LAP_FRAMES) / LAP_FRAMES
    return round(share * (WIDTH - SQUARE)), (HEIGHT - SQUARE) // 2


def draw_frame(number: int, color: Color) -> Image.Image:
    image = Image.new("RGB", (WIDTH, HEIGHT), color)
    left, top = square_position(number)
    box = (left, top, left + SQUARE - 1, top + SQUARE - 1)
    ImageDraw.Draw(image).rectangle(box, fill=SQUARE_COLOR)
    return image


def read_prompt(message: str | bytes) -> str | None:
    """Return the prompt of a message on a data channel: `{"prompt": ...}`."""
    try:
        document = json.loads(message)
    except ValueError:
        return None
    prompt = document.get("prompt") if isinstance(document, dict) else None
    return prompt if isinstance(prompt, str) else None


async def open_runner(endpoint: str, offer: str) -> Runner:
    """Return the runner of a new session.

    Raises: InvalidOfferError.
    """
    try:
        from falproxy.sandbox.live_video import open_video_runner
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith(("aiortc", "av", "aioice")):
            raise
        log.warning("Live video sends no images: pip install 'falproxy[live]'")
        return SilentRunner(offer)
    return await open_video_runner(endpoint, offer)


class SilentRunner:
    """A runner without media: its answer rejects all of them (RFC 3264, section 6)."""

    def __init__(self, offer: str) -> None:
        if not offer.startswith("v=0"):
            raise InvalidOfferError("sdp is no session description")
        lines = ["v=0", "o=- 0 0 IN IP4 127.0.0.1", "s=-", "t=0 0"]
        for line in offer.splitlines():
            if match := MEDIA_LINE.fullmatch(line):
                lines += [f"m={match[1]} 0 {match[2]}", "c=IN IP4 0.0.0.0", "a=inactive"]
            elif line.startswith("a=mid:"):
                lines.append(line)
        self.sdp = "".join(f"{line}\r\n" for line in lines)

    async def close(self) -> None:
        """There is nothing to close."""
