"""Every kernel against the plain formula in float32, on this device, on fresh random inputs."""

from collections.abc import Callable
from dataclasses import replace

import torch
from bench import Bench, Gate
from caches import attention_shape, cut, meta_of, random_bytes
from torch import Tensor
from weights import dequantised, packed, random_quantised

from morphserve.runtime.kernels import AttentionShape, BatchMeta, Draw, FullLinear
from morphserve.runtime.kernels.cuda.kernels import CudaKernels
from morphserve.runtime.kernels.reference import ReferenceKernels

BF16 = Gate("<=", 1e-2)  # relative error of results that are rounded to bfloat16
DRAWN = Gate("<=", 0.05)
REFERENCE = ReferenceKernels()
Check = Callable[[Bench, CudaKernels], list[tuple[str, float]]]


def run(bench: Bench) -> None:
    kernels = CudaKernels()
    for check in (_linears, _decode, _prefill, _mixed, _pointwise, _rope, _embed, _greedy, _drawn):
        line = check.__name__.strip("_")
        try:
            for label, error in check(bench, kernels):
                bench.figures.add(line, label, error, gate=DRAWN if check is _drawn else BF16)
            bench.sync()
        except Exception as error:  # one kernel that fails must not hide the others
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            bench.figures.add(line, "FAILED", text[:120])
            if "CUDA" in text or "illegal" in text:
                raise  # nothing more can be computed in this process


def _error(out: Tensor, expected: Tensor) -> float:
    out, expected = out.double(), expected.double()
    return float((out - expected).norm() / expected.norm())


def _linears(bench: Bench, kernels: CudaKernels) -> list[tuple[str, float]]:
    group, found = bench.sizes.group, []
    outputs, inputs = (72, 2 * group) if bench.dry else (1544, 4096)
    for bits in (0, 4, 8):
        quantised = random_quantised(bench, outputs, inputs, bits or 8)
        weight = dequantised(quantised)
        if not bits:
            made = kernels.pack_full(weight.bfloat16())
            weight = weight.bfloat16().float()
        else:
            made = packed(bench, kernels, quantised)
        for rows in (1, 7) if bench.dry else (1, 7, 16, 33, 130, 1000):
            x = bench.random(rows, inputs)
            found.append(
                (f"{bits}b M{rows}", _error(kernels.linear(x, made), x.float() @ weight.T))
            )
    return found


def _decode(bench: Bench, kernels: CudaKernels) -> list[tuple[str, float]]:
    cells = ((1, 17), (3, 40)) if bench.dry else ((1, 1), (1, 8000), (5, 333), (64, 1024))
    return [(f"{n}x{c}", _attention_error(bench, kernels, n, c, 1)) for n, c in cells]


def _prefill(bench: Bench, kernels: CudaKernels) -> list[tuple[str, float]]:
    cells = ((1, 33, 20),) if bench.dry else ((1, 777, 777), (3, 900, 200), (1, 5000, 128))
    return [(f"{n}x{q} of {c}", _attention_error(bench, kernels, n, c, q)) for n, c, q in cells]


def _attention_error(
    bench: Bench, kernels: CudaKernels, num_seqs: int, context: int, queries: int
) -> float:
    tokens = bench.sizes.block_tokens
    caches = cut(bench, random_bytes(bench, num_seqs * context), 3, tokens)
    meta = meta_of(caches, num_seqs, context, tokens, queries)
    return _compare_attention(bench, kernels, caches.layer(1), meta, attention_shape(bench))


def _mixed(bench: Bench, kernels: CudaKernels) -> list[tuple[str, float]]:
    """Decodes beside prompts, one of them with a long past."""
    tokens = bench.sizes.block_tokens
    lengths = ((20, 1), (33, 9), (18, 18)) if bench.dry else ((700, 1), (900, 77), (33, 1), (5, 5))
    most = sum(-(-context // tokens) for context, _ in lengths) * tokens
    caches = cut(bench, random_bytes(bench, most), 3, tokens)
    metas, free = [], caches.blocks
    for context, queries in lengths:
        meta = meta_of(replace(caches), 1, context, tokens, queries)
        count = -(-context // tokens)
        blocks, free = free[:count], free[count:]
        last = torch.arange(context - queries, context, device=free.device)
        table = torch.zeros(1, 64, dtype=torch.int32, device=free.device)
        table[0, :count] = blocks
        metas.append(replace(meta, block_table=table, token_page=blocks[last // tokens]))
    return [("", _compare_attention(bench, kernels, caches.layer(0), _joined(metas), None))]


def _joined(metas: list[BatchMeta]) -> BatchMeta:
    def cat(name: str) -> Tensor:
        return torch.cat([getattr(meta, name) for meta in metas])

    counts = torch.tensor([0] + [len(meta.positions) for meta in metas])
    return BatchMeta(
        positions=cat("positions"),
        token_page=cat("token_page"),
        token_slot=cat("token_slot"),
        query_start=counts.cumsum(0).int().to(metas[0].positions.device),
        context_len=cat("context_len"),
        block_table=cat("block_table"),
    )


def _compare_attention(
    bench: Bench,
    kernels: CudaKernels,
    cache: Tensor,
    meta: BatchMeta,
    shape: AttentionShape | None,
) -> float:
    shape = shape or attention_shape(bench)
    q = bench.random(len(meta.positions), shape.num_heads, shape.head_dim)
    out = kernels.attention(q, cache, meta, shape)
    return _error(out, dense_attention(q, cache, meta, shape))


def dense_attention(q: Tensor, cache: Tensor, meta: BatchMeta, shape: AttentionShape) -> Tensor:
    """In float32, over pages of K [G, B, D] and V [G, B, D]."""
    starts, results = meta.query_start.tolist(), []
    group = shape.num_heads // shape.num_kv_heads
    for i, length in enumerate(meta.context_len.tolist()):
        blocks = meta.block_table[i, : -(-length // shape.block_tokens)].long()
        pages = cache[blocks].float()
        pages = pages.view(len(blocks), 2, shape.num_kv_heads, shape.block_tokens, shape.head_dim)
        k, v = (t.transpose(0, 1).flatten(1, 2)[:, :length] for t in pages.unbind(1))
        queries = q[starts[i] : starts[i + 1]].float().transpose(0, 1)  # [H, n, D]
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        scores = queries @ k.transpose(1, 2) * shape.head_dim**-0.5
        position = torch.arange(length - queries.shape[1], length, device=q.device)
        future = torch.arange(length, device=q.device) > position[:, None]
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        results.append((weights @ v).transpose(0, 1).flatten(1))
    return torch.cat(results)


def _pointwise(bench: Bench, kernels: CudaKernels) -> list[tuple[str, float]]:
    hidden, inner = bench.sizes.architecture.hidden_size, bench.sizes.architecture.intermediate_size
    x, residual = bench.random(5, hidden), bench.random(5, hidden)
    weight, gate_up = bench.random(hidden), bench.random(5, 2 * inner)
    ours, theirs = residual.clone(), residual.clone()
    added = kernels.add_rms_norm(x, ours, weight, 1e-5)
    expected = REFERENCE.add_rms_norm(x, theirs, weight, 1e-5)
    norm = REFERENCE.rms_norm(x.float(), weight, 1e-5)
    return [
        ("norm", _error(kernels.rms_norm(x, weight, 1e-5), norm)),
        ("add", _error(added, expected)),
        ("sum", _error(ours, theirs)),
        ("silu", _error(kernels.silu_mul(gate_up), REFERENCE.silu_mul(gate_up.float()))),
    ]


def _rope(bench: Bench, kernels: CudaKernels) -> list[tuple[str, float]]:
    shape, tokens = attention_shape(bench), bench.sizes.block_tokens
    caches = cut(bench, random_bytes(bench, 4 * tokens), 3, tokens)
    meta = meta_of(caches, 2, 2 * tokens - 3, tokens, queries=tokens)
    angles = torch.rand(2 * tokens, shape.head_dim // 2, device=bench.device) * 6
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1)
    width = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    qkv = bench.random(len(meta.positions), width)
    ours, theirs = caches.layer(1), caches.pages.clone()[3:]
    q = kernels.rope_write_kv(qkv, ours, meta, shape, cos_sin, None)
    expected = REFERENCE.rope_write_kv(qkv, theirs, meta, shape, cos_sin, None)
    page, slot = meta.token_page.long(), meta.token_slot.long()
    parts = (2, shape.num_kv_heads, shape.block_tokens, shape.head_dim)
    written = ours.view(-1, *parts)[page, :, :, slot]
    k, v = theirs.view(-1, 2, theirs.shape[1] // 2).unbind(1)
    k = k.view(-1, parts[1], parts[3], parts[2])[page, :, :, slot]
    v = v.view(-1, *parts[1:])[page, :, slot]
    return [("q", _error(q, expected)), ("k, v", _error(written, torch.stack((k, v), 1)))]


def _embed(bench: Bench, kernels: CudaKernels) -> list[tuple[str, float]]:
    table = FullLinear(bench.random(50, bench.sizes.architecture.hidden_size), None, 50)
    tokens = torch.tensor([3, 49, 0, 3], device=bench.device)
    return [("", _error(kernels.embed(tokens, table), table.weight[tokens]))]


def _greedy(bench: Bench, kernels: CudaKernels) -> list[tuple[str, float]]:
    logits = bench.random(5, bench.sizes.architecture.vocab_size, dtype=torch.float32)
    logits[3, 7] = torch.nan
    differ = kernels.sample(logits, {}) != REFERENCE.sample(logits, {})
    return [("differ", float(differ))]


def _drawn(bench: Bench, kernels: CudaKernels) -> list[tuple[str, float]]:
    """Of draws whose mass is summed in another order, a few may fall on the next token."""
    count = 4 if bench.dry else 64
    logits = bench.random(count, bench.sizes.architecture.vocab_size, dtype=torch.float32) * 3
    draws = {
        i: Draw(0.8, 0.0, (0, 5, 40)[i % 3], (1.0, 0.9)[i % 2], float(torch.rand(())))
        for i in range(count)
    }
    expected = REFERENCE.sample(logits.cpu(), draws)
    got = kernels.sample(logits, draws)
    wrong = sum(a != b for a, b in zip(got, expected, strict=True))
    return [("share of other tokens", wrong / count)]
