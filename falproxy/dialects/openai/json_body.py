"""The bodies of calls: JSON in which files stand as data URIs, made while it is sent."""

import asyncio
import base64
import json
import re
import secrets
from collections.abc import AsyncIterator, Callable, Mapping

from falproxy.dialects.openai.errors import invalid
from falproxy.dialects.openai.model_inputs import Upload
from falproxy.spool import Spool

PIECE = 3 * 2**16  # bytes of a file at a time; base64 is of three


class Body:
    """The JSON of a call's input. size: its bytes. It can be read again and again."""

    def __init__(self, inputs: Mapping[str, object]) -> None:
        self._token = secrets.token_hex(16)
        self._files: list[Upload] = []
        text = written(inputs, self._stand_in)
        pieces = re.split(rf"{self._token}-(\d+)", text)
        self._parts: list[bytes | Upload] = [
            self._files[int(piece)] if place % 2 else piece.encode()
            for place, piece in enumerate(pieces)
        ]
        self.size = sum(map(size_of, self._parts))

    def _stand_in(self, upload: object) -> str:
        """What stands in the JSON for a file. No client can have written it."""
        if not isinstance(upload, Upload):
            raise TypeError(type(upload).__name__)
        self._files.append(upload)
        return f"{self._token}-{len(self._files) - 1}"

    async def chunks(self) -> AsyncIterator[bytes]:
        for part in self._parts:
            if isinstance(part, bytes):
                yield part
                continue
            yield head_of(part)
            for start in range(0, part.content.size, PIECE):
                yield await encoded(part.content, start)


def written(inputs: Mapping[str, object], stand_in: Callable[[object], str]) -> str:
    """Raises: ImagesError 400, the inputs are nested too deep."""
    try:
        return json.dumps(inputs, default=stand_in)
    except RecursionError:
        raise invalid(None, "The request is nested too deep.", "invalid_json") from None


def head_of(upload: Upload) -> bytes:
    return f"data:{upload.content_type};base64,".encode()


def size_of(part: bytes | Upload) -> int:
    if isinstance(part, bytes):
        return len(part)
    return len(head_of(part)) + 4 * -(-part.content.size // 3)


async def encoded(content: Spool, start: int) -> bytes:
    if content.is_small:
        return base64.b64encode(content.read(start, PIECE))
    return base64.b64encode(await asyncio.to_thread(content.read, start, PIECE))
