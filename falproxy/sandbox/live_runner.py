"""The runner of a live video session: generates a moving image and sends it by WebRTC.

It needs the packages of `falproxy[live]`. Without them, sessions are opened, but send no video.
"""

import logging
import re
from typing import Protocol

from falproxy.sandbox.live_media import InvalidOfferError

log = logging.getLogger(__name__)

MEDIA_LINE = re.compile(r"m=(\S+) \d+ (.*)")


class Runner(Protocol):
    """A runner of one session. sdp: its answer to the client's offer."""

    sdp: str

    async def close(self) -> None: ...


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
