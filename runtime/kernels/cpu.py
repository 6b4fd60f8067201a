"""CPU kernels: C where a compiler is found, torch elsewhere. Activations are float32.

Each output row of the C kernels is bit for bit the same whatever else is in the batch, however
a prompt is cut into chunks and however many threads run. A quantised linear equals, bit for bit,
the full-precision linear over the dequantised weight in float32.
"""

import dataclasses
import logging
from array import array
from collections.abc import Mapping
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor

from morphserve.configs.errors import ConfigError
from morphserve.quantize.weights import QuantizedWeight
from morphserve.runtime.kernels import (
    AttentionShape,
    BatchMeta,
    Draw,
    FullLinear,
    Kernels,
    Linear,
    QKNorm,
    QuantizedLinear,
)
from morphserve.runtime.kernels.native import NativeUnavailable, load_library
from morphserve.runtime.kernels.reference import (
    ReferenceKernels,
    dequantise,
    in_column_order,
)

log = logging.getLogger(__name__)

_KIND = {torch.float32: 0, torch.bfloat16: 1}
_INT4, _INT4_ZEROS, _INT8 = 2, 3, 4
_STEP = 32  # features that the C linear takes at once; codes are packed in such runs
# Multiply-adds below which waking a second thread (some 90 us where threads sleep between two
# operations, as they must on shared cores) costs more than it saves.
_MIN_SHARED_WORK = 8_000_000
_GREEDY = Draw(temperature=0.0, min_p=0.0, top_k=0, top_p=1.0, uniform=0.0)
_SAMPLER_PADDING = 16  # floats that the C sampler wants after its scratch of one vocabulary


def cpu_kernels() -> Kernels:
    """The C kernels, or torch with a warning where they cannot be built."""
    try:
        return CpuKernels()
    except NativeUnavailable as error:
        log.warning(
            "C kernels are not available (%s): torch runs instead, several times slower and not "
            "batch-invariant; install a C compiler with OpenMP",
            error,
        )
        return TorchKernels()


class TorchKernels(ReferenceKernels):
    """What runs without a compiler: float32 throughout, which torch does well on any CPU."""

    name = "torch"

    def weight_dtype(self, checkpoint_dtype: torch.dtype) -> torch.dtype:
        return torch.float32

    def activation_dtype(self, weight_dtype: torch.dtype) -> torch.dtype:
        return torch.float32

    def linear(self, x: Tensor, weight: Linear) -> Tensor:
        if isinstance(weight, FullLinear):
            return super().linear(x, weight)
        x, zeros = in_column_order(x, weight), weight.zeros
        pieces = []
        for start in range(0, len(weight.codes), 256):  # rows whose floats stay in the cache
            rows = slice(start, start + 256)
            part = dataclasses.replace(
                weight,
                codes=weight.codes[rows],
                scales=weight.scales[rows],
                zeros=None if zeros is None else zeros[rows],
            )
            pieces.append(F.linear(x, dequantise(part)))
        out = torch.cat(pieces, dim=1)
        return out if weight.bias is None else out.add_(weight.bias)


class CpuKernels:
    """The C kernels. Raises NativeUnavailable where they cannot be built."""

    name = "cpu"
    max_head_dim = 256  # that the C kernels' scratch holds

    def __init__(self) -> None:
        self._library = load_library()

    def weight_dtype(self, checkpoint_dtype: torch.dtype) -> torch.dtype:
        # float16 has digits that bfloat16 has not: what was asked for is full precision.
        return torch.bfloat16 if checkpoint_dtype == torch.bfloat16 else torch.float32

    def activation_dtype(self, weight_dtype: torch.dtype) -> torch.dtype:
        return torch.float32

    def pack_full(self, weight: Tensor) -> Tensor:
        """The weight itself, [N, K], float32 or bfloat16."""
        return weight.contiguous()

    def pack_quantized(self, weight: QuantizedWeight) -> QuantizedLinear:
        """Codes [N, K] or, INT4, [N, K / 2], 16 bytes for 32 features (i low, 16 + i high).

        K is rounded up to a multiple of 32 with weights of 0. Scales [N, groups] are float32, which
        spares a conversion per group, a tenth of the time at M = 1, for 2 bytes more. Where zeros
        are not 8, they are [N, groups, 2]: scale and `-zero * scale`, side by side, so that one
        read finds both and one multiply-add makes a weight of a code.
        """
        codes, group = weight.codes, weight.group_size
        if group != codes.shape[1]:
            _require_readable(group)
        elif group % _STEP:
            codes = _pad_row(weight)
        scales = weight.scales.to(torch.float16).float()
        if weight.bits == 8 or weight.zeros is not None:
            zeros = weight.middle if weight.zeros is None else weight.zeros
            scales = torch.stack((scales, -scales * zeros), dim=-1)
        if weight.bits == 4:
            runs = codes.view(len(codes), -1, 2, _STEP // 2)
            codes = (runs[:, :, 0] | runs[:, :, 1] << 4).flatten(1)
        order = None if weight.input_order is None else weight.input_order.int()
        return QuantizedLinear(
            weight.bits, codes.contiguous(), scales.contiguous(), None, order, None
        )

    def linear(self, x: Tensor, weight: Linear) -> Tensor:
        if isinstance(weight, QuantizedLinear):
            data, scales = weight.codes, weight.scales
            kind = _INT8 if weight.bits == 8 else _INT4 if scales.dim() == 2 else _INT4_ZEROS
            features, groups = data.shape[1] * 8 // weight.bits, scales.shape[1]
            x = in_column_order(x, weight)
        else:
            data, scales = weight.weight, None
            kind, features, groups = _KIND[data.dtype], data.shape[1], 0
        missing = features + -features % _STEP - x.shape[1]
        assert 0 <= missing < _STEP
        if missing:
            x = F.pad(x, (0, missing))
        outputs = data.shape[0]
        y = torch.empty(len(x), outputs)
        self._library.morph_linear(
            *(kind, _data(x), len(x), x.shape[1], _data(data), _optional(scales)),
            *(outputs, features, groups, _optional(weight.bias), y.data_ptr()),
            _threads(y.numel() * features),
        )
        return y

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._norm(x, None, weight, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._norm(x, residual, weight, eps)

    def _norm(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        y = torch.empty_like(x)
        self._library.morph_rms_norm(
            *(_data(x), _optional(residual), _data(weight), eps, len(x), x.shape[1]),
            *(y.data_ptr(), _threads(8 * x.numel())),
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
            *(_KIND[cache.dtype], _data(qkv), _data(cache), q.data_ptr()),
            *(_data(meta.positions), _data(meta.token_page), _data(meta.token_slot)),
            *(_data(cos_sin), _optional(q_norm), _optional(k_norm)),
            *(shape.norm_eps, len(qkv), *_sizes(shape), _threads(16 * qkv.numel())),
        )
        return q

    def attention(self, q: Tensor, cache: Tensor, meta: BatchMeta, shape: AttentionShape) -> Tensor:
        out = torch.empty(len(q), shape.num_heads * shape.head_dim)
        sequences, max_blocks = meta.block_table.shape
        most = q.numel() * max_blocks * shape.block_tokens
        self._library.morph_attention(
            *(_KIND[cache.dtype], _data(q), _data(cache), out.data_ptr(), _data(meta.query_start)),
            *(_data(meta.context_len), _data(meta.block_table), sequences, max_blocks),
            *(*_sizes(shape), _threads(most)),
        )
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        rows, width = len(gate_up), gate_up.shape[1] // 2
        y = torch.empty(rows, width)
        self._library.morph_silu_mul(
            *(_data(gate_up), rows, width, y.data_ptr(), _threads(16 * gate_up.numel()))
        )
        return y

    def sample(self, logits: Tensor, draws: Mapping[int, Draw]) -> list[int | None]:
        rows, vocab = logits.shape
        threads = _threads((32 if draws else 4) * logits.numel())
        tokens = torch.empty(rows, dtype=torch.int64)
        table, scratch = None, None
        if draws:
            table = array("d", chain.from_iterable(draws.get(i, _GREEDY) for i in range(rows)))
            scratch = torch.empty(threads, vocab + _SAMPLER_PADDING)
        self._library.morph_sample(
            *(_data(logits), table and table.buffer_info()[0], rows, vocab),
            *(_optional(scratch), tokens.data_ptr(), threads),
        )
        return [None if token < 0 else token for token in tokens.tolist()]


def _require_readable(group: int) -> None:
    if group < _STEP or group & (group - 1):
        raise ConfigError(
            f"groups of {group} inputs cannot be served on CPU, only powers of two from {_STEP}: "
            "run `morph quantize` with --group-size 32, 64 or 128"
        )


def _pad_row(weight: QuantizedWeight) -> Tensor:
    """Codes of rows that are one group each, filled up with the code of 0."""
    codes, extra = weight.codes, -weight.codes.shape[1] % _STEP
    if weight.zeros is None:
        return F.pad(codes, (0, extra), value=weight.middle)
    return torch.cat((codes, weight.zeros.expand(-1, extra)), dim=1)


def _data(tensor: Tensor) -> int:
    assert tensor.is_contiguous()
    return tensor.data_ptr()


def _optional(tensor: Tensor | None) -> int | None:
    return None if tensor is None else _data(tensor)


def _sizes(shape: AttentionShape) -> tuple[int, int, int, int]:
    assert shape.head_dim <= CpuKernels.max_head_dim
    return shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.block_tokens


def _threads(multiply_adds: int) -> int:
    return 1 if multiply_adds < _MIN_SHARED_WORK else torch.get_num_threads()
