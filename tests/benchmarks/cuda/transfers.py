"""Copies from pinned host memory: how fast, and how long a step's small ones wait for them."""

import statistics
import time

import torch
from bench import Bench, between_events

CHUNK_BYTES = 8 << 20


def measure(bench: Bench) -> None:
    add, size = bench.figures.add, 1 << 20 if bench.dry else 416 << 20
    started = time.perf_counter()
    host = torch.empty(size, dtype=torch.uint8, pin_memory=not bench.dry)
    add("host to device", "pinning", (time.perf_counter() - started) / (size / 2**30), "s/GiB")
    host.random_()
    target = torch.empty(size, dtype=torch.uint8, device=bench.device)

    def whole() -> None:
        target.copy_(host, non_blocking=True)

    def chunked(spacers: bool) -> None:
        for a, b in zip(target.split(CHUNK_BYTES), host.split(CHUNK_BYTES), strict=True):
            a.copy_(b, non_blocking=True)
            if spacers:
                a[:1].add_(1)

    ways = {
        "whole": whole,
        "8 MiB chunks": lambda: chunked(False),
        "with spacers": lambda: chunked(True),
    }
    for label, way in ways.items():
        add("host to device", label, size / bench.replays(way, 0.2) / 1e9, "GB/s")
    if not bench.dry:
        for label, way in ways.items():
            add("a small copy beside it us", label, _small_copy_us(way))


def _small_copy_us(bulk: object) -> float:
    """Median wait of 4 KiB on another stream while bulk copies run; "~15" is without them."""
    side = torch.cuda.Stream()
    small = torch.empty(4096, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(4096, dtype=torch.uint8, device="cuda")
    spent = []
    for _ in range(20):
        with torch.cuda.stream(side):
            bulk()  # type: ignore[operator]
        spent += between_events([lambda: target.copy_(small, non_blocking=True)] * 1)
        torch.cuda.synchronize()
    return statistics.median(spent) * 1e6
