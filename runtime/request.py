"""A request's life: what was asked, what has been produced, where it stands."""

from collections.abc import Collection
from dataclasses import dataclass, field
from enum import Enum

import msgspec

from morphserve.configs.schema import Slo as Slo
from morphserve.quantize.manifest import Variant

PENDING = -1  # in place of a token that is being computed


class SamplingParams(msgspec.Struct, frozen=True):
    """How the next token is chosen and when to stop."""

    max_tokens: int
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0  # least probability of a token, as a share of the likeliest one's
    presence_penalty: float = 0.0  # off the logit of each token that the output holds
    frequency_penalty: float = 0.0  # the same, for each time the output holds it
    repetition_penalty: float = 1.0  # divides positive logits of tokens seen, prompt included
    logit_bias: dict[int, float] = {}  # token id -> added to its logit
    logprobs: int | None = None  # most likely tokens to tell beside each chosen one; None: nothing
    seed: int | None = None
    min_tokens: int = 0  # end-of-sequence is not allowed before
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()


def needs_history(params: SamplingParams) -> bool:
    """Whether a token depends on all tokens before it beyond what the model sees of them."""
    return bool(
        params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1
    )


class Demands(msgspec.Struct, frozen=True):
    """What a request asks of how it is served, beside its answer."""

    min_precision: Variant = Variant.INT4  # of every layer, in every step that computes for it
    slo: Slo = Slo()
    cache_salt: str = ""  # KV blocks are shared only among requests with the same salt


class FinishReason(Enum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"
    TIMEOUT = "timeout"  # it waited in the queue for too long


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Request:
    """State of one request. Written by the scheduler only."""

    id: str
    prompt: list[int]  # token ids
    params: SamplingParams
    arrival_s: float  # monotonic clock
    demands: Demands = Demands()
    max_rung: int | None = None  # the deepest at which it may be computed; None: any
    output: list[int] = field(default_factory=list)  # the last one may be PENDING
    is_ending: bool = False  # its newest token, known or not, is the last it may have
    status: Status = Status.WAITING
    finish_reason: FinishReason | None = None
    num_computed: int = 0  # tokens whose K and V are in the cache
    blocks: list[int] = field(default_factory=list)  # page0 of each KV block
    kv_rung: int = 0  # the deepest under which anything in its blocks was computed
    block_names: list[bytes] = field(default_factory=list)  # of its first full blocks
    num_registered: int = 0  # of its blocks, those that the prefix cache was shown
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache at the first admission
    num_preemptions: int = 0
    scheduled_s: float | None = None  # when it first ran, monotonic clock

    @property
    def is_pending(self) -> bool:
        """Whether its newest token is being computed."""
        return bool(self.output) and self.output[-1] == PENDING

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.output)

    @property
    def max_tokens(self) -> int:
        """Most tokens this request can come to hold, prompt included."""
        return len(self.prompt) + self.params.max_tokens

    def tokens_within(self, horizon: int) -> int:
        """Tokens it comes to hold with at most `horizon` more."""
        return min(self.num_tokens + horizon, self.max_tokens)

    def runs_at(self, rung: int) -> bool:
        """Whether it may be computed at this rung."""
        return self.max_rung is None or rung <= self.max_rung

    def gains_below(self, rung: int) -> bool:
        """Whether blocks that a deeper rung than this brings can be of use to it."""
        return self.max_rung is None or rung < self.max_rung

    def tokens(self, start: int, end: int) -> list[int]:
        """Token ids start..end of prompt and output together."""
        split = len(self.prompt)
        if end <= split:
            return self.prompt[start:end]
        if start >= split:
            return self.output[start - split : end - split]
        return self.prompt[start:] + self.output[: end - split]


def end_of(request: Request, eos: Collection[int]) -> FinishReason | None:
    """Why the request's latest token is its last, or None."""
    params = request.params
    token, count = request.output[-1], len(request.output)
    if count >= params.min_tokens:
        if token in params.stop_token_ids:
            return FinishReason.STOP
        if token in eos and not params.ignore_eos:
            return FinishReason.STOP
    return FinishReason.LENGTH if request.is_ending else None
