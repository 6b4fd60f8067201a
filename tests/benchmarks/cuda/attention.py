"""Paged attention: decode in TB/s of K and V read, prefill in TFLOP/s, against FlashAttention 3."""

from functools import partial

from bench import Bench, Gate
from caches import Caches, attention_shape, cut, meta_of, random_bytes
from sizes import ATTENTION_US, PREFILL_US

from morphserve.runtime.kernels.cuda.attention import attention
from morphserve.runtime.kernels.cuda.splits import plan_splits

# TB/s that decode must reach at (batch, context)
GATES = {(64, 1024): Gate(">=", 3.0), (64, 4096): Gate(">=", 3.6)}


def run(bench: Bench) -> None:
    sizes = bench.sizes
    most = max(batch * context for batch, context in sizes.attention)
    memory = random_bytes(bench, most)
    run, tokens = sizes.runs[0], sizes.block_tokens
    caches = cut(bench, memory, run, tokens)
    for cell in sizes.attention[:2]:
        _decode(bench, caches, tokens, *cell, line=f"decode TB/s, run {run}")
    for prompt in sizes.prompts:
        _prefill(bench, caches, tokens, prompt)
    for other in sizes.runs[1:]:
        for cell in sizes.attention[:2]:
            _decode(bench, cut(bench, memory, other, tokens), tokens, *cell, f"  runs of {other}")
    for size in sizes.blocks[1:]:
        for cell in sizes.attention[:2]:
            _decode(bench, cut(bench, memory, run, size), size, *cell, f"  blocks of {size}")
    for cell in sizes.attention[2:]:
        if bench.left_s < 5:
            return
        _decode(bench, caches, tokens, *cell, "decode us (x FA3)")


def _decode(bench: Bench, caches: Caches, tokens: int, batch: int, context: int, line: str) -> None:
    shape = attention_shape(bench, tokens)
    meta = meta_of(caches, batch, context, tokens)
    q = bench.random(batch, shape.num_heads, shape.head_dim)
    plan = plan_splits(meta, shape)
    works = [
        partial(attention, q, caches.layer(i), meta, plan, shape) for i in range(caches.num_layers)
    ]
    spent_s = bench.seconds(works)
    num_bytes = 2 * 2 * shape.num_kv_heads * shape.head_dim * batch * context
    rate, cell = num_bytes / spent_s / 1e12, f"{batch}x{context}"
    published_us = ATTENTION_US.get((batch, context))
    ratio = spent_s * 1e6 / published_us if published_us else 0.0
    add = bench.figures.add
    if line.startswith("decode us"):
        add(line, cell, f"{spent_s * 1e6:.1f} ({ratio:.2f})")
    else:
        add(line, cell, rate, f"({ratio:.2f} x FA3)", GATES.get((batch, context)))
    add(f"{line} all", f"{cell} us", spent_s * 1e6, in_table=False)
    add(f"{line} all", f"{cell} TB/s", rate, in_table=False)
    add(f"{line} all", f"{cell} over FA3", ratio, in_table=False)
    planning_s = bench.seconds([lambda: plan_splits(meta, shape)] * 8)
    add(f"{line} all", f"{cell} plan us", planning_s * 1e6, in_table=False)


def _prefill(bench: Bench, caches: Caches, tokens: int, prompt: int) -> None:
    shape = attention_shape(bench, tokens)
    meta = meta_of(caches, 1, prompt, tokens, queries=prompt)
    q = bench.random(prompt, shape.num_heads, shape.head_dim)
    plan = plan_splits(meta, shape)
    works = [
        partial(attention, q, caches.layer(i), meta, plan, shape)
        for i in range(min(4, caches.num_layers))
    ]
    spent_s = bench.seconds(works)
    pairs = prompt * (prompt + 1) / 2
    rate = 4 * shape.num_heads * shape.head_dim * pairs / spent_s / 1e12
    ratio = spent_s * 1e6 / PREFILL_US.get(prompt, spent_s * 1e6)
    bench.figures.add("prefill TFLOP/s", f"1x{prompt}", rate, f"({ratio:.2f} x FA3)")
    bench.figures.add("prefill all", f"{prompt} us", spent_s * 1e6, in_table=False)
