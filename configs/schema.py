"""Frozen dataclasses of a run's settings, with units and checks."""

import re
from dataclasses import dataclass, field, replace

import msgspec

from morphserve.configs.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Defaults:
    """Of the settings that each kind of device has its own defaults for."""

    block_tokens: int
    min_run_bytes: int
    max_num_seqs: int
    max_num_batched_tokens: int

    def limits(self, num_seqs: int | None, num_tokens: int | None) -> tuple[int, int]:
        """max_num_seqs and max_num_batched_tokens; None is a default that suits the other."""
        if num_seqs is None:
            num_seqs = min(self.max_num_seqs, num_tokens or self.max_num_seqs)
        if num_tokens is None:
            num_tokens = max(self.max_num_batched_tokens, num_seqs)
        return num_seqs, num_tokens


CPU_DEFAULTS = Defaults(16, 64 * 1024, 64, 512)
CUDA_DEFAULTS = Defaults(32, 2 * 2**20, 256, 2048)


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """How device memory is cut up."""

    block_tokens: int = CPU_DEFAULTS.block_tokens  # tokens per KV block
    memory_budget: int | None = None  # bytes of the arena; None: what suits the device
    gpu_memory_utilization: float | None = None  # share of a GPU for everything; None: 0.9
    staging_slots: int = 2  # layers that may be in flight at once
    min_run_bytes: int = CPU_DEFAULTS.min_run_bytes  # shortest wanted run of a layer's pages
    enable_prefix_caching: bool = True  # keep KV for requests with the same beginning

    def __post_init__(self) -> None:
        if self.block_tokens < 1:
            raise ConfigError(f"--block-size must be at least 1, not {self.block_tokens}")
        share = self.gpu_memory_utilization
        if share is None:
            return
        if not 0 < share <= 1:
            raise ConfigError(
                f"--gpu-memory-utilization is a share above 0 and at most 1, not {share:g}"
            )
        if self.memory_budget is not None:
            raise ConfigError(
                "--memory-budget and --gpu-memory-utilization both say how much memory is used: "
                "leave out one of them"
            )


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of one step."""

    max_num_seqs: int = CPU_DEFAULTS.max_num_seqs  # requests running at once
    max_num_batched_tokens: int = CPU_DEFAULTS.max_num_batched_tokens  # per step, of all requests
    max_model_len: int | None = None  # prompt + output tokens; None: the model's own limit
    queue_timeout_s: float | None = None  # longest wait to be admitted; None: no limit

    def __post_init__(self) -> None:
        if self.max_num_seqs < 1:
            raise ConfigError(f"--max-num-seqs must be at least 1, not {self.max_num_seqs}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"--max-num-batched-tokens ({self.max_num_batched_tokens}) must be at least "
                f"--max-num-seqs ({self.max_num_seqs}): each running request needs one per step"
            )
        if self.queue_timeout_s is not None and not self.queue_timeout_s > 0:
            raise ConfigError(
                f"--queue-timeout must be above 0 seconds, not {self.queue_timeout_s:g}: leave it "
                "out for no limit"
            )


class Slo(msgspec.Struct, frozen=True):
    """What a request needs, or a server promises; None: nothing."""

    ttft_s: float | None = None  # request received to first token
    tpot_s: float | None = None  # per output token after the first


@dataclass(frozen=True, slots=True)
class Policy:
    """When the controller demotes and promotes layers. Loaded from the presets beside this file."""

    name: str
    max_demoted_share: float  # largest share of layers that may be INT4, 0 to 1
    static_layers: int  # layers held at INT4 all the time; -1: the controller decides
    window_s: float  # one look at the signals
    entry_windows: int  # consecutive pressed windows before the first demotion
    demote_above: float  # KV demand over capacity that counts as pressure, and what depth aims for
    max_queue_delay_s: float  # age of the oldest request waiting for memory that counts as pressure
    slo_share: float  # share of a TTFT target that a prediction may reach before it is pressure
    horizon_tokens: int  # output tokens per request that demand looks ahead
    promote_below: float  # demand over the shallower rung's capacity that allows promotion
    quiet_s: float  # time without a preemption before promotion
    dwell_s: float  # time that calm must have lasted before promotion
    cooldown_s: float  # time between opposite actions
    max_flips_per_minute: int  # changes of direction
    tail_s: float  # time without an arrival, nothing waiting, after which nothing is demoted
    max_demoted_token_share: float  # of generated tokens, made with INT4 layers; 1: no limit
    quality_window_s: float  # latest seconds over which that share is counted

    def __post_init__(self) -> None:
        if not 0 < self.promote_below < self.demote_above <= 1:
            raise ConfigError(
                f"policy {self.name}: promote_below ({self.promote_below}) must lie under "
                f"demote_above ({self.demote_above}), both between 0 and 1"
            )
        if not 0 <= self.max_demoted_share <= 1:
            raise ConfigError(f"policy {self.name}: max_demoted_share must lie between 0 and 1")
        if not 0 <= self.max_demoted_token_share <= 1:
            raise ConfigError(
                f"policy {self.name}: max_demoted_token_share must lie between 0 and 1"
            )
        if not 0 < self.slo_share <= 1:
            raise ConfigError(f"policy {self.name}: slo_share must lie above 0, at most 1")
        if self.quality_window_s <= 0:
            raise ConfigError(f"policy {self.name}: quality_window_s must lie above 0")

    @property
    def swaps(self) -> bool:
        """Whether it needs INT4 layers, of a model with enough layers."""
        return self.static_layers > 0 or (self.static_layers < 0 and self.max_demoted_share > 0)

    def max_demoted(self, num_layers: int) -> int:
        """Deepest rung this policy may reach."""
        if self.static_layers >= 0:
            return min(self.static_layers, num_layers)
        return round(self.max_demoted_share * num_layers)


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything the engine process is told."""

    model: str  # Hugging Face folder
    policy: Policy
    bundle: str | None = None  # folder made by `morph quantize`; None: full precision only
    device: str = "auto"  # auto (a GPU if there is one that serves), cpu, cuda, cuda:N
    kernels: str = "auto"  # auto (the device's own) or reference
    dtype: str = "auto"  # of weights and KV: auto, float32, bfloat16
    threads: int | None = None  # compute threads; None: OMP_NUM_THREADS, else one per core it gets
    order: str = "bundle"  # bundle (its ranking), front-to-back, back-to-front, random
    seed: int = 0  # of the random order and of unseeded sampling
    log_format: str = "text"  # as the server's
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    slo: Slo = Slo()  # of requests that name no targets of their own
    unset: frozenset[str] = frozenset()  # fields of Defaults that are left to the device

    def settled(self, defaults: Defaults) -> "EngineConfig":
        """The same for a device with these defaults, and nothing left to it."""

        def unless_unset(name: str, value: int) -> int | None:
            return None if name in self.unset else value

        cache, scheduler = self.cache, self.scheduler
        num_seqs, num_tokens = defaults.limits(
            unless_unset("max_num_seqs", scheduler.max_num_seqs),
            unless_unset("max_num_batched_tokens", scheduler.max_num_batched_tokens),
        )
        block_tokens = unless_unset("block_tokens", cache.block_tokens)
        min_run_bytes = unless_unset("min_run_bytes", cache.min_run_bytes)
        return replace(
            self,
            cache=replace(
                cache,
                block_tokens=defaults.block_tokens if block_tokens is None else block_tokens,
                min_run_bytes=defaults.min_run_bytes if min_run_bytes is None else min_run_bytes,
            ),
            scheduler=replace(scheduler, max_num_seqs=num_seqs, max_num_batched_tokens=num_tokens),
            unset=frozenset(),
        )


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """The HTTP side."""

    served_model_name: str
    host: str = "127.0.0.1"
    port: int = 8000
    max_queued: int = 512  # prompts that wait beside max_num_seqs; more are told to come again
    max_queued_tokens: int | None = None  # of prompts without a first token; None: 8 KV caches
    overload_status: int = 503  # what they are told: 503 or 429
    engine_timeout_s: float = 300.0  # an engine that says nothing for so long is replaced
    shutdown_timeout_s: float = 30.0  # for running requests after SIGTERM
    log_format: str = "text"  # text or json
    api_keys: tuple[str, ...] = field(default=(), repr=False)  # any opens the API; (): no key asked
    admin_key: str | None = field(default=None, repr=False)  # None: no admin routes
    allowed_origins: tuple[str, ...] = ()  # web pages of other hosts that may call; * is all
    sse_keep_alive_s: float = 15.0  # silence on a stream before a comment says that it lives

    def __post_init__(self) -> None:
        if self.max_queued < 1:
            raise ConfigError(f"--max-num-queued-reqs must be at least 1, not {self.max_queued}")
        if self.max_queued_tokens is not None and self.max_queued_tokens < 1:
            raise ConfigError(
                f"--max-num-queued-tokens must be at least 1, not {self.max_queued_tokens}"
            )
        if self.overload_status not in (429, 503):
            raise ConfigError(f"--overload-status must be 503 or 429, not {self.overload_status}")
        if not self.engine_timeout_s > 0:
            raise ConfigError(f"--engine-timeout must be above 0, not {self.engine_timeout_s:g}")
        if not self.sse_keep_alive_s > 0:
            raise ConfigError(f"sse_keep_alive_s must be above 0, not {self.sse_keep_alive_s:g}")
        if self.log_format not in ("text", "json"):
            raise ConfigError(f"--log-format must be text or json, not {self.log_format!r}")
        self._check_access()

    def _check_access(self) -> None:
        for key in (*self.api_keys, *([] if self.admin_key is None else [self.admin_key])):
            if not re.fullmatch(r"[!-~]{1,4096}", key):  # what a header can carry
                raise ConfigError("a key must be 1 to 4096 visible ASCII characters, no spaces")
        if self.admin_key in self.api_keys:
            raise ConfigError("the admin key must not be an API key, too")
        for origin in self.allowed_origins:
            if origin != "*" and not re.fullmatch(r"https?://[^/?#@\s*]+", origin):
                raise ConfigError(
                    f"an allowed origin is like https://chat.example.com:8443, or *; not {origin!r}"
                )
