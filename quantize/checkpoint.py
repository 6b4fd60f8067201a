"""A full-precision checkpoint: a Hugging Face folder of safetensors, read layer by layer."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from morphserve.configs.errors import UnsupportedModel
from morphserve.configs.load import DEMO_MODEL, resolve_model
from morphserve.quantize import modules
from morphserve.quantize.architecture import Architecture, read_architecture
from morphserve.quantize.files import BadFile, TensorEntry, read_entries, read_tensor
from morphserve.quantize.weights import Biases, LayerTensors, Norms, StaticTensors

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_NOT_MATHS = ("dtype", "eos_token_ids", "max_position")  # facts that leave logits as they are


class BadCheckpoint(BadFile):
    """The checkpoint folder cannot be used as it is."""


class Checkpoint:
    """Tensors are read anew, into memory of their own, each time they are asked for."""

    def __init__(
        self, path: Path, architecture: Architecture, entries: Mapping[str, TensorEntry]
    ) -> None:
        self.path = path
        self.architecture = architecture
        self._entries = entries
        self._digests: dict[str, str] = {}  # tensor name -> sha256 of its bytes

    def layer(self, i: int) -> LayerTensors[Tensor]:
        """Decoder layer `i` in the checkpoint's dtype, q, k, v and gate, up fused."""
        prefix = modules.layer_prefix(i)
        wanted = modules.vector_shapes(self.architecture)
        vectors = {name: self._read(prefix + name) for name in wanted}

        def linear(names: tuple[str, ...]) -> Tensor:
            return _fuse([self._read(f"{prefix}{name}.weight") for name in names])

        return LayerTensors(
            norms=read_norms(vectors),
            biases=read_biases(vectors),
            qkv=linear(modules.QKV),
            o=linear(modules.OUTPUT),
            gate_up=linear(modules.GATE_UP),
            down=linear(modules.DOWN),
        )

    def layer_bytes(self, i: int) -> int:
        """Size of decoder layer `i` in its files."""
        prefix = modules.layer_prefix(i)
        entries = self._entries.items()
        return sum(entry.num_bytes for name, entry in entries if name.startswith(prefix))

    def static(self) -> StaticTensors:
        """Embedding, final norm and head; a tied head is the embedding itself."""
        embedding = self._read(modules.EMBEDDING)
        head = self._read(modules.HEAD) if modules.HEAD in self._entries else embedding
        if self.architecture.tied_head:
            if head.dtype != embedding.dtype or not torch.equal(head, embedding):
                raise BadCheckpoint(
                    f"config.json of {self.path} ties the head to the embedding, but its "
                    f"{modules.HEAD} differs: set tie_word_embeddings to false there"
                )
            head = embedding
        return StaticTensors(embedding, self._read(modules.FINAL_NORM), head)

    def fingerprint(self) -> str:
        """sha256 of all that decides the logits: facts of the config and every tensor's bytes.

        Tensors are hashed when they are first read, so this reads only those not read yet.
        """
        facts = {k: v for k, v in asdict(self.architecture).items() if k not in _NOT_MATHS}
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        for name in sorted(modules.checkpoint_shapes(self.architecture)):
            if name not in self._digests:
                self._read(name)
            entry = self._entries[name]
            digest.update(f"{name} {entry.dtype} {entry.shape} {self._digests[name]}\n".encode())
        return digest.hexdigest()

    def _read(self, name: str) -> Tensor:
        tensor = read_tensor(self._entries[name])
        if name not in self._digests:
            data = tensor.view(-1).view(torch.uint8).numpy().data
            self._digests[name] = hashlib.sha256(data).hexdigest()
        return tensor


def read_norms(vectors: Mapping[str, Tensor]) -> Norms:
    """Norms of a layer from its tensors by name."""
    return Norms(
        input=vectors[modules.INPUT_NORM],
        post_attention=vectors[modules.POST_ATTENTION_NORM],
        q=vectors.get(modules.Q_NORM),
        k=vectors.get(modules.K_NORM),
    )


def read_biases(vectors: Mapping[str, Tensor]) -> Biases:
    """Biases of a layer from its tensors by name, fused as the linears are."""

    def bias(names: tuple[str, ...]) -> Tensor | None:
        parts = [vectors[f"{name}.bias"] for name in names if f"{name}.bias" in vectors]
        return _fuse(parts) if parts else None

    return Biases(
        qkv=bias(modules.QKV),
        o=bias(modules.OUTPUT),
        gate_up=bias(modules.GATE_UP),
        down=bias(modules.DOWN),
    )


def _fuse(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def open_checkpoint(path: str) -> Checkpoint:
    """The checkpoint in a folder (or `demo`), its headers checked against its config.

    Raises BadCheckpoint, BadFile or UnsupportedModel, naming the file or tensor at fault.
    """
    folder = resolve_model(path)
    if not folder.is_dir():
        raise BadCheckpoint(
            f"there is no model folder {folder}: give a Hugging Face folder with config.json and "
            f"{_WEIGHTS}, or `{DEMO_MODEL}` for the shipped model"
        )
    config = read_json(folder / "config.json")
    _refuse_foreign(folder, config)
    generation_file = folder / "generation_config.json"
    generation = read_json(generation_file) if generation_file.exists() else {}
    architecture = read_facts(folder, config, generation)
    entries = collect_entries(folder)
    _check_tensors(folder, architecture, entries)
    return Checkpoint(folder, architecture, entries)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises BadCheckpoint with the reason there is none."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise BadCheckpoint(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise BadCheckpoint(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise BadCheckpoint(f"{path} must hold a JSON object")
    return value


def _refuse_foreign(folder: Path, config: Mapping[str, Any]) -> None:
    if config.get("auto_map"):
        raise UnsupportedModel(
            f"{folder}/config.json asks for code that comes with the model (auto_map), which is "
            "never run: use a checkpoint of a supported family without it"
        )
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise UnsupportedModel(
            f"{folder} is quantised already ({method or 'quantization_config'}): "
            "give the full-precision checkpoint it was made from"
        )


def read_facts(
    folder: Path, config: Mapping[str, Any], generation: Mapping[str, Any]
) -> Architecture:
    """`read_architecture`, with an error that names the folder."""
    try:
        return read_architecture(config, generation)
    except KeyError as error:
        raise BadCheckpoint(f"{folder}/config.json lacks {error}") from error
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise BadCheckpoint(f"{folder}/config.json has a wrong value: {error}") from error


def collect_entries(folder: Path, index: str = _INDEX) -> dict[str, TensorEntry]:
    """Every tensor of the folder's safetensors, one file or sharded."""
    if (folder / _WEIGHTS).exists():
        return read_entries(folder / _WEIGHTS)
    if not (folder / index).exists():
        raise BadCheckpoint(_no_weights(folder))
    weight_map = read_json(folder / index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(map(_is_file_name, weight_map.values())):
        raise BadCheckpoint(f"{folder / index} lacks a weight_map of tensor and file names")
    entries: dict[str, TensorEntry] = {}
    for shard in sorted(set(weight_map.values())):
        for name, entry in read_entries(folder / shard).items():
            if name in entries:
                raise BadCheckpoint(
                    f"tensor {name} is in both {entries[name].path.name} and {shard} of {folder}"
                )
            entries[name] = entry
    return entries


def _is_file_name(value: object) -> bool:
    return isinstance(value, str) and Path(value).name == value


def _no_weights(folder: Path) -> str:
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    if pickles:
        return (
            f"{folder} holds only pickled weights ({pickles[0]}), which are never read because "
            "they can run code: convert them to safetensors"
        )
    return f"{folder} holds neither {_WEIGHTS} nor {_INDEX}"


def _check_tensors(
    folder: Path, architecture: Architecture, entries: Mapping[str, TensorEntry]
) -> None:
    expected = modules.checkpoint_shapes(architecture)
    for name, shape in expected.items():
        if name not in entries:
            raise BadCheckpoint(f"{folder} lacks tensor {name}")
        entry = entries[name]
        if entry.shape != shape:
            raise BadCheckpoint(
                f"tensor {name} of {folder} has shape {list(entry.shape)}, "
                f"but config.json asks for {list(shape)}"
            )
        if entry.dtype not in _FLOATS:
            raise UnsupportedModel(
                f"tensor {name} of {folder} is {entry.dtype}: weights must be "
                "bfloat16, float16 or float32"
            )
    for name in entries:
        if name not in expected and not _may_ignore(name, architecture):
            raise UnsupportedModel(
                f"{folder} holds tensor {name}, which a {architecture.family} model does not use"
            )


def _may_ignore(name: str, architecture: Architecture) -> bool:
    is_tied_head = name == modules.HEAD and architecture.tied_head
    return is_tied_head or name.endswith("rotary_emb.inv_freq")
