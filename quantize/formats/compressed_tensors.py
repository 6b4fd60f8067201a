"""compressed-tensors checkpoints (llm-compressor), format pack-quantized.

Bits b*i .. b*i + b - 1 of word [n, r] of `weight_packed` hold the code of output n and input
r*c + i; `weight_zero_point` holds zeros in the same way along the outputs. Codes and zeros are
signed numbers plus 2**(b - 1).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from morphserve.quantize.formats.stored import Part, Settings, Stored, num_groups, read_grid
from morphserve.quantize.packing import unpack_codes
from morphserve.quantize.rounding import Grid

_FORMAT = "pack-quantized"


@dataclass(frozen=True, slots=True)
class CompressedTensors:
    grid: Grid
    act_order: bool
    name: str = "compressed-tensors"

    def parts(self, outputs: int, inputs: int) -> dict[str, Part]:
        per_word, groups = 32 // self.grid.bits, num_groups(self.grid, inputs)
        parts = {
            "weight_packed": Part((outputs, inputs // per_word), "words"),
            "weight_scale": Part((outputs, groups), "floats"),
            "weight_shape": Part((2,), "sizes", optional=True),
            "weight_g_idx": Part((inputs,), "groups", optional=True),
        }
        if not self.grid.symmetric:
            parts["weight_zero_point"] = Part((outputs // per_word, groups), "words")
        return parts

    def decode(self, tensors: Mapping[str, Tensor]) -> Stored:
        bits, zeros = self.grid.bits, tensors.get("weight_zero_point")
        group_of = tensors.get("weight_g_idx")
        if group_of is not None and (group_of == -1).all():  # how "in order" is written
            group_of = None
        return Stored(
            codes=unpack_codes(tensors["weight_packed"].t(), bits).t(),
            scales=tensors["weight_scale"],
            zeros=None if zeros is None else unpack_codes(zeros, bits),
            group_of=group_of,
        )


def read_compressed_tensors(config: Mapping[str, Any]) -> CompressedTensors:
    """The format that the config describes. Raises ValueError for what cannot be read.

    `ignore` and `targets` need no reading: a decoder linear that was left out has a plain weight,
    and is refused by name.
    """
    settings = Settings(config)
    settings.refuse("kv_cache_scheme", "but the cache is not quantised here")
    settings.refuse("transform_config", "which rotates what layers say to each other")
    if (settings.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise ValueError("its weights are sparse, which is not read")
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise ValueError("it has no config_groups")
    kinds = {_read_group(group, settings.get("format")) for group in groups.values()}
    if len(kinds) > 1:
        raise ValueError("its groups of linears differ in bits, group size or symmetry")
    return kinds.pop()


def _read_group(group: Mapping[str, Any], default_format: Any) -> CompressedTensors:
    settings = Settings(group)
    stored_as = settings.get("format") or default_format
    if stored_as != _FORMAT:
        raise ValueError(f"its format is {stored_as!r}: only {_FORMAT} is read")
    for side in ("input_activations", "output_activations"):
        settings.refuse(side, "but activations are not quantised here")
    weights = Settings(settings.get("weights") or {})
    if (kind := weights.get("type") or "int") != "int":
        raise ValueError(f"its codes are {kind!r}: only whole numbers (int) are read")
    strategy = weights.get("strategy")
    if strategy not in ("group", "channel"):
        raise ValueError(f"its strategy is {strategy!r}: only group and channel are read")
    size = weights.whole("group_size") if strategy == "group" else -1
    grid = read_grid(weights.whole("num_bits"), size, weights.switch(True, "symmetric"))
    return CompressedTensors(grid, weights.get("actorder") is not None)
