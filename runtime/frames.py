"""Messages between the two processes as bytes: a length, then msgpack."""

import msgspec

_LENGTH_BYTES = 4
_encoder = msgspec.msgpack.Encoder()


def encode_frame(message: object) -> bytes:
    """One message, preceded by its length (little-endian, 4 bytes)."""
    body = _encoder.encode(message)
    return len(body).to_bytes(_LENGTH_BYTES, "little") + body


class FrameSplitter:
    """Cuts a stream of bytes, which arrives in any pieces, into message bodies."""

    def __init__(self) -> None:
        self._pending = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The bodies that `data` completes, in order."""
        self._pending += data
        bodies: list[bytes] = []
        start = 0
        while len(self._pending) >= start + _LENGTH_BYTES:
            body = start + _LENGTH_BYTES
            end = body + int.from_bytes(self._pending[start:body], "little")
            if len(self._pending) < end:
                break
            bodies.append(bytes(self._pending[body:end]))
            start = end
        del self._pending[:start]
        return bodies
