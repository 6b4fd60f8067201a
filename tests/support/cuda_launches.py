"""Launches of every CUDA kernel on tensors without memory, for offline_compile.py to compile.

python tests/support/offline_compile.py cuda_launches:decode_step --arch 80 90
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from morphserve.quantize.weights import QuantizedWeight
from morphserve.runtime.kernels import AttentionShape, BatchMeta, FullLinear, LayerWeights, Linear
from morphserve.runtime.kernels.cuda.kernels import CudaKernels
from morphserve.runtime.kernels.cuda.sampling import DeviceDraws
from morphserve.runtime.kernels.cuda.upload import unpack

KERNELS = CudaKernels()
FEW, MANY = 1, 32  # rows of a decode step
LONG = 512  # rows of a prefill
ROWS = (1, 8, 16, 32, 64, 128, 256, LONG)


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a model whose kernels are compiled."""

    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    inner: int
    vocab: int
    block_tokens: int
    group: int  # weights that share a scale

    @property
    def attention(self) -> AttentionShape:
        return AttentionShape(self.heads, self.kv_heads, self.head_dim, self.block_tokens, 1e-5)


EIGHT_B = Shape(32, 8, 128, 4096, 14336, 128256, 32, 128)
ODD = Shape(14, 2, 80, 1120, 3040, 32003, 16, 32)


def every_kernel() -> None:
    """What a CI run has time for."""
    for shape in (EIGHT_B, ODD):
        _step(shape, MANY, MANY)
        _step(shape, LONG, 4)
    for bits in (4, 8):
        _linears(EIGHT_B, FEW, bits)
        _linears(EIGHT_B, LONG, bits)
    _linears(ODD, MANY, 4)
    _sampler(EIGHT_B)
    _sampler(replace(EIGHT_B, vocab=1))  # a size that Triton takes for a constant


def decode_step() -> None:
    _step(EIGHT_B, MANY, MANY)


def prefill_step() -> None:
    _step(EIGHT_B, LONG, 4)


def int4_linears() -> None:
    """Of the 8B shape, for few and many rows."""
    for rows in ROWS:
        _linears(EIGHT_B, rows, 4)


def int8_linears() -> None:
    for rows in ROWS:
        _linears(EIGHT_B, rows, 8)


def sampler() -> None:
    _sampler(EIGHT_B)


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _numbers(*shape: int) -> Tensor:
    return _meta(*shape, dtype=torch.int32)


def _step(shape: Shape, tokens: int, sequences: int) -> None:
    """A forward pass through one layer at full precision, from inputs on the host."""
    attention = shape.attention
    page = 2 * shape.kv_heads * shape.head_dim * shape.block_tokens
    meta = BatchMeta(
        positions=_numbers(tokens),
        token_page=_numbers(tokens),
        token_slot=_numbers(tokens),
        query_start=_numbers(sequences + 1),
        context_len=_numbers(sequences),
        block_table=_numbers(sequences, 256),
    )
    ids, rows = _numbers(tokens), _numbers(sequences)
    unpack(
        *(_numbers(9 * tokens), _numbers(sequences), ids, rows, meta, shape.block_tokens),
        num_tokens=tokens,
        num_seqs=sequences,
        num_rows=sequences,
        longest=tokens,
    )
    width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    layer = LayerWeights(
        input_norm=_meta(shape.hidden),
        post_norm=_meta(shape.hidden),
        qk_norm=None,
        qkv=_full(width, shape.hidden),
        o=_full(shape.hidden, shape.heads * shape.head_dim),
        gate_up=_full(2 * shape.inner, shape.hidden),
        down=_full(shape.hidden, shape.inner),
    )
    KERNELS.forward(
        *(ids, _full(shape.vocab, shape.hidden), [layer]),
        *([_meta(1000, page)], meta, attention, _meta(8192, shape.head_dim, dtype=torch.float32)),
        *(rows, _meta(shape.hidden)),
        _full(shape.vocab, shape.hidden),
    )


def _full(outputs: int, inputs: int) -> FullLinear:
    return FullLinear(_meta(outputs, inputs), None, outputs)


def _linears(shape: Shape, rows: int, bits: int) -> None:
    """The widest and the longest of a layer, as they are packed."""
    for outputs, inputs in ((2 * shape.inner, shape.hidden), (shape.hidden, shape.inner)):
        KERNELS.linear(_meta(rows, inputs), _quantised(outputs, inputs, bits, shape.group))


def _quantised(outputs: int, inputs: int, bits: int, group: int) -> Linear:
    """As the kernels pack it: sizes and dtypes of what they make of one that has memory."""
    codes = _meta(outputs, inputs, dtype=torch.uint8)
    scales = _meta(outputs, inputs // group, dtype=torch.float16)
    return KERNELS.pack_quantized(QuantizedWeight(codes, scales, group, bits))


def _sampler(shape: Shape) -> None:
    rows = 8
    logits = _meta(rows, max(16, shape.vocab), dtype=torch.float32)[:, : shape.vocab]
    columns = [_meta(rows, dtype=torch.float32) for _ in range(4)]
    KERNELS.choose(logits, None)
    names = ("temperature", "min_p", "top_p", "uniform")
    draws = dict(zip(names, columns, strict=True))
    KERNELS.choose(logits, DeviceDraws(**draws, top_k=_numbers(rows)))
