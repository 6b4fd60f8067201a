"""The engine that serves, over a random model, with stopwatches around its runner and swapper."""

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from bench import Bench

from morphserve.configs.load import load_policy
from morphserve.configs.schema import CacheConfig, EngineConfig, SchedulerConfig
from morphserve.quantize.manifest import Variant
from morphserve.runtime.build import build
from morphserve.runtime.engine import Engine
from morphserve.runtime.layout import staging_slots
from morphserve.runtime.loader import LoadedModel
from morphserve.runtime.memory import budget_for
from morphserve.runtime.request import Request, SamplingParams, Status


class TimedRunner:
    """How long the host waits for the device's tokens."""

    def __init__(self, runner: Any) -> None:
        self.runner, self.overlaps = runner, runner.overlaps
        self.waited_s = 0.0

    def launch(self, batch: Any) -> "_TimedLaunch":
        return _TimedLaunch(self, self.runner.launch(batch))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.runner, name)


@dataclass(slots=True)
class _TimedLaunch:
    runner: TimedRunner
    launched: Any

    def result(self) -> Any:
        started = time.perf_counter()
        try:
            return self.launched.result()
        finally:
            self.runner.waited_s += time.perf_counter() - started


@dataclass(slots=True)
class Commit:
    layers: list[int]
    at_s: float
    host_s: float
    events: tuple[Any, Any] | None  # before and after, on the compute stream

    @property
    def device_s(self) -> float:
        return self.events[0].elapsed_time(self.events[1]) / 1e3 if self.events else self.host_s


class TimedSwapper:
    """What swaps take of the step loop; with `strict`, how often they wait for the device."""

    def __init__(self, swapper: Any, on_gpu: bool) -> None:
        self.swapper, self._on_gpu = swapper, on_gpu
        self.strict = False
        self.waits = 0
        self.commits: list[Commit] = []
        self.started_s: dict[int, float] = {}  # of each layer's latest swap
        self.advance_s: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.swapper, name)

    def start(self, layer: int, to: Variant) -> bool:
        self.started_s[layer] = time.perf_counter()
        with self._counting_waits():
            return bool(self.swapper.start(layer, to))

    def advance(self) -> None:
        started = time.perf_counter()
        with self._counting_waits():
            self.swapper.advance()
        if self.swapper.in_flight:
            self.advance_s.append(time.perf_counter() - started)

    def commit_ready(self) -> Any:
        if not self.swapper.in_flight:
            return self.swapper.commit_ready()
        events = self._events()
        started = time.perf_counter()
        if events:
            events[0].record()
        with self._counting_waits():
            done = self.swapper.commit_ready()
        if events:
            events[1].record()
        ended = time.perf_counter()
        if done:
            layers = [swap.layer for swap in done]
            self.commits.append(Commit(layers, ended, ended - started, events))
        return done

    def _events(self) -> tuple[Any, Any] | None:
        if not self._on_gpu:
            return None
        first, second = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        return first, second

    @contextmanager
    def _counting_waits(self) -> Iterator[None]:
        """torch warns of its calls that wait for the device."""
        if not (self.strict and self._on_gpu):
            yield
            return
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode("default")
        self.waits += sum("a synchronizing" in str(warning.message) for warning in told)


@dataclass(slots=True)
class Served:
    """An engine and its parts."""

    bench: Bench
    engine: Engine
    parts: Any
    runner: TimedRunner
    swapper: TimedSwapper
    count: int = field(default=0)  # requests so far

    @property
    def num_layers(self) -> int:
        return int(self.parts.hello.num_layers)

    def fill(self) -> None:
        """Numbers in every page of KV: what was never written may be no number at all."""
        blocks = torch.tensor(self.parts.pool.allocate(self.parts.pool.num_free))
        for cache in self.parts.model.caches:
            cache[blocks.to(cache.device)] = self.bench.random(1, cache.shape[1])
        self.parts.pool.free(blocks.tolist())

    def pin(self, rung: int) -> None:
        """Swaps layers until the rung is reached."""
        self.engine.pin(rung)
        ends = time.monotonic() + 20
        while self.rung != rung or self.parts.swapper.in_flight:
            self.engine.step()
            if time.monotonic() > ends:
                raise TimeoutError(f"rung {rung} was not reached: {self.parts.swapper.failures}")

    @property
    def rung(self) -> int:
        return int(self.parts.ladder.rung_of(self.parts.layers.variants))

    def decode(self, count: int, context: int) -> list[Request]:
        """Requests that decode from the next step on; nobody computed their prompts."""
        requests = []
        for i in range(count):
            params = SamplingParams(max_tokens=1 << 20, temperature=0.0, ignore_eos=True)
            prompt = [(7 * i + j) % 100 + 5 for j in range(context)]
            request = Request(f"d{self.count}", prompt, params, time.monotonic())
            request.blocks = self.parts.pool.allocate(-(-(context + 1) // self.block_tokens))
            request.num_computed, request.status = context - 1, Status.RUNNING
            request.scheduled_s = request.arrival_s
            self.parts.scheduler.running.append(request)
            requests.append(request)
            self.count += 1
        return requests

    @property
    def block_tokens(self) -> int:
        return int(self.parts.hello.block_tokens)

    def end(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self.engine.abort(request.id)
        for _ in range(3):
            self.engine.step()

    def time_steps(self, count: int, until: Callable[[], bool] = lambda: False) -> list[float]:
        """Seconds from one step's end to the next one's, of so many steps, or until then."""
        spent = []
        before = time.perf_counter()
        for _ in range(count):
            self.engine.step()
            now = time.perf_counter()
            spent.append(now - before)
            before = now
            if until():
                break
        return spent


def serve(
    bench: Bench,
    model: LoadedModel,
    policy: str,
    max_seqs: int,
    max_batched_tokens: int,
    kv_tokens: int | None = None,
    budget: int | None = None,
    max_model_len: int | None = None,
) -> Served:
    """With room for so many tokens of KV at full precision, or within a budget of bytes."""
    cache = CacheConfig(
        block_tokens=bench.sizes.block_tokens,
        min_run_bytes=64 if bench.dry else 2 << 20,
        enable_prefix_caching=False,
    )
    limits = SchedulerConfig(max_seqs, max_batched_tokens, max_model_len)
    config = EngineConfig(
        "", load_policy(policy), device=bench.device, cache=cache, scheduler=limits
    )
    if budget is None:
        assert kv_tokens is not None
        sizes = model.sizes(cache.block_tokens)
        budget = budget_for(sizes, staging_slots(config), cache.min_run_bytes, kv_tokens)
    config = replace(config, cache=replace(cache, memory_budget=budget))
    parts = build(config, model)
    runner = TimedRunner(parts.runner)
    swapper = TimedSwapper(parts.swapper, on_gpu=not bench.dry)
    parts = replace(parts, runner=runner, swapper=swapper)
    return Served(bench, Engine(config, parts), parts, runner, swapper)
