"""Rounding passes, layers that compute something else or write K and V in another basis do not."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from morphserve.quantize import dense
from morphserve.quantize.agreement import FLOOR, MAX_KV_SHIFT, Probe
from morphserve.quantize.checkpoint import Checkpoint, open_checkpoint
from morphserve.quantize.rounding import Grid, quantize_rtn
from morphserve.quantize.weights import LayerTensors, QuantizedWeight


def rounded(layer: LayerTensors[Tensor], grid: Grid) -> LayerTensors[QuantizedWeight]:
    return LayerTensors(
        layer.norms,
        layer.biases,
        qkv=quantize_rtn(layer.qkv, grid),
        o=quantize_rtn(layer.o, grid),
        gate_up=quantize_rtn(layer.gate_up, grid),
        down=quantize_rtn(layer.down, grid),
    )


def folded(layer: LayerTensors[Tensor], checkpoint: Checkpoint) -> LayerTensors[Tensor]:
    """The same function with scales moved from o's inputs into v, as AWQ does; moderate ones."""
    arch = checkpoint.architecture
    scales = torch.linspace(0.7, 1.4, arch.kv_size)
    repeated = scales.view(arch.num_kv_heads, 1, arch.head_dim)
    repeated = repeated.expand(-1, arch.num_heads // arch.num_kv_heads, -1).flatten()
    qkv, bias = layer.qkv.float().clone(), layer.biases.qkv
    qkv[-arch.kv_size :] /= scales.unsqueeze(1)
    if bias is not None:
        bias = bias.clone()
        bias[-arch.kv_size :] /= scales
    biases = replace(layer.biases, qkv=bias)
    return replace(layer, qkv=qkv, o=layer.o.float() * repeated, biases=biases)


def test_rounded_layers_agree_and_folds_of_v_into_o_do_not(
    family: str, tiny_model: Callable[[str], Path]
) -> None:
    checkpoint = open_checkpoint(str(tiny_model(family)))
    probe = Probe(checkpoint)
    for i in range(3):
        full = checkpoint.layer(i)
        assert probe.layer == i
        assert probe.compare(rounded(full, Grid(4, 32))).fault(floor=0.9) is None
        assert probe.compare(rounded(full, Grid(4, 0))).kv_shift < MAX_KV_SHIFT / 1.5
        agreement = probe.compare(rounded(folded(full, checkpoint), Grid(4, 32)))
        assert agreement.cosine > 0.9  # the layer alone computes the same
        assert "scales keys or values" in str(agreement.fault(floor=0.9))
        probe.advance()


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_every_layer_of_the_demo_model_passes_rounded_and_fails_folded(group_size: int) -> None:
    checkpoint = open_checkpoint("demo")
    probe = Probe(checkpoint)
    for i in range(checkpoint.architecture.num_layers):
        full = checkpoint.layer(i)
        assert probe.compare(rounded(full, Grid(4, group_size))).fault() is None
        fold = probe.compare(rounded(folded(full, checkpoint), Grid(4, group_size)))
        assert fold.kv_shift > 2 * MAX_KV_SHIFT
        probe.advance()


def test_eight_bits_agree_better_than_four(tiny_model: Callable[[str], Path]) -> None:
    checkpoint = open_checkpoint(str(tiny_model("llama")))
    probe, full = Probe(checkpoint), checkpoint.layer(0)
    eight, four = (probe.compare(rounded(full, Grid(bits, 0))) for bits in (8, 4))
    assert eight.cosine > 0.999 > four.cosine
    assert eight.kv_shift < 0.01


def test_the_layers_cosine_is_of_what_it_adds(tiny_model: Callable[[str], Path]) -> None:
    """Against the definition, on the second layer of a model."""
    checkpoint = open_checkpoint(str(tiny_model("llama")))
    arch = checkpoint.architecture
    probe = Probe(checkpoint, num_tokens=16, seed=3)
    probe.advance()
    int4 = rounded(checkpoint.layer(1), Grid(4, 32))
    tokens = torch.randint(arch.vocab_size, (1, 16), generator=torch.Generator().manual_seed(3))
    turn = dense.rotation(arch, 16)
    x = dense.embed(checkpoint.static(), tokens)
    x = dense.decoder_layer(x, dense.to_float32(checkpoint.layer(0)), arch, turn)
    exact = dense.decoder_layer(x, dense.to_float32(checkpoint.layer(1)), arch, turn) - x
    ours = dense.decoder_layer(x, dense.quantized_to_float32(int4), arch, turn) - x
    expected = F.cosine_similarity(ours, exact, dim=-1).mean()
    assert probe.compare(int4).cosine == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("linear", ["qkv", "o", "gate_up", "down"])
def test_a_linear_with_its_outputs_in_another_order_fails(
    linear: str, tiny_model: Callable[[str], Path]
) -> None:
    checkpoint = open_checkpoint(str(tiny_model("llama")))
    full = checkpoint.layer(0)
    wrong = replace(full, **{linear: getattr(full, linear).flip(0)})
    fault = Probe(checkpoint).compare(rounded(wrong, Grid(8, 0))).fault()
    assert f"under {FLOOR}" in str(fault)


def test_another_layers_weights_fail(tiny_model: Callable[[str], Path]) -> None:
    checkpoint = open_checkpoint(str(tiny_model("llama")))
    assert Probe(checkpoint).compare(rounded(checkpoint.layer(1), Grid(8, 0))).fault() is not None


def test_dead_channels_are_no_shift(tiny_model: Callable[[str], Path]) -> None:
    """Rows of zeros, and rows too small for a scale, give ratios of 0 / 0 and of 0."""
    checkpoint = open_checkpoint(str(tiny_model("llama")))
    probe, full = Probe(checkpoint), checkpoint.layer(0)
    qkv = full.qkv.clone()
    qkv[-8:] = 0.0
    qkv[-16:-8] *= 1e-7
    whole = replace(full, qkv=qkv)
    checkpoint.layer = lambda _: whole  # type: ignore[method-assign]
    assert Probe(checkpoint).compare(rounded(whole, Grid(4, 32))).kv_shift < MAX_KV_SHIFT
    assert probe.compare(rounded(whole, Grid(4, 32))).kv_shift > MAX_KV_SHIFT


def test_values_that_are_not_finite_are_a_fault(tiny_model: Callable[[str], Path]) -> None:
    checkpoint = open_checkpoint(str(tiny_model("llama")))
    layer = rounded(checkpoint.layer(0), Grid(4, 32))
    scales = layer.down.scales.clone()
    scales[0, 0] = torch.nan
    broken = replace(layer, down=replace(layer.down, scales=scales))
    assert Probe(checkpoint).compare(broken).fault() is not None
