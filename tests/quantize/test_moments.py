"""What is known of linears' inputs, against transformers and against plain forward passes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from morphserve.quantize import dense
from morphserve.quantize.checkpoint import BadCheckpoint, open_checkpoint
from morphserve.quantize.dense import LINEARS, Linear
from morphserve.quantize.moments import Calibration
from morphserve.quantize.weights import LayerTensors

PLACES: dict[Linear, str] = {
    "qkv": "self_attn.q_proj",
    "o": "self_attn.o_proj",
    "gate_up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
# 25 windows run in three batches
TOKENS = torch.randint(0, 256, (25, 100), generator=torch.Generator().manual_seed(1))


def inputs_in_transformers(folder: Path, layer: int) -> dict[Linear, Tensor]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs: dict[Linear, Tensor] = {}
    for linear, place in PLACES.items():
        module = model.get_submodule(f"model.layers.{layer}.{place}")
        module.register_forward_pre_hook(
            lambda _module, args, linear=linear: inputs.__setitem__(linear, args[0].flatten(0, 1))
        )
    model(TOKENS)
    return inputs


def inputs_of(layer: LayerTensors[Tensor], x: Tensor, checkpoint: str) -> dict[Linear, Tensor]:
    arch = open_checkpoint(checkpoint).architecture
    inputs: dict[Linear, Tensor] = {}

    def keep(linear: Linear, entering: Tensor) -> None:
        inputs[linear] = entering.flatten(0, 1)

    dense.decoder_layer(x, layer, arch, dense.rotation(arch, x.shape[1]), keep)
    return inputs


@torch.inference_mode()
def test_moments_are_those_of_the_inputs_in_transformers(
    family: str, tiny_model: Callable[[str], Path]
) -> None:
    checkpoint = open_checkpoint(str(tiny_model(family)))
    calibration = Calibration(checkpoint.static(), checkpoint.architecture, TOKENS)
    for i in range(2):
        calibration.enter(dense.to_float32(checkpoint.layer(i)))
    expected = inputs_in_transformers(tiny_model(family), layer=1)
    moments = calibration.moments()
    for linear, x in expected.items():
        exact = x.t() @ x / len(x)
        torch.testing.assert_close(moments[linear], exact, atol=1e-3, rtol=1e-3)


@torch.inference_mode()
def test_replaced_linears_change_what_later_ones_meet(
    family: str, tiny_model: Callable[[str], Path]
) -> None:
    folder = str(tiny_model(family))
    checkpoint = open_checkpoint(folder)
    calibration = Calibration(checkpoint.static(), checkpoint.architecture, TOKENS)
    full = dense.to_float32(checkpoint.layer(0))
    calibration.enter(full)
    random = torch.Generator().manual_seed(0)
    noisy = {}
    for linear in LINEARS:
        weight: Tensor = getattr(full, linear)
        noisy[linear] = weight + 0.05 * torch.randn(weight.shape, generator=random)
    replaced = LayerTensors(norms=full.norms, biases=full.biases, **noisy)
    x = dense.embed(checkpoint.static(), TOKENS)
    before, after = inputs_of(full, x, folder), inputs_of(replaced, x, folder)
    inputs = calibration.inputs()
    for linear in LINEARS:
        seen = inputs.of(linear)
        inputs.replace(linear, noisy[linear])
        a, b = before[linear], after[linear]
        torch.testing.assert_close(seen.moments, b.t() @ b / len(b), atol=1e-3, rtol=1e-3)
        assert (seen.drift is None) == (linear == "qkv")
        if seen.drift is not None:
            torch.testing.assert_close(seen.drift, (a - b).t() @ b / len(b), atol=1e-3, rtol=1e-3)
            assert float((a - b).norm() / a.norm()) > 0.01


@torch.inference_mode()
def test_moments_of_wide_linears_are_whole() -> None:
    checkpoint = open_checkpoint("demo")  # 768 inputs of down: more than are computed at once
    calibration = Calibration(checkpoint.static(), checkpoint.architecture, TOKENS[:2])
    full = dense.to_float32(checkpoint.layer(0))
    calibration.enter(full)
    x = inputs_of(full, dense.embed(checkpoint.static(), TOKENS[:2]), "demo")["down"]
    exact = x.t() @ x / len(x)
    torch.testing.assert_close(calibration.moments()["down"], exact, atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_an_output_error_is_relative_to_what_the_layer_adds(
    tiny_model: Callable[[str], Path],
) -> None:
    checkpoint = open_checkpoint(str(tiny_model("llama")))
    arch = checkpoint.architecture
    calibration = Calibration(checkpoint.static(), arch, TOKENS)
    full, other = (dense.to_float32(checkpoint.layer(i)) for i in (0, 1))
    calibration.enter(full)
    assert calibration.output_error(full) == 0
    x = dense.embed(checkpoint.static(), TOKENS)
    exact, ours = (
        dense.decoder_layer(x, layer, arch, dense.rotation(arch, 100)) for layer in (full, other)
    )
    expected = float((ours - exact).norm() / (exact - x).norm())
    assert calibration.output_error(other) == pytest.approx(expected, rel=1e-4)


@torch.inference_mode()
def test_states_that_are_not_finite_are_refused(tiny_model: Callable[[str], Path]) -> None:
    checkpoint = open_checkpoint(str(tiny_model("llama")))
    static = checkpoint.static()
    static.embedding[int(TOKENS[0, 0])] = float("nan")
    calibration = Calibration(static, checkpoint.architecture, TOKENS)
    with pytest.raises(BadCheckpoint, match="what enters layer 0 is not finite"):
        calibration.enter(dense.to_float32(checkpoint.layer(0)))
