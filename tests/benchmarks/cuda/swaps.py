"""Swaps beside running requests: what a commit takes, what steps feel, how long a layer takes."""

import statistics
from dataclasses import dataclass, field

import torch
import transfers
from bench import Bench, Gate
from model import random_model
from serving import Commit, Served, serve

SWAPS = 8
TURNS = 6  # down and up again, so that a percentile of the steps beside them means something
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
        kv_tokens=batch * (sizes.context + 8 * STEADY),
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
    dry, figures = served.bench.dry, served.bench.figures
    full = served.time_steps(3 if dry else STEADY)
    before, blocks = _counts(served), served.parts.pool.capacity
    down, up = Turns(), Turns()
    for turn in range(1 if dry else TURNS):
        served.swapper.strict = True
        down.add(served, swaps)
        served.swapper.strict = False
        if not turn:
            grown = served.parts.pool.capacity - blocks
            figures.add("demote", "KV blocks gained per layer", grown / swaps)
            int4 = served.time_steps(3 if dry else STEADY)
        up.add(served, 0)
    served.bench.sync()
    after = _counts(served)
    _tell(served, "demote", down, full)
    _tell(served, "promote", up, full, int4)
    for name, count in after.items():
        figures.add("during swaps", name, count - before[name], gate=Gate("<=", 0))
    figures.add("during swaps", "host waits", served.swapper.waits, gate=Gate("<=", 0))
    figures.add("during swaps", "failures", len(served.parts.swapper.failures), gate=Gate("<=", 0))


@dataclass(slots=True)
class Turns:
    """All swaps in one direction, and the steps beside them."""

    steps_s: list[float] = field(default_factory=list)
    commits: list[Commit] = field(default_factory=list)
    advance_s: list[float] = field(default_factory=list)  # host time before each step
    layer_s: list[float] = field(default_factory=list)  # of a layer, in each turn

    def add(self, served: Served, rung: int) -> None:
        """Swaps until the rung is reached."""
        swapper = served.swapper
        swapper.commits, swapper.started_s, swapper.advance_s = [], {}, []
        served.engine.pin(rung)

        def arrived() -> bool:
            return served.rung == rung and not served.parts.swapper.in_flight

        self.steps_s += served.time_steps(4000, until=arrived)
        if not arrived():
            raise TimeoutError(f"rung {rung} was not reached")
        self.steps_s += served.time_steps(5)
        spent_s = swapper.commits[-1].at_s - min(swapper.started_s.values())
        self.layer_s.append(spent_s / sum(len(commit.layers) for commit in swapper.commits))
        self.commits += swapper.commits
        self.advance_s += swapper.advance_s


def _tell(
    served: Served, name: str, turns: Turns, full: list[float], int4: list[float] | None = None
) -> None:
    add, during = served.bench.figures.add, turns.steps_s
    device_ms = [commit.device_s * 1e3 / len(commit.layers) for commit in turns.commits]
    host_ms = [commit.host_s * 1e3 / len(commit.layers) for commit in turns.commits]
    down, up = (int4 is None, int4 is not None)
    commit_gate = Gate("<=", 0.2) if down else None
    add(name, "commit on device", statistics.median(device_ms), "ms", commit_gate)
    add(name, "commit on host", statistics.median(host_ms), "ms")
    add(name, "before a step", 1e3 * statistics.median(turns.advance_s or [0.0]), "ms")
    layer_ms = 1e3 * statistics.median(turns.layer_s)
    add(name, "a layer", layer_ms, "ms", Gate("<=", 12.0) if up else None)
    p99, steady99 = _quantile(during, 0.99), _quantile(full, 0.99)
    add(name, "p99 over steady", p99 / steady99, gate=Gate("<=", 1.15) if down else None)
    add(name, "steps", len(during))
    if int4 is not None:
        expected = (statistics.mean(full) + statistics.mean(int4)) / 2
        add(name, "mean over steady", statistics.mean(during) / expected, gate=Gate("<=", 1.03))
    add(f"{name} all", "steady p50 ms", 1e3 * statistics.median(full), in_table=False)
    add(f"{name} all", "steady p99 ms", 1e3 * steady99, in_table=False)
    add(f"{name} all", "during p50 ms", 1e3 * statistics.median(during), in_table=False)
    add(f"{name} all", "during p99 ms", 1e3 * p99, in_table=False)
    add(f"{name} all", "during max ms", 1e3 * max(during), in_table=False)
    add(f"{name} all", "commit max ms", max(device_ms), in_table=False)


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
