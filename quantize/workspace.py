"""An unfinished bundle: a folder beside its final place, renamed when every layer is written."""

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path

import msgspec

from morphserve.configs.errors import ConfigError
from morphserve.quantize.bundle import MANIFEST, layer_file_name, write_manifest
from morphserve.quantize.files import BadFile, write_atomically
from morphserve.quantize.manifest import LayerFile, Manifest, Variant, VariantFiles

PROGRESS = "progress.json"  # the manifest of the layers that are written so far


class Workspace:
    """Layers that are written one after the other, all variants of a layer together."""

    def __init__(self, target: Path, folder: Path, manifest: Manifest, force: bool) -> None:
        self._target = target
        self._folder = folder
        self._manifest = manifest
        self._force = force

    @property
    def num_finished(self) -> int:
        """Layers whose variants are all written."""
        return min(len(files.layers) for files in self._manifest.variants.values())

    def write(self, written: Mapping[Variant, tuple[bytes, float, float | None]]) -> None:
        """The next layer: of each variant the file's content, weight error and output error."""
        layer = self.num_finished
        variants = dict(self._manifest.variants)
        for variant, (data, weight_error, output_error) in written.items():
            name = layer_file_name(layer, variant)
            write_atomically(self._folder / name, data)
            sha256 = hashlib.sha256(data).hexdigest()
            fact = LayerFile(name, len(data), sha256, weight_error, output_error)
            files = variants[variant]
            variants[variant] = VariantFiles(files.quantization, [*files.layers, fact])
        self._manifest = msgspec.structs.replace(self._manifest, variants=variants)

    def finish(self) -> Manifest:
        """Makes the folder a bundle at its final place and returns its manifest."""
        write_manifest(self._folder, self._manifest)
        if self._force and self._target.exists():
            shutil.rmtree(self._target)
        self._folder.rename(self._target)
        return self._manifest


def open_workspace(target: Path, plan: Manifest, force: bool, resume: bool) -> Workspace:
    """The place where the bundle that `plan` describes (without layers) is built.

    A bundle at `target` stays whole until the new one takes its place, and is an error without
    `force`. With `resume`, an unfinished build of the same plan goes on where it stopped.
    """
    if target.is_dir() and any(not _is_ours(path.name) for path in target.iterdir()):
        raise ConfigError(f"{target} holds other files than a bundle's: choose another --output")
    if (target / MANIFEST).exists() and not force:
        raise ConfigError(f"{target} holds a bundle already: pass --force to replace it")
    folder = target.with_name(f".{target.name}.partial")
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    except OSError as error:
        raise BadFile(f"cannot write to {folder}: {error.strerror}") from error
    return Workspace(target, folder, plan, force)


def _is_ours(name: str) -> bool:
    """Whether `quantize` or `profile` may have written this file, finished or not."""
    return name == MANIFEST or name.lstrip(".").startswith(("layer-", MANIFEST, "profile."))
