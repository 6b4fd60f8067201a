"""Predicted against measured time of the engine's steps on the demo model.

    python tests/benchmarks/costs.py [--threads N]

Measures costs as `morph profile` does, then turns real engines. Lower quartiles of the steps, as
the costs are: other work on the machine meets both alike.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from morphserve.configs.load import load_policy
from morphserve.configs.schema import CacheConfig, EngineConfig, SchedulerConfig
from morphserve.quantize.build import QuantizeSettings, build_bundle
from morphserve.quantize.bundle import open_bundle
from morphserve.quantize.checkpoint import open_checkpoint
from morphserve.quantize.costs import DeviceCosts
from morphserve.quantize.manifest import Variant
from morphserve.runtime.build import build_engine
from morphserve.runtime.costs import CostModel, Span, cost_model, roofline
from morphserve.runtime.engine import Engine
from morphserve.runtime.measure import measure_costs
from morphserve.runtime.messages import Submit
from morphserve.runtime.request import SamplingParams

CHUNK, STEPS = 256, 40
POLICIES = {"full precision": "off", "6 of 12 INT4": "static:6", "all INT4": "static:all"}
DECODES = [(1, 64), (1, 1000), (8, 64), (8, 500), (12, 200), (32, 64), (32, 400), (48, 100)]
PREFILLS = [(1, 256), (1, 1024), (4, 64)]  # prompts, tokens in each


def engine_for(bundle: Path, policy: str, threads: int) -> Engine:
    return build_engine(
        EngineConfig(
            "demo",
            load_policy(policy),
            str(bundle),
            threads=threads,
            cache=CacheConfig(enable_prefix_caching=False),  # batches repeat their prompts
            scheduler=SchedulerConfig(
                max_num_seqs=64, max_num_batched_tokens=CHUNK, max_model_len=1100
            ),
        )
    )


def submit(engine: Engine, count: int, prompt_tokens: int, output_tokens: int) -> None:
    params = SamplingParams(max_tokens=output_tokens, temperature=0.0, ignore_eos=True)
    for i in range(count):
        prompt = [(7 * i + j) % 4000 + 5 for j in range(prompt_tokens)]
        assert engine.submit(Submit(f"r{i}", prompt, params)) is None


def timed_steps(engine: Engine) -> Iterator[tuple[list[Span], float]]:
    """What each step computed and its seconds, until nothing is left to do."""
    scheduler = engine._parts.scheduler
    while engine.has_work:
        before = {id(r): r.num_computed for r in (*scheduler.running, *scheduler.waiting)}
        requests = [*scheduler.running, *scheduler.waiting]
        started = time.perf_counter()
        engine.step()
        seconds = time.perf_counter() - started
        spans = [(before[id(r)], r.num_computed) for r in requests]
        yield [span for span in spans if span[1] > span[0]], seconds


def compare(engine: Engine, model: CostModel, case: tuple[int, int], decode: bool) -> list[float]:
    """[predicted, measured] seconds of a decode step, or of all the steps of a prefill."""
    count, prompt_tokens = case
    variants = [Variant(state) for state in engine.snapshot().layers]
    until_all_decode = count * prompt_tokens // (CHUNK - count)  # steps
    runs = []
    for _ in range(1 if decode else 10):
        submit(engine, count, prompt_tokens, STEPS + until_all_decode if decode else 2)
        steps = [
            (model.step_seconds(variants, spans), seconds)
            for spans, seconds in timed_steps(engine)
            if len(spans) == count and all((end - start == 1) == decode for start, end in spans)
        ]
        runs += steps if decode else [tuple(map(sum, zip(*steps, strict=True)))]
    return [sorted(values)[len(runs) // 4] for values in zip(*runs, strict=True)]


def comparison(bundle: Path, model: CostModel, threads: int) -> tuple[Table, list[float]]:
    table = Table("layers", "step", "predicted", "measured", "off by", title="steps")
    errors = []
    for title, policy in POLICIES.items():
        engine = engine_for(bundle, policy, threads)
        for decode, cases in ((True, DECODES), (False, PREFILLS)):
            for case in cases:
                predicted, measured = compare(engine, model, case, decode)
                errors.append(predicted / measured - 1)
                name = (
                    f"decode {case[0]} at {case[1]}" if decode else f"prefill {case[0]} x {case[1]}"
                )
                table.add_row(
                    title,
                    name,
                    f"{predicted * 1e3:.2f} ms",
                    f"{measured * 1e3:.2f} ms",
                    f"{errors[-1]:+.1%}",
                )
    return table, errors


def layers_table(costs: DeviceCosts) -> Table:
    counts = costs.layers[0].curve.tokens
    table = Table(
        *("layer", "bytes", *map(str, counts), "GB/s", "GFLOP/s", "fit"), title="us by tokens"
    )
    for times in costs.layers:
        constants = roofline(times, costs.layer_weights)
        table.add_row(
            times.variant,
            str(times.num_bytes),
            *(f"{seconds * 1e6:.0f}" for seconds in times.curve.seconds),
            f"{constants.bytes_per_s / 1e9:.1f}",
            f"{constants.flops / 1e9:.0f}",
            f"{constants.error:.1%}",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    threads = parser.parse_args().threads
    console = Console(width=140)
    with tempfile.TemporaryDirectory() as folder:
        path, checkpoint = Path(folder) / "demo.morph", open_checkpoint("demo")
        build_bundle(checkpoint, path, QuantizeSettings("rtn", 64, int8=True))
        started = time.perf_counter()
        costs = measure_costs(checkpoint, open_bundle(str(path), checkpoint), "cpu", threads)
        took, load = time.perf_counter() - started, os.getloadavg()[0]
        console.print(
            f"{costs.device}, {threads} threads, in {took:.1f} s, load average {load:.2f}"
        )
        model = cost_model(costs)
        console.print(layers_table(costs))
        console.print(
            f"attention fits: decode off by {model.decode.error:.1%}, "
            f"prefill by {model.prefill.error:.1%}"
        )
        table, errors = comparison(path, model, threads)
        console.print(table)
        console.print(f"mean absolute error {sum(map(abs, errors)) / len(errors):.1%}")


if __name__ == "__main__":
    main()
