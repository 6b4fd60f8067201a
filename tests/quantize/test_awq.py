"""Folds leave a layer's function, its keys and its values as they are, and help where they can."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from morphserve.quantize import dense
from morphserve.quantize.awq import Folds, find_folds, fold, quantize_layer_awq, unfold
from morphserve.quantize.checkpoint import Checkpoint, open_checkpoint
from morphserve.quantize.moments import Calibration
from morphserve.quantize.rounding import Grid, quantize_rtn
from morphserve.quantize.weights import LayerTensors, Norms, QuantizedWeight

TOKENS = torch.randint(0, 256, (20, 100), generator=torch.Generator().manual_seed(1))
HALF = 50
GRID = Grid(4, 32)


def opened(folder: Path) -> tuple[Checkpoint, LayerTensors[Tensor], Calibration]:
    """A checkpoint, its first layer, and calibration text in front of it."""
    checkpoint = open_checkpoint(str(folder))
    full = dense.to_float32(checkpoint.layer(0))
    calibration = Calibration(checkpoint.static(), checkpoint.architecture, TOKENS)
    calibration.enter(full)
    return checkpoint, full, calibration


def random_folds(full: LayerTensors[Tensor]) -> Folds:
    random = torch.Generator().manual_seed(0)

    def scale(size: int) -> Tensor:
        return torch.exp(torch.randn(size, generator=random))

    return Folds(
        qkv=scale(len(full.norms.input)),
        gate_up=scale(len(full.norms.input)),
        down=scale(full.down.shape[1]),
    )


def in_bfloat16(norms: Norms) -> Norms:
    return replace(
        norms, input=norms.input.bfloat16(), post_attention=norms.post_attention.bfloat16()
    )


@torch.inference_mode()
def test_a_folded_layer_computes_the_same_with_rounded_norms(
    family: str, tiny_model: Callable[[str], Path]
) -> None:
    checkpoint, full, calibration = opened(tiny_model(family))
    arch = checkpoint.architecture
    folded, _ = fold(full, random_folds(full), in_bfloat16(full.norms))
    assert folded.norms.input.dtype == torch.bfloat16
    assert float((folded.qkv - full.qkv).norm() / full.qkv.norm()) > 0.3
    same = dense.to_float32(folded)
    assert calibration.output_error(same) < 1e-5
    x = dense.embed(checkpoint.static(), TOKENS)
    cos_sin = dense.rotation(arch, TOKENS.shape[1])
    exact = dense.project(x, full, arch, cos_sin)
    for ours, theirs in zip(dense.project(x, same, arch, cos_sin), exact, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_norms_that_cannot_be_divided_are_kept(tiny_model: Callable[[str], Path]) -> None:
    _, full, calibration = opened(tiny_model("llama"))
    full.norms.input[3] = 0
    folds = random_folds(full)
    folds.qkv[4] = 1e-42  # the norm over it is beyond float32
    folded, applied = fold(full, folds, full.norms)
    assert folded.norms.input[3:5].tolist() == full.norms.input[3:5].tolist()
    assert applied.qkv[3:5].tolist() == [1, 1]
    assert calibration.output_error(folded) < 1e-5


@torch.inference_mode()
def test_unfolding_undoes_folds(family: str, tiny_model: Callable[[str], Path]) -> None:
    _, full, _ = opened(tiny_model(family))
    folded, _ = fold(full, random_folds(full), in_bfloat16(full.norms))
    same = unfold(dense.to_float32(folded), full)
    for linear in dense.LINEARS:
        torch.testing.assert_close(getattr(same, linear), getattr(full, linear))


@torch.inference_mode()
def test_inputs_of_very_unlike_sizes_make_folds_that_help(
    tiny_model: Callable[[str], Path],
) -> None:
    checkpoint, _, _ = opened(tiny_model("llama"))
    full = dense.to_float32(checkpoint.layer(0))
    full.norms.input[::16] *= 30
    full.norms.post_attention[::16] *= 30
    calibration = Calibration(checkpoint.static(), checkpoint.architecture, TOKENS)
    calibration.enter(full)
    moments = calibration.moments()
    folds = find_folds(full, moments, GRID)
    assert float(folds.qkv[::16].mean()) > 2 * float(folds.qkv[1::16].mean())
    awq = quantize_layer_awq(full, moments, GRID, full.norms)
    plain = rounded(full)
    error, plain_error = (
        calibration.output_error(dense.quantized_to_float32(layer)) for layer in (awq, plain)
    )
    assert error < 0.8 * plain_error


def rounded(layer: LayerTensors[Tensor]) -> LayerTensors[QuantizedWeight]:
    weights = {linear: quantize_rtn(getattr(layer, linear), GRID) for linear in dense.LINEARS}
    return LayerTensors(norms=layer.norms, biases=layer.biases, **weights)


def second_half(
    checkpoint: Checkpoint, full: LayerTensors[Tensor], ours: LayerTensors[Tensor]
) -> Tensor:
    """What `ours` adds to the second half of the windows, on keys and values that it wrote there
    and that `full` wrote in the first half."""
    arch = checkpoint.architecture
    cos_sin = dense.rotation(arch, TOKENS.shape[1])
    x = dense.embed(checkpoint.static(), TOKENS)
    early = torch.arange(TOKENS.shape[1]).unsqueeze(1) < HALF
    pairs = zip(
        dense.project(x, full, arch, cos_sin), dense.project(x, ours, arch, cos_sin), strict=True
    )
    attended = dense.attend(*(torch.where(early, a, b) for a, b in pairs))
    return (dense.finish(x, attended, ours, arch) - x)[:, HALF:]


def folded_into_v(layer: LayerTensors[Tensor], kv_size: int) -> LayerTensors[Tensor]:
    """The same function with scales moved from o's inputs into v, as AWQ may elsewhere."""
    scale = torch.exp(torch.randn(kv_size, generator=torch.Generator().manual_seed(0)))
    qkv, bias = layer.qkv.clone(), layer.biases.qkv
    assert bias is not None
    bias = bias.clone()
    qkv[-kv_size:] /= scale.unsqueeze(1)
    bias[-kv_size:] /= scale
    return replace(layer, qkv=qkv, o=layer.o * scale, biases=replace(layer.biases, qkv=bias))


@torch.inference_mode()
def test_a_cache_of_both_precisions_serves_unless_v_was_folded_into_o(
    tiny_model: Callable[[str], Path],
) -> None:
    checkpoint, full, calibration = opened(tiny_model("llama-mha-bias"))
    exact = second_half(checkpoint, full, full)
    awq = dense.quantized_to_float32(
        quantize_layer_awq(full, calibration.moments(), GRID, full.norms)
    )
    forbidden = folded_into_v(full, checkpoint.architecture.kv_size)
    assert calibration.output_error(forbidden) < 1e-4  # alone it computes the same
    error, forbidden_error = (
        float((second_half(checkpoint, full, layer) - exact).norm() / exact.norm())
        for layer in (awq, forbidden)
    )
    assert error < 1.1 * calibration.output_error(awq)  # as if it had written all of the cache
    assert forbidden_error > 2 * error
