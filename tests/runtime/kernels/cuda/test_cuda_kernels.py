"""Whole forward passes of the CUDA kernels, against the reference and against transformers."""

import dataclasses
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path

import emulated_codes  # noqa: F401
import pytest
import torch
from kernel_batches import make_meta, page_items, scatter_pages
from swap_driver import (
    ARCHITECTURE,
    Driver,
    prompt_of,
    quantised_layers,
    random_model,
)
from swap_driver import (
    tiny_model as model_that_swaps,
)
from torch import Tensor
from transformers import AutoModelForCausalLM

from morphserve.configs.errors import ConfigError
from morphserve.quantize.architecture import Architecture
from morphserve.quantize.checkpoint import open_checkpoint
from morphserve.quantize.manifest import Variant
from morphserve.quantize.weights import StaticTensors
from morphserve.runtime import kernels as protocol
from morphserve.runtime.kernels import (
    AttentionShape,
    BatchMeta,
    Draw,
    Kernels,
    LayerWeights,
    load_kernels,
)
from morphserve.runtime.kernels.cuda.kernels import CudaKernels
from morphserve.runtime.kernels.reference import ReferenceKernels
from morphserve.runtime.layers import Image, full_image, quantized_image, weights_at
from morphserve.runtime.model import Model, StaticWeights, pack_statics, rope_table

CUDA, REFERENCE = CudaKernels(), ReferenceKernels()
BLOCK_TOKENS = 8
# New tokens of two sequences: prompts; one goes on, the other gets more; both go on.
STEPS = ([5, 11], [1, 3], [1, 1])
# Sums of 64 to 128 float32 products in another order, through all layers, on logits of size 10.
EXACT = {"rtol": 1e-4, "atol": 2e-4}


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


class _Memory:
    """An image's bytes on the device, for `weights_at`."""

    def __init__(self, image: Image, device: str) -> None:
        self._bytes = image.host.to(device)

    def view(self, offset: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        size = torch.Size(shape)
        return self._bytes[offset : offset + size.numel() * dtype.itemsize].view(dtype).view(size)


def _placed(image: Image, device: str) -> LayerWeights:
    return weights_at(_Memory(image, device), 0, image)


def _shape(architecture: Architecture) -> AttentionShape:
    sizes = (architecture.num_heads, architecture.num_kv_heads, architecture.head_dim)
    return AttentionShape(*sizes, BLOCK_TOKENS, architecture.norm_eps)


def _model(
    kernels: Kernels,
    architecture: Architecture,
    static: StaticTensors,
    images: Sequence[Image],
    dtype: torch.dtype,
    device: str,
) -> Model:
    """With caches of 8 blocks of which every item that was not written shows."""
    shape = _shape(architecture)
    packed = pack_statics(static, kernels, dtype)
    embedding, head = (
        dataclasses.replace(table, weight=table.weight.to(device))
        for table in (packed.embedding, packed.head)
    )
    caches = [
        torch.full((8, page_items(shape)), torch.nan, dtype=dtype, device=device) for _ in images
    ]
    return Model(
        kernels=kernels,
        static=StaticWeights(embedding, packed.norm.to(device), head),
        layers=[_placed(image, device) for image in images],
        caches=caches,
        cos_sin=rope_table(architecture, 64).to(device),
        shape=shape,
    )


def _tiny(kernels: Kernels, dtype: torch.dtype, device: str, quantised: bool = False) -> Model:
    """Of random weights; two layers in full, or five quantised ones of all kinds."""
    static, layers = random_model()
    if quantised:
        images = [quantized_image(layer, kernels, dtype) for layer in quantised_layers()]
    else:
        images = [full_image(layer, kernels, dtype) for layer in layers[:2]]
    return _model(kernels, ARCHITECTURE, static, images, dtype, device)


def _batches(steps: Sequence[Sequence[int]], device: str) -> list[tuple[Tensor, BatchMeta]]:
    """Token ids and places of each step, of sequences that grow."""
    pages = scatter_pages([sum(lengths) for lengths in zip(*steps, strict=True)], BLOCK_TOKENS)
    contexts = [0] * len(steps[0])
    generator = torch.Generator().manual_seed(3)
    batches = []
    for new in steps:
        contexts = [before + n for before, n in zip(contexts, new, strict=True)]
        meta = make_meta(contexts, new, pages, BLOCK_TOKENS)
        tokens = torch.randint(0, ARCHITECTURE.vocab_size, (sum(new),), generator=generator)
        batches.append((tokens.to(device), _on(device, meta)))
    return batches


def _on(device: str, meta: BatchMeta) -> BatchMeta:
    fields = dataclasses.fields(meta)
    return BatchMeta(**{field.name: getattr(meta, field.name).to(device) for field in fields})


def _logits(model: Model, device: str) -> Tensor:
    """Of every token of all steps, or of some where there are many layers."""
    batches = _batches(STEPS if len(model.layers) < 4 else STEPS[::2], device)
    with torch.inference_mode():
        return torch.cat(
            [
                model.forward(tokens, meta, torch.arange(len(tokens), device=device)).float()
                for tokens, meta in batches
            ]
        )


@pytest.mark.parametrize("quantised", [False, True])
def test_logits_of_float32_equal_the_reference(quantised: bool, device: str) -> None:
    mine = _logits(_tiny(CUDA, torch.float32, device, quantised), device)
    wanted = _logits(_tiny(REFERENCE, torch.float32, device, quantised), device)
    torch.testing.assert_close(mine, wanted, **EXACT)


@pytest.mark.parametrize("quantised", [False, True])
def test_bfloat16_is_no_further_from_float32_than_the_reference_is(
    quantised: bool, device: str
) -> None:
    exact = _logits(_tiny(REFERENCE, torch.float32, device, quantised), device)
    mine = _logits(_tiny(CUDA, torch.bfloat16, device, quantised), device)
    theirs = _logits(_tiny(REFERENCE, torch.bfloat16, device, quantised), device)
    assert (mine - exact).norm() < 1.2 * (theirs - exact).norm()
    assert (mine - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_logits_equal_transformers(
    family: str, tiny_model: Callable[[str], Path], device: str
) -> None:
    folder = tiny_model(family)
    checkpoint = open_checkpoint(str(folder))
    architecture = checkpoint.architecture
    images = [
        full_image(checkpoint.layer(i), CUDA, torch.float32) for i in range(architecture.num_layers)
    ]
    model = _model(CUDA, architecture, checkpoint.static(), images, torch.float32, device)
    prompt = torch.randint(0, 250, (21,), generator=torch.Generator().manual_seed(1))
    pages = scatter_pages([21], BLOCK_TOKENS)
    mine = []
    with torch.inference_mode():
        for start, end in ((0, 13), (13, 20), (20, 21)):  # two chunks of the prompt, a decode
            meta = _on(device, make_meta([end], [end - start], pages, BLOCK_TOKENS))
            rows = torch.arange(end - start, device=device)
            mine.append(model.forward(prompt[start:end].to(device), meta, rows).cpu())
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        wanted = theirs(prompt[None]).logits[0]
    torch.testing.assert_close(torch.cat(mine), wanted, **EXACT)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's numpy
def test_a_padded_batch_gives_the_same_and_writes_no_more(device: str) -> None:
    plain, padded = (_tiny(CUDA, torch.float32, device) for _ in range(2))
    *before, (tokens, meta) = _batches(STEPS, device)
    filled = BatchMeta(
        positions=_extended(meta.positions, [0, 0]),
        token_page=_extended(meta.token_page, [-1, -1]),
        token_slot=_extended(meta.token_slot, [0, 0]),
        query_start=_extended(meta.query_start, [3, 4]),
        context_len=_extended(meta.context_len, [0, 0]),
        block_table=torch.cat([meta.block_table, torch.zeros_like(meta.block_table)]),
    )
    two, four = (torch.arange(n, device=device) for n in (2, 4))
    with torch.inference_mode():
        for model in (plain, padded):
            for step in before:
                model.forward(*step, two)
        wanted = plain.forward(tokens, meta, two)
        mine = padded.forward(_extended(tokens, [-1, -1]), filled, four)
    torch.testing.assert_close(mine[:2], wanted, **EXACT)
    for cache, other in zip(padded.caches, plain.caches, strict=True):
        torch.testing.assert_close(cache, other, **EXACT, equal_nan=True)


def _extended(values: Tensor, more: Sequence[int]) -> Tensor:
    return torch.cat([values, values.new_tensor(more)])


def test_the_pieces_of_a_pass_work_in_place_and_make_up_the_whole(device: str) -> None:
    (tokens, meta), *_ = _batches(STEPS, device)
    whole, pieces, rest = (_tiny(CUDA, torch.float32, device) for _ in range(3))
    rows = torch.tensor([4, 15], device=device)
    static, shape = pieces.static, pieces.shape
    with torch.inference_mode():
        wanted = whole.forward(tokens, meta, rows)
        delta, residual = CUDA.enter(tokens, static.embedding)
        hidden = delta.clone()
        plan = CUDA.plan(meta, shape)
        for layer, cache in zip(pieces.layers, pieces.caches, strict=True):
            CUDA.layer(delta, residual, layer, cache, meta, plan, shape, pieces.cos_sin)
        mine = CUDA.leave(delta, residual, rows, static.norm, shape.norm_eps, static.head)
        last = CUDA.run_layers(*(hidden, rest.layers, rest.caches, meta, shape, rest.cos_sin, rows))
        normed = CUDA.rms_norm(last, static.norm, shape.norm_eps)
    assert torch.equal(mine, wanted)
    torch.testing.assert_close(last, (delta + residual)[rows])
    torch.testing.assert_close(CUDA.linear(normed, static.head), wanted, **EXACT)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the driver's arena lies in host memory")
def test_tokens_are_the_reference_s_while_layers_swap() -> None:
    swapping = Driver(model_that_swaps(CUDA, exact=True), kv_tokens=60)
    still = Driver(model_that_swaps(REFERENCE, exact=True), kv_tokens=600)
    for driver in (swapping, still):
        for i, length in enumerate((9, 22)):
            driver.add(f"r{i}", prompt_of(i, length), max_tokens=8)
    still.run(lambda turn: [])
    swapping.run(_down_and_up)
    computed = [v for pieces in swapping.precisions.values() for *_, mix in pieces for v in mix]
    assert set(computed) == set(Variant)
    for name, request in still.requests.items():
        assert swapping.requests[name].output == request.output


def _down_and_up(turn: int) -> list[tuple[int, Variant]]:
    to = (Variant.INT8, Variant.INT4, Variant.INT8, Variant.FULL)[turn // 3 % 4]
    return [(layer, to) for layer in (3, 0)]


def test_attention_by_itself_equals_the_reference(device: str) -> None:
    """What the protocol offers without a plan."""
    shape = _shape(ARCHITECTURE)
    meta = _on(device, make_meta([9, 20], [3, 1], scatter_pages([9, 20], 8), BLOCK_TOKENS))
    k, v = torch.randn(2, 5, shape.num_kv_heads, BLOCK_TOKENS, shape.head_dim, device=device)
    q = torch.randn(4, shape.num_heads, shape.head_dim, device=device)
    cache = torch.cat([k.flatten(1), v.flatten(1)], dim=1)
    theirs = torch.cat([k.transpose(2, 3).flatten(1), v.flatten(1)], dim=1)
    wanted = REFERENCE.attention(q, theirs, meta, shape)
    torch.testing.assert_close(CUDA.attention(q, cache, meta, shape), wanted, rtol=1e-4, atol=1e-5)


def test_tokens_are_drawn_as_the_reference_draws_them(device: str) -> None:
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(2)).to(device)
    logits[2, 7] = torch.nan
    draws = {
        1: Draw(temperature=0.7, min_p=0.0, top_k=20, top_p=0.9, uniform=0.4),
        2: Draw(temperature=1.0, min_p=0.0, top_k=0, top_p=1.0, uniform=0.4),
        4: Draw(temperature=1.5, min_p=0.05, top_k=0, top_p=1.0, uniform=0.93),
    }
    for asked in ({}, draws):
        drawn = CUDA.sample(logits, asked)
        assert drawn == REFERENCE.sample(logits, asked)
        assert drawn[2] is None


def test_kernels_for_cuda_are_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(load_kernels("cuda"), CudaKernels)
    with pytest.raises(ConfigError, match="use cpu, cuda or reference"):
        load_kernels("gpu")

    def not_installed(name: str) -> ModuleSpec | None:
        assert name == "triton"
        return None

    monkeypatch.setattr(protocol, "find_spec", not_installed)
    with pytest.raises(ConfigError, match="need Triton"):
        load_kernels("cuda")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("quantised", [False, True])
def test_a_pass_never_waits_for_the_device(quantised: bool) -> None:
    model = _tiny(CUDA, torch.bfloat16, "cuda", quantised)
    batches = _batches(STEPS, "cuda")
    rows = torch.tensor([0, 1], device="cuda")
    for attempt in range(2):  # the first compiles
        torch.cuda.set_sync_debug_mode("error" if attempt else "default")
        try:
            for tokens, meta in batches:
                CUDA.choose(model.forward(tokens, meta, rows), None)
        finally:
            torch.cuda.set_sync_debug_mode("default")
