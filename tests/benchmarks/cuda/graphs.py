"""Decode steps as one graph, in pieces, and launched kernel by kernel; and disabled nodes."""

import statistics
from typing import Any

import nodes
from bench import Bench
from model import random_model
from serving import Served, serve


def run(bench: Bench) -> None:
    try:
        nodes.measure(bench)
    except Exception as error:
        bench.figures.add("disabled nodes", "FAILED", f"{type(error).__name__}: {error}"[:120])
    sizes = bench.sizes
    batches = [batch for batch in sizes.batches if batch in (1, 8, 64)]
    served = serve(
        bench,
        random_model(bench),
        "performance",
        max_seqs=max(batches),
        max_batched_tokens=512 if not bench.dry else 64,
        kv_tokens=max(batches) * (sizes.context + 400),
        max_model_len=sizes.context + 400,
    )
    served.fill()
    served.pin(0)
    graphs: Any = getattr(served.runner.runner, "_graphs", None)
    if graphs is None:
        return bench.figures.add("ways", "", "this device has no graphs")
    for batch in batches:
        requests = served.decode(batch, sizes.context)
        _time(served, batch, "one graph")
        graphs._find_whole = lambda mix, num_seqs: None
        _time(served, batch, "pieces")
        graphs._find_pieces = lambda mix, num_seqs: None
        _time(served, batch, "eager")
        del graphs._find_whole, graphs._find_pieces
        served.end(requests)


def _time(served: Served, batch: int, way: str) -> None:
    steps = dict(served.runner.tally.steps)
    served.time_steps(2)
    spent = served.time_steps(2 if served.bench.dry else 30)
    taken = {how: n - steps[how] for how, n in served.runner.tally.steps.items()}
    how = max(taken, key=taken.__getitem__)
    served.bench.figures.add(f"{way} ms ({how})", f"B{batch}", 1e3 * statistics.median(spent))
