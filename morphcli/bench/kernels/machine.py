"""The most that this machine can do: bytes read from memory, multiply-adds in registers."""

import ctypes
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier

from morphserve.configs.errors import ConfigError
from morphserve.morphcli.bench.kernels.memory import beyond_caches, huge_buffer
from morphserve.morphcli.bench.kernels.result import Rates
from morphserve.quantize.machine import free_memory
from morphserve.runtime.kernels.native import NativeUnavailable, load_library

KINDS = {"float32": 0, "bfloat16": 1, "int8": 2}  # as probe.c numbers them
ATTEMPTS = 30  # other work only ever takes away: the best counts
TURN_S = 0.02
PIECE = 4096  # bytes; parts of the buffer begin at multiples

Probe = Callable[[int], float]  # of the thread that does it: how much was done


def read_rates(threads: int) -> Rates:
    """Bytes per second of a plain loop over a buffer far larger than the last cache."""
    num_bytes = min(8 * beyond_caches(), free_memory() // 4)
    buffer = huge_buffer(num_bytes).fill_(1)
    library = _library()

    def rate(count: int) -> float:
        part = num_bytes // count // PIECE * PIECE

        def read(i: int) -> float:
            total = ctypes.c_uint64()
            start = buffer.data_ptr() + i * part
            library.morph_probe_read(start, part, ctypes.byref(total))
            return part

        return best_rate(read, count)

    return _rates(rate, threads)


def multiply_rates(threads: int) -> dict[str, Rates]:
    """Multiply-adds per second, by the kinds that this machine has instructions for."""
    found = {}
    for name, kind in KINDS.items():
        rounds = _rounds(kind)
        if rounds:
            found[name] = _rates(partial(best_rate, _multiply(kind, rounds)), threads)
    return found


def _rates(rate: Callable[[int], float], threads: int) -> Rates:
    """On a busy machine threads may never run side by side: together they do what one does."""
    one = rate(1)
    return Rates(one, one if threads == 1 else max(one, rate(threads)))


def best_rate(probe: Probe, count: int) -> float:
    """The best of several attempts of so many threads, each from a common start to the last end.

    Of one thread alone the time counts that the processor worked for it, as for kernels.
    """
    start = Barrier(count)
    clock = time.thread_time if count == 1 else time.perf_counter

    def attempt(i: int) -> tuple[float, float, float]:
        start.wait()
        began = clock()
        done = probe(i)
        return began, clock(), done

    rates: list[float] = []
    with ThreadPoolExecutor(count) as pool:
        for _ in range(ATTEMPTS):
            began, ended, done = zip(*pool.map(attempt, range(count)), strict=True)
            rates.append(sum(done) / (max(ended) - min(began)))
    return max(rates)


def _multiply(kind: int, rounds: int) -> Probe:
    library = _library()

    def multiply(_: int) -> float:
        done = ctypes.c_int64()
        library.morph_probe_multiply(kind, rounds, ctypes.byref(done))
        return float(done.value)

    return multiply


def _rounds(kind: int) -> int:
    """How many fill a turn; 0 where there is no instruction for the kind."""
    rounds, started = 100_000, time.perf_counter()
    if not _multiply(kind, rounds)(0):
        return 0
    return max(1, int(rounds * TURN_S / (time.perf_counter() - started)))


def _library() -> ctypes.CDLL:
    try:
        return load_library()
    except NativeUnavailable as error:
        raise ConfigError(
            f"--kernels measures the C kernels, which are not available ({error}): "
            "install a C compiler, as gcc"
        ) from error
