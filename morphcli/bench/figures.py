"""The figures of a run, as `summary.json` has them."""

import msgspec

from morphserve.quantize.manifest import Variant


class Percentiles(msgspec.Struct, frozen=True):
    """None: the request at that rank was never answered, or there is none."""

    p50: float | None
    p95: float | None
    p99: float | None


class ServerFigures(msgspec.Struct, frozen=True):
    """What the server's own state tells of a run. Shares from 0 to 1."""

    preemptions: float  # of repeats, the mean per run
    swaps: float  # of repeats, the mean per run
    quantized_token_share: float | None  # made while a layer was INT8 or INT4; None: no token
    quantized_layers_max: int  # INT8 and INT4
    quantized_layers_at_end: int
    int4_layers_mean: float | None  # over generated tokens
    int4_layers_max: int
    kv_tokens_min: int  # capacity of the KV cache
    kv_tokens_max: int
    full_again_s: float | None  # from the end of the burst; None: never left, or not back at end
    later_episodes: float  # times that layers were swapped again after it; of repeats, per run


class Interval(msgspec.Struct, frozen=True):
    """95 % confidence interval of the mean over repeats."""

    low: float
    high: float


class Repeats(msgspec.Struct, frozen=True):
    """How far the repeats of one policy differ; None: unknown in one of them."""

    count: int
    slo_miss_share: Interval | None
    ttft_p95_s: Interval | None
    tpot_p95_s: Interval | None
    output_tokens_per_s: Interval | None
    perplexity: Interval | None


class PositionShare(msgspec.Struct, frozen=True):
    """Of output tokens at these places in their answers, the share made below full precision."""

    start: int  # 0 is an answer's first token
    end: int
    tokens: int
    below_full: float


class Answers(msgspec.Struct, frozen=True):
    """What the answers of one policy were worth. Shares from 0 to 1; None: not measured."""

    tokens: dict[Variant, int]  # by the lowest precision of the steps that made them
    positions: list[PositionShare] = []
    same_text: float | None = None  # of answers, the text at full precision
    token_agreement: float | None = None  # of tokens, the one at its place at full precision
    same_prefix_tokens: float | None = None  # mean, before the first token that differs
    f1: float | None = None  # against references
    rouge_l: float | None = None  # against references


class PolicySummary(msgspec.Struct):
    """The figures of one policy: of one run, or of all its repeats together."""

    policy: str
    offered: int
    finished: int
    refused: int  # answered with an HTTP error
    unfinished: int  # ran into the timeout
    failed: int  # anything else
    slo_misses: int  # of the offered requests
    ttft_s: Percentiles  # over offered requests
    tpot_s: Percentiles  # over finished requests
    e2e_s: Percentiles  # over offered requests
    duration_s: float  # from the first send to the last token; of repeats, the sum
    output_tokens_per_s: float
    finished_per_s: float
    goodput_per_s: float  # requests within the SLO
    lag_p50_s: float
    lag_p99_s: float
    lag_max_s: float
    faults: list[str]  # reasons for which the run proves nothing; empty for a valid run
    server: ServerFigures | None  # None: the server gives no state
    perplexity: float | None = None  # of the precisions served, weighted by tokens
    kl: float | None = None  # nats per token from full precision, weighted alike
    itl_s: Percentiles = Percentiles(None, None, None)  # every gap between two streamed pieces
    queue_s: Percentiles = Percentiles(None, None, None)  # received to first scheduled, if told
    repeats: Repeats | None = None  # None: one run
    answers: Answers | None = None
    slo_attainment: float = 0.0  # share of the offered requests that met the target
    repeat: int = 0  # of one run: which, from 0
    rate: float = 1.0  # of a sweep: the load, over the schedule's

    def __post_init__(self) -> None:
        # One division: 1 - 4/5 would lie under an asserted 0.2.
        self.slo_attainment = (self.offered - self.slo_misses) / self.offered

    @property
    def slo_miss_share(self) -> float:
        return self.slo_misses / self.offered
