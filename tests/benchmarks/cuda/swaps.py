"""Swaps beside running requests: what a commit takes, what steps feel, how long a layer takes."""

import statistics

import torch
import transfers
from bench import Bench, Gate
from model import random_model
from serving import Served, serve

SWAPS = 8
STEADY = 150


def run(bench: Bench) -> None:
    transfers.measure(bench)
    sizes = bench.sizes
    batch = max(b for b in sizes.batches if b <= 64)
    served = serve(
        bench,
        random_model(bench),
        "performance",
        max_seqs=batch,
        max_batched_tokens=512 if not bench.dry else 64,
        kv_tokens=batch * (sizes.context + 10 * STEADY),
        max_model_len=sizes.context + 10 * STEADY,
    )
    served.fill()
    served.decode(batch, sizes.context)
    swaps = min(SWAPS, served.num_layers)
    served.pin(swaps)  # whatever is slow the first time
    served.pin(0)
    served.time_steps(5)
    _measure(served, swaps)


def _measure(served: Served, swaps: int) -> None:
    steady = STEADY if not served.bench.dry else 3
    before = _counts(served)
    blocks = served.parts.pool.capacity
    full = served.time_steps(steady)
    served.swapper.strict = True
    down = _swap(served, swaps)
    _tell(served, "demote", down, full)
    grown = served.parts.pool.capacity - blocks
    served.bench.figures.add("demote", "KV blocks gained per layer", grown / swaps)
    int4 = served.time_steps(steady)
    served.swapper.strict = False
    up = _swap(served, 0)
    _tell(served, "promote", up, full, int4)
    after = _counts(served)
    add = served.bench.figures.add
    for name in ("graphs captured", "allocator calls"):
        if name in after:
            add("during swaps", name, after[name] - before[name], gate=Gate("<=", 0))
    add("during swaps", "failures", len(served.parts.swapper.failures), gate=Gate("<=", 0))


def _swap(served: Served, rung: int) -> list[float]:
    """Seconds of the steps until the rung is reached."""
    served.swapper.commits.clear()
    served.swapper.started_s.clear()
    served.swapper.advance_s.clear()
    served.engine.pin(rung)

    def arrived() -> bool:
        return served.rung == rung and not served.parts.swapper.in_flight

    spent = served.time_steps(4000, until=arrived)
    if not arrived():
        raise TimeoutError(f"rung {rung} was not reached")
    return spent + served.time_steps(5)


def _tell(
    served: Served,
    name: str,
    during: list[float],
    full: list[float],
    int4: list[float] | None = None,
) -> None:
    add, swapper = served.bench.figures.add, served.swapper
    served.bench.sync()
    layers = sum(len(commit.layers) for commit in swapper.commits)
    device_ms = [commit.device_s * 1e3 / len(commit.layers) for commit in swapper.commits]
    host_ms = [commit.host_s * 1e3 / len(commit.layers) for commit in swapper.commits]
    began = min(swapper.started_s.values())
    per_layer_ms = (swapper.commits[-1].at_s - began) * 1e3 / layers
    gate = Gate("<=", 0.2) if int4 is None else None
    add(name, "commit on device", statistics.median(device_ms), "ms", gate)
    add(name, "commit on host", statistics.median(host_ms), "ms")
    add(name, "before a step", 1e3 * statistics.median(swapper.advance_s or [0.0]), "ms")
    gate = Gate("<=", 12.0) if int4 is not None else None
    add(name, "a layer", per_layer_ms, "ms", gate)
    p99, steady99 = _quantile(during, 0.99), _quantile(full, 0.99)
    limit = Gate("<=", 1.15) if int4 is None else None
    add(name, "p99 over steady", p99 / steady99, gate=limit)
    add(name, "steps", len(during))
    if int4 is not None:
        expected = (statistics.mean(full) + statistics.mean(int4)) / 2
        add(name, "mean over steady", statistics.mean(during) / expected, gate=Gate("<=", 1.03))
    add(f"{name} all", "steady p50 ms", 1e3 * statistics.median(full), in_table=False)
    add(f"{name} all", "steady p99 ms", 1e3 * steady99, in_table=False)
    add(f"{name} all", "during p50 ms", 1e3 * statistics.median(during), in_table=False)
    add(f"{name} all", "during p99 ms", 1e3 * p99, in_table=False)
    add(f"{name} all", "during max ms", 1e3 * max(during), in_table=False)


def _counts(served: Served) -> dict[str, float]:
    counts: dict[str, float] = {}
    if tally := getattr(served.runner.runner, "tally", None):
        counts["graphs captured"] = tally.whole + tally.pieces
    if not served.bench.dry:
        counts["allocator calls"] = torch.cuda.memory_stats().get("num_device_alloc", 0)
    return counts


def _quantile(values: list[float], share: float) -> float:
    """Nearest rank."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]
