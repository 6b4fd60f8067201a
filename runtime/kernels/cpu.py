"""CPU kernels: C where a compiler is found, torch elsewhere. Activations are float32.

Each output row of the C kernels is bit for bit the same whatever else is in the batch, however
a prompt is cut into chunks and however many threads run. Sums are float32. Activations are rounded
to bfloat16 where they meet bfloat16 weights, and to eight bits where they meet INT4 and INT8 ones,
by token and group of 64 features at most (32 where the weight's groups are 32).
"""

import ctypes
import logging
import weakref
from array import array
from collections.abc import Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor

from morphserve.configs.errors import ConfigError
from morphserve.quantize.weights import QuantizedWeight
from morphserve.runtime.kernels import (
    GREEDY,
    AttentionShape,
    BatchMeta,
    Draw,
    FullLinear,
    Kernels,
    LayerWeights,
    Linear,
    QKNorm,
    QuantizedLinear,
    packing,
)
from morphserve.runtime.kernels.native import NativeUnavailable, load_library
from morphserve.runtime.kernels.portable import TorchKernels
from morphserve.runtime.kernels.structs import (
    KIND,
    LayerStruct,
    StackStruct,
    batch_struct,
    data_of,
    layer_struct,
    linear_struct,
    optional,
    stack_struct,
)

log = logging.getLogger(__name__)


def cpu_kernels() -> Kernels:
    """The C kernels, or torch with a warning where they cannot be built."""
    try:
        return CpuKernels()
    except NativeUnavailable as error:
        log.warning(
            "C kernels are not available (%s): torch runs instead, several times slower and not "
            "batch-invariant; install a C compiler",
            error,
        )
        return TorchKernels()


class CpuKernels:
    """The C kernels. Raises NativeUnavailable where they cannot be built."""

    name = "native"  # renamed when times change: measured costs are found by it
    max_head_dim = 256  # that the C kernels' scratch holds

    def __init__(self) -> None:
        self._library = load_library()
        # By id, as long as the layer lives: it holds an arena.
        self._structs: dict[int, LayerStruct] = {}

    def weight_dtype(self, checkpoint_dtype: torch.dtype) -> torch.dtype:
        # float16 has digits that bfloat16 has not: what was asked for is full precision.
        return torch.bfloat16 if checkpoint_dtype == torch.bfloat16 else torch.float32

    def activation_dtype(self, weight_dtype: torch.dtype) -> torch.dtype:
        return torch.float32

    def pack_full(self, weight: Tensor) -> FullLinear:
        return packing.pack_full(weight)

    def pack_quantized(self, weight: QuantizedWeight) -> QuantizedLinear:
        if weight.group_size != weight.codes.shape[1]:
            _require_readable(weight.group_size)
        return packing.pack_quantized(weight)

    def embed(self, tokens: Tensor, table: FullLinear) -> Tensor:
        words, dtype = table.weight.shape[1], table.weight.dtype
        out = torch.empty(len(tokens), words * 4 // dtype.itemsize)
        self._library.morph_embed(
            *(KIND[dtype], data_of(table.weight), data_of(tokens), len(tokens), words),
            out.data_ptr(),
        )
        return out

    def linear(self, x: Tensor, weight: Linear) -> Tensor:
        struct = linear_struct(weight, x.shape[1])
        y = torch.empty(len(x), weight.num_outputs)
        self._library.morph_linear(
            ctypes.byref(struct), data_of(x), len(x), y.data_ptr(), torch.get_num_threads()
        )
        return y

    def run_layers(
        self,
        residual: Tensor,
        layers: Sequence[LayerWeights],
        caches: Sequence[Tensor],
        meta: BatchMeta,
        shape: AttentionShape,
        cos_sin: Tensor,
        rows: Tensor,
    ) -> Tensor:
        if not layers:
            return residual[rows]
        stack, batch = self._stack(layers, caches, residual.shape[1], shape), batch_struct(meta)
        self._library.morph_layers(
            *(ctypes.byref(stack), ctypes.byref(batch), data_of(cos_sin), data_of(residual)),
            *(data_of(rows), len(rows), torch.get_num_threads()),
        )
        return residual[: len(rows)]

    def forward(
        self,
        tokens: Tensor,
        embedding: FullLinear,
        layers: Sequence[LayerWeights],
        caches: Sequence[Tensor],
        meta: BatchMeta,
        shape: AttentionShape,
        cos_sin: Tensor,
        rows: Tensor,
        norm: Tensor,
        head: FullLinear,
    ) -> Tensor:
        hidden = len(norm)
        table, product = linear_struct(embedding, hidden), linear_struct(head, hidden)
        stack, batch = self._stack(layers, caches, hidden, shape), batch_struct(meta)
        logits = torch.empty(len(rows), head.num_outputs)
        self._library.morph_forward(
            *(ctypes.byref(table), data_of(tokens), ctypes.byref(stack), ctypes.byref(batch)),
            *(data_of(cos_sin), data_of(rows), len(rows), data_of(norm), ctypes.byref(product)),
            *(logits.data_ptr(), torch.get_num_threads()),
        )
        return logits

    def _stack(
        self,
        layers: Sequence[LayerWeights],
        caches: Sequence[Tensor],
        hidden: int,
        shape: AttentionShape,
    ) -> StackStruct:
        structs = self._structs
        for layer in layers:
            if id(layer) not in structs:
                structs[id(layer)] = layer_struct(layer, hidden, shape)
                weakref.finalize(layer, structs.pop, id(layer))
        return stack_struct([structs[id(layer)] for layer in layers], caches, shape)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._norm(x, None, weight, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._norm(x, residual, weight, eps)

    def _norm(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        y = torch.empty_like(x)
        self._library.morph_rms_norm(
            *(data_of(x), optional(residual), data_of(weight), eps, len(x), x.shape[1]),
            y.data_ptr(),
        )
        return y

    def rope_write_kv(
        self,
        qkv: Tensor,
        cache: Tensor,
        meta: BatchMeta,
        shape: AttentionShape,
        cos_sin: Tensor,
        norm: QKNorm | None,
    ) -> Tensor:
        q = torch.empty(len(qkv), shape.num_heads, shape.head_dim)
        q_norm, k_norm = (norm.q, norm.k) if norm else (None, None)
        self._library.morph_rope_write_kv(
            *(KIND[cache.dtype], data_of(qkv), data_of(cache), q.data_ptr()),
            *(data_of(meta.positions), data_of(meta.token_page), data_of(meta.token_slot)),
            *(data_of(cos_sin), optional(q_norm), optional(k_norm)),
            *(shape.norm_eps, len(qkv), *_sizes(shape), torch.get_num_threads()),
        )
        return q

    def attention(self, q: Tensor, cache: Tensor, meta: BatchMeta, shape: AttentionShape) -> Tensor:
        out = torch.empty(len(q), shape.num_heads * shape.head_dim)
        sequences, max_blocks = meta.block_table.shape
        self._library.morph_attention(
            *(
                KIND[cache.dtype],
                data_of(q),
                data_of(cache),
                out.data_ptr(),
                data_of(meta.query_start),
            ),
            *(data_of(meta.context_len), data_of(meta.block_table), sequences, max_blocks),
            *(*_sizes(shape), torch.get_num_threads()),
        )
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        rows, width = len(gate_up), gate_up.shape[1] // 2
        y = torch.empty(rows, width)
        self._library.morph_silu_mul(*(data_of(gate_up), rows, width, y.data_ptr()))
        return y

    def sample(self, logits: Tensor, draws: Mapping[int, Draw]) -> list[int | None]:
        rows, vocab = logits.shape
        tokens, table = array("q", bytes(8 * rows)), None
        if draws:
            table = array("d", chain.from_iterable(draws.get(i, GREEDY) for i in range(rows)))
        self._library.morph_sample(
            *(data_of(logits), table and table.buffer_info()[0], rows, vocab),
            *(tokens.buffer_info()[0], torch.get_num_threads()),
        )
        return [None if token < 0 else token for token in tokens]


def _require_readable(group: int) -> None:
    if group < packing.CODE_RUN or group & (group - 1):
        raise ConfigError(
            f"groups of {group} inputs cannot be served on CPU, only powers of two from "
            f"{packing.CODE_RUN}: run `morph quantize` with --group-size 32, 64 or 128"
        )


def _sizes(shape: AttentionShape) -> tuple[int, int, int, int]:
    assert shape.head_dim <= CpuKernels.max_head_dim
    return shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.block_tokens
