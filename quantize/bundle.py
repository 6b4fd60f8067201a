"""A bundle: the folder of quantised layer variants and their ranking, made for one checkpoint."""

import hashlib
import shlex
from pathlib import Path

import msgspec

from morphserve.quantize.architecture import Architecture
from morphserve.quantize.checkpoint import Checkpoint
from morphserve.quantize.costs import DeviceCosts
from morphserve.quantize.files import BadFile, write_atomically
from morphserve.quantize.layer_file import decode_layer, layer_file_name
from morphserve.quantize.manifest import LayerFile, Manifest, Ranking, Variant, decode, encode
from morphserve.quantize.weights import LayerTensors, QuantizedWeight

MANIFEST = "bundle.json"
_MAX_MANIFEST_BYTES = 100_000_000


class BadBundle(BadFile):
    """The bundle is missing, unfinished, damaged, or belongs to another checkpoint."""


class Bundle:
    """Layers are read anew, into memory of their own, and checked each time they are asked for."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @property
    def architecture(self) -> Architecture:
        """Of the checkpoint the bundle was made from."""
        return self.manifest.architecture

    @property
    def num_layers(self) -> int:
        return self.architecture.num_layers

    @property
    def order(self) -> list[int]:
        """Layer ids, first to be demoted first; front to back until `morph profile` ran."""
        ranking = self.manifest.ranking
        if ranking is None:
            return list(range(self.num_layers))
        return next(order.layers for order in ranking.orders if order.name == ranking.chosen)

    def layer(self, i: int, variant: Variant = Variant.INT4) -> LayerTensors[QuantizedWeight]:
        """A variant of layer `i`, q, k, v and gate, up fused, with norms and biases.

        Raises BadBundle if the file is not, byte for byte, the one that was written.
        """
        try:
            return self.checked_layer(i, variant)
        except BadFile as error:
            raise self._unusable(error) from error

    def checked_layer(self, i: int, variant: Variant) -> LayerTensors[QuantizedWeight]:
        """As `layer`, but the error is BadFile and says only what is wrong with the file."""
        files = self.manifest.variants[variant]
        data = self._read(files.layers[i])
        path = self.path / files.layers[i].name
        return decode_layer(path, data, self.architecture, files.quantization)

    def check_files(self) -> None:
        """Raises BadBundle unless every file is there with its size."""
        try:
            for files in self.manifest.variants.values():
                for fact in files.layers:
                    _check_file(self.path, fact)
        except BadFile as error:
            raise self._unusable(error) from error

    def _unusable(self, error: BadFile) -> BadBundle:
        return BadBundle(f"{error}; {_rebuild(self.path)}")

    def with_ranking(self, ranking: Ranking) -> "Bundle":
        """This bundle with the ranking stored in its folder."""
        return self._store(msgspec.structs.replace(self._current(), ranking=ranking))

    def with_costs(self, costs: DeviceCosts) -> "Bundle":
        """This bundle with times of a device stored, in place of those of the same set-up."""
        current = self._current()
        others = [entry for entry in current.costs if _set_up(entry) != _set_up(costs)]
        return self._store(msgspec.structs.replace(current, costs=[*others, costs]))

    def _current(self) -> Manifest:
        """The manifest in the folder, which others may have added to since it was opened."""
        current = _read_manifest(self.path)
        if (current.base, current.variants) != (self.manifest.base, self.manifest.variants):
            raise BadBundle(f"{self.path} was built anew meanwhile: run the command again")
        return current

    def _store(self, manifest: Manifest) -> "Bundle":
        data = encode(manifest)
        try:
            decode(data)
        except ValueError as error:
            raise BadBundle(
                f"{self.path / MANIFEST} would not be readable ({error}): it was left as it is"
            ) from error
        write_atomically(self.path / MANIFEST, data)
        return Bundle(self.path, manifest)

    def _read(self, fact: LayerFile) -> bytes:
        _check_file(self.path, fact)
        path = self.path / fact.name
        try:
            data = path.read_bytes()
        except OSError as error:
            raise BadFile(f"cannot read {path} ({error.strerror})") from error
        if (digest := hashlib.sha256(data).hexdigest()) != fact.sha256:
            raise BadFile(f"{path} {self._damage(digest)}")
        return data

    def _damage(self, digest: str) -> str:
        facts = [fact for files in self.manifest.variants.values() for fact in files.layers]
        other = next((fact.name for fact in facts if fact.sha256 == digest), None)
        if other:
            return f"is damaged (it holds the content of {other})"
        return "is damaged (its sha256 does not match)"


def read_bundle(path: str) -> Bundle:
    """The bundle in a folder, whatever checkpoint it is for; its layers are not looked at yet."""
    folder = Path(path).expanduser()
    return Bundle(folder, _read_manifest(folder))


def open_bundle(path: str, checkpoint: Checkpoint) -> Bundle:
    """The bundle in a folder; every file must have its size and be made for `checkpoint`.

    Contents are checked against their sha256 when a layer is read. Comparing fingerprints reads
    whatever tensors of the checkpoint have not been read yet.
    """
    bundle = read_bundle(path)
    check_base(bundle, checkpoint)
    bundle.check_files()
    return bundle


def check_base(bundle: Bundle, checkpoint: Checkpoint) -> None:
    """Raises BadBundle unless the bundle was made from this very checkpoint."""
    if bundle.manifest.base.fingerprint != checkpoint.fingerprint():
        raise BadBundle(
            f"{bundle.path} was built from another checkpoint ({bundle.manifest.base.name}) than "
            f"{checkpoint.path}: run `morph quantize {checkpoint.path}`"
        )


def unfinished(folder: Path) -> Path:
    """Where a bundle is built before it takes its place."""
    return folder.with_name(f".{folder.name}.partial")


def replaced(folder: Path) -> Path:
    """Where the old bundle lies while the new one takes its place."""
    return folder.with_name(f".{folder.name}.replaced")


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    try:
        if not path.is_file():
            raise BadBundle(_no_bundle(folder.resolve()))
        if path.is_symlink():
            raise BadBundle(f"{path} is a link: copy the bundle with its files")
        if path.stat().st_size > _MAX_MANIFEST_BYTES:
            raise BadBundle(f"{path} is too large to be a manifest: {_rebuild(folder)}")
        manifest = decode(path.read_bytes())
    except OSError as error:
        raise BadBundle(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # msgspec's decoding errors are ValueErrors too
        raise BadBundle(f"{path} cannot be used ({error}): {_rebuild(folder)}") from error
    _check_names(folder, manifest)
    return manifest


def _no_bundle(folder: Path) -> str:
    if unfinished(folder).is_dir() or replaced(folder).is_dir():
        return (
            f"there is no bundle {folder}, but an unfinished build of it: "
            "run its `morph quantize` command again with --resume"
        )
    if not folder.is_dir():
        return f"there is no bundle {folder}: make it with `morph quantize`"
    return (
        f"{folder} is not a finished bundle (no {MANIFEST}): "
        "give the folder that `morph quantize` wrote, or make one with it"
    )


def _check_names(folder: Path, manifest: Manifest) -> None:
    """The file of every layer must have the name that is its own, which leads to no other place."""
    for variant, files in manifest.variants.items():
        if len(files.layers) != manifest.architecture.num_layers:
            raise BadBundle(f"{folder} does not hold every {variant} layer: {_rebuild(folder)}")
        for i, fact in enumerate(files.layers):
            if fact.name != layer_file_name(i, variant):
                raise BadBundle(
                    f"{folder / MANIFEST} names a wrong file for layer {i} ({fact.name!r}): "
                    f"{_rebuild(folder)}"
                )


def _check_file(folder: Path, fact: LayerFile) -> None:
    path = folder / fact.name
    try:
        if path.is_symlink():
            raise BadFile(f"{path} is a link: copy the bundle with its files")
        if not path.is_file():
            raise BadFile(f"{path} is missing")
        num_bytes = path.stat().st_size
    except OSError as error:
        raise BadFile(f"cannot read {path} ({error.strerror})") from error
    if num_bytes != fact.num_bytes:
        raise BadFile(f"{path} has {num_bytes} bytes instead of {fact.num_bytes}")


def _set_up(costs: DeviceCosts) -> tuple[str, str, int, str]:
    return costs.device, costs.kernels, costs.threads, costs.dtype


def _rebuild(folder: Path) -> str:
    command = f"morph quantize MODEL --output {shlex.quote(str(folder))} --force"
    return f"run `{command}`, with the options it was made with, to build it again"
