"""Bundles of every method: what is in them, and that the same build makes the same bytes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from morphserve.configs.errors import ConfigError
from morphserve.quantize import dense
from morphserve.quantize.build import QuantizeSettings, build_bundle
from morphserve.quantize.bundle import Bundle, open_bundle
from morphserve.quantize.calibration import Windows
from morphserve.quantize.checkpoint import BadCheckpoint, open_checkpoint
from morphserve.quantize.manifest import Quantization, TextSample, Variant
from morphserve.quantize.rounding import Grid, dequantize, quantize_rtn
from morphserve.quantize.weights import LayerTensors, QuantizedWeight

RANDOM = torch.Generator().manual_seed(1)
WINDOWS = Windows(
    TextSample("text", "0" * 64, 24, 64, 0), torch.randint(0, 256, (24, 64), generator=RANDOM)
)
METHODS = [
    QuantizeSettings("rtn", 32, int8=True),
    QuantizeSettings("gptq", 32),
    QuantizeSettings("gptq", 64, symmetric=False, act_order=False),
    QuantizeSettings("awq", 32, symmetric=False),
]


def build(model: Path, target: Path, settings: QuantizeSettings, **how: object) -> Bundle:
    checkpoint = open_checkpoint(str(model))
    build_bundle(checkpoint, target, settings, WINDOWS, **how)  # type: ignore[arg-type]
    return open_bundle(str(target), checkpoint)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def output_errors(bundle: Bundle) -> list[float]:
    errors = [file.output_error for file in bundle.manifest.variants[Variant.INT4].layers]
    assert None not in errors
    return [error for error in errors if error is not None]


@pytest.mark.parametrize("settings", METHODS)
def test_a_bundle_says_how_it_was_made_and_how_well(
    settings: QuantizeSettings, family: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    bundle = build(tiny_model(family), tmp_path / "b", settings)
    how = bundle.manifest.variants[Variant.INT4].quantization
    assert (how.method, how.group_size, how.symmetric) == (
        settings.method,
        settings.group_size,
        settings.symmetric,
    )
    assert how.calibration == WINDOWS.sample
    assert how.act_order == (settings.method == "gptq" and settings.act_order)
    assert all(0.01 < error < 0.35 for error in output_errors(bundle))
    assert (Variant.INT8 in bundle.manifest.variants) == settings.int8


def test_errors_are_those_of_the_layers_that_are_stored(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    bundle = build(tiny_model("llama"), tmp_path / "b", METHODS[0])
    checkpoint = open_checkpoint(str(tiny_model("llama")))
    arch, cos_sin = checkpoint.architecture, dense.rotation(checkpoint.architecture, 64)
    x = dense.embed(checkpoint.static(), WINDOWS.tokens)
    for i in range(arch.num_layers):
        full = dense.to_float32(checkpoint.layer(i))
        exact = dense.decoder_layer(x, full, arch, cos_sin)
        for variant, files in bundle.manifest.variants.items():
            ours = dense.quantized_to_float32(bundle.layer(i, variant))
            weights, others = (
                torch.cat([getattr(layer, linear).flatten() for linear in dense.LINEARS])
                for layer in (full, ours)
            )
            error = dense.decoder_layer(x, ours, arch, cos_sin) - exact
            file = files.layers[i]
            expected = float((others - weights).norm() / weights.norm())
            assert file.weight_error == pytest.approx(expected, rel=1e-3)
            expected = float(error.norm() / (exact - x).norm())
            assert file.output_error == pytest.approx(expected, rel=1e-3)
        x = exact


def test_gptq_changes_outputs_less_than_rounding_and_corrects_within_the_layer(
    family: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """On text of few tokens, whose inputs are correlated."""
    few = replace(WINDOWS, tokens=WINDOWS.tokens % 16)
    errors = {}
    for method in ("rtn", "gptq"):
        checkpoint = open_checkpoint(str(tiny_model(family)))
        target = tmp_path / method
        build_bundle(checkpoint, target, QuantizeSettings(method, 32), few)
        errors[method] = output_errors(open_bundle(str(target), checkpoint))
    assert all(a < 0.8 * b for a, b in zip(errors["gptq"], errors["rtn"], strict=True))


@pytest.mark.parametrize("settings", METHODS)
def test_the_same_build_makes_the_same_bytes_also_resumed(
    settings: QuantizeSettings, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    class Stopped(Exception):
        pass

    def stop(layer: int) -> None:
        if layer == 1:
            raise Stopped

    model = tiny_model("llama-mha-bias")
    build(model, tmp_path / "whole", settings)
    with pytest.raises(Stopped):
        build(model, tmp_path / "stopped", settings, on_layer=stop)
    assert not (tmp_path / "stopped").exists()
    done: list[int] = []
    build(model, tmp_path / "stopped", settings, resume=True, on_layer=done.append)
    assert done == [1, 2]  # what was finished is told first
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


@pytest.mark.parametrize("settings", METHODS)
def test_norms_and_biases_keep_the_dtypes_of_the_checkpoint(
    settings: QuantizeSettings, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model = in_bfloat16(tiny_model("llama-mha-bias"), tmp_path / "model")
    bundle = build(model, tmp_path / "b", settings)
    layer, full = bundle.layer(1), open_checkpoint(str(model)).layer(1)
    vectors = (
        layer.norms.input,
        layer.norms.post_attention,
        layer.biases.qkv,
        layer.biases.gate_up,
    )
    assert all(vector is not None and vector.dtype == torch.bfloat16 for vector in vectors)
    assert torch.equal(layer.norms.input, full.norms.input) == (settings.method != "awq")
    assert layer.biases.down is not None and full.biases.down is not None
    assert torch.equal(layer.biases.down, full.biases.down)


def in_bfloat16(model: Path, copy: Path) -> Path:
    copy.mkdir()
    (copy / "config.json").write_text((model / "config.json").read_text())
    tensors = load_file(model / "model.safetensors")
    save_file({k: v.bfloat16() for k, v in tensors.items()}, copy / "model.safetensors")
    return copy


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_methods_that_need_text_say_so(
    method: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(tiny_model("llama")))
    with pytest.raises(ConfigError, match=f"{method} needs calibration text: .* or choose rtn"):
        build_bundle(checkpoint, tmp_path / "b", QuantizeSettings(method, 32))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (QuantizeSettings("gguf", 32), "no method 'gguf': choose one of rtn, gptq, awq"),
        (QuantizeSettings("rtn", 48), "must be a power of two"),
        (QuantizeSettings("rtn", 128), "does not divide the 64 inputs"),
        (QuantizeSettings("rtn", 32, device="cuda:77"), "device 'cuda:77' cannot be used: "),
        (QuantizeSettings("rtn", 32, device="sofa"), "device 'sofa' cannot be used: choose cpu"),
        (QuantizeSettings("rtn", 32, device="meta"), "device 'meta' cannot be used: choose cpu"),
    ],
)
def test_what_cannot_be_built_is_refused_before_anything_is_written(
    settings: QuantizeSettings, reason: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(tiny_model("llama")))
    with pytest.raises(ConfigError, match=reason):
        build_bundle(checkpoint, tmp_path / "b", settings, WINDOWS)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_finite_are_refused_by_name(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model = in_bfloat16(tiny_model("llama"), tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 4] = torch.inf
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(BadCheckpoint, match="layer 2 of .*model has weights that are not finite"):
        build(model, tmp_path / "b", METHODS[0])


class Elsewhere:
    """Layers rounded with an order of inputs, as another tool may have made them."""

    def __init__(self, model: Path, bits: int = 4, group_size: int = 32) -> None:
        self._checkpoint = open_checkpoint(str(model))
        self._bits = bits
        self._group_size = group_size

    @property
    def quantization(self) -> Quantization:
        how = Quantization("imported", self._bits, self._group_size, symmetric=False)
        return msgspec.structs.replace(how, source="folder (gptq)")

    def layer(self, i: int) -> LayerTensors[QuantizedWeight]:
        full = self._checkpoint.layer(i)
        weights = {linear: self._rounded(getattr(full, linear)) for linear in dense.LINEARS}
        return LayerTensors(norms=full.norms, biases=full.biases, **weights)

    def _rounded(self, weight: Tensor) -> QuantizedWeight:
        order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(0))
        rounded = quantize_rtn(weight[:, order], Grid(self._bits, 32, symmetric=False))
        return replace(rounded, input_order=order)


@pytest.mark.parametrize("windows", [None, WINDOWS])
def test_imported_layers_are_written_as_they_are(
    windows: Windows | None, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint, source = open_checkpoint(str(tiny_model("qwen3"))), Elsewhere(tiny_model("qwen3"))
    settings = QuantizeSettings("gptq", 128, int8=True)  # of which only INT8 is used
    manifest = build_bundle(checkpoint, tmp_path / "b", settings, windows, imported=source)
    bundle = open_bundle(str(tmp_path / "b"), checkpoint)
    files = manifest.variants[Variant.INT4]
    assert files.quantization.source == "folder (gptq)"
    assert files.quantization.calibration == (windows.sample if windows else None)
    for i, file in enumerate(files.layers):
        error = size = 0.0
        for linear in dense.LINEARS:
            ours, theirs = getattr(bundle.layer(i), linear), getattr(source.layer(i), linear)
            assert torch.equal(dequantize(ours), dequantize(theirs))
            full = getattr(checkpoint.layer(i), linear).double()
            error += float((dequantize(ours) - full).square().sum())
            size += float(full.square().sum())
        assert file.weight_error == pytest.approx((error / size) ** 0.5, rel=1e-6)
        assert (file.output_error is None) == (windows is None)
    assert manifest.variants[Variant.INT8].quantization.method == "rtn"


@pytest.mark.parametrize(
    ("bits", "group_size", "reason"),
    [
        (8, 32, r"folder \(gptq\) has 8-bit weights"),
        (4, 16, r"folder \(gptq\) has groups of 16 inputs"),
        (4, 96, r"folder \(gptq\) has groups of 96 inputs"),
    ],
)
def test_imported_layers_must_be_such_as_can_be_served(
    bits: int, group_size: int, reason: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model = tiny_model("llama")
    source = Elsewhere(model, bits, group_size)
    with pytest.raises(ConfigError, match=reason):
        build_bundle(
            open_checkpoint(str(model)), tmp_path / "b", QuantizeSettings(), imported=source
        )
    assert list(tmp_path.iterdir()) == []
