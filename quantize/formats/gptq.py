"""GPTQ checkpoints (auto-gptq, GPTQModel, AutoRound), versions 1 and 2 of their format.

Bits b*i .. b*i + b - 1 of word [r, n] of `qweight` hold the code of output n and input r*c + i;
`qzeros` holds zeros in the same way along the outputs, in version 1 less one. `g_idx` names each
input's group.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from morphserve.quantize.formats.stored import Part, Settings, Stored, num_groups, read_grid
from morphserve.quantize.packing import unpack_codes
from morphserve.quantize.rounding import Grid

_VERSIONS = ("gptq", "gptq_v2")


@dataclass(frozen=True, slots=True)
class Gptq:
    grid: Grid
    act_order: bool
    version: str = "gptq"
    name: str = "gptq"

    def parts(self, outputs: int, inputs: int) -> dict[str, Part]:
        per_word, groups = 32 // self.grid.bits, num_groups(self.grid, inputs)
        return {
            "qweight": Part((inputs // per_word, outputs), "words"),
            "qzeros": Part((groups, outputs // per_word), "words"),
            "scales": Part((groups, outputs), "floats"),
            "g_idx": Part((inputs,), "groups", optional=not self.act_order),
        }

    def decode(self, tensors: Mapping[str, Tensor]) -> Stored:
        bits, zeros = self.grid.bits, tensors["qzeros"]
        if self.version == "gptq":
            zeros = add_one(zeros, bits)
        return Stored(
            codes=unpack_codes(tensors["qweight"], bits).t(),
            scales=tensors["scales"].t(),
            zeros=unpack_codes(zeros.t(), bits),
            group_of=tensors.get("g_idx"),
        )


def add_one(words: Tensor, bits: int) -> Tensor:
    """One added to every code in int32 words, whose carries run on into the next code.

    GPTQModel takes one away from whole words when it writes zeros and adds it when it reads them,
    so a zero of 0 borrows from its neighbour and only this brings both back.
    """
    ones = sum(1 << shift for shift in range(0, 32, bits))
    return (words.long() + ones).to(torch.int32)


def read_gptq(config: Mapping[str, Any]) -> Gptq:
    """The format that a GPTQ config describes. Raises ValueError for what cannot be read.

    `dynamic` overrides need no reading here: shapes show which linears differ, and those are
    refused by name. A quantised head (`lm_head`) is not read: only decoder layers are.
    """
    settings = Settings(config)
    version = settings.get("checkpoint_format", "format") or "gptq"
    if version not in _VERSIONS or settings.get("is_marlin_format"):
        raise ValueError(f"its checkpoint_format is {version!r}: only gptq and gptq_v2 are read")
    pack_dtype = settings.get("pack_dtype") or "int32"
    if pack_dtype != "int32":
        raise ValueError(f"its pack_dtype is {pack_dtype!r}: only int32 is read")
    settings.refuse("rotation", "which changes what layers say to each other")
    grid = read_grid(
        settings.whole("bits"), settings.whole("group_size"), settings.switch(True, "sym")
    )
    return Gptq(grid, settings.switch(False, "desc_act"), version)
