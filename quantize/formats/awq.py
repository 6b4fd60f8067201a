"""AWQ checkpoints in the GEMM layout (AutoAWQ, GPTQModel).

Bits 4i .. 4i + 3 of word [k, c] of `qweight` hold the code of input k and output 8c + ORDER[i];
`qzeros` holds zeros in the same way, as they are.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from morphserve.quantize.formats.stored import Part, Settings, Stored, num_groups, read_grid
from morphserve.quantize.packing import unpack_codes
from morphserve.quantize.rounding import Grid

_PLACE = (0, 4, 1, 5, 2, 6, 3, 7)  # where in its word each of 8 outputs lies: ORDER inverted


@dataclass(frozen=True, slots=True)
class Awq:
    grid: Grid
    act_order: bool = False
    name: str = "awq"

    def parts(self, outputs: int, inputs: int) -> dict[str, Part]:
        groups = num_groups(self.grid, inputs)
        return {
            "qweight": Part((inputs, outputs // 8), "words"),
            "qzeros": Part((groups, outputs // 8), "words"),
            "scales": Part((groups, outputs), "floats"),
        }

    def decode(self, tensors: Mapping[str, Tensor]) -> Stored:
        return Stored(
            codes=_unpack(tensors["qweight"]),
            scales=tensors["scales"].t(),
            zeros=_unpack(tensors["qzeros"]),
        )


def _unpack(words: Tensor) -> Tensor:
    """int32 [A, N / 8] to uint8 [N, A]."""
    codes = unpack_codes(words.t(), 4)
    return codes.view(-1, 8, codes.shape[1])[:, _PLACE].flatten(0, 1)


def read_awq(config: Mapping[str, Any]) -> Awq:
    """The format that an AWQ config describes. Raises ValueError for what cannot be read."""
    settings = Settings(config)
    version = str(settings.get("version", "checkpoint_format", "format") or "gemm").lower()
    if version != "gemm":
        raise ValueError(
            f"its layout is {version!r}: only gemm is read, so quantise again with version gemm"
        )
    bits = settings.whole("bits", "w_bit")
    if bits != 4:
        raise ValueError(f"it has {bits} bits: AWQ is read with 4")
    has_zeros = settings.switch(True, "zero_point")
    return Awq(read_grid(bits, settings.whole("group_size", "q_group_size"), not has_zeros))
