"""Compiles our Triton kernels for a GPU that is not here, exactly as their launches ask for.

    python tests/support/offline_compile.py FILE_OR_MODULE:FUNCTION [--arch 80 90] [--json PATH]

FUNCTION launches kernels on tensors of torch's device "meta" (no memory, no numbers). Each launch
is compiled with its own types, alignments, constants, num_warps and num_stages instead of being
run; the table tells registers, spills, shared memory and the machine instructions, also of the
innermost loop with the most arithmetic. `compile_launches` does it in a fresh process for tests:
this one may hold kernels that are interpreted.
"""

import argparse
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import sass

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Architecture:
    """What a multiprocessor holds (CUDA C++ programming guide, table of compute capabilities)."""

    shared_bytes: int  # of one multiprocessor; each program takes 1 KiB more than it asks for
    shared_limit: int  # of one program
    warps: int
    programs: int
    multiprocessors: int  # of the card that the architecture stands for: A100, L4, H200


ARCHITECTURES = {
    80: Architecture(164 << 10, 163 << 10, 64, 32, 108),
    89: Architecture(100 << 10, 99 << 10, 48, 24, 58),
    90: Architecture(228 << 10, 227 << 10, 64, 32, 132),
}


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel as one architecture runs it."""

    name: str
    arch: int
    grid: tuple[int, ...]  # of its first launch
    launches: int  # that use this very machine code
    constants: dict[str, str]  # constexpr arguments
    warps: int
    stages: int
    registers: int  # per thread
    spilled_bytes: int  # stack and local memory per thread
    shared_bytes: int  # per program; Triton asks for all of it at launch
    programs_per_sm: int  # that fit at once
    counts: dict[str, int]  # instructions by kind, see sass.py
    loop: dict[str, int]  # of the innermost loop with the most arithmetic; {}: none


def compile_launches(target: str, archs: Sequence[int] = (90,)) -> list[Compiled]:
    """Every kernel that `target`, "file.py:function" or "module:function", launches.

    A process for each architecture, side by side.
    """
    with ThreadPoolExecutor() as pool:
        return [kernel for of in pool.map(partial(_compile, target), archs) for kernel in of]


def _compile(target: str, arch: int) -> list[Compiled]:
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "kernels.json"
        command = [sys.executable, __file__, target, "--arch", str(arch)]
        done = subprocess.run(
            [*command, "--json", str(result)],
            env=_environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{target} did not compile:\n{done.stdout}\n{done.stderr}")
        return [
            Compiled(**{**kernel, "grid": tuple(kernel["grid"])})
            for kernel in json.loads(result.read_text())
        ]


def record(function: Callable[[], object], arch: int) -> list[Compiled]:
    """In this process, where kernels must not be interpreted."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    launches: dict[str, tuple[Any, list[tuple[int, ...]]]] = {}  # by the machine code's hash
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        named = {p.name: a for p, a in zip(self.params, args, strict=False)} | kwargs
        size = tuple(int(n) for n in (grid(named) if callable(grid) else grid))
        stand_ins = [_stand_in(argument) for argument in args]
        kernel = run(
            self,
            *stand_ins,
            grid=size,
            warmup=True,
            **{name: _stand_in(argument) for name, argument in kwargs.items()},
        )
        _, grids = launches.setdefault(kernel.hash, (kernel, []))
        grids.append(size)
        return kernel

    JITFunction.run = compile_only
    driver.set_active(_Driver(arch))
    try:
        function()
    finally:
        JITFunction.run = run
    return [_examined(kernel, grids, arch) for kernel, grids in launches.values()]


@dataclass(frozen=True, slots=True)
class _Driver:
    """What Triton asks of a GPU's driver to compile; one device per architecture."""

    arch: int

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


class _Address:
    """A tensor without memory, aligned as in memory that starts at a multiple of 256."""

    def __init__(self, tensor: Any) -> None:
        self.dtype = tensor.dtype
        self._offset = tensor.storage_offset() * tensor.element_size()

    def data_ptr(self) -> int:
        return self._offset

    @staticmethod
    def ptr_range() -> int:
        return 0


def _stand_in(argument: Any) -> Any:
    import torch

    if isinstance(argument, tuple):
        return tuple(map(_stand_in, argument))
    return _Address(argument) if isinstance(argument, torch.Tensor) else argument


def _examined(kernel: Any, grids: list[tuple[int, ...]], arch: int) -> Compiled:
    code = sass.disassemble(kernel.asm["cubin"])
    warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
    names = kernel.src.fn.arg_names
    return Compiled(
        name=kernel.metadata.name,
        arch=arch,
        grid=grids[0],
        launches=len(grids),
        constants={
            names[path[0]]: str(getattr(value, "value", value))
            for path, value in kernel.src.constants.items()
        },
        warps=warps,
        stages=kernel.metadata.num_stages,
        registers=code.registers,
        spilled_bytes=code.stack + code.local,
        shared_bytes=shared,
        programs_per_sm=_programs(ARCHITECTURES[arch], code.registers, warps, shared),
        counts=sass.count(code.instructions),
        loop=sass.count(loop) if (loop := sass.hottest_loop(code.instructions)) else {},
    )


def _programs(arch: Architecture, registers: int, warps: int, shared: int) -> int:
    """64 Ki registers are given out to warps in units of 256, a quarter of them per scheduler."""
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = (4 * ((65536 // 4) // per_warp)) // warps if per_warp else arch.programs
    by_shared = arch.shared_bytes // (shared + 1024)
    return min(by_registers, by_shared, arch.warps // warps, arch.programs)


def _function(target: str) -> Callable[[], object]:
    place, _, name = target.partition(":")
    if not place.endswith(".py"):
        return getattr(importlib.import_module(place), name)
    spec = importlib.util.spec_from_file_location(Path(place).stem, place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # Triton looks for a kernel's module
    spec.loader.exec_module(module)
    return getattr(module, name)


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = [str(ROOT / ".src"), str(Path(__file__).parent), kept.get("PYTHONPATH", "")]
    return kept | {"PYTHONPATH": os.pathsep.join(filter(None, path)), "OMP_NUM_THREADS": "1"}


def _compile_only() -> None:
    """Before Triton is imported."""
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # else Triton warns of a new default
    sys.path[:0] = [str(ROOT / ".src"), str(ROOT)]


def table(kernels: Sequence[Compiled]) -> str:
    head = (
        f"{'kernel':20} {'sm':>3} {'grid':>12} {'warps':>5} {'regs':>4} {'spill':>5} {'KiB':>5} "
        f"{'/SM':>3} {'instr':>5}  innermost loop, or all where there is none; constants"
    )
    return "\n".join([head, *map(_row, kernels)])


def _row(kernel: Compiled) -> str:
    grid = "x".join(map(str, kernel.grid)) + (f" *{kernel.launches}" if kernel.launches > 1 else "")
    constants = " ".join(f"{name}={value}" for name, value in kernel.constants.items())
    return (
        f"{kernel.name[:20]:20} {kernel.arch:3} {grid:>12} {kernel.warps:5} {kernel.registers:4} "
        f"{kernel.spilled_bytes:5} {kernel.shared_bytes / 1024:5.1f} {kernel.programs_per_sm:3} "
        f"{kernel.counts['all']:5}  {_kinds(kernel.loop or kernel.counts)}; {constants}"
    )


def _kinds(counts: dict[str, int]) -> str:
    return " ".join(f"{kind}:{number}" for kind, number in counts.items() if kind != "other")


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile the kernels that a function launches.")
    parser.add_argument("target", metavar="FILE_OR_MODULE:FUNCTION")
    parser.add_argument("--arch", type=int, nargs="+", default=[90], choices=ARCHITECTURES)
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    _compile_only()
    function = _function(arguments.target)
    kernels = [kernel for arch in arguments.arch for kernel in record(function, arch)]
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(kernel) for kernel in kernels]))
    print(table(kernels))


if __name__ == "__main__":
    main()
