"""Turns a batch into tensors, runs the model, and samples."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from morphserve.runtime.kernels import BatchMeta
from morphserve.runtime.model import Model
from morphserve.runtime.parts import Sampled
from morphserve.runtime.sampler import Sampler
from morphserve.runtime.scheduler import Batch


class Runner:
    def __init__(self, model: Model, eos_token_ids: Sequence[int]) -> None:
        self._model = model
        self._sampler = Sampler(model.kernels, eos_token_ids)

    @torch.inference_mode()
    def run(self, batch: Batch) -> list[Sampled]:
        """One forward pass; what each sampling slice gets from it, in batch order."""
        tokens, meta, ends = pack(batch, self._model.shape.block_tokens)
        sampling = [i for i, piece in enumerate(batch) if piece.samples]
        logits = self._model.forward(tokens, meta, ends[sampling])
        return self._sampler.sample(logits, [batch[i].request for i in sampling])


def pack(batch: Batch, block_tokens: int) -> tuple[Tensor, BatchMeta, Tensor]:
    """(token ids int64 [M], where they lie, the last row of each slice int64 [S])"""
    lengths = np.array([piece.end - piece.start for piece in batch], dtype=np.int32)
    ends = np.cumsum(lengths, dtype=np.int32)
    widest = max(len(piece.request.blocks) for piece in batch)
    table = np.zeros((len(batch), widest), dtype=np.int32)
    for row, piece in zip(table, batch, strict=True):
        row[: len(piece.request.blocks)] = piece.request.blocks
    owner = np.repeat(np.arange(len(batch)), lengths)
    starts = np.array([piece.start for piece in batch], dtype=np.int32)
    positions = np.arange(ends[-1], dtype=np.int32) - np.repeat(ends - lengths - starts, lengths)
    tokens = [token for piece in batch for token in piece.request.tokens(piece.start, piece.end)]
    meta = BatchMeta(
        positions=torch.from_numpy(positions.astype(np.int32)),
        token_page=torch.from_numpy(table[owner, positions // block_tokens]),
        token_slot=torch.from_numpy((positions % block_tokens).astype(np.int32)),
        query_start=torch.from_numpy(np.concatenate(([0], ends)).astype(np.int32)),
        context_len=torch.from_numpy((starts + lengths).astype(np.int32)),
        block_table=torch.from_numpy(table),
    )
    return torch.tensor(tokens), meta, torch.from_numpy(ends.astype(np.int64) - 1)
