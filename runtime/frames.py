"""Messages between the two processes as bytes: a length, then msgpack."""

import msgspec

MAX_FRAME_BYTES = 64 << 20  # far above a prompt or a step of any model's length
_LENGTH_BYTES = 4
_encoder = msgspec.msgpack.Encoder()


def encode_frame(message: object) -> bytes:
    """One message, preceded by its length (little-endian, 4 bytes)."""
    body = _encoder.encode(message)
    return len(body).to_bytes(_LENGTH_BYTES, "little") + body


class FrameTooLarge(Exception):
    """The stream announces a message that nobody sends: it is not a stream of ours."""


class FrameSplitter:
    """Cuts a stream of bytes, which arrives in any pieces, into message bodies.

    Holds at most one frame of MAX_FRAME_BYTES and what was read with it.
    """

    def __init__(self) -> None:
        self._pending = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The bodies that `data` completes, in order. Raises FrameTooLarge."""
        self._pending += data
        bodies: list[bytes] = []
        start = 0
        while len(self._pending) >= start + _LENGTH_BYTES:
            body = start + _LENGTH_BYTES
            size = int.from_bytes(self._pending[start:body], "little")
            if size > MAX_FRAME_BYTES:
                raise FrameTooLarge(f"a message of {size} bytes; at most {MAX_FRAME_BYTES}")
            end = body + size
            if len(self._pending) < end:
                break
            bodies.append(bytes(self._pending[body:end]))
            start = end
        del self._pending[:start]
        return bodies
