"""Whole forward passes of the CUDA kernels, against the reference and against transformers."""

from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path

import emulated_codes  # noqa: F401
import pytest
import swap_driver
import torch
from kernel_batches import make_meta, scatter_pages
from placed_models import (
    BLOCK_TOKENS,
    growing_batches,
    on_device,
    place_model,
    shape_of,
    small_model,
)
from swap_driver import Driver, prompt_of
from torch import Tensor
from transformers import AutoModelForCausalLM

from morphserve.configs.errors import ConfigError
from morphserve.quantize.checkpoint import open_checkpoint
from morphserve.quantize.manifest import Variant
from morphserve.runtime import kernels as protocol
from morphserve.runtime.kernels import BatchMeta, Draw, load_kernels
from morphserve.runtime.kernels.cuda import splits
from morphserve.runtime.kernels.cuda.kernels import CudaKernels
from morphserve.runtime.kernels.reference import ReferenceKernels
from morphserve.runtime.layers import full_image
from morphserve.runtime.model import Model

CUDA, REFERENCE = CudaKernels(), ReferenceKernels()
# New tokens of two sequences: prompts; one goes on, the other gets more; both go on.
STEPS = ([5, 11], [1, 3], [1, 1])
# Sums of 64 to 128 float32 products in another order, through all layers, on logits of size 10.
EXACT = {"rtol": 1e-4, "atol": 2e-4}


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each program of attention costs the interpreter time, also those that have nothing to do."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(splits, "PROGRAMS", 16)


def _logits(model: Model, device: str) -> Tensor:
    """Of every token of all steps, or of some where there are many layers."""
    batches = growing_batches(STEPS if len(model.layers) < 4 else STEPS[::2], device)
    with torch.inference_mode():
        return torch.cat(
            [
                model.forward(tokens, meta, torch.arange(len(tokens), device=device)).float()
                for tokens, meta in batches
            ]
        )


@pytest.mark.parametrize("quantised", [False, True])
def test_logits_of_float32_equal_the_reference(quantised: bool, device: str) -> None:
    mine = _logits(small_model(CUDA, torch.float32, device, quantised), device)
    wanted = _logits(small_model(REFERENCE, torch.float32, device, quantised), device)
    torch.testing.assert_close(mine, wanted, **EXACT)


@pytest.mark.parametrize("quantised", [False, True])
def test_bfloat16_is_no_further_from_float32_than_the_reference_is(
    quantised: bool, device: str
) -> None:
    exact = _logits(small_model(REFERENCE, torch.float32, device, quantised), device)
    mine = _logits(small_model(CUDA, torch.bfloat16, device, quantised), device)
    theirs = _logits(small_model(REFERENCE, torch.bfloat16, device, quantised), device)
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
    model = place_model(CUDA, architecture, checkpoint.static(), images, torch.float32, device)
    prompt = torch.randint(0, 250, (21,), generator=torch.Generator().manual_seed(1))
    pages = scatter_pages([21], BLOCK_TOKENS)
    mine = []
    with torch.inference_mode():
        for start, end in ((0, 13), (13, 20), (20, 21)):  # two chunks of the prompt, a decode
            meta = on_device(device, make_meta([end], [end - start], pages, BLOCK_TOKENS))
            rows = torch.arange(end - start, device=device)
            mine.append(model.forward(prompt[start:end].to(device), meta, rows).cpu())
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        wanted = theirs(prompt[None]).logits[0]
    torch.testing.assert_close(torch.cat(mine), wanted, **EXACT)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's numpy
def test_a_padded_batch_gives_the_same_and_writes_no_more(device: str) -> None:
    plain, padded = (small_model(CUDA, torch.float32, device) for _ in range(2))
    *before, (tokens, meta) = growing_batches(STEPS, device)
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
    (tokens, meta), *_ = growing_batches(STEPS, device)
    whole, pieces, rest = (small_model(CUDA, torch.float32, device) for _ in range(3))
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
    swapping = Driver(swap_driver.tiny_model(CUDA, exact=True), kv_tokens=60)
    still = Driver(swap_driver.tiny_model(REFERENCE, exact=True), kv_tokens=600)
    for driver, script in ((swapping, _down_and_up), (still, lambda turn: [])):
        driver.add("r", prompt_of(1, 26), max_tokens=4)
        driver.run(script)
    assert {v for *_, variants in swapping.precisions["r"] for v in variants} == set(Variant)
    assert swapping.requests["r"].output == still.requests["r"].output


def _down_and_up(turn: int) -> list[tuple[int, Variant]]:
    to = (Variant.INT8, Variant.INT4, Variant.INT8, Variant.FULL)[turn % 4]
    return [(layer, to) for layer in (3, 0)]


def test_attention_by_itself_equals_the_reference(device: str) -> None:
    """What the protocol offers without a plan."""
    shape = shape_of(swap_driver.ARCHITECTURE)
    meta = on_device(device, make_meta([9, 20], [3, 1], scatter_pages([9, 20], 8), BLOCK_TOKENS))
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
        3: Draw(temperature=1.0, min_p=0.0, top_k=2**40, top_p=1.0, uniform=1 - 2.0**-53),
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
    model = small_model(CUDA, torch.bfloat16, "cuda", quantised)
    batches = growing_batches(STEPS, "cuda")
    rows = torch.tensor([0, 1], device="cuda")
    for attempt in range(2):  # the first compiles
        torch.cuda.set_sync_debug_mode("error" if attempt else "default")
        try:
            for tokens, meta in batches:
                CUDA.choose(model.forward(tokens, meta, rows), None)
        finally:
            torch.cuda.set_sync_debug_mode("default")
