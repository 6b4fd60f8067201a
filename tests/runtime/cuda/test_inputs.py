"""A step's inputs on the device are what the batch says, whatever was there before."""

import random
from dataclasses import fields

import numpy as np
import pytest
import torch
from graph_driver import GARBAGE
from tape_graphs import TapeGpu
from torch import Tensor

from morphserve.runtime.cuda.gpu import CudaGpu, Gpu
from morphserve.runtime.cuda.inputs import Inputs, Limits
from morphserve.runtime.cuda.packing import Packer, room_for
from morphserve.runtime.kernels import BatchMeta
from morphserve.runtime.request import Request, SamplingParams
from morphserve.runtime.runner import pack
from morphserve.runtime.scheduler import Slice

BLOCK_TOKENS = 4
LIMITS = Limits(max_tokens=700, max_seqs=9, max_blocks=300)


@pytest.fixture
def gpu() -> Gpu:
    return CudaGpu() if torch.cuda.is_available() else TapeGpu()


def request_of(rng: random.Random, length: int) -> Request:
    prompt = [rng.randrange(100) for _ in range(rng.randint(1, length))]
    output = [rng.randrange(100) for _ in range(length - len(prompt))]
    blocks = [rng.randrange(10**6) for _ in range(-(-length // BLOCK_TOKENS) + rng.randrange(2))]
    return Request("x", prompt, SamplingParams(999), 0.0, output=output, blocks=blocks)


def decode(rng: random.Random, length: int) -> Slice:
    return Slice(request_of(rng, length), length - 1, length)


def chunk(rng: random.Random, length: int) -> Slice:
    end = rng.randint(1, length)
    return Slice(request_of(rng, length), rng.randrange(end), end)


def spoil(inputs: Inputs) -> None:
    meta = inputs._meta
    for tensor in (*(getattr(meta, f.name) for f in fields(meta)), inputs.tokens, inputs.rows):
        tensor.fill_(GARBAGE)


def check(inputs: Inputs, batch: list[Slice], num_seqs: int) -> None:
    """Against the packing of the CPU's runner, with padding after it."""
    tokens, meta, rows = pack(batch, BLOCK_TOKENS)
    m, s, padded = len(tokens), len(batch), num_seqs - len(batch)
    got = inputs.meta(m + padded, num_seqs)

    def same(tensor: Tensor, wanted: Tensor, padding: int) -> None:
        assert tensor.tolist() == wanted.tolist() + [padding] * (len(tensor) - len(wanted))

    same(inputs.tokens[: m + padded], tokens, 0)
    same(got.positions, meta.positions, 0)
    same(got.token_page, meta.token_page, -1)
    same(got.token_slot, meta.token_slot, 0)
    same(got.context_len, meta.context_len, 0)
    same(inputs.rows[:num_seqs], rows, 0)
    assert got.query_start[: s + 1].tolist() == meta.query_start.tolist()
    assert got.query_start.diff()[s:].tolist() == [1] * padded
    for row, piece in zip(got.block_table.tolist(), batch, strict=False):
        used = -(-piece.end // BLOCK_TOKENS)
        assert row[:used] == piece.request.blocks[:used]


def test_unpacking_writes_every_step_over_garbage(gpu: Gpu) -> None:
    rng = random.Random(1)
    inputs = Inputs(gpu, LIMITS, BLOCK_TOKENS)
    batches = [
        [decode(rng, 1)],
        [decode(rng, n) for n in (1100, 7, 260)],
        [decode(rng, 5), chunk(rng, 600), chunk(rng, 40)],
    ]
    for batch, num_seqs in zip(batches, (1, 4, 3), strict=True):
        spoil(inputs)
        inputs.load(batch, {}, num_seqs)
        check(inputs, batch, num_seqs)


def test_a_blank_step_is_padding_alone(gpu: Gpu) -> None:
    inputs = Inputs(gpu, LIMITS, BLOCK_TOKENS)
    spoil(inputs)
    inputs.blank(3)
    meta = inputs.meta(3, 3)
    assert meta.query_start.tolist() == [0, 1, 2, 3]
    assert meta.token_page.tolist() == [-1] * 3
    for tensor in (meta.context_len, meta.positions, meta.token_slot):
        assert tensor.tolist() == [0] * 3
    assert inputs.tokens[:3].tolist() == inputs.rows[:3].tolist() == [0] * 3


@pytest.mark.usefixtures("fast_unpack")
def test_packing_is_that_of_the_cpu_with_padding_after_it() -> None:
    rng = random.Random(2)
    inputs = Inputs(TapeGpu(), LIMITS, BLOCK_TOKENS)
    for _ in range(60):
        batch = [decode(rng, rng.randint(1, 99)) for _ in range(rng.randint(1, 8))]
        if rng.random() < 0.5:
            batch.insert(rng.randrange(len(batch)), chunk(rng, 300))
        spoil(inputs)
        is_decode = all(piece.end - piece.start == 1 for piece in batch)
        num_seqs = rng.randint(len(batch), 9) if is_decode else len(batch)
        inputs.load(batch, {}, num_seqs)
        check(inputs, batch, num_seqs)


def test_tokens_that_are_not_known_yet_are_taken_on_the_device(gpu: Gpu) -> None:
    rng = random.Random(3)
    inputs = Inputs(gpu, LIMITS, BLOCK_TOKENS)
    inputs.chosen.copy_(torch.arange(50, 59))
    batch = [decode(rng, 20), chunk(rng, 30), decode(rng, 3)]
    pending = [batch[0].request, batch[2].request]
    for request in pending:
        request.prompt, request.output = [1] * (len(request.prompt + request.output) - 1), [-1]
    inputs.load(batch, {pending[0]: 5, pending[1]: 0}, 3)
    last = inputs.meta(sum(p.end - p.start for p in batch), 3).query_start[1:] - 1
    tokens = inputs.tokens[last.long()].tolist()
    assert (tokens[0], tokens[2]) == (55, 50)


def test_a_token_that_nobody_is_choosing_is_an_error(gpu: Gpu) -> None:
    inputs = Inputs(gpu, LIMITS, BLOCK_TOKENS)
    request = Request("late", [1], SamplingParams(9), 0.0, output=[-1], blocks=[1])
    with pytest.raises(AssertionError, match="late waits"):
        inputs.load([Slice(request, 1, 2)], {}, 1)


def test_blocks_are_packed_as_they_are_after_growth_and_moves() -> None:
    rng = random.Random(4)
    packer = Packer(BLOCK_TOKENS)
    requests = [request_of(rng, rng.randint(1, 60)) for _ in range(6)]
    buffer = np.zeros(room_for(700, 9, 300), np.int32)
    for _ in range(300):
        for request in requests:
            request.output.append(1)
            if -(-request.num_tokens // BLOCK_TOKENS) > len(request.blocks):
                request.blocks += [rng.randrange(1000) for _ in range(rng.randint(1, 3))]
        match rng.randrange(4):
            case 0:
                moved = rng.choice(requests)
                moved.blocks = [block + 1 for block in moved.blocks]
            case 1:
                requests[rng.randrange(6)] = request_of(rng, rng.randint(1, 60))
        batch = [Slice(r, r.num_tokens - 1, r.num_tokens) for r in rng.sample(requests, 4)]
        packed = packer.pack(batch, {}, buffer)
        blocks = [r.blocks[: -(-p.end // BLOCK_TOKENS)] for p in batch for r in [p.request]]
        flat = [block for own in blocks for block in own]
        head = 4 * packed.num_seqs + 2 + packed.num_tokens
        assert buffer[head : head + len(flat)].tolist() == flat
        assert packed.longest == max(map(len, blocks))


@pytest.mark.usefixtures("fast_unpack")
def test_a_buffer_is_written_again_only_after_the_device_has_read_it() -> None:
    gpu = TapeGpu()
    inputs = Inputs(gpu, LIMITS, BLOCK_TOKENS)
    rng = random.Random(5)
    for waits in (0, 0, 1, 2):
        inputs.load([decode(rng, 3)], {}, 1)
        assert gpu.waits == waits


@pytest.mark.usefixtures("fast_unpack")
def test_the_views_of_a_size_are_the_same_memory_in_every_step() -> None:
    inputs = Inputs(TapeGpu(), LIMITS, BLOCK_TOKENS)

    def addresses(meta: BatchMeta) -> list[int]:
        return [getattr(meta, f.name).data_ptr() for f in fields(meta)]

    before = addresses(inputs.meta(4, 4))
    inputs.load([decode(random.Random(6), 30)], {}, 4)
    assert addresses(inputs.meta(4, 4)) == before


@pytest.mark.usefixtures("fast_unpack")
def test_there_may_be_more_sequences_than_tokens_of_prompts() -> None:
    inputs = Inputs(TapeGpu(), Limits(max_tokens=2, max_seqs=9, max_blocks=300), BLOCK_TOKENS)
    batch = [decode(random.Random(7), 5) for _ in range(8)]
    inputs.load(batch, {}, 9)
    check(inputs, batch, 9)
