"""The bodies of calls: JSON in which files stand as data URIs, made while it is sent."""

import asyncio
import base64
import json
import re
import secrets
from collections.abc import AsyncIterator, Callable, Mapping

from falproxy.dialects.openai.errors import invalid_parameter
from falproxy.dialects.openai.model_inputs import Upload
from falproxy.spool import Spool

CHUNK_BYTES = 3 * 2**16  # bytes of a file at a time; base64 is of three


class JsonBody:
    """The JSON of a call's input. size: its bytes. It can be read again and again."""

    def __init__(self, inputs: Mapping[str, object]) -> None:
        self._token = secrets.token_hex(16)
        self._files: list[Upload] = []
        text = serialize(inputs, self._placeholder)
        pieces = re.split(rf"{self._token}-(\d+)", text)
        self._parts: list[bytes | Upload] = [
            self._files[int(piece)] if place % 2 else piece.encode()
            for place, piece in enumerate(pieces)
        ]
        self.size = sum(map(encoded_size, self._parts))

    def _placeholder(self, upload: object) -> str:
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
            yield data_uri_prefix(part)
            for start in range(0, part.content.size, CHUNK_BYTES):
                yield await encode_chunk(part.content, start)


def serialize(inputs: Mapping[str, object], placeholder: Callable[[object], str]) -> str:
    """Raises: ImagesError 400, the inputs are nested too deep."""
    try:
        return json.dumps(inputs, default=placeholder)
    except RecursionError:
        raise invalid_parameter(None, "The request is nested too deep.", "invalid_json") from None


def data_uri_prefix(upload: Upload) -> bytes:
    return f"data:{upload.content_type};base64,".encode()


def encoded_size(part: bytes | Upload) -> int:
    if isinstance(part, bytes):
        return len(part)
    return len(data_uri_prefix(part)) + 4 * -(-part.content.size // 3)


async def encode_chunk(content: Spool, start: int) -> bytes:
    if content.is_small:
        return base64.b64encode(content.read(start, CHUNK_BYTES))
    return base64.b64encode(await asyncio.to_thread(content.read, start, CHUNK_BYTES))
