"""A folder that another tool wrote: its format, and whether its tensors fit the model."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from morphserve.quantize import modules
from morphserve.quantize.architecture import Architecture
from morphserve.quantize.checkpoint import Checkpoint, collect_entries, read_facts, read_json
from morphserve.quantize.files import TensorEntry, read_entries
from morphserve.quantize.formats.awq import read_awq
from morphserve.quantize.formats.compressed_tensors import read_compressed_tensors
from morphserve.quantize.formats.gptq import read_gptq
from morphserve.quantize.formats.stored import DTYPES, BadSource, Format, Part

_READERS: Mapping[str, Callable[[Mapping[str, Any]], Format]] = {
    "gptq": read_gptq,
    "awq": read_awq,
    "compressed-tensors": read_compressed_tensors,
}
_OWN_CONFIGS = {"quantize_config.json": "gptq", "quant_config.json": "awq"}  # of older tools
# Facts that two files of one model may spell differently without a difference in its layers.
_NOT_LAYERS = ("dtype", "eos_token_ids", "max_position", "tied_head")


def open_folder(folder: Path, checkpoint: Checkpoint) -> tuple[Format, Mapping[str, TensorEntry]]:
    """The folder's format and tensors, checked against the model by their shapes and names."""
    if not folder.is_dir():
        raise BadSource(f"there is no folder {folder}: give a quantised checkpoint's")
    config = read_json(folder / "config.json")
    stored_as = _read_format(folder, config)
    _check_same_model(folder, read_facts(folder, config, {}), checkpoint)
    entries = _collect(folder)
    for i in range(checkpoint.architecture.num_layers):
        _check_layer(folder, i, checkpoint.architecture, stored_as, entries)
    return stored_as, entries


def _read_format(folder: Path, config: Mapping[str, Any]) -> Format:
    method, settings = _quantization_config(folder, config)
    if method not in _READERS:
        raise BadSource(
            f"{folder} is quantised as {method!r}, which is not read: "
            f"choose one of {', '.join(_READERS)}"
        )
    try:
        return _READERS[method](settings)
    except (ValueError, TypeError, AttributeError) as error:
        raise BadSource(f"{folder} is a {method} checkpoint that is not read: {error}") from error


def _quantization_config(folder: Path, config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    if isinstance(settings := config.get("quantization_config"), dict):
        return str(settings.get("quant_method", "gptq")), settings
    for name, method in _OWN_CONFIGS.items():
        if (folder / name).exists():
            settings = read_json(folder / name)
            return str(settings.get("quant_method", method)), settings
    raise BadSource(
        f"{folder} is not quantised (its config.json has no quantization_config): give a GPTQ, "
        "AWQ or compressed-tensors checkpoint, or leave it to `morph quantize` to quantise it"
    )


def _check_same_model(folder: Path, found: Architecture, checkpoint: Checkpoint) -> None:
    ours, theirs = asdict(checkpoint.architecture), asdict(found)
    for fact, value in ours.items():
        if fact not in _NOT_LAYERS and theirs[fact] != value:
            raise BadSource(
                f"{folder} was quantised from another model than {checkpoint.path}: its {fact} is "
                f"{theirs[fact]}, not {value}"
            )


def _collect(folder: Path) -> Mapping[str, TensorEntry]:
    """auto-gptq names them after its settings: gptq_model-4bit-128g.safetensors, or its index."""
    files = sorted(folder.glob("*.safetensors"))
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if len(files) == 1 and not indices:
        return read_entries(files[0])
    return (
        collect_entries(folder, indices[0].name) if len(indices) == 1 else collect_entries(folder)
    )


def _check_layer(
    folder: Path, i: int, arch: Architecture, stored_as: Format, entries: Mapping[str, TensorEntry]
) -> None:
    """Every tensor that the layer needs is there in its shape, and no other one is."""
    prefix = modules.layer_prefix(i)
    wanted = {name: Part(shape, "floats") for name, shape in modules.vector_shapes(arch).items()}
    try:
        for linear, (outputs, inputs) in modules.linear_shapes(arch).items():
            parts = stored_as.parts(outputs, inputs)
            wanted |= {f"{linear}.{end}": part for end, part in parts.items()}
            bias = Part((outputs,), "floats", optional=True)
            wanted.setdefault(f"{linear}.bias", bias)
    except ValueError as error:
        raise BadSource(f"{folder} cannot be read: {error}") from error
    found = {name.removeprefix(prefix): e for name, e in entries.items() if name.startswith(prefix)}
    for fault in _faults(prefix, wanted, found):
        raise BadSource(f"{folder} cannot be read: {fault}")


def _faults(
    prefix: str, wanted: Mapping[str, Part], found: Mapping[str, TensorEntry]
) -> Iterator[str]:
    for name, part in wanted.items():
        if name not in found:
            if not part.optional:
                yield f"it lacks {prefix}{name}{_instead(name, found)}"
            continue
        entry = found[name]
        if entry.shape != part.shape:
            yield (
                f"{prefix}{name} has shape {list(entry.shape)}, but its config asks for "
                f"{list(part.shape)}; all decoder linears must share one number of bits and one "
                "group size"
            )
        if entry.dtype not in DTYPES[part.kind]:
            yield f"{prefix}{name} is {entry.dtype}, not {DTYPES[part.kind][0]}"
    for name in found.keys() - wanted.keys():
        if not name.endswith("rotary_emb.inv_freq"):
            yield f"it holds {prefix}{name}, which is not known here"


def _instead(name: str, found: Mapping[str, TensorEntry]) -> str:
    """What may explain a missing tensor."""
    linear = name.rpartition(".")[0]
    if f"{linear}.weight" in found:
        return ": that linear was left at full precision, but layers are swapped whole"
    block, _, part = linear.rpartition(".")
    if part.startswith(("q_", "k_", "v_", "gate_", "up_")):
        others = {other.rpartition(".")[0] for other in found if other.startswith(f"{block}.")}
        fused = sorted(other for other in others if "qkv" in other or "gate_up" in other)
        if fused:
            return f": it holds {fused[0]} fused, which is not read; export it unfused"
    return ""
