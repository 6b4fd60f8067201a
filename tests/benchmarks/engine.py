"""Times of the engine on the demo model: steps by batch and precision, swaps, idle control.

    python tests/benchmarks/engine.py [--threads N] [--rounds N]

Prints the tables of BENCHMARKS.md. Medians; compare figures of one run only.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from morphserve.configs.load import load_policy
from morphserve.configs.schema import CacheConfig, EngineConfig, SchedulerConfig
from morphserve.quantize.build import QuantizeSettings, build_bundle
from morphserve.quantize.bundle import open_bundle
from morphserve.quantize.checkpoint import open_checkpoint
from morphserve.quantize.manifest import Variant
from morphserve.runtime.build import build, build_engine
from morphserve.runtime.engine import Engine
from morphserve.runtime.measure import measure_costs
from morphserve.runtime.messages import Submit
from morphserve.runtime.request import SamplingParams

PROMPT_TOKENS, OUTPUT_TOKENS = 200, 60
BATCHES = (1, 8, 16, 32)
STREAMS = 16
TURN_STEPS, TURNS, WARM_TURNS = 5, 30, 20  # in one round
POLICIES = {"full precision": "off", "6 of 12 INT4": "static:6", "all INT4": "static:all"}


def config(bundle: Path, policy: str, threads: int) -> EngineConfig:
    limits = SchedulerConfig(max_num_seqs=32, max_num_batched_tokens=512, max_model_len=640)
    return EngineConfig(
        "demo",
        load_policy(policy),
        str(bundle),
        threads=threads,
        cache=CacheConfig(enable_prefix_caching=False),  # batches repeat their prompts
        scheduler=limits,
    )


def submit(engine: Engine, count: int) -> None:
    params = SamplingParams(max_tokens=OUTPUT_TOKENS, temperature=0.0, ignore_eos=True)
    for i in range(count):
        prompt = [(7 * i + j) % 4000 + 5 for j in range(PROMPT_TOKENS)]
        assert engine.submit(Submit(f"r{i}", prompt, params)) is None


def run_batch(engine: Engine, count: int) -> tuple[float, float]:
    """(prompt tokens per second, median seconds of a decode step)"""
    computed = engine.snapshot().prompt_tokens + count * PROMPT_TOKENS
    submit(engine, count)
    started = time.perf_counter()
    while engine.snapshot().prompt_tokens < computed:
        engine.step()
    prefill_s = time.perf_counter() - started
    steps = []
    while engine.has_work:
        started = time.perf_counter()
        engine.step()
        steps.append(time.perf_counter() - started)
    return count * PROMPT_TOKENS / prefill_s, statistics.median(steps)


def steps_table(bundle: Path, threads: int) -> Table:
    table = Table("layers", *(f"batch {count}" for count in BATCHES), title="decode step, prefill")
    for title, policy in POLICIES.items():
        engine = build_engine(config(bundle, policy, threads))
        run_batch(engine, BATCHES[-1])  # touches all memory
        runs = [run_batch(engine, count) for count in BATCHES]
        table.add_row(
            title, *(f"{step_s * 1e3:.2f} ms, {rate:,.0f} tok/s" for rate, step_s in runs)
        )
    return table


def swaps_table(bundle: Path, threads: int) -> Table:
    swapper = build(config(bundle, "performance", threads)).swapper
    table = Table("swap", "copies before steps", "commit at the boundary", title="one layer")
    times: dict[Variant, list[tuple[float, float]]] = {Variant.INT4: [], Variant.FULL: []}
    for _ in range(20):
        for to in times:
            for layer in range(12):
                started = time.perf_counter()
                swapper.start(layer, to)
                swapper.advance()
                copied = time.perf_counter()
                swapper.commit_ready()
                times[to].append((copied - started, time.perf_counter() - copied))
    for to, title in ((Variant.INT4, "demote"), (Variant.FULL, "promote")):
        medians = map(statistics.median, zip(*times[to], strict=True))
        table.add_row(title, *(f"{seconds * 1e6:.0f} us" for seconds in medians))
    return table


def controller_share(bundle: Path, threads: int) -> tuple[float, float]:
    """(processor seconds of one look at the signals, their share at the policy's rate of looks)

    With sixteen requests running, no pressure and measured costs.
    """
    engine = build_engine(config(bundle, "balanced", threads))
    submit(engine, STREAMS)
    for _ in range(20):
        engine.step()
    window_s = load_policy("balanced").window_s
    looks = 2000
    now_s, started = time.monotonic(), time.thread_time()
    for i in range(looks):
        engine._decide(now_s + 1.01 * i * window_s)  # a look that comes too early is none
    look_s = (time.thread_time() - started) / looks
    assert engine.snapshot().swaps == 0
    return look_s, look_s / window_s


class Streams:
    """An engine that sixteen clients keep busy: each asks again when it has its answer."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.num_sent = 0
        for i in range(STREAMS):  # apart, so that prompts and decodes mix as they would
            self._send(OUTPUT_TOKENS * (i + 1) // STREAMS)

    def turn(self) -> tuple[int, float]:
        """(tokens generated, processor seconds) of a few steps."""
        before = self.engine.snapshot().num_generated
        started = time.process_time()
        for _ in range(TURN_STEPS):
            step = self.engine.step()
            for output in step.outputs if step else []:
                if output.finish_reason:
                    self._send(OUTPUT_TOKENS)
        seconds = time.process_time() - started
        return self.engine.snapshot().num_generated - before, seconds

    def _send(self, max_tokens: int) -> None:
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        prompt = [(7919 * self.num_sent + j) % 4000 + 5 for j in range(PROMPT_TOKENS)]
        assert self.engine.submit(Submit(f"s{self.num_sent}", prompt, params)) is None
        self.num_sent += 1


def idle_ratios(bundle: Path, threads: int, rounds: int) -> dict[str, list[float]]:
    """Tokens per processor second over those of an engine with `off`, one ratio per round.

    Of `balanced`, never pressed, and of `off` once more, which shows what chance does. All do the
    same work in turns of a few steps. A round's ratio is the median of its pairs of turns: other
    work on the machine, for which processor time stands still, spoils caches all the same.
    """
    names = {"off": "off", "balanced": "balanced", "off again": "off"}
    streams = {name: Streams(build_engine(config(bundle, p, threads))) for name, p in names.items()}
    for _ in range(WARM_TURNS):  # touches the memory of all
        for stream in streams.values():
            stream.turn()
    ratios: dict[str, list[float]] = {"balanced": [], "off again": []}
    for _ in range(rounds):
        turns = [_turns(streams, first) for first in range(TURNS)]
        for name, found in ratios.items():
            found.append(statistics.median(turn["off"] / turn[name] for turn in turns))
    assert all(stream.engine.snapshot().swaps == 0 for stream in streams.values())
    return ratios


def _turns(streams: dict[str, Streams], first: int) -> dict[str, float]:
    """Processor seconds of one turn of each, who is first changing from call to call."""
    names = list(streams)
    order = [names[(first + i) % len(names)] for i in range(len(names))]
    done = {name: streams[name].turn() for name in order}
    assert len({tokens for tokens, _ in done.values()}) == 1
    return {name: seconds for name, (_, seconds) in done.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=7, help="of the idle control")
    given = parser.parse_args()
    threads, console = given.threads, Console(width=120)
    with tempfile.TemporaryDirectory() as folder:
        bundle, checkpoint = Path(folder) / "demo.morph", open_checkpoint("demo")
        build_bundle(checkpoint, bundle, QuantizeSettings("rtn", 64))
        console.print(f"{threads} threads, load average {os.getloadavg()[0]:.2f}")
        console.print(steps_table(bundle, threads))
        console.print(swaps_table(bundle, threads))
        opened = open_bundle(str(bundle), checkpoint)
        opened.with_costs(measure_costs(checkpoint, opened, "cpu", threads))
        look_s, share = controller_share(bundle, threads)
        console.print(f"controller: {look_s * 1e6:.0f} us a look, {share:.2%} of the time")
        console.print(f"tokens per processor second over off, {STREAMS} streams, no pressure:")
        for name, ratios in idle_ratios(bundle, threads, given.rounds).items():
            middle, spread = statistics.median(ratios), f"{min(ratios):.4f} to {max(ratios):.4f}"
            console.print(f"  {name}: median {middle:.4f}, {spread} in {len(ratios)} rounds")


if __name__ == "__main__":
    main()
