"""What a step reads, in tensors that never move: graphs know their addresses."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from morphserve.runtime.cuda.gpu import Gpu, Mark
from morphserve.runtime.cuda.packing import Packed, Packer, empty, room_for
from morphserve.runtime.kernels import BatchMeta
from morphserve.runtime.kernels.cuda.upload import unpack
from morphserve.runtime.request import Request
from morphserve.runtime.scheduler import Batch


@dataclass(frozen=True, slots=True)
class Limits:
    """The largest step."""

    max_tokens: int  # where prompts are among them; else one of each sequence
    max_seqs: int
    max_blocks: int  # of one sequence


class Inputs:
    """Device tensors for the largest step, and two host buffers in turn to fill them from."""

    def __init__(self, gpu: Gpu, limits: Limits, block_tokens: int) -> None:
        def ints(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=gpu.device)

        tokens, seqs = max(limits.max_tokens, limits.max_seqs), limits.max_seqs
        self.tokens = ints(tokens)
        self.rows = ints(seqs)
        self.chosen = ints(seqs)  # what the step before chose, by its sampling slices
        self._meta = BatchMeta(
            positions=ints(tokens),
            token_page=ints(tokens),
            token_slot=ints(tokens),
            query_start=ints(seqs + 1),
            context_len=ints(seqs),
            block_table=ints(seqs, limits.max_blocks),
        )
        self._gpu, self._block_tokens = gpu, block_tokens
        self._packer = Packer(block_tokens)
        size = room_for(tokens, seqs, limits.max_blocks)
        self._buffers = [_Buffer(gpu.pinned(size)) for _ in range(2)]

    def meta(self, num_tokens: int, num_seqs: int) -> BatchMeta:
        """Of a step of these sizes, padding included: views of the same memory every time."""
        meta = self._meta
        return BatchMeta(
            positions=meta.positions[:num_tokens],
            token_page=meta.token_page[:num_tokens],
            token_slot=meta.token_slot[:num_tokens],
            query_start=meta.query_start[: num_seqs + 1],
            context_len=meta.context_len[:num_seqs],
            block_table=meta.block_table[:num_seqs],
        )

    def load(self, batch: Batch, rows: Mapping[Request, int], num_seqs: int) -> Packed:
        """Brings a batch to the device, padded to `num_seqs` sequences.

        rows: of `chosen`, where tokens lie that are not known here yet.
        """
        buffer = self._next_buffer()
        packed = self._packer.pack(batch, rows, buffer.host.numpy())
        self._unpack(packed, num_seqs)
        return packed

    def blank(self, num_seqs: int) -> None:
        """A step of that many padded sequences, which reads nothing and writes nothing."""
        self._next_buffer()
        self._unpack(empty(), num_seqs)

    def _next_buffer(self) -> "_Buffer":
        """The one whose step is longer ago; the device has read it unless somebody did not wait."""
        self._buffers.reverse()
        buffer = self._buffers[0]
        if buffer.read is not None:
            buffer.read.synchronize()
        return buffer

    def _unpack(self, packed: Packed, num_seqs: int) -> None:
        buffer = self._buffers[0]
        num_tokens = packed.num_tokens + num_seqs - packed.num_seqs
        unpack(
            *(buffer.host, self.chosen, self.tokens, self.rows),
            *(self.meta(num_tokens, num_seqs), self._block_tokens),
            num_tokens=packed.num_tokens,
            num_seqs=packed.num_seqs,
            num_rows=packed.num_rows,
            longest=packed.longest,
        )
        buffer.read = self._gpu.mark()


@dataclass(slots=True)
class _Buffer:
    host: Tensor  # int32, pinned
    read: Mark | None = None  # the device has unpacked what lies in it
