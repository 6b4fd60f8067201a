"""NVIDIA machine code, disassembled and counted by kind of instruction."""

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TENSOR = ("HGMMA", "QGMMA", "IGMMA", "HMMA", "IMMA", "QMMA", "DMMA")
# kinds that a reader asks for; the rest counts as "other"
_PLAIN = ("BAR", "MUFU", "SHFL", "LDSM", "LDL", "STL", "ATOM", "RED", "WARPGROUP", "UTMALDG", "BRA")
_WIDE = ("LDG", "STG", "LDS", "STS", "LDGSTS")  # with the bits that one thread moves
_LINE = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P[T\d]+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);", re.M
)
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


@dataclass(frozen=True, slots=True)
class Instruction:
    address: int
    name: str  # "LDG.E.128"
    operands: str


@dataclass(frozen=True, slots=True)
class Code:
    instructions: list[Instruction]
    registers: int
    stack: int  # bytes per thread
    local: int  # bytes per thread


def disassemble(cubin: bytes) -> Code:
    """One kernel's machine code, by the cuobjdump that Triton brings."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        text = _cuobjdump("--dump-sass", path)
        usage = _USAGE.search(_cuobjdump("--dump-resource-usage", path))
    assert usage is not None, "cuobjdump tells no registers"
    registers, stack, local = map(int, usage.groups())
    instructions = [
        Instruction(int(address, 16), name, operands)
        for address, name, operands in _LINE.findall(text)
    ]
    return Code(instructions, registers, stack, local)


def count(instructions: Sequence[Instruction]) -> dict[str, int]:
    """Instructions by kind: "all", "HGMMA", "LDG.128", …, "other" for what has no kind here."""
    counts: dict[str, int] = {"all": 0}
    for instruction in instructions:
        kind = _kind(instruction.name)
        if kind != "padding":
            counts["all"] += 1
            counts[kind] = counts.get(kind, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (item[0] == "other", item[0] != "all")))


def hottest_loop(instructions: Sequence[Instruction]) -> list[Instruction]:
    """The innermost loop that multiplies most, else that loads most; [] without loops."""
    inner: list[list[Instruction]] = []
    for start, end in _innermost(_loops(instructions)):
        inner.append([i for i in instructions if start <= i.address <= end])
    return max(inner, key=_weight, default=[])


def _loops(instructions: Sequence[Instruction]) -> list[tuple[int, int]]:
    """Address ranges that a branch backwards closes."""
    found = []
    for instruction in instructions:
        target = re.search(r"0x([0-9a-f]+)\s*$", instruction.operands)
        if instruction.name.split(".")[0] == "BRA" and target:
            start = int(target.group(1), 16)
            if start < instruction.address:  # a branch to itself ends the program's padding
                found.append((start, instruction.address))
    return found


def _innermost(loops: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    def holds(outer: tuple[int, int], inner: tuple[int, int]) -> bool:
        return outer != inner and outer[0] <= inner[0] and inner[1] <= outer[1]

    return [loop for loop in loops if not any(holds(loop, other) for other in loops)]


def _weight(loop: list[Instruction]) -> tuple[int, int, int]:
    kinds = count(loop)
    tensor = sum(kinds.get(kind, 0) for kind in TENSOR)
    loads = sum(number for kind, number in kinds.items() if kind.startswith("LDG"))
    return tensor, loads, len(loop)


def _kind(name: str) -> str:
    first, *rest = name.split(".")
    if first == "NOP":
        return "padding"
    if first in TENSOR or first in _PLAIN:
        return first
    if first in _WIDE:
        return f"{first}.{_bits(rest)}"
    return "other"


def _bits(suffixes: Sequence[str]) -> int:
    for suffix in suffixes:
        if suffix in ("64", "128"):
            return int(suffix)
        if suffix in ("U8", "S8"):
            return 8
        if suffix in ("U16", "S16"):
            return 16
    return 32


def _cuobjdump(option: str, path: Path) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    done = subprocess.run([tool, option, path], capture_output=True, text=True, check=True)
    return done.stdout
