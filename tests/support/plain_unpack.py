"""What `unpack` does, in plain numpy: its oracle, and far faster than its interpreted kernel."""

import numpy as np
import pytest
from torch import Tensor

from morphserve.runtime.kernels import BatchMeta


def plain_unpack(
    packed: Tensor,
    chosen: Tensor,
    tokens: Tensor,
    rows: Tensor,
    meta: BatchMeta,
    block_tokens: int,
    *,
    num_tokens: int,
    num_seqs: int,
    num_rows: int,
    longest: int,
) -> None:
    numbers = packed.numpy()
    sizes = (num_seqs + 1, num_seqs, num_seqs + 1, num_rows, num_tokens)
    cuts = np.cumsum(sizes)
    starts, ends, first_blocks, asked, ids, blocks = np.split(numbers, cuts)
    padded = len(meta.context_len) - num_seqs
    if not num_seqs:
        starts = np.zeros(1, np.int32)
    for s in range(num_seqs):
        own = blocks[first_blocks[s] : first_blocks[s + 1]]
        assert starts[s + 1] - starts[s] <= longest and len(own) <= longest
        places = np.arange(ends[s] - (starts[s + 1] - starts[s]), ends[s])
        part = slice(int(starts[s]), int(starts[s + 1]))
        _put(meta.positions[part], places)
        _put(meta.token_page[part], own[places // block_tokens])
        _put(meta.token_slot[part], places % block_tokens)
        _put(meta.block_table[s, : len(own)], own)
    rest = slice(num_tokens, num_tokens + padded)
    late = ids < 0
    _put(tokens[:num_tokens], np.where(late, chosen.numpy()[np.where(late, -1 - ids, 0)], ids))
    for tensor, value in ((tokens, 0), (meta.positions, 0), (meta.token_page, -1)):
        tensor[rest] = value
    meta.token_slot[rest] = 0
    _put(meta.context_len, np.concatenate((ends, np.zeros(padded, np.int32))))
    _put(meta.query_start, np.concatenate((starts, starts[-1] + 1 + np.arange(padded))))
    _put(rows[: num_seqs + padded], np.pad(asked, (0, num_seqs + padded - num_rows)))


def _put(tensor: Tensor, values: np.ndarray) -> None:
    tensor.numpy()[:] = values


@pytest.fixture
def fast_unpack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("morphserve.runtime.cuda.inputs.unpack", plain_unpack)
