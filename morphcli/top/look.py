"""One look at a server: its state as it came over the wire, made safe to show."""

import msgspec

from morphserve.runtime.server.state import State

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class BadState(Exception):
    """What was read is no server's state; the message says why."""


def clean(value: object) -> object:
    """The same without control characters: a terminal would obey them."""
    if isinstance(value, str):
        return "".join(c if c.isprintable() else _REPLACEMENT for c in value)
    if isinstance(value, list):
        return [clean(item) for item in value]
    if isinstance(value, dict):
        return {clean(key): clean(item) for key, item in value.items()}
    return value


def decode(body: bytes) -> State:
    """Raises BadState."""
    try:
        # As JSON the keys of objects are strings, whatever they stand for.
        return msgspec.convert(clean(msgspec.json.decode(body)), State, strict=False)
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadState(f"this is no state of a MorphServe server: {error}") from error
