"""The wire between the server and the engine process: msgpack frames over two pipes.

A frame is a 4-byte little-endian length and that many bytes of msgpack. Commands flow
to the engine, events come back: some `Loading`, one `Ready` (or `Fatal`), then a `Stepped` per
engine step, per refusal, and when the last request was aborted. The engine exits when its command pipe closes.
"""

from __future__ import annotations

from types import UnionType

import msgspec

from skippy.engine.config import EngineConfig
from skippy.engine.types import EngineInfo, Request, StepOutput

FRAME_HEADER_BYTES = 4


class Start(msgspec.Struct, tag=True):
    """The first command: build the engine, and log what is at least so severe."""

    config: EngineConfig
    log_level: str = "info"


class Add(msgspec.Struct, tag=True):
    """Admit a request. A refused one is answered by an output with finish_reason "error"."""

    request: Request


class Abort(msgspec.Struct, tag=True):
    """Forget a request, or one choice of it, and free what it holds; unknown ones are ignored."""

    request_id: str
    index: int | None = None


class Loading(msgspec.Struct, tag=True):
    """How many bytes of the model are read, and of how many."""

    done: int
    total: int


class Ready(msgspec.Struct, tag=True):
    info: EngineInfo


class Stepped(msgspec.Struct, tag=True):
    output: StepOutput


class Fatal(msgspec.Struct, tag=True):
    """The engine cannot start or go on; it exits after this."""

    message: str


Command = Start | Add | Abort
Event = Loading | Ready | Stepped | Fatal


def encode(message: Command | Event) -> bytes:
    """The whole frame of one message."""
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(FRAME_HEADER_BYTES, "little") + body


class FrameReader:
    """Cuts a byte stream into messages: `feed` it bytes as they come."""

    def __init__(self, kind: UnionType) -> None:
        self._decoder = msgspec.msgpack.Decoder(kind)
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Command | Event]:
        """Every message that `data` completes, in order."""
        self._buffer += data
        messages = []
        while len(self._buffer) >= FRAME_HEADER_BYTES:
            end = FRAME_HEADER_BYTES + int.from_bytes(self._buffer[:FRAME_HEADER_BYTES], "little")
            if len(self._buffer) < end:
                break
            messages.append(self._decoder.decode(self._buffer[FRAME_HEADER_BYTES:end]))
            del self._buffer[:end]
        return messages
