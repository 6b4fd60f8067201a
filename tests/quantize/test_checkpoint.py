"""Checkpoints are read as they are, or refused with a sentence that names the fault."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from morphserve.configs.errors import MorphError
from morphserve.quantize.checkpoint import open_checkpoint

Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def folder(tiny_model: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the tiny Llama that may be changed."""
    return shutil.copytree(tiny_model("llama"), tmp_path / "model")


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return safetensors.torch.load((folder / "model.safetensors").read_bytes())


def store(folder: Path, tensors: dict[str, Tensor]) -> None:
    (folder / "model.safetensors").write_bytes(safetensors.torch.save(tensors))


def configure(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def shard(folder: Path) -> dict[str, str]:
    """Cuts the checkpoint into two files; returns the index's weight map."""
    tensors = tensors_of(folder)
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for part, chosen in (("a", names[::2]), ("b", names[1::2])):
        file = f"model-{part}.safetensors"
        (folder / file).write_bytes(safetensors.torch.save({n: tensors[n] for n in chosen}))
        weight_map |= dict.fromkeys(chosen, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return weight_map


def refusal(folder: Path) -> str:
    with pytest.raises(MorphError) as caught:
        open_checkpoint(str(folder))
    return str(caught.value)


def test_layers_are_fused_in_order(folder: Path) -> None:
    tensors = tensors_of(folder)
    layer = open_checkpoint(str(folder)).layer(1)
    q, k, v = (tensors[f"model.layers.1.self_attn.{p}_proj.weight"] for p in "qkv")
    assert torch.equal(layer.qkv, torch.cat((q, k, v)))
    gate, up = (tensors[f"model.layers.1.mlp.{p}_proj.weight"] for p in ("gate", "up"))
    assert torch.equal(layer.gate_up, torch.cat((gate, up)))
    assert torch.equal(layer.down, tensors["model.layers.1.mlp.down_proj.weight"])


def test_a_sharded_checkpoint_is_the_same_checkpoint(folder: Path) -> None:
    whole = open_checkpoint(str(folder)).fingerprint()
    shard(folder)
    assert open_checkpoint(str(folder)).fingerprint() == whole


def test_the_shipped_model_is_found_by_name() -> None:
    checkpoint = open_checkpoint("demo")
    static = checkpoint.static()
    assert static.head is static.embedding
    assert checkpoint.layer(0).qkv.dtype == torch.bfloat16
    assert checkpoint.layer_bytes(0) == 1_573_888


def test_the_fingerprint_tells_every_bit_and_the_maths_apart(folder: Path) -> None:
    fingerprints = {open_checkpoint(str(folder)).fingerprint()}
    tensors = tensors_of(folder)
    tensors[Q].view(torch.int32)[3, 5] ^= 1
    store(folder, tensors)
    fingerprints.add(open_checkpoint(str(folder)).fingerprint())
    configure(folder, rms_norm_eps=1e-3)
    fingerprints.add(open_checkpoint(str(folder)).fingerprint())
    assert len(fingerprints) == 3


def test_the_fingerprint_does_not_depend_on_what_was_read_before(folder: Path) -> None:
    read = open_checkpoint(str(folder))
    read.layer(2)
    read.static()
    configure(folder, eos_token_id=3)
    assert read.fingerprint() == open_checkpoint(str(folder)).fingerprint()


def test_old_rotary_tables_are_ignored_and_unknown_tensors_refused(folder: Path) -> None:
    tensors = tensors_of(folder)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    store(folder, tensors)
    open_checkpoint(str(folder))
    tensors["model.layers.0.self_attn.q_norm.weight"] = torch.ones(16)
    store(folder, tensors)
    assert "q_norm.weight, which a llama model does not use" in refusal(folder)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    assert "there is no model folder" in refusal(tmp_path / "none")


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pickled weights (pytorch_model.bin)" in refusal(folder)


def test_remote_code_and_quantised_checkpoints_are_refused(folder: Path) -> None:
    configure(folder, auto_map={"AutoModel": "x.Y"})
    assert "auto_map" in refusal(folder)
    configure(folder, auto_map=None, quantization_config={"quant_method": "gptq"})
    assert "quantised already (gptq)" in refusal(folder)


def test_missing_and_misshapen_tensors_are_named(folder: Path) -> None:
    tensors = tensors_of(folder)
    wrong = tensors | {Q: tensors[Q][:32].contiguous()}
    store(folder, wrong)
    assert f"tensor {Q}" in refusal(folder) and "[32, 64]" in refusal(folder)
    del wrong[Q]
    store(folder, wrong)
    assert f"lacks tensor {Q}" in refusal(folder)
    store(folder, tensors | {Q: tensors[Q].to(torch.int8)})
    assert "torch.int8" in refusal(folder)


def test_a_tensor_in_two_shards_is_refused(folder: Path) -> None:
    shard(folder)
    both = safetensors.torch.load((folder / "model-a.safetensors").read_bytes())
    both |= safetensors.torch.load((folder / "model-b.safetensors").read_bytes())
    (folder / "model-b.safetensors").write_bytes(safetensors.torch.save(both))
    assert "is in both" in refusal(folder)


def test_shards_must_lie_in_the_folder(folder: Path) -> None:
    weight_map = shard(folder)
    index = {"weight_map": weight_map | {Q: "../model-a.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "weight_map" in refusal(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model-b.safetensors").unlink()
    assert "cannot read" in refusal(folder) and "model-b.safetensors" in refusal(folder)


def test_a_truncated_file_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "truncated" in refusal(folder)


def test_a_head_that_differs_from_its_tied_embedding_is_refused(folder: Path) -> None:
    configure(folder, tie_word_embeddings=True)
    with pytest.raises(MorphError, match="ties the head"):
        open_checkpoint(str(folder)).static()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "gpt2"}, "model type 'gpt2' is not supported"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"num_key_value_heads": 3}, "4 attention heads cannot share 3"),
        ({"hidden_size": "wide"}, "wrong value"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope scaling 'yarn'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "lacks 'factor'"),
    ],
)
def test_a_config_that_cannot_be_served_is_refused(
    folder: Path, changes: dict[str, Any], reason: str
) -> None:
    configure(folder, **changes)
    assert reason in refusal(folder)


def test_broken_json_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    assert "config.json is not valid JSON" in refusal(folder)
    (folder / "config.json").unlink()
    assert "cannot read" in refusal(folder)
