"""A tiny engine that overlaps, its clients, and the answers that they should get."""

from dataclasses import dataclass, field, replace
from functools import cache

from deferred_runner import DeferredRunner, defer
from swap_driver import ARCHITECTURE, prompt_of, tiny_model

from morphserve.configs.load import load_policy
from morphserve.configs.schema import CacheConfig, EngineConfig, SchedulerConfig
from morphserve.quantize.manifest import Variant
from morphserve.runtime.build import assemble
from morphserve.runtime.engine import Engine
from morphserve.runtime.kernels import load_kernels
from morphserve.runtime.layout import DeviceMemory, lay_out
from morphserve.runtime.loader import LoadedModel
from morphserve.runtime.memory import budget_for
from morphserve.runtime.messages import Step, Submit, TokenOutput
from morphserve.runtime.request import Demands, SamplingParams

QUICK = replace(
    load_policy("performance"),
    window_s=0.0,
    entry_windows=1,
    quiet_s=0.0,
    dwell_s=0.0,
    cooldown_s=0.0,
    max_flips_per_minute=1000,
)
EOS = (11, 40)
MAX_LEN = 64
AMPLE, TIGHT = 2000, 80  # tokens of KV at full precision


class ManualClock:
    def __init__(self) -> None:
        self.seconds = 100.0

    def now_s(self) -> float:
        return self.seconds

    def epoch_s(self) -> float:
        return self.seconds


@cache
def model() -> LoadedModel:
    """All variants of its layers give the same bits, so that swaps change no answer."""
    loaded = tiny_model(load_kernels("cpu"), exact=True)
    return replace(loaded, architecture=replace(ARCHITECTURE, eos_token_ids=EOS))


def engine_of(kv_tokens: int, clock: ManualClock | None = None, **limits: float) -> Engine:
    scheduler = {"max_num_seqs": 5, "max_num_batched_tokens": 24, "max_model_len": MAX_LEN}
    config = EngineConfig(
        model="",
        policy=QUICK,
        cache=CacheConfig(block_tokens=8, min_run_bytes=1),
        scheduler=SchedulerConfig(**(scheduler | limits)),  # type: ignore[arg-type]
    )
    sizes = model().sizes(8)
    config = replace(
        config, cache=replace(config.cache, memory_budget=budget_for(sizes, 2, 1, kv_tokens))
    )
    memory = DeviceMemory(2**40, lambda: 2**40)
    layout = lay_out(config, sizes, model().ladder, 256, memory)
    return Engine(config, assemble(config, model(), layout), clock or ManualClock())


@dataclass(frozen=True)
class Ask:
    """A request as clients make them."""

    seed: int
    length: int
    params: SamplingParams
    min_precision: Variant = Variant.INT4

    @property
    def prompt(self) -> list[int]:
        return prompt_of(self.seed, self.length)

    def submit(self, engine: Engine, name: str) -> None:
        demands = Demands(min_precision=self.min_precision)
        assert engine.submit(Submit(name, self.prompt, self.params, demands)) is None


@dataclass
class Told:
    """What a client has heard of a request."""

    tokens: list[int] = field(default_factory=list)
    firsts: int = 0  # outputs that told how long it was queued or cached
    reason: str | None = None

    def take(self, output: TokenOutput) -> None:
        assert self.reason is None, "told after the end"
        self.tokens += output.tokens
        self.reason = output.finish_reason
        assert len(output.logprobs or []) in (0, len(output.tokens))


class Client:
    """Steps an engine, and checks what holds after every step."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.told: dict[str, Told] = {}
        self.asked: dict[str, Ask] = {}
        self.aborted: set[str] = set()

    def submit(self, ask: Ask) -> str:
        name = f"r{len(self.asked)}"
        self.asked[name] = ask
        ask.submit(self.engine, name)
        return name

    def abort(self, name: str) -> None:
        if self.told.get(name, Told()).reason is None:
            self.aborted.add(name)
        self.engine.abort(name)

    def step(self) -> Step | None:
        step = self.engine.step()
        for output in step.outputs if step else []:
            assert output.request_id not in self.aborted, "told after it was aborted"
            self.told.setdefault(output.request_id, Told()).take(output)
        self.check()
        return step

    def drain(self) -> None:
        for _ in range(3000):
            if not self.engine.has_work and not self.engine.snapshot().held:
                return
            self.step()
        raise AssertionError("requests did not end")

    def check(self) -> None:
        parts = self.engine._parts
        parts.pool.check([request.blocks for request in parts.scheduler.running])
        told = sum(len(told.tokens) for told in self.told.values())
        assert self.engine.snapshot().num_generated == told


def alone(ask: Ask) -> tuple[list[int], str | None]:
    """The answer of an engine that reads each step at once, with nothing else to do."""
    known = _answers()
    if (key := repr((ask.seed, ask.length, ask.params))) not in known:
        client = Client(_still())
        ask.submit(client.engine, "alone")
        client.engine._monitor.generated_tokens.clear()
        client.drain()
        told = client.told["alone"]
        known[key] = told.tokens, told.reason
    return known[key]


@cache
def _answers() -> dict[str, tuple[list[int], str | None]]:
    return {}


@cache
def _still() -> Engine:
    return engine_of(AMPLE)


def overlapping(kv_tokens: int = AMPLE, **more: float) -> tuple[Client, DeferredRunner]:
    engine = engine_of(kv_tokens, **more)
    return Client(engine), defer(engine)


def greedy(max_tokens: int, **params: object) -> SamplingParams:
    return SamplingParams(max_tokens, temperature=0.0, **params)  # type: ignore[arg-type]


def sampled(max_tokens: int, **params: object) -> SamplingParams:
    """Tokens that do not repeat as the greedy ones of a random model do."""
    return SamplingParams(max_tokens, seed=2, ignore_eos=True, **params)  # type: ignore[arg-type]


def check_answers(client: Client) -> None:
    for name, ask in client.asked.items():
        tokens, reason = alone(ask)
        told = client.told.get(name, Told())
        if name in client.aborted:
            assert told.tokens == tokens[: len(told.tokens)]
        else:
            assert (told.tokens, told.reason) == (tokens, reason)
    assert client.engine.snapshot().blocks_used == 0
