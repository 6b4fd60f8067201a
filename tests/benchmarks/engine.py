"""Times of the engine on the demo model: steps by batch and precision, swaps, the idle controller.

    python tests/benchmarks/engine.py [--threads N]

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
from morphserve.configs.schema import EngineConfig, SchedulerConfig
from morphserve.quantize.build import build_bundle
from morphserve.quantize.checkpoint import open_checkpoint
from morphserve.quantize.manifest import Variant
from morphserve.runtime.build import build
from morphserve.runtime.engine import Engine
from morphserve.runtime.messages import Submit
from morphserve.runtime.request import SamplingParams

PROMPT_TOKENS, OUTPUT_TOKENS = 200, 60
BATCHES = (1, 8, 16, 32)
POLICIES = {"full precision": "off", "6 of 12 INT4": "static:6", "all INT4": "static:all"}


def config(bundle: Path, policy: str, threads: int) -> EngineConfig:
    limits = SchedulerConfig(max_num_seqs=32, max_num_batched_tokens=512, max_model_len=640)
    return EngineConfig("demo", load_policy(policy), str(bundle), threads=threads, scheduler=limits)


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
        engine = Engine(config(bundle, policy, threads))
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
    """(seconds of one look at the signals, share of all time at the policy's rate of looks)

    With eight requests running and no pressure. Whole steps differ by more from run to run.
    """
    engine = Engine(config(bundle, "balanced", threads))
    submit(engine, 8)
    for _ in range(20):
        engine.step()
    window_s = load_policy("balanced").window_s
    looks = 2000
    started = time.perf_counter()
    for i in range(looks):
        engine._decide(time.monotonic() + i * window_s)
    look_s = (time.perf_counter() - started) / looks
    assert engine.snapshot().swaps == 0
    return look_s, look_s / window_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    threads = parser.parse_args().threads
    console = Console(width=120)
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "demo.morph"
        build_bundle(open_checkpoint("demo"), bundle, 64)
        console.print(f"{threads} threads, load average {os.getloadavg()[0]:.2f}")
        console.print(steps_table(bundle, threads))
        console.print(swaps_table(bundle, threads))
        look_s, share = controller_share(bundle, threads)
        console.print(f"controller: {look_s * 1e6:.0f} us a look, {share:.2%} of the time")


if __name__ == "__main__":
    main()
