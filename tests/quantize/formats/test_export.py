"""An export is a GPTQ checkpoint that holds the bundle's layers and the model's other tensors."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from morphserve.configs.errors import MorphError
from morphserve.morphcli.app import app
from morphserve.quantize.build import QuantizeSettings, build_bundle
from morphserve.quantize.bundle import Bundle, open_bundle
from morphserve.quantize.checkpoint import open_checkpoint
from morphserve.quantize.formats.export import export_gptq
from morphserve.quantize.formats.source import open_quantized
from morphserve.quantize.manifest import Variant
from morphserve.quantize.weights import LayerTensors, QuantizedWeight

VALUES = ("codes", "scales", "zeros", "input_order")


def load_export(folder: Path) -> dict[str, Tensor]:
    """Every tensor, found as programs find it: by the index."""
    index = json.loads((folder / "model.safetensors.index.json").read_text("utf-8"))
    weight_map: dict[str, str] = index["weight_map"]
    shards = {name: load_file(folder / name) for name in set(weight_map.values())}
    tensors = {name: shards[shard][name] for name, shard in weight_map.items()}
    assert sum(map(len, shards.values())) == len(tensors)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    return tensors


def settings_of(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    settings: dict[str, Any] = config["quantization_config"]
    assert json.loads((folder / "quantize_config.json").read_text("utf-8")) == settings
    return settings


def same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a, b)


def assert_same_layer(a: LayerTensors[QuantizedWeight], b: LayerTensors[QuantizedWeight]) -> None:
    for name in ("qkv", "o", "gate_up", "down"):
        for value in VALUES:
            assert same(getattr(getattr(a, name), value), getattr(getattr(b, name), value))
        assert same(getattr(a.biases, name), getattr(b.biases, name))
    for norm in ("input", "post_attention", "q", "k"):
        assert same(getattr(a.norms, norm), getattr(b.norms, norm))


def test_every_layer_is_read_back_as_it_is_in_the_bundle(
    family: str,
    tiny_model: Callable[[str], Path],
    tiny_bundle: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    checkpoint = open_checkpoint(str(tiny_model(family)))
    bundle = open_bundle(str(tiny_bundle(family)), checkpoint)
    told: list[int] = []
    num_bytes = export_gptq(bundle, checkpoint, tmp_path / "out", told.append)
    assert told == [0, 1, 2]
    assert num_bytes == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    source = open_quantized(str(tmp_path / "out"), checkpoint)
    for i in range(3):
        assert_same_layer(source.layer(i), bundle.layer(i))


def test_symmetric_linears_are_written_as_version_1_describes_them(
    tiny_model: Callable[[str], Path], tiny_bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(tiny_model("llama")))
    bundle = open_bundle(str(tiny_bundle("llama")), checkpoint)
    export_gptq(bundle, checkpoint, tmp_path / "out")
    tensors, settings = load_export(tmp_path / "out"), settings_of(tmp_path / "out")
    assert settings["checkpoint_format"] == "gptq" and settings["quant_method"] == "gptq"
    assert (settings["bits"], settings["group_size"]) == (4, 32)
    assert settings["sym"] and not settings["desc_act"]
    up = "model.layers.1.mlp.up_proj"  # the second half of the fused rows
    assert (tensors[f"{up}.qzeros"] == 0x77777777).all()  # 8 less one
    assert tensors[f"{up}.g_idx"].tolist() == [i // 32 for i in range(64)]
    codes, words = bundle.layer(1).gate_up.codes[128:], tensors[f"{up}.qweight"].tolist()
    for inputs, outputs in ((0, 0), (7, 5), (8, 127), (63, 64)):
        assert words[inputs // 8][outputs] >> 4 * (inputs % 8) & 15 == codes[outputs, inputs]
    assert torch.equal(tensors[f"{up}.scales"].t(), bundle.layer(1).gate_up.scales[128:])


def test_what_is_never_swapped_comes_from_the_model(
    family: str,
    tiny_model: Callable[[str], Path],
    tiny_bundle: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    model = tiny_model(family)
    checkpoint = open_checkpoint(str(model))
    export_gptq(open_bundle(str(tiny_bundle(family)), checkpoint), checkpoint, tmp_path / "out")
    found, given = load_export(tmp_path / "out"), load_file(model / "model.safetensors")
    for name in given:
        if ".layers." not in name:
            assert torch.equal(found[name], given[name])
    assert {n for n in found if ".layers." not in n} == {n for n in given if ".layers." not in n}
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
        model / "tokenizer.json"
    ).read_bytes()


def test_asymmetric_layers_are_written_as_version_2(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(tiny_model("llama")))
    settings = QuantizeSettings("rtn", 32, symmetric=False)
    build_bundle(checkpoint, tmp_path / "bundle", settings)
    bundle = open_bundle(str(tmp_path / "bundle"), checkpoint)
    export_gptq(bundle, checkpoint, tmp_path / "out")
    assert settings_of(tmp_path / "out")["checkpoint_format"] == "gptq_v2"
    assert not settings_of(tmp_path / "out")["sym"]
    source = open_quantized(str(tmp_path / "out"), checkpoint)
    assert_same_layer(source.layer(2), bundle.layer(2))
    zeros = bundle.layer(0).o.zeros
    assert zeros is not None
    word = int(load_export(tmp_path / "out")["model.layers.0.self_attn.o_proj.qzeros"][1, 2])
    assert [word >> 4 * i & 15 for i in range(8)] == zeros[16:24, 1].tolist()


class Reordered(Bundle):
    """A bundle whose inputs are out of order, as in layers that came from desc_act."""

    order_of = torch.randperm(64, generator=torch.Generator().manual_seed(0))

    def layer(self, i: int, variant: Variant = Variant.INT4) -> LayerTensors[QuantizedWeight]:
        layer = super().layer(i, variant)
        return replace(layer, o=replace(layer.o, input_order=self.order_of))


def test_inputs_out_of_order_keep_their_groups(
    tiny_model: Callable[[str], Path], tiny_bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(tiny_model("llama")))
    opened = open_bundle(str(tiny_bundle("llama")), checkpoint)
    export_gptq(Reordered(opened.path, opened.manifest), checkpoint, tmp_path / "out")
    assert settings_of(tmp_path / "out")["desc_act"]
    tensors, weight = load_export(tmp_path / "out"), opened.layer(0).o
    group_of = tensors["model.layers.0.self_attn.o_proj.g_idx"]
    words = tensors["model.layers.0.self_attn.o_proj.qweight"].tolist()
    for column, source in enumerate(Reordered.order_of.tolist()):
        assert group_of[source] == column // 32
        assert words[source // 8][3] >> 4 * (source % 8) & 15 == weight.codes[3, column]


def test_a_folder_with_something_in_it_is_left_alone(
    tiny_model: Callable[[str], Path], tiny_bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(tiny_model("llama")))
    bundle = open_bundle(str(tiny_bundle("llama")), checkpoint)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(MorphError, match="choose another --output"):
        export_gptq(bundle, checkpoint, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_an_export_that_fails_leaves_nothing(
    tiny_model: Callable[[str], Path], tiny_bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(tiny_model("llama")))
    folder = shutil.copytree(tiny_bundle("llama"), tmp_path / "bundle")
    bundle = open_bundle(str(folder), checkpoint)
    damaged = folder / "layer-00002.int4.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x01")
    with pytest.raises(MorphError, match="damaged"):
        export_gptq(bundle, checkpoint, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_an_unfinished_build_beside_the_target_is_left_alone(
    tiny_model: Callable[[str], Path], tiny_bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(tiny_model("llama")))
    begun = tmp_path / ".out.partial" / "layer-00000.int4.safetensors"
    begun.parent.mkdir()
    begun.write_text("hours of work")
    export_gptq(open_bundle(str(tiny_bundle("llama")), checkpoint), checkpoint, tmp_path / "out")
    assert begun.read_text() == "hours of work"
    assert {path.name for path in tmp_path.iterdir()} == {".out.partial", "out"}


def test_the_target_may_be_the_empty_folder_one_is_in(
    tiny_model: Callable[[str], Path],
    tiny_bundle: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint = open_checkpoint(str(tiny_model("llama")))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    export_gptq(open_bundle(str(tiny_bundle("llama")), checkpoint), checkpoint, Path("."))
    assert load_export(tmp_path / "here")


def test_places_that_cannot_be_looked_at_are_errors_of_the_user(
    tiny_model: Callable[[str], Path],
    tiny_bundle: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    checkpoint = open_checkpoint(str(tiny_model("llama")))
    bundle = open_bundle(str(tiny_bundle("llama")), checkpoint)
    for target in (tmp_path / ("x" * 300), tmp_path / ("x" * 300) / "out", Path("/")):
        with pytest.raises(MorphError):
            export_gptq(bundle, checkpoint, target)


def test_the_command_says_what_it_wrote(
    tiny_model: Callable[[str], Path], tiny_bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    arguments = ["export", str(tiny_bundle("llama")), str(tiny_model("llama"))]
    told = CliRunner().invoke(app, [*arguments, "-o", str(tmp_path / "a"), "--json"])
    report = msgspec.json.decode(told.stdout)
    assert (report["format"], report["num_layers"]) == ("gptq", 3)
    assert report["num_bytes"] == sum(p.stat().st_size for p in (tmp_path / "a").iterdir())
    told = CliRunner().invoke(app, [*arguments, "-o", str(tmp_path / "b")])
    assert f"wrote {tmp_path / 'b'}: 3 INT4 layers as gptq" in told.stdout
    assert "vllm" not in told.stdout
