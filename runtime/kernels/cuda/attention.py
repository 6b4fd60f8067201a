"""Attention over paged K and V; a page is K [G, B, D], then V [G, B, D], of a layer's block."""

from math import e, log2

import torch
from torch import Tensor

from morphserve.runtime.kernels import AttentionShape, BatchMeta
from morphserve.runtime.kernels.cuda.decode import decode
from morphserve.runtime.kernels.cuda.prefill import prefill
from morphserve.runtime.kernels.cuda.splits import SplitPlan


def attention(
    q: Tensor, cache: Tensor, meta: BatchMeta, plan: SplitPlan, shape: AttentionShape
) -> Tensor:
    """Causal attention of each token over its sequence's pages: [M, H * D].

    q: [M, H, D], heads and channels contiguous, of the cache's dtype, bfloat16 or float32; cache:
    [pages, 2 * G * B * D] with any row stride, B a power of two, D at most 256; plan: this batch's.
    The last query of sequence s stands at position `context_len[s] - 1`. A sequence with one query
    and no context gets zeros; rows of no sequence are left as they are.
    """
    scale = log2(e) * shape.head_dim**-0.5
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    decode(q, cache, meta, plan, shape, scale, out)
    if len(q) != len(meta.context_len):  # else each sequence has one query
        prefill(q, cache, meta, shape, scale, out)
    return out.flatten(1)
