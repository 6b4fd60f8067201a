"""Decode steps of the engine that serves: against published step times, by batch and precision."""

import statistics

from bench import Bench, Gate
from model import random_model
from serving import Served, serve
from sizes import STEP_MS

WARM, STEPS = 8, 40


def run(bench: Bench) -> None:
    sizes = bench.sizes
    most = max(sizes.batches)
    served = serve(
        bench,
        random_model(bench),
        "performance",
        max_seqs=most,
        max_batched_tokens=max(2048, most) if not bench.dry else 64,
        kv_tokens=most * (sizes.context + 4 * (WARM + STEPS)),
        max_model_len=sizes.context + 8 * (WARM + STEPS),
    )
    served.fill()
    _startup(served)
    layers = served.num_layers
    for rung, name in ((0, "full"), (layers, "INT4"), (layers // 2, "half INT4")):
        served.pin(rung)
        for batch in sizes.batches:
            if bench.left_s < 5:
                return
            _decode(served, batch, name)


def _startup(served: Served) -> None:
    tally = getattr(served.runner.runner, "tally", None)
    add = served.bench.figures.add
    for phase, seconds in served.parts.hello.startup_s.items():
        add("start", phase, seconds, "s")
    if tally is not None:
        add("graphs", "whole", tally.whole)
        add("graphs", "pieces", tally.pieces)
        add("graphs", "captured in", tally.seconds, "s")
        add("graphs", "memory", tally.num_bytes / 2**20, "MiB")
        if tally.failure:
            add("graphs", "FAILED", tally.failure)


def _decode(served: Served, batch: int, name: str) -> None:
    requests = served.decode(batch, served.bench.sizes.context)
    served.time_steps(1 if served.bench.dry else WARM)
    capture_wanted(served)
    served.time_steps(2)
    served.runner.waited_s = 0.0
    spent = served.time_steps(2 if served.bench.dry else STEPS)
    waited_s = served.runner.waited_s / len(spent)
    step_s = statistics.median(spent)
    served.end(requests)
    add, label = served.bench.figures.add, f"B{batch}"
    published = STEP_MS.get(batch)
    gate = Gate("<=", 1.10) if name == "full" and published else None
    add(f"{name} step ms", label, step_s * 1e3)
    if published:
        add(f"{name} over vLLM", label, step_s * 1e3 / published, gate=gate)
    add(f"{name} tokens/s", label, batch / step_s, in_table=False)
    host_ms = (statistics.mean(spent) - waited_s) * 1e3
    host_gate = Gate("<=", 0.5) if batch == 64 else None
    add(f"{name} host ms", label, host_ms, gate=host_gate, in_table=name == "full")
    add(f"{name} waited ms", label, waited_s * 1e3, in_table=False)


def capture_wanted(served: Served) -> None:
    """Graphs of whole steps that the runner would capture when idle."""
    while served.runner.prepare():
        pass
