"""What mapping memory would cost instead of cutting up one arena: the driver's virtual memory."""

import statistics
import time
from collections.abc import Callable
from typing import Any

from bench import Bench

PAGES = 152  # of 2 MiB: what one layer frees


def run(bench: Bench) -> None:
    if bench.dry:
        bench.figures.add("mapping", "", "needs a GPU")
        return
    import torch
    from cuda.bindings import driver

    torch.zeros(1, device="cuda")  # the context
    spent: dict[str, list[float]] = {}

    def call(name: str, *arguments: Any) -> Any:
        started = time.perf_counter()
        error, *results = getattr(driver, name)(*arguments)
        spent.setdefault(name, []).append(time.perf_counter() - started)
        if int(error):
            raise RuntimeError(f"{name}: {error}")
        return results[0] if results else None

    _map_and_unmap(driver, call)
    for name, times in spent.items():
        bench.figures.add("us per call", name, statistics.median(times) * 1e6)


def _map_and_unmap(driver: Any, call: Callable[..., Any]) -> None:
    prop = driver.CUmemAllocationProp()
    prop.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    prop.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    prop.location.id = 0
    access = driver.CUmemAccessDesc()
    access.location = prop.location
    access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
    granularity = call(
        "cuMemGetAllocationGranularity",
        prop,
        driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM,
    )
    start = int(call("cuMemAddressReserve", PAGES * granularity, 0, 0, 0))
    handles = [call("cuMemCreate", granularity, prop, 0) for _ in range(PAGES)]
    places = [start + i * granularity for i in range(PAGES)]
    for place, handle in zip(places, handles, strict=True):
        call("cuMemMap", place, granularity, 0, handle, 0)
        call("cuMemSetAccess", place, granularity, [access], 1)
    for place, handle in zip(places, handles, strict=True):
        call("cuMemUnmap", place, granularity)
        call("cuMemRelease", handle)
    call("cuMemAddressFree", start, PAGES * granularity)
