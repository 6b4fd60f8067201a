"""What the HTTP process and the engine process say to each other, as msgpack over a local socket.

The HTTP process sends Submit, Abort, Pin and Shutdown; the engine answers with one Hello, then one
Step per engine step that produced something, Refused for a request it cannot take, Events as they
happen, and a Snapshot several times a second. Token ids only: text lives in the HTTP process.
"""

import msgspec

from morphserve.quantize.manifest import Rung, Variant
from morphserve.runtime.request import Demands, SamplingParams


class Submit(msgspec.Struct, tag=True, frozen=True):
    request_id: str
    prompt: list[int]
    params: SamplingParams
    demands: Demands = Demands()


class Abort(msgspec.Struct, tag=True, frozen=True):
    request_id: str


class Pin(msgspec.Struct, tag=True, frozen=True):
    """Hold a rung, whatever the traffic; None: the controller decides again."""

    rung: int | None


class Shutdown(msgspec.Struct, tag=True, frozen=True):
    """Stop after this; requests still running end with finish reason `abort`."""


class MemoryBytes(msgspec.Struct, frozen=True):
    """What memory is for at full precision; static to layers, and KV, are the budget, nearly."""

    budget: int
    static: int  # embedding, head, norms
    staging: int
    layers: int  # slabs of all layers
    page: int  # K and V of one block of one layer
    images: dict[Variant, list[int]]  # of each layer, by variant; without those not served
    activations: int | None = None  # of a step, beside the budget; None: not measured


class Hello(msgspec.Struct, tag=True, frozen=True):
    """The engine is ready to serve. What it says does not change."""

    max_model_len: int  # most tokens of a request, prompt and output; the KV cache holds one
    max_num_seqs: int  # requests running at once
    num_layers: int
    ladder: list[Rung]  # steps of demotion, the first taken first
    capacities: list[int]  # KV blocks at rung 0, 1, ... the deepest that the policy allows
    block_tokens: int
    device: str
    kernels: str
    threads: int  # that compute; 0 of a simulated device
    dtype: str  # of full-precision weights and KV
    memory: MemoryBytes
    startup_s: dict[str, float]  # seconds per phase: import, kernels, checkpoint, bundle, arena


class TokenLogprobs(msgspec.Struct, frozen=True):
    """Natural logarithms of probabilities, of the model's own distribution."""

    logprob: float  # of the chosen token
    top: list[tuple[int, float]]  # the likeliest tokens with theirs, the likeliest first


class TokenOutput(msgspec.Struct, frozen=True):
    """New tokens of one request; `finish_reason` is None while it goes on."""

    request_id: str
    tokens: list[int]
    finish_reason: str | None = None  # stop, length, abort, error, timeout
    logprobs: list[TokenLogprobs] | None = None  # one per token, if asked for
    cached_tokens: int = 0  # prompt tokens whose KV was there; told with the first token
    queued_s: float = 0.0  # submitted to first scheduled; told with the first token


class Step(msgspec.Struct, tag=True, frozen=True):
    """All tokens of one engine step, with the lowest precision that any layer had in it."""

    precision: Variant
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
    # demote, promote, decision, pin, preempt, swap_failed, costs, slow, error; engine: its process
    # died or serves again
    kind: str
    text: str
    numbers: dict[str, float] = {}  # what the decision was made from; a swap's bytes and seconds


class Events(msgspec.Struct, tag=True, frozen=True):
    """What has happened since the last message of this kind, oldest first."""

    events: list[Event]


SLOW = 2.0  # times the predicted time that a step takes when something is wrong


class Snapshot(msgspec.Struct, tag=True, frozen=True):
    """The engine at one moment; counters count from its start."""

    time: float  # seconds since the epoch
    policy: str
    layers: list[Variant]  # that each layer computes in now
    swapping: dict[int, Variant]  # layer -> the variant it is on its way to
    rung: int  # steps of the ladder that have been taken, or are under way
    target_rung: int
    pinned: bool  # an administrator holds the rung
    blocks_used: int  # held by requests
    blocks_cached: int  # held by nobody, kept for requests with the same beginning
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
    generated_tokens: dict[Variant, int]  # by the lowest precision of the steps that made them
    prefix_queries: int  # prompt tokens that were looked up in the prefix cache
    prefix_hits: int  # of these, found
    swaps: int
    steps: int
    step_s: float  # duration of the latest step
    predicted_step_s: float | None  # what the cost model said of it; None without measured costs
    slowdown: float | None = None  # of the latest steps over what the cost model said of them
    arrivals_per_s: float = 0.0  # over the latest ten seconds
    int4_token_share: float = 0.0  # of the tokens generated in the policy's quality window
    held: int = 0  # requests that wait for precision, with their blocks if they were running

    @property
    def num_generated(self) -> int:
        return sum(self.generated_tokens.values())

    @property
    def is_slow(self) -> bool:
        """Whether the latest step took far longer than the cost model said."""
        return self.step_s >= SLOW * (self.predicted_step_s or float("inf"))


ToEngine = Submit | Abort | Pin | Shutdown
FromEngine = Hello | Step | Refused | Failed | Events | Snapshot
