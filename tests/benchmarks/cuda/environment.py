"""The machine, and the two ceilings that every other figure is held against."""

import platform
import subprocess
from functools import partial
from pathlib import Path

import torch
from bench import Bench


def run(bench: Bench) -> None:
    import triton

    add = bench.figures.add
    add("software", "torch", torch.__version__)
    add("software", "triton", triton.__version__)
    add("software", "python", platform.python_version())
    add("software", "commit", _commit())
    add("device", "is", _device(bench))
    if not bench.dry:
        properties = torch.cuda.get_device_properties(0)
        add("device", "multiprocessors", properties.multi_processor_count)
        add("device", "memory", properties.total_memory / 2**30, "GiB")
        add("device", "L2", properties.L2_cache_size / 2**20, "MiB")
        add("device", "driver", _driver())
        add("device", "CUDA", str(torch.version.cuda))
    _ceilings(bench)


def _ceilings(bench: Bench) -> None:
    source = bench.random(bench.sizes.copy_bytes // 2)
    target = torch.empty_like(source)
    copy_s = bench.seconds([partial(target.copy_, source)])
    bench.figures.add("ceilings", "copy", 2 * source.nbytes / copy_s / 1e12, "TB/s")
    del source, target
    size = 128 if bench.dry else 8192
    a, b = bench.random(size, size), bench.random(size, size)
    out = torch.empty_like(a)
    product_s = bench.seconds([partial(torch.mm, a, b, out=out)], 0.2)
    bench.figures.add("ceilings", "bf16 product", 2 * size**3 / product_s / 1e12, "TFLOP/s")


def _device(bench: Bench) -> str:
    return platform.processor() or "cpu" if bench.dry else torch.cuda.get_device_name()


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    folder = Path(__file__).parent
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
