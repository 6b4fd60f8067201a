"""A folder of another tool is read whole and made for the model, or refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_model import write_plain_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from morphserve.configs.errors import MorphError
from morphserve.quantize.build import QuantizeSettings, build_bundle
from morphserve.quantize.checkpoint import Checkpoint, open_checkpoint
from morphserve.quantize.formats.source import QuantizedSource, open_quantized
from morphserve.quantize.workspace import Interrupted

DATA = Path(__file__).parent / "data"
LAYER = "model.layers.0."
Tensors = dict[str, Tensor]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The model with two key and value heads that the libraries quantised."""
    write_plain_model(tmp_path / "model", 2)
    return tmp_path / "model"


@pytest.fixture
def checkpoint(model: Path) -> Checkpoint:
    return open_checkpoint(str(model))


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a library's folder that may be changed."""

    def copy(name: str) -> Path:
        return shutil.copytree(DATA / name, tmp_path / name)

    return copy


def change_tensors(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")


def change_config(folder: Path, **values: Any) -> None:
    """Sets what the config says about quantisation."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["quantization_config"] |= values
    (folder / "config.json").write_text(json.dumps(config), "utf-8")


def refusal(folder: Path, checkpoint: Checkpoint) -> str:
    with pytest.raises(MorphError) as caught:
        open_quantized(str(folder), checkpoint).layer(0)
    assert folder.name in str(caught.value)
    return str(caught.value)


def same_layer(a: QuantizedSource, b: QuantizedSource) -> bool:
    one, other = a.layer(0).qkv, b.layer(0).qkv
    return torch.equal(one.codes, other.codes) and torch.equal(one.scales, other.scales)


def test_awq_of_a_model_with_a_value_head_per_query_head_is_refused(tmp_path: Path) -> None:
    """The library folded scales from the output projection into values."""
    write_plain_model(tmp_path / "model", 4)
    text = refusal(DATA / "awq-mha", open_checkpoint(str(tmp_path / "model")))
    assert "layer 0" in text and "keys or values" in text and "KV cache" in text


@pytest.mark.parametrize(
    "name,method",
    [
        ("gptq-v1-order", "gptq"),
        ("awq-gqa", "awq"),
        ("compressed-channel", "compressed-tensors"),
    ],
)
def test_the_bundle_is_told_where_layers_come_from(
    name: str, method: str, checkpoint: Checkpoint
) -> None:
    how = open_quantized(str(DATA / name), checkpoint).quantization
    assert (how.method, how.bits, how.source) == ("imported", 4, f"{name} ({method})")
    assert how.group_size == (0 if name == "compressed-channel" else 32)
    assert how.symmetric == (name != "awq-gqa")
    assert how.act_order == (name == "gptq-v1-order")


def test_layers_of_another_model_of_the_same_shapes_are_refused(model: Path) -> None:
    change_tensors(model, lambda t: t[f"{LAYER}mlp.down_proj.weight"].neg_())
    text = refusal(DATA / "gptq-v1", open_checkpoint(str(model)))
    assert "cosine" in text and f"quantised from {model}" in text


def test_models_of_other_shapes_are_refused_before_a_layer_is_read(tmp_path: Path) -> None:
    write_plain_model(tmp_path / "model", 4)
    with pytest.raises(MorphError, match="num_kv_heads is 2, not 4"):
        open_quantized(str(DATA / "gptq-v1"), open_checkpoint(str(tmp_path / "model")))


def test_layers_may_be_asked_for_in_any_order(tmp_path: Path) -> None:
    write_plain_model(tmp_path / "model", 2, num_layers=3)
    base = load_file(tmp_path / "model" / "model.safetensors")
    folder = shutil.copytree(DATA / "compressed-group", tmp_path / "source")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}), "utf-8")

    def repeat(tensors: Tensors) -> None:
        for name, tensor in list(tensors.items()):
            for i in (1, 2):
                tensors[name.replace(".0.", f".{i}.")] = tensor.clone()

    change_tensors(folder, repeat)
    for name in [name for name in base if name.startswith(LAYER)]:
        for i in (1, 2):
            base[name.replace(".0.", f".{i}.")] = base[name].clone()
    save_file(base, tmp_path / "model" / "model.safetensors")
    source = open_quantized(str(folder), open_checkpoint(str(tmp_path / "model")))
    codes = [source.layer(i).o.codes for i in (2, 0, 1)]
    assert torch.equal(codes[0], codes[1]) and torch.equal(codes[1], codes[2])


def test_old_folders_with_a_config_and_a_file_of_their_own_names(
    copied: Callable[[str], Path], checkpoint: Checkpoint
) -> None:
    folder = copied("gptq-v1")
    (folder / "model.safetensors").rename(folder / "gptq_model-4bit-32g.safetensors")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    settings = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    del settings["quant_method"]
    (folder / "quantize_config.json").write_text(json.dumps(settings), "utf-8")
    library = open_quantized(str(DATA / "gptq-v1"), checkpoint)
    assert same_layer(open_quantized(str(folder), checkpoint), library)


@pytest.mark.parametrize("name", ["model", "gptq_model-4bit-32g"])
def test_sharded_folders_are_read(
    name: str, copied: Callable[[str], Path], checkpoint: Checkpoint
) -> None:
    folder = copied("gptq-v1")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i, tensor in enumerate(tensors):
        weight_map[tensor] = f"{name}-{i % 2}.safetensors"
    for shard in set(weight_map.values()):
        own = {key: tensor for key, tensor in tensors.items() if weight_map[key] == shard}
        save_file(own, folder / shard)
    index = {"weight_map": weight_map}
    (folder / f"{name}.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    library = open_quantized(str(DATA / "gptq-v1"), checkpoint)
    assert same_layer(open_quantized(str(folder), checkpoint), library)


def test_biases_of_zero_that_the_model_does_not_have_are_passed_over(
    copied: Callable[[str], Path], checkpoint: Checkpoint
) -> None:
    folder = copied("gptq-v1")
    change_tensors(folder, lambda t: t.update({f"{LAYER}mlp.up_proj.bias": torch.zeros(128)}))
    assert open_quantized(str(folder), checkpoint).layer(0).biases.gate_up is None
    change_tensors(folder, lambda t: t[f"{LAYER}mlp.up_proj.bias"].fill_(0.5))
    assert "mlp.up_proj.bias" in refusal(folder, checkpoint)


CONFIGS: list[tuple[str, dict[str, Any], str]] = [
    ("gptq-v1", {"bits": 3}, "3 bits"),
    ("gptq-v1", {"bits": "4"}, "whole number"),
    ("gptq-v1", {"group_size": 0}, "group size is 0"),
    ("gptq-v1", {"group_size": 48}, "48 do not fill the 64 inputs"),
    ("gptq-v1", {"group_size": 64}, "one group size"),
    ("gptq-v1", {"bits": 8}, "one number of bits"),
    ("gptq-v1", {"checkpoint_format": "marlin"}, "'marlin'"),
    ("gptq-v1", {"is_marlin_format": True}, "checkpoint_format"),
    ("gptq-v1", {"pack_dtype": "int64"}, "int64"),
    ("gptq-v1", {"rotation": "hadamard"}, "rotation"),
    ("gptq-v1", {"quant_method": "bitsandbytes"}, "'bitsandbytes'"),
    ("gptq-v1", {"quant_method": None}, "choose one of gptq, awq, compressed-tensors"),
    ("gptq-v1-asymmetric", {"sym": True}, "zeros differ from 8"),
    ("gptq-v1", {"sym": "yes"}, "true or false"),
    ("awq-gqa", {"version": "gemv"}, "only gemm"),
    ("awq-gqa", {"bits": 8}, "8 bits"),
    ("awq-gqa", {"zero_point": False}, "zeros differ from 8"),
    ("compressed-group", {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
    ("compressed-group", {"transform_config": {"config_groups": {"u": {}}}}, "transform_config"),
    ("compressed-group", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse"),
    ("compressed-group", {"config_groups": {}}, "no config_groups"),
    ("compressed-group", {"config_groups": {"group_0": None}}, "is not read"),
]


@pytest.mark.parametrize("name,values,words", CONFIGS)
def test_settings_that_are_not_read_are_named(
    name: str,
    values: dict[str, Any],
    words: str,
    copied: Callable[[str], Path],
    checkpoint: Checkpoint,
) -> None:
    folder = copied(name)
    change_config(folder, **values)
    assert words in refusal(folder, checkpoint)


SCHEMES: list[tuple[dict[str, Any], str]] = [
    ({"format": "nvfp4-pack-quantized"}, "nvfp4-pack-quantized"),
    ({"input_activations": {"num_bits": 8}}, "input_activations"),
    ({"weights": {"num_bits": 4, "type": "float", "strategy": "group"}}, "'float'"),
    ({"weights": {"num_bits": 4, "strategy": "tensor"}}, "'tensor'"),
    ({"weights": {"num_bits": 4, "strategy": "group"}}, "group_size"),
]


@pytest.mark.parametrize("values,words", SCHEMES)
def test_schemes_that_are_not_read_are_named(
    values: dict[str, Any], words: str, copied: Callable[[str], Path], checkpoint: Checkpoint
) -> None:
    folder = copied("compressed-group")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    groups = config["quantization_config"]["config_groups"]
    change_config(folder, config_groups={"group_0": groups["group_0"] | values})
    assert words in refusal(folder, checkpoint)
    one, other = {"num_bits": 4, "strategy": "channel"}, {"num_bits": 8, "strategy": "channel"}
    change_config(folder, config_groups={"a": {"weights": one}, "b": {"weights": other}})
    assert "differ" in refusal(folder, checkpoint)


def as_plain(tensors: Tensors) -> None:
    for end in ("qweight", "qzeros", "scales", "g_idx"):
        del tensors[f"{LAYER}self_attn.q_proj.{end}"]
    tensors[f"{LAYER}self_attn.q_proj.weight"] = torch.zeros(64, 64)


def as_fused(tensors: Tensors) -> None:
    for name in list(tensors):
        if "q_proj" in name:
            tensors[name.replace("q_proj", "qkv_proj")] = tensors.pop(name)
        elif "k_proj" in name or "v_proj" in name:
            del tensors[name]


def reverse_groups(tensors: Tensors) -> None:
    name = f"{LAYER}self_attn.k_proj.g_idx"
    tensors[name] = 1 - tensors[name]


CHANGES: list[tuple[Callable[[Tensors], object], str]] = [
    (lambda t: t.pop(f"{LAYER}mlp.down_proj.scales"), "lacks model.layers.0.mlp.down_proj.scales"),
    (lambda t: t.pop(f"{LAYER}self_attn.q_proj.g_idx"), "self_attn.q_proj.g_idx"),
    (lambda t: t.pop(f"{LAYER}input_layernorm.weight"), "input_layernorm.weight"),
    (as_plain, "left at full precision"),
    (as_fused, "self_attn.qkv_proj fused"),
    (lambda t: t.update({f"{LAYER}self_attn.k_scale": torch.ones(1)}), "self_attn.k_scale"),
    (
        lambda t: t.update({f"{LAYER}mlp.up_proj.qzeros": torch.zeros(2, 16)}),
        "float32, not torch.int32",
    ),
    (
        lambda t: t.update({f"{LAYER}mlp.up_proj.scales": torch.ones(2, 64)}),
        "has shape [2, 64], but its config asks for [2, 128]",
    ),
    (lambda t: t[f"{LAYER}mlp.up_proj.scales"].fill_(torch.inf), "not finite"),
    (
        lambda t: t.update({f"{LAYER}mlp.up_proj.scales": torch.full((2, 128), 1e5)}),
        "not finite in float16",
    ),
    (lambda t: t[f"{LAYER}input_layernorm.weight"].fill_(torch.nan), "not finite"),
    (lambda t: t[f"{LAYER}mlp.up_proj.g_idx"].fill_(0), "different numbers of inputs"),
    (lambda t: t[f"{LAYER}mlp.up_proj.g_idx"].add_(1), "not among its 2"),
    (reverse_groups, "different orders (g_idx)"),
]


@pytest.mark.parametrize("change,words", CHANGES)
def test_tensors_that_do_not_fit_are_named(
    change: Callable[[Tensors], object],
    words: str,
    copied: Callable[[str], Path],
    checkpoint: Checkpoint,
) -> None:
    folder = copied("gptq-v1-order")
    change_tensors(folder, change)
    assert words in refusal(folder, checkpoint)


def test_full_precision_and_missing_folders_are_told_apart(
    tmp_path: Path, checkpoint: Checkpoint
) -> None:
    with pytest.raises(MorphError, match="is not quantised"):
        open_quantized(str(checkpoint.path), checkpoint)
    with pytest.raises(MorphError, match="there is no folder"):
        open_quantized(str(tmp_path / "nowhere"), checkpoint)


def test_an_import_is_not_resumed_from_other_layers_of_the_same_name(
    checkpoint: Checkpoint, copied: Callable[[str], Path], tmp_path: Path
) -> None:
    def build(on_layer: Callable[[int], None] = lambda _: None) -> None:
        source = open_quantized(str(folder), checkpoint)
        target = tmp_path / "bundle"
        options: Any = {"resume": True, "on_layer": on_layer, "imported": source}
        build_bundle(checkpoint, target, QuantizeSettings(), **options)

    def stop(_: int) -> None:
        raise KeyboardInterrupt

    folder = copied("gptq-v1")
    scales = load_file(folder / "model.safetensors")[f"{LAYER}mlp.up_proj.scales"]
    with pytest.raises(Interrupted):
        build(stop)
    change_tensors(folder, lambda t: t[f"{LAYER}mlp.up_proj.scales"].mul_(1.01))
    with pytest.raises(MorphError, match="int4 layers have source_sha256 .* instead of .*--force"):
        build()
    change_tensors(folder, lambda t: t[f"{LAYER}mlp.up_proj.scales"].copy_(scales))
    build()


def test_settings_are_part_of_what_tells_a_source(
    checkpoint: Checkpoint, copied: Callable[[str], Path]
) -> None:
    folder = copied("gptq-v1")
    before = open_quantized(str(folder), checkpoint).quantization.source_sha256
    assert open_quantized(str(folder), checkpoint).quantization.source_sha256 == before
    change_config(folder, checkpoint_format="gptq_v2")
    assert open_quantized(str(folder), checkpoint).quantization.source_sha256 != before
