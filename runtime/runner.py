"""Turns a batch into tensors, runs the model, and samples."""

import struct
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from morphserve.runtime.kernels import BatchMeta
from morphserve.runtime.model import Model
from morphserve.runtime.parts import Computed
from morphserve.runtime.sampler import Sampler
from morphserve.runtime.scheduler import Batch


class Runner:
    overlaps = False

    def __init__(self, model: Model, eos_token_ids: Sequence[int]) -> None:
        self._model = model
        self._sampler = Sampler(model.kernels, eos_token_ids)

    def prepare(self) -> bool:
        return False

    def launch(self, batch: Batch) -> Computed:
        """One forward pass; what each sampling slice gets from it, in batch order."""
        tokens, meta, rows = pack(batch, self._model.shape.block_tokens)
        logits = self._model.forward(tokens, meta, rows)
        requests = [piece.request for piece in batch if piece.samples]
        return Computed(self._sampler.sample(logits, requests) if requests else [])


def pack(batch: Batch, block_tokens: int) -> tuple[Tensor, BatchMeta, Tensor]:
    """(token ids int64 [M], where they lie, the last row of each slice that samples int64)"""
    places = _Places(block_tokens)
    tokens: list[int] = []
    context, rows = array("i"), array("q")
    query_start, table = array("i", [0]), list[int]()
    padding = [0] * max([len(piece.request.blocks) for piece in batch])
    for piece in batch:
        request, start, end = piece.request, piece.start, piece.end
        blocks = request.blocks
        places.add(blocks, start, end)
        tokens += request.tokens(start, end)
        context.append(end)
        query_start.append(len(tokens))
        if piece.samples:
            rows.append(len(tokens) - 1)
        table += blocks
        table += padding[len(blocks) :]
    meta = BatchMeta(
        positions=_tensor(places.positions),
        token_page=_tensor(places.pages),
        token_slot=_tensor(places.slots),
        query_start=_tensor(query_start),
        context_len=_tensor(context),
        block_table=_tensor(_packed(table)).view(len(batch), len(padding)),
    )
    return _tensor(array("q", tokens), torch.int64), meta, _tensor(rows, torch.int64)


class _Places:
    """Where tokens lie, in plain arrays: for a few numbers those are far faster than tensors."""

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self.positions, self.pages, self.slots = array("i"), array("i"), array("i")

    def add(self, blocks: Sequence[int], start: int, end: int) -> None:
        """Tokens start..end of a sequence in these blocks."""
        size = self._block_tokens
        if end - start == 1:  # as in most steps: no runs to build
            self.positions.append(start)
            self.pages.append(blocks[start // size])
            self.slots.append(start % size)
            return
        blocks = blocks[start // size : -(-end // size)]
        inside = slice(start % size, start % size + end - start)
        self.positions.extend(range(start, end))
        self.pages.fromlist([block for block in blocks for _ in range(size)][inside])
        self.slots.extend((array("i", range(size)) * len(blocks))[inside])


def _packed(numbers: Sequence[int]) -> bytearray:
    """As int32: for many numbers faster than an array."""
    return bytearray(struct.pack(f"{len(numbers)}i", *numbers))


def _tensor(values: "array[int] | bytearray", dtype: torch.dtype = torch.int32) -> Tensor:
    """Of the same memory."""
    return torch.frombuffer(values, dtype=dtype) if values else torch.empty(0, dtype=dtype)
