"""What the HTTP process and the engine process say to each other, as msgpack over a local socket.

The HTTP process sends Submit, Abort and Shutdown; the engine answers with one Hello, then one
Step per engine step that produced something, Refused for a request it cannot take, and a
Snapshot several times a second. Token ids only: text lives in the HTTP process.
"""

import msgspec

from morphserve.runtime.request import SamplingParams


class Submit(msgspec.Struct, tag=True, frozen=True):
    request_id: str
    prompt: list[int]
    params: SamplingParams


class Abort(msgspec.Struct, tag=True, frozen=True):
    request_id: str


class Shutdown(msgspec.Struct, tag=True, frozen=True):
    """Stop after this; requests still running end with finish reason `abort`."""


class Hello(msgspec.Struct, tag=True, frozen=True):
    """The engine is ready to serve."""

    max_model_len: int  # most tokens of a request, prompt and output; the KV cache holds one
    num_layers: int
    startup_s: dict[str, float]  # seconds per phase: import, load, arena


class TokenOutput(msgspec.Struct, frozen=True):
    """New tokens of one request; `finish_reason` is None while it goes on."""

    request_id: str
    tokens: list[int]
    finish_reason: str | None = None  # stop, length, abort, error


class Step(msgspec.Struct, tag=True, frozen=True):
    """All tokens of one engine step, with the number of layers that were INT4 in it."""

    num_int4_layers: int
    outputs: list[TokenOutput]


class Refused(msgspec.Struct, tag=True, frozen=True):
    request_id: str
    message: str  # one sentence with the numbers


class Failed(msgspec.Struct, tag=True, frozen=True):
    """The engine cannot start or cannot go on; its process ends after this."""

    message: str  # one sentence
    exit_code: int


class Event(msgspec.Struct, frozen=True):
    """Something the monitor shows: a swap, a decision, a preemption, an error."""

    id: int  # counts up from 1
    time: float  # seconds since the epoch
    kind: str  # demote, promote, decision, preempt, swap_failed, error
    text: str


class Snapshot(msgspec.Struct, tag=True, frozen=True):
    """The engine at one moment; counters count from its start."""

    time: float  # seconds since the epoch
    policy: str
    layers: list[str]  # per layer: full, int4, demoting, promoting
    order: list[int]  # layer ids, first to be demoted first
    rung: int  # layers that are INT4 or on their way
    target_rung: int
    blocks_used: int
    blocks_capacity: int  # now
    blocks_full: int  # capacity with every layer at full precision
    blocks_max: int  # capacity at the deepest allowed rung
    block_tokens: int
    demand: int  # blocks wanted by running and waiting requests over the horizon
    running: int
    waiting: int
    oldest_wait_s: float
    preemptions: int
    prompt_tokens: int
    generated_tokens: int
    generated_tokens_int4: int  # generated while at least one layer was INT4
    swaps: int
    steps: int
    step_s: float  # duration of the latest step
    events: list[Event]  # the latest, oldest first


ToEngine = Submit | Abort | Shutdown
FromEngine = Hello | Step | Refused | Failed | Snapshot
