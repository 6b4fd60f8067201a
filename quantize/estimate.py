"""What making a bundle will take: disk exactly, memory and time by arithmetic and measurement."""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from morphserve.quantize import modules
from morphserve.quantize.architecture import Architecture
from morphserve.quantize.checkpoint import Checkpoint
from morphserve.quantize.files import encode_tensors
from morphserve.quantize.gptq import quantize_gptq
from morphserve.quantize.layer_file import layer_file_bytes
from morphserve.quantize.manifest import Quantization, Variant
from morphserve.quantize.moments import BATCH_TOKENS
from morphserve.quantize.packing import pack
from morphserve.quantize.rounding import CHUNK, Grid, dequantize, quantize_rtn
from morphserve.quantize.variants import AWQ, GPTQ

_SIZE = 1024  # of the matrices that are timed
_AWQ_TRIALS = 20  # scales that AWQ tries of three linears
_AWQ_ROWS = 512  # that it tries them on
_MATRICES = {GPTQ: 8, AWQ: 2}  # as large as the widest linear's moments, at one time
_LOADED_BYTES = 60_000_000  # of code that is loaded when it is first used


@dataclass(frozen=True, slots=True)
class Estimate:
    file_bytes: dict[Variant, int]  # of all layer files; exact unless layers are imported
    memory_bytes: int  # at one time, this program as it is now included
    seconds: float  # on this machine, as busy as it is now


@dataclass(frozen=True, slots=True)
class _Work:
    """Of one layer."""

    multiplied: float = 0.0  # multiply-adds of matrix products and factorisations
    rounded: float = 0.0  # weights rounded to nearest and written
    solved: float = 0.0  # weights rounded by GPTQ, beside its matrix products


def estimate(checkpoint: Checkpoint, variants: Mapping[Variant, Quantization]) -> Estimate:
    """What `build_bundle` would take on the CPU. Takes seconds itself and writes nothing."""
    arch = checkpoint.architecture
    memory = _resident_bytes() + _working_bytes(arch, variants)
    start_s = time.perf_counter()
    vectors = checkpoint.layer(0).norms.input.dtype
    per_layer_s = time.perf_counter() - start_s
    work = [_work(arch, how) for how in variants.values()]
    per_layer_s += sum(step.rounded for step in work) * _round_s()
    per_layer_s += sum(step.multiplied for step in work) * _multiply_s()
    if any(step.solved for step in work):
        per_layer_s += sum(step.solved for step in work) * _solve_s()
    sizes = {
        variant: layer_file_bytes(arch, how, vectors) * arch.num_layers
        for variant, how in variants.items()
    }
    return Estimate(sizes, memory, per_layer_s * arch.num_layers)


def _work(arch: Architecture, how: Quantization) -> _Work:
    weights = _num_weights(arch)
    if how.calibration is None:
        return _Work(rounded=weights)
    tokens, length = _tokens(how), how.calibration.window_tokens
    # Of full precision and of the variant, to measure its output error.
    forward = tokens * (weights + length * arch.q_size)
    if how.method not in (GPTQ, AWQ):
        return _Work(2 * forward, rounded=weights)
    linears = _fused_shapes(arch)
    moments = sum(tokens * k * k for _, k in linears)
    if how.method == AWQ:
        trials = sum(_AWQ_TRIALS * _AWQ_ROWS * k * k for _, k in linears[1:])
        tried = sum(_AWQ_TRIALS * _AWQ_ROWS * k for _, k in linears[1:])
        return _Work(3 * forward + moments + trials, rounded=weights + tried)
    # Inputs at full precision and behind the linears rounded before; targets corrected for the
    # difference; factors and inverses of the moments; column updates, on one thread.
    factors = sum(3 * k**3 + n * k * k for n, k in linears)
    updates = sum(n * k * k / 2 for n, k in linears) * torch.get_num_threads()
    return _Work(4 * forward + 2 * moments + factors + updates, weights, weights)


def _fused_shapes(arch: Architecture) -> list[tuple[int, int]]:
    shapes = modules.linear_shapes(arch)
    groups = (modules.OUTPUT, modules.QKV, modules.GATE_UP, modules.DOWN)
    return [(sum(shapes[name][0] for name in names), shapes[names[0]][1]) for names in groups]


def _num_weights(arch: Architecture) -> int:
    return sum(n * k for n, k in _fused_shapes(arch))


def _tokens(how: Quantization) -> int:
    sample = how.calibration
    return 0 if sample is None else sample.num_windows * sample.window_tokens


def _window_tokens(how: Quantization) -> int:
    return 0 if how.calibration is None else how.calibration.window_tokens


def _round_s() -> float:
    """Per weight, with all that is done to a rounded weight up to its file."""
    weight = torch.randn(_SIZE, _SIZE)

    def work() -> None:
        rounded = quantize_rtn(weight, Grid(4, 64))
        dequantize(rounded)
        encode_tensors(pack(rounded))

    return _time(work) / weight.numel()


def _multiply_s() -> float:
    """Per multiply-add."""
    a, b = torch.randn(_SIZE, _SIZE), torch.randn(_SIZE, _SIZE)
    return _time(lambda: a @ b) / _SIZE**3


def _solve_s() -> float:
    """Per weight; rounding to nearest is counted apart."""
    weight, inputs = torch.randn(_SIZE, _SIZE // 4), torch.randn(_SIZE, _SIZE // 4)
    moments = inputs.t() @ inputs / len(inputs)
    return _time(lambda: quantize_gptq(weight, moments, Grid(4, 64))) / weight.numel()


def _time(work: Callable[[], object]) -> float:
    """Seconds of the faster of two runs, the first of which warms up."""
    times = []
    for _ in range(2):
        start_s = time.perf_counter()
        work()
        times.append(time.perf_counter() - start_s)
    return min(times)


def _working_bytes(arch: Architecture, variants: Mapping[Variant, Quantization]) -> int:
    """Beside the program: a layer in every form it takes, calibration states, and matrices."""
    item = 4 if arch.dtype == "float32" else 2
    weights = _num_weights(arch)
    largest = max(n * k for n, k in _fused_shapes(arch))
    widest = max(k for _, k in _fused_shapes(arch))
    tokens = max(_tokens(how) for how in variants.values())
    methods = {how.method for how in variants.values()}
    states = 5 * tokens * arch.hidden_size * 4
    batch = max(BATCH_TOKENS, *(_window_tokens(how) for how in variants.values()))
    activations = min(tokens, batch) * 5 * arch.intermediate_size * 4
    scratch = 48 * min(CHUNK, largest)  # about a dozen float32 copies
    # In float32 twice, of full precision and of the variant; AWQ's also without its folds.
    layer = (12 if AWQ in methods else 8) * weights + weights
    files = 2 * sum(layer_file_bytes(arch, how, torch.float32) for how in variants.values())
    # Moments, their factors and inverses, and for GPTQ those of two inputs.
    matrices = max(_MATRICES.get(method, 0) for method in methods) * widest**2 * 4
    embedding = arch.vocab_size * arch.hidden_size * item
    at_work = layer + max(files, activations, scratch + matrices)
    return _LOADED_BYTES + states + max(embedding, at_work)


def _resident_bytes() -> int:
    """Of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
