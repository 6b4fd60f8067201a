"""Attention over pages, and what writes them, against torch over keys that lie side by side."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from morphserve.morphcli.bench.kernels.caches import Filled, fill, lay_out
from morphserve.morphcli.bench.kernels.memory import copies_beyond_caches
from morphserve.morphcli.bench.kernels.race import Call, Task
from morphserve.morphcli.bench.kernels.random_values import bell
from morphserve.morphcli.bench.kernels.result import Work
from morphserve.runtime.kernels import AttentionShape, Kernels

SHAPE = AttentionShape(
    num_heads=32, num_kv_heads=4, head_dim=64, block_tokens=16, norm_eps=1e-5
)  # of a 1B-class model
CONTEXT = 512
SEQUENCES = (1, 8, 32)


def attention_tasks(kernels: Kernels) -> Iterator[list[Task]]:
    for sequences in SEQUENCES:
        filled = fill(kernels, SHAPE, sequences, CONTEXT)
        yield [_decode(kernels, filled, sequences)]
        yield [_write(kernels, filled, sequences, 1)]
    filled = fill(kernels, SHAPE, 1, CONTEXT)
    yield [_prefill(kernels, filled)]
    yield [_write(kernels, filled, 1, CONTEXT)]


def _decode(kernels: Kernels, filled: Filled, sequences: int) -> Task:
    shape, caches = filled.shape, filled.caches
    q = bell(sequences, shape.num_heads, shape.head_dim, seed=2)
    own, meta = _own(kernels, q), lay_out(shape, sequences, filled.context, 1)
    return Task(
        kernel="attention, decode",
        size=_size(filled),
        rows=sequences,
        work=Work(filled.k[0].nbytes * 2, 2 * q.numel() * filled.context),
        ours=lambda i: kernels.attention(own, caches[i % len(caches)], meta, shape),
        torch=_decode_routes(q.bfloat16(), filled),
    )


def _decode_routes(q: Tensor, filled: Filled) -> dict[str, Call]:
    """The heads that share keys become queries of one: far faster than `enable_gqa`."""
    k, v, num = filled.k, filled.v, len(filled.k)
    folded = q.view(len(q), filled.shape.num_kv_heads, -1, filled.shape.head_dim)
    scale = filled.shape.head_dim**-0.5

    def products(i: int) -> Tensor:
        scores = folded @ k[i % num].transpose(2, 3) * scale
        return torch.matmul(scores.softmax(-1), v[i % num]).view(len(q), -1)

    def sdpa(i: int) -> Tensor:
        mixed = F.scaled_dot_product_attention(folded, k[i % num], v[i % num])
        return mixed.reshape(len(q), -1)

    return {"SDPA, folded": sdpa, "two products": products}


def _prefill(kernels: Kernels, filled: Filled) -> Task:
    shape, caches, tokens = filled.shape, filled.caches, filled.context
    q = bell(tokens, shape.num_heads, shape.head_dim, seed=3)
    own, meta = _own(kernels, q), lay_out(shape, 1, tokens, tokens)
    return Task(
        kernel="attention, prompt",
        size=_size(filled),
        rows=tokens,
        work=Work(filled.k[0].nbytes * 2, q.numel() * (tokens + 1)),
        ours=lambda i: kernels.attention(own, caches[i % len(caches)], meta, shape),
        torch=_prefill_routes(q, filled),
    )


def _prefill_routes(q: Tensor, filled: Filled) -> dict[str, Call]:
    """Each head with keys of its own, in both dtypes, and heads that share them."""
    shared = filled.shape.num_heads // filled.shape.num_kv_heads
    queries = q.transpose(0, 1).unsqueeze(0)  # [1, H, M, D]

    def route(dtype: torch.dtype, repeats: int) -> Call:
        heads = queries.to(dtype).contiguous()
        k, v = (
            copies_beyond_caches(x[0].repeat_interleave(repeats, dim=1).to(dtype))
            for x in (filled.k, filled.v)
        )

        def attend(i: int) -> Tensor:
            mixed = F.scaled_dot_product_attention(
                heads, k[i % len(k)], v[i % len(v)], is_causal=True, enable_gqa=repeats == 1
            )
            return mixed[0].transpose(0, 1).reshape(len(q), -1)

        return attend

    return {
        "SDPA, own keys": route(torch.bfloat16, shared),
        "SDPA, own keys, float32": route(torch.float32, shared),
        "SDPA, shared keys": route(torch.bfloat16, 1),
    }


def _write(kernels: Kernels, filled: Filled, sequences: int, new: int) -> Task:
    shape, caches = filled.shape, filled.caches
    meta = lay_out(shape, sequences, filled.context, new)
    width = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    qkv = bell(sequences * new, width, seed=4)
    own, angles = _own(kernels, qkv), bell(filled.context, shape.head_dim, seed=5)
    return Task(
        kernel="RoPE, KV write",
        size=_size(filled),
        rows=len(qkv),
        work=None,
        ours=lambda i: kernels.rope_write_kv(
            own, caches[i % len(caches)], meta, shape, angles, None
        ),
        torch={"rotate, index": _written_by_torch(qkv.bfloat16(), filled, new, angles.bfloat16())},
    )


def _written_by_torch(qkv: Tensor, filled: Filled, new: int, angles: Tensor) -> Call:
    shape, first = filled.shape, filled.context - new
    queries, keys = shape.num_heads, shape.num_kv_heads
    heads = qkv.view(-1, new, queries + 2 * keys, shape.head_dim)
    place = torch.arange(first, filled.context)

    def write(i: int) -> Tensor:
        q, k, v = torch.split(heads, [queries, keys, keys], dim=2)
        cos, sin = angles[place][:, None].chunk(2, dim=-1)
        filled.k[i % len(filled.k)].index_copy_(2, place, _rotated(k, cos, sin).transpose(1, 2))
        filled.v[i % len(filled.v)].index_copy_(2, place, v.transpose(1, 2))
        return _rotated(q, cos, sin).view(len(qkv), queries, shape.head_dim)

    return write


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _size(filled: Filled) -> str:
    shape = filled.shape
    heads = f"{shape.num_heads}/{shape.num_kv_heads} heads of {shape.head_dim}"
    return f"{heads}, context {filled.context}"


def _own(kernels: Kernels, x: Tensor) -> Tensor:
    return x.to(kernels.activation_dtype(kernels.weight_dtype(torch.bfloat16)))
