"""An unfinished bundle: a folder beside its final place, renamed when every layer is written.

Of a target NAME, `.NAME.partial` is the build, `.NAME.replaced` the bundle that just gave way,
`.NAME.lock` who may write them.
"""

import hashlib
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec
import torch

from morphserve.configs.errors import ConfigError, MorphError
from morphserve.quantize.bundle import MANIFEST, replaced, unfinished
from morphserve.quantize.files import BadFile, DiskFull, Lock, sync_folder, write_atomically
from morphserve.quantize.layer_file import layer_file_bytes, layer_file_name
from morphserve.quantize.manifest import LayerFile, Manifest, Variant, VariantFiles, encode
from morphserve.quantize.progress import PROGRESS, continued, finished_as, read_progress

_OURS = re.compile(
    r"layer-\d{5}\.(int4|int8)\.safetensors|bundle\.json|progress\.json"
    r"|profile\.(json|svg|png|html)"
)
_UNFINISHED = re.compile(r"\.(.+)\.\d+\.tmp")  # as `write_atomically` names files
_SPARE_BYTES = 1_000_000  # for the manifest and what the file system takes for itself


class Interrupted(MorphError):
    """The user stopped a build; what is finished stays."""

    exit_code = 130


class Workspace:
    """Layers that are written one after the other, all variants of a layer together.

    To be used in a `with`, which gives the place back and tells an interrupted user how to go on.
    """

    def __init__(
        self, target: Path, manifest: Manifest, force: bool, lock: Lock, done: bool = False
    ) -> None:
        self._target = target
        self._folder = unfinished(target)
        self._manifest = manifest
        self._force = force
        self._lock = lock
        self._done = done

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self.num_finished:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._lock.release()
        if kind is KeyboardInterrupt:
            raise Interrupted(f"stopped; {self._way_on()}") from None

    @property
    def num_finished(self) -> int:
        """Layers whose variants are all written."""
        return min(len(files.layers) for files in self._manifest.variants.values())

    def write(self, written: Mapping[Variant, tuple[bytes, float, float | None]]) -> None:
        """The next layer: of each variant the file's content, weight error and output error."""
        layer = self.num_finished
        variants = dict(self._manifest.variants)
        try:
            for variant, (data, weight_error, output_error) in written.items():
                name = layer_file_name(layer, variant)
                write_atomically(self._folder / name, data)
                sha256 = hashlib.sha256(data).hexdigest()
                fact = LayerFile(name, len(data), sha256, weight_error, output_error)
                files = variants[variant]
                variants[variant] = VariantFiles(files.quantization, [*files.layers, fact])
            manifest = msgspec.structs.replace(self._manifest, variants=variants)
            write_atomically(self._folder / PROGRESS, encode(manifest))
        except DiskFull as error:
            raise DiskFull(
                f"{error}; {self._finished_layers()} are kept, the rest needs about "
                f"{_megabytes(_missing_bytes(self._manifest))}: make room and run the same "
                "command with --resume to go on"
            ) from error
        self._manifest = manifest

    def finish(self) -> Manifest:
        """Makes the folder a bundle at its final place and returns its manifest.

        If the program dies here, the old bundle or the new one is found by the next build.
        """
        if not self._done:
            (self._folder / PROGRESS).replace(self._folder / MANIFEST)
            sync_folder(self._folder)
            self._take_place()
        return self._manifest

    def _take_place(self) -> None:
        _refuse_foreign(self._target)
        if (self._target / MANIFEST).exists() and not self._force:
            raise ConfigError(
                f"a bundle {self._target} was made meanwhile: run the same command with "
                "--force --resume to replace it"
            )
        old = replaced(self._target)
        try:
            if self._target.exists():
                self._target.rename(old)
            self._folder.rename(self._target)
            sync_folder(self._target.parent)
            shutil.rmtree(old, ignore_errors=True)
        except OSError as error:
            raise BadFile(
                f"cannot move {self._folder} to {self._target} ({error.strerror}): move it there "
                "by hand, it is a whole bundle"
            ) from error

    def _way_on(self) -> str:
        if not self.num_finished:
            return "no layer was finished and nothing is kept: run the same command to begin anew"
        return f"{self._finished_layers()} are kept: run the same command with --resume to go on"

    def _finished_layers(self) -> str:
        return f"{self.num_finished} of {self._manifest.architecture.num_layers} layers"


def open_workspace(target: Path, plan: Manifest, force: bool, resume: bool) -> Workspace:
    """The place where the bundle that `plan` describes (without layers) is built.

    A bundle at `target` stays whole until the new one takes its place, and is an error without
    `force`. With `resume`, an unfinished build of the same plan goes on where it stopped; without
    it such a build is an error, or given up with `force`. One process at a time may build.
    """
    target = target.expanduser().resolve()
    if not target.name:
        raise ConfigError(f"{target} cannot be replaced: choose another --output")
    lock = _lock(target)
    try:
        _recover(target)
        return _open(target, plan, force, resume, lock)
    except OSError as error:
        lock.release()
        raise BadFile(f"cannot write to {unfinished(target)}: {error.strerror}") from error
    except BaseException:
        lock.release()
        raise


def _lock(target: Path) -> Lock:
    path = target.with_name(f".{target.name}.lock")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = Lock.take(path)
    except OSError as error:
        raise BadFile(f"cannot write to {path.parent}: {error.strerror}") from error
    if lock is None:
        raise ConfigError(
            f"another `morph quantize` is writing {target}: wait for it, or choose another --output"
        )
    return lock


def _recover(target: Path) -> None:
    """Ends what a program that died while bundles took each other's place had begun."""
    old = replaced(target)
    if not old.exists():
        return
    _refuse_foreign(old)
    if (target / MANIFEST).exists():
        shutil.rmtree(old)
    else:
        old.rename(target)


def _refuse_foreign(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file: choose another --output")
    if folder.is_dir() and not all(map(_is_ours, folder.iterdir())):
        raise ConfigError(f"{folder} holds other files than a bundle's: choose another --output")


def _is_ours(path: Path) -> bool:
    """Whether `quantize` or `profile` may have written this file, finished or not."""
    temporary = _UNFINISHED.fullmatch(path.name)
    name = temporary[1] if temporary else path.name
    if name.startswith("profile.") and not (path.parent / MANIFEST).exists():
        return False  # a report without its bundle may be any program's
    return bool(_OURS.fullmatch(name)) and path.is_file() and not path.is_symlink()


def _open(target: Path, plan: Manifest, force: bool, resume: bool, lock: Lock) -> Workspace:
    folder = unfinished(target)
    begun = read_progress(folder)
    if resume and begun is None and not force and (target / MANIFEST).exists():
        if manifest := finished_as(plan, target):
            return Workspace(target, manifest, force, lock, done=True)
    check_target(target, force, resume)
    manifest = continued(folder, begun, plan) if begun is not None and resume else plan
    _prepare(folder, manifest)
    return Workspace(target, manifest, force, lock)


def check_target(target: Path, force: bool, resume: bool) -> None:
    """Raises ConfigError if there is something at or beside `target` that must be kept."""
    target = target.expanduser().resolve()
    folder = unfinished(target)
    _refuse_foreign(target)
    _refuse_foreign(folder)
    begun = read_progress(folder)
    if (target / MANIFEST).exists() and not force:
        aside = "; to go on with the unfinished build beside it, --force --resume" if begun else ""
        raise ConfigError(f"{target} holds a bundle already: pass --force to replace it{aside}")
    if begun is not None and not resume and not force:
        raise ConfigError(
            f"{folder} is an unfinished build of {target}: pass --resume to go on with it, or "
            "--force to begin anew"
        )


def _prepare(folder: Path, manifest: Manifest) -> None:
    """Leaves the finished layers and what says so, and makes sure that there is room for more."""
    folder.mkdir(exist_ok=True)
    kept = {fact.name for files in manifest.variants.values() for fact in files.layers}
    if kept:
        write_atomically(folder / PROGRESS, encode(manifest))
        kept.add(PROGRESS)
    for path in folder.iterdir():
        if path.name not in kept:
            path.unlink()
    free = shutil.disk_usage(folder).free
    if free < (needed := _missing_bytes(manifest)):
        if not kept:
            folder.rmdir()
        raise DiskFull(
            f"{folder.parent} has {_megabytes(free)} free and the bundle needs "
            f"{_megabytes(needed)} more: make room or choose another --output"
        )


def _missing_bytes(manifest: Manifest) -> int:
    """Size of the layers that are not written yet."""
    arch = manifest.architecture
    return _SPARE_BYTES + sum(
        (arch.num_layers - len(files.layers))
        * layer_file_bytes(arch, files.quantization, torch.float32)
        for files in manifest.variants.values()
    )


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB"
