"""The runner of a live video session with aiortc, an optional package."""

import asyncio
import logging

from aiortc import RTCPeerConnection, RTCSessionDescription, VideoStreamTrack
from av import VideoFrame

from falproxy.sandbox.live_media import (
    InvalidOfferError,
    background,
    draw_frame,
    read_prompt,
    without_local_names,
)

logging.getLogger("aioice").setLevel(logging.WARNING)  # it logs every step of a connection
GATHER_TIMEOUT = 10.0  # seconds to find the addresses of this machine


class GeneratedVideo(VideoStreamTrack):  # type: ignore[misc]  # of the type Any
    """A square that moves in front of a color, which depends on the endpoint and on the prompt."""

    def __init__(self, endpoint: str) -> None:
        super().__init__()
        self._endpoint = endpoint
        self._color = background(endpoint)
        self._number = 0

    async def recv(self) -> VideoFrame:
        pts, time_base = await self.next_timestamp()
        frame = VideoFrame.from_image(draw_frame(self._number, self._color))
        frame.pts, frame.time_base = pts, time_base
        self._number += 1
        return frame

    def set_prompt(self, prompt: str) -> None:
        self._color = background(self._endpoint, prompt)


class VideoRunner:
    """One WebRTC connection. sdp: its answer, with all candidates."""

    def __init__(self, connection: RTCPeerConnection) -> None:
        self._connection = connection
        self.sdp: str = connection.localDescription.sdp

    def __repr__(self) -> str:
        return f"<VideoRunner {self._connection.connectionState}>"

    async def close(self) -> None:
        await self._connection.close()


async def open_video_runner(endpoint: str, offer: str) -> VideoRunner:
    """Raises: InvalidOfferError."""
    connection = RTCPeerConnection()
    video = GeneratedVideo(endpoint)

    def on_message(message: str | bytes) -> None:
        if (prompt := read_prompt(message)) is not None:
            video.set_prompt(prompt)

    connection.on("datachannel", lambda channel: channel.on("message", on_message))
    try:
        async with asyncio.timeout(GATHER_TIMEOUT):
            await connection.setRemoteDescription(
                RTCSessionDescription(without_local_names(offer), "offer")
            )
            if any(transceiver.kind == "video" for transceiver in connection.getTransceivers()):
                connection.addTrack(video)
            await connection.setLocalDescription(await connection.createAnswer())
    except BaseException as error:
        await connection.close()
        if not isinstance(error, Exception):
            raise
        # aiortc raises errors of many types.
        raise InvalidOfferError(f"sdp cannot be used: {error}") from error
    return VideoRunner(connection)
