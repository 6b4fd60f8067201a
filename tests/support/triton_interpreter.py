"""Triton's interpreter, mended: it computes with the bits of bfloat16 as if they were integers.

Kernels then run on the CPU, on CPU tensors, as they would on a GPU, slowly. Inline assembly is
emulated by functions that a test names for it.
"""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

Emulation = Callable[..., tuple[np.ndarray, ...]]  # arrays of the operands -> arrays of the results
_emulations: dict[str, Emulation] = {}  # by the assembly's text


def interpret_without_gpu() -> None:
    """Before any kernel is imported: where torch sees no GPU, they are interpreted."""
    if torch.cuda.is_available():
        return
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # else Triton warns of a new default
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    _mend(interpreter)


def emulate(assembly: str, emulation: Emulation) -> None:
    """What this inline assembly computes, element by element."""
    _emulations[assembly] = emulation


def widen(bits: np.ndarray) -> np.ndarray:
    """Bits of bfloat16 numbers, as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 numbers rounded to the nearest bfloat16, ties to even, as bits."""
    numbers = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    bits: np.ndarray = numbers.bfloat16().view(torch.int16).numpy().view(np.uint16)
    return bits.reshape(values.shape)


def _mend(interpreter: Any) -> None:
    import triton.language as tl

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    binary, unary, cast, dot = (
        getattr(builder, name) for name in ("binary_op", "unary_op", "cast_impl", "create_dot")
    )

    def is_bfloat16(operand: Any) -> bool:
        return bool(operand.dtype.scalar == tl.bfloat16)

    def as_float(operand: Any) -> Any:
        return handle(widen(operand.data), tl.float32) if is_bfloat16(operand) else operand

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        if not is_bfloat16(lhs):
            return binary(self, lhs, rhs, op)
        result = op(widen(lhs.data), widen(rhs.data))
        if result.dtype == np.bool_:
            return handle(result, tl.int1)
        return handle(narrow(result), tl.bfloat16)

    def unary_op(self: Any, arg: Any, op: Any) -> Any:
        if not is_bfloat16(arg):
            return unary(self, arg, op)
        return handle(narrow(op(widen(arg.data))), tl.bfloat16)

    def cast_impl(self: Any, source: Any, to: Any) -> Any:
        if is_bfloat16(source):
            return cast(self, as_float(source), to)
        if to.scalar == tl.bfloat16:
            return handle(narrow(source.data.astype(np.float32)), tl.bfloat16)
        return cast(self, source, to)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *how: Any) -> Any:
        return dot(self, as_float(a), as_float(b), d, *how)

    def create_fp_to_fp(self: Any, source: Any, to: Any, rounding_mode: Any) -> Any:
        return cast_impl(self, source, to)

    def create_inline_asm(
        self: Any, text: str, constraints: str, values: Any, types: Any, pure: bool, pack: int
    ) -> Any:
        results = _emulations[text](*(value.data for value in values))
        return _Results([handle(r, t.scalar) for r, t in zip(results, types, strict=True)])

    builder.binary_op, builder.unary_op = binary_op, unary_op
    builder.cast_impl, builder.create_dot = cast_impl, create_dot
    builder.create_fp_to_fp = create_fp_to_fp
    builder.create_inline_asm = create_inline_asm
    _mend_indices(interpreter)
    _mend_calls(interpreter)


def _mend_indices(interpreter: Any) -> None:
    """Older releases turn an array of one element into a number as numpy no longer allows."""
    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.reshape(()))

    interpreter._patch_lang_tensor = patch_lang_tensor


def _mend_calls(interpreter: Any) -> None:
    """A function that a kernel calls prepares the language anew: half of the time of small ones."""
    import triton.language as tl

    patch = interpreter._patch_lang
    prepared: set[str] = set()  # modules, while a kernel runs

    def patch_lang(function: Any) -> Any:
        seen = function.__globals__.values()
        modules = {module.__name__ for module in (tl, tl.core) if any(v is module for v in seen)}
        if modules and modules <= prepared:
            return None
        scope = patch(function)
        prepared.update(modules)
        restore = scope.restore

        def restore_lang() -> None:
            prepared.clear()
            restore()

        scope.restore = restore_lang
        return scope

    interpreter._patch_lang = patch_lang


class _Results:
    """What the interpreter asks of an operation with several results."""

    def __init__(self, handles: list[Any]) -> None:
        self._handles = handles

    def get_result(self, i: int) -> Any:
        return self._handles[i]
