"""Weights in the layout that the CUDA linears read.

Full-precision weights stay as they are, [N, K]: cuBLAS reads them. Codes become words of 16 bits,
int16 [tiles, runs, TILE, words]: a tile is TILE outputs, a run 128 (INT4) or 64 (INT8) inputs, or
half of that where it fits the inputs better. Word w of an output holds the codes of inputs w,
w + words, w + 2 * words ... of the run, lowest bits first, so that shifting all words by one code
gives `words` inputs side by side. A tile's runs follow each other, so a kernel reads its
weights as one stream of 16-byte pieces.

Scales are float16 and zeros uint8, [tiles, groups, TILE].
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from morphserve.configs.errors import ConfigError
from morphserve.quantize.weights import QuantizedWeight
from morphserve.runtime.kernels import FullLinear, QuantizedLinear

TILE = 64  # outputs
WORDS = 32  # 16-bit words of a run, per output; or half as many
GROUP_STEP = 32  # whole inputs that share a scale: what a half run of one code per word has


def pack_full(weight: Tensor) -> FullLinear:
    return FullLinear(weight.contiguous(), None, len(weight))


def pack_quantized(weight: QuantizedWeight) -> QuantizedLinear:
    """The weight, without bias; outputs and inputs are filled up with zeros to whole tiles.

    Raises ConfigError for several groups of a size that is no multiple of 32 inputs.
    """
    if weight.scales.shape[1] > 1 and weight.group_size % GROUP_STEP:
        raise ConfigError(
            f"the CUDA kernels read no groups of {weight.group_size} inputs: quantise again with "
            "--group-size 32, 64 or 128"
        )
    order = weight.input_order
    return QuantizedLinear(
        bits=weight.bits,
        codes=_pack_codes(weight.codes, weight.bits),
        scales=_in_tiles(weight.scales),
        zeros=None if weight.zeros is None else _in_tiles(weight.zeros),
        input_order=None if order is None else order.int(),
        bias=None,
        num_outputs=len(weight.codes),
    )


def steps_of(weight: QuantizedLinear, num_inputs: int) -> tuple[int, int, int]:
    """Inputs of a run, inputs that share a scale, and inputs of a run that are sure to share one.

    Where all inputs share one scale, a run's do.
    """
    run = 16 // weight.bits * weight.codes.shape[-1]
    num_groups = weight.scales.shape[1]
    group = run if num_groups == 1 else num_inputs // num_groups
    return run, group, math.gcd(group, run)


def _pack_codes(codes: Tensor, bits: int) -> Tensor:
    """uint8 [N, K] as int16 [tiles, runs, TILE, words]."""
    num_outputs, num_inputs = codes.shape
    per_word = 16 // bits
    words = _words_per_run(num_inputs, per_word)
    run = per_word * words
    codes = F.pad(codes, (0, -num_inputs % run, 0, -num_outputs % TILE))
    # [tiles, TILE, runs, per_word, words] of codes; two bytes make a word, the lower one first
    parts = codes.view(-1, TILE, codes.shape[1] // run, per_word, words)
    halves = parts if bits == 8 else parts[:, :, :, 0::2] | parts[:, :, :, 1::2] << 4
    packed = halves.permute(0, 2, 1, 4, 3).contiguous()
    return packed.view(torch.int16).squeeze(-1)


def _words_per_run(num_inputs: int, per_word: int) -> int:
    """Half runs where they leave fewer inputs to fill up."""
    full, half = (-num_inputs % (per_word * words) for words in (WORDS, WORDS // 2))
    return WORDS // 2 if half < full else WORDS


def _in_tiles(values: Tensor) -> Tensor:
    """[N, groups] as [tiles, groups, TILE]."""
    padded = F.pad(values, (0, 0, 0, -len(values) % TILE))
    return padded.view(-1, TILE, values.shape[1]).transpose(1, 2).contiguous()
