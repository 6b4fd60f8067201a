"""Decoder layers of a checkpoint that another tool quantised, held against full precision."""

import hashlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from morphserve.quantize import modules
from morphserve.quantize.agreement import Probe
from morphserve.quantize.checkpoint import Checkpoint, read_biases, read_norms
from morphserve.quantize.files import TensorEntry, digest_file, read_tensor
from morphserve.quantize.formats.folder import open_folder
from morphserve.quantize.formats.stored import BadSource, Format, to_weight
from morphserve.quantize.manifest import Quantization
from morphserve.quantize.packing import fuse
from morphserve.quantize.weights import LayerTensors, QuantizedWeight


class QuantizedSource:
    """Layers are read anew each time they are asked for, whole, with their norms and biases."""

    def __init__(
        self,
        path: Path,
        checkpoint: Checkpoint,
        stored_as: Format,
        entries: Mapping[str, TensorEntry],
    ) -> None:
        self.path = path
        self._checkpoint = checkpoint
        self._format = stored_as
        self._entries = entries
        self._probe: Probe | None = None

    @cached_property
    def quantization(self) -> Quantization:
        """Reads every layer's bytes once, for their digest."""
        grid = self._format.grid
        return Quantization(
            method="imported",
            bits=grid.bits,
            group_size=grid.group_size,
            symmetric=grid.symmetric,
            act_order=self._format.act_order,
            source=f"{self.path.name} ({self._format.name})",
            source_sha256=self._digest(),
        )

    def _digest(self) -> str:
        """sha256 of what decides on the layers: the settings and the layers' tensors."""
        digest = hashlib.sha256()
        for path in (self.path / "config.json", *sorted(self.path.glob("quant*_config.json"))):
            digest.update(f"{path.name} {digest_file(path)}\n".encode())
        for name, entry in sorted(self._entries.items()):
            if ".layers." in name:
                digest.update(f"{name} {entry.dtype} {entry.shape}\n".encode())
                digest.update(read_tensor(entry).view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def layer(self, i: int) -> LayerTensors[QuantizedWeight]:
        """Layer `i`, q, k, v and gate, up fused; cheapest when asked for front to back.

        Raises BadSource unless it does what the full-precision layer does and writes K and V as
        that one does, so that the two may take turns within a request.
        """
        layer = self._read(i)
        agreement = self._probe_at(i).compare(layer)
        if fault := agreement.fault():
            way_out = (
                "quantise again without folding scales into keys or values (AWQ folds them where "
                "each query head has its own value head; GPTQ folds none)"
                if not agreement.shares_cache
                else f"give a folder that was quantised from {self._checkpoint.path}"
            )
            raise BadSource(
                f"layer {i} of {self.path} cannot stand in for full precision: {fault}; {way_out}"
            )
        return layer

    def _probe_at(self, i: int) -> Probe:
        probe = self._probe
        if probe is None or probe.layer > i:
            probe = Probe(self._checkpoint)
        while probe.layer < i:
            probe.advance()
        self._probe = probe
        return probe

    def _read(self, i: int) -> LayerTensors[QuantizedWeight]:
        vectors = self._vectors(i)
        return LayerTensors(
            norms=read_norms(vectors),
            biases=read_biases(vectors),
            qkv=self._fused(i, modules.QKV),
            o=self._fused(i, modules.OUTPUT),
            gate_up=self._fused(i, modules.GATE_UP),
            down=self._fused(i, modules.DOWN),
        )

    def _vectors(self, i: int) -> dict[str, Tensor]:
        """Norms and biases that the architecture has; others must be zero."""
        prefix, arch = modules.layer_prefix(i), self._checkpoint.architecture
        wanted = modules.vector_shapes(arch)
        for linear in modules.linear_shapes(arch):
            name = f"{linear}.bias"
            if name not in wanted and (entry := self._entries.get(prefix + name)):
                if read_tensor(entry).any():
                    raise BadSource(
                        f"{prefix}{name} of {self.path} is not zero, but a {arch.family} model "
                        "has no such bias: it was quantised from another kind of model"
                    )
        vectors = {name: read_tensor(self._entries[prefix + name]) for name in wanted}
        for name, vector in vectors.items():
            if not vector.isfinite().all():
                raise BadSource(f"{prefix}{name} of {self.path} has values that are not finite")
        return vectors

    def _fused(self, i: int, linears: tuple[str, ...]) -> QuantizedWeight:
        weights = [self._linear(modules.layer_prefix(i) + name) for name in linears]
        for name, weight in zip(linears[1:], weights[1:], strict=True):
            if not _same_order(weights[0].input_order, weight.input_order):
                raise BadSource(
                    f"{linears[0]} and {name} in layer {i} of {self.path} have their inputs in "
                    "different orders (g_idx), but are one matrix here: quantise again with "
                    "static groups or without desc_act"
                )
        return fuse(weights)

    def _linear(self, name: str) -> QuantizedWeight:
        prefix = f"{name}."
        tensors = {
            entry.removeprefix(prefix): read_tensor(self._entries[entry])
            for entry in self._entries
            if entry.startswith(prefix) and entry != f"{prefix}bias"
        }
        try:
            return to_weight(self._format.decode(tensors), self._format.grid)
        except ValueError as error:
            raise BadSource(f"{name} of {self.path} cannot be read: {error}") from error


def _same_order(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a, b)


def open_quantized(path: str, checkpoint: Checkpoint) -> QuantizedSource:
    """The quantised checkpoint in a folder, which must be made from `checkpoint`.

    Reads GPTQ, AWQ (gemm) and compressed-tensors (pack-quantized). Raises BadSource, with the
    reason, for anything else, and before any layer is read if a tensor is missing or unknown.
    """
    folder = Path(path).expanduser()
    stored_as, entries = open_folder(folder, checkpoint)
    return QuantizedSource(folder, checkpoint, stored_as, entries)
