"""A bundle's INT4 layers as a GPTQ checkpoint in the format that GPTQModel and vLLM read."""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from morphserve.configs.errors import ConfigError
from morphserve.configs.version import version
from morphserve.quantize import modules
from morphserve.quantize.architecture import Architecture
from morphserve.quantize.bundle import Bundle
from morphserve.quantize.checkpoint import Checkpoint, read_json
from morphserve.quantize.files import BadFile, encode_tensors, write_atomically
from morphserve.quantize.layer_file import named_tensors
from morphserve.quantize.manifest import Quantization, Variant
from morphserve.quantize.packing import pack_codes
from morphserve.quantize.weights import LayerTensors, QuantizedWeight

_COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def export_gptq(
    bundle: Bundle,
    checkpoint: Checkpoint,
    target: Path,
    on_layer: Callable[[int], None] = lambda _: None,
) -> int:
    """Writes a checkpoint whose decoder layers are the bundle's, and returns its bytes.

    Embedding, final norm and head are the full-precision checkpoint's. The folder appears at
    `target` when it is whole; one layer is in memory at a time, and each has its own file.
    Symmetric layers are written as GPTQ version 1, others as version 2 (`gptq_v2`), since readers
    of version 1 disagree about zeros of 0.
    """
    target = target.expanduser().resolve()
    try:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ConfigError(f"{target} exists and is not empty: choose another --output")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as place:
            folder = Path(place) / "export"  # with the rights of any new folder
            folder.mkdir()
            num_bytes = _write(folder, bundle, checkpoint, on_layer)
            folder.rename(target)
    except OSError as error:
        raise BadFile(f"cannot write {target}: {error.strerror}") from error
    return num_bytes


def _write(
    folder: Path, bundle: Bundle, checkpoint: Checkpoint, on_layer: Callable[[int], None]
) -> int:
    num_files, total, desc_act = checkpoint.architecture.num_layers + 1, 0, False
    weight_map: dict[str, str] = {}
    for i, tensors in enumerate(_files(bundle, checkpoint)):
        name = f"model-{i + 1:05d}-of-{num_files:05d}.safetensors"
        write_atomically(folder / name, encode_tensors(tensors))
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
        desc_act = desc_act or any(_out_of_order(n, t) for n, t in tensors.items())
        if i > 0:
            on_layer(i - 1)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)
    settings = _settings(bundle.manifest.variants[Variant.INT4].quantization, desc_act)
    _write_json(folder / "quantize_config.json", settings)
    _write_json(folder / "config.json", _config(checkpoint) | {"quantization_config": settings})
    for name in _COPIED:
        if (checkpoint.path / name).is_file():
            shutil.copyfile(checkpoint.path / name, folder / name)
    return sum(path.stat().st_size for path in folder.iterdir())


def _files(bundle: Bundle, checkpoint: Checkpoint) -> Iterator[dict[str, Tensor]]:
    """Tensors of one file after the other: what is never swapped, then each layer."""
    static = checkpoint.static()
    tensors = {modules.EMBEDDING: static.embedding, modules.FINAL_NORM: static.norm}
    if not checkpoint.architecture.tied_head:
        tensors[modules.HEAD] = static.head
    yield tensors
    del static, tensors
    how = bundle.manifest.variants[Variant.INT4].quantization
    for i in range(bundle.num_layers):
        yield _layer(i, bundle.layer(i), checkpoint.architecture, how.bits)


def _layer(
    i: int, layer: LayerTensors[QuantizedWeight], arch: Architecture, bits: int
) -> dict[str, Tensor]:
    tensors = named_tensors(layer, arch)
    for linear, (_, inputs) in modules.linear_shapes(arch).items():
        groups, outputs = tensors[f"{linear}.scales"].shape
        in_order = (torch.arange(inputs) // (inputs // groups)).int()
        tensors.setdefault(f"{linear}.g_idx", in_order)
        if f"{linear}.qzeros" not in tensors:  # symmetric: the middle code, less one
            zeros = torch.full((outputs, groups), (1 << bits - 1) - 1, dtype=torch.uint8)
            tensors[f"{linear}.qzeros"] = pack_codes(zeros, bits).t()
    return {modules.layer_prefix(i) + name: tensor for name, tensor in tensors.items()}


def _out_of_order(name: str, tensor: Tensor) -> bool:
    return name.endswith(".g_idx") and bool((tensor[1:] < tensor[:-1]).any())


def _settings(how: Quantization, desc_act: bool) -> dict[str, Any]:
    """What GPTQ readers want to know; `desc_act` means that inputs are out of order."""
    return {
        "bits": how.bits,
        "group_size": how.group_size or -1,
        "sym": how.symmetric,
        "desc_act": desc_act,
        "lm_head": False,
        "quant_method": "gptq",
        "checkpoint_format": "gptq" if how.symmetric else "gptq_v2",
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"morphserve:{version()}"], "method": how.method},
    }


def _config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The model's own; programs that run GPTQ know 16-bit activations only."""
    config = read_json(checkpoint.path / "config.json")
    if checkpoint.architecture.dtype == "float32":
        config |= {"dtype": "float16", "torch_dtype": "float16"}
    return config


def _write_json(path: Path, value: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(value, indent=2).encode() + b"\n")
