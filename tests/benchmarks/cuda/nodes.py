"""What a disabled node of a CUDA graph costs: cudaGraphNodeSetEnabled."""

import time
from typing import Any

import torch
from bench import Bench

NODES = 320  # kernels of a decode step: about ten per layer


def measure(bench: Bench) -> None:
    """A chain of small kernels, beside as many that are disabled."""
    add = bench.figures.add
    if bench.dry:
        return add("disabled nodes", "", "needs a GPU")
    alone = _chain(NODES)
    both = _chain(2 * NODES)
    alone_s = bench.replays(alone.replay)
    both_s = bench.replays(both.replay)
    nodes = _nodes(both)[1::2]
    call_s = _disable(both, nodes)
    half_s = bench.replays(both.replay)
    add("disabled nodes", f"{NODES} enabled", alone_s * 1e6, "us")
    add("disabled nodes", f"{2 * NODES} enabled", both_s * 1e6, "us")
    add("disabled nodes", f"{NODES} of {2 * NODES} disabled", half_s * 1e6, "us")
    add("disabled nodes", "each adds", (half_s - alone_s) / NODES * 1e9, "ns")
    add("disabled nodes", "a call takes", call_s * 1e6, "us")


def _chain(count: int) -> torch.cuda.CUDAGraph:
    x = torch.ones(4096, device="cuda")
    x.add_(1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        for _ in range(count):
            x.add_(1)
    graph.instantiate()
    graph.keep = x  # type: ignore[attr-defined]
    return graph


def _nodes(graph: torch.cuda.CUDAGraph) -> list[Any]:
    from cuda.bindings import runtime

    raw = runtime.cudaGraph_t(init_value=graph.raw_cuda_graph())
    _, _, count = _checked(runtime.cudaGraphGetNodes(raw))
    _, nodes, _ = _checked(runtime.cudaGraphGetNodes(raw, count))
    return list(nodes)


def _disable(graph: torch.cuda.CUDAGraph, nodes: list[Any]) -> float:
    """Seconds of one call."""
    from cuda.bindings import runtime

    executable = runtime.cudaGraphExec_t(init_value=graph.raw_cuda_graph_exec())
    started = time.perf_counter()
    for node in nodes:
        _checked(runtime.cudaGraphNodeSetEnabled(executable, node, 0))
    return (time.perf_counter() - started) / len(nodes)


def _checked(result: tuple[Any, ...]) -> tuple[Any, ...]:
    if int(result[0]):
        raise RuntimeError(f"CUDA runtime: {result[0]}")
    return result
