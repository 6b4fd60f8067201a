"""What an unfinished build has finished, and whether another run may go on with it."""

from pathlib import Path

import msgspec

from morphserve.configs.errors import ConfigError
from morphserve.quantize.bundle import MANIFEST
from morphserve.quantize.files import digest_file
from morphserve.quantize.manifest import Manifest, Quantization, TextSample, VariantFiles, decode

PROGRESS = "progress.json"  # the manifest of the layers that are written so far


def read_progress(folder: Path) -> bytes | None:
    """The manifest of an unfinished build, if it has finished a layer."""
    for name in (PROGRESS, MANIFEST):  # the latter if it died before it was moved to its place
        if (folder / name).is_file():
            return (folder / name).read_bytes()
    return None


def continued(folder: Path, begun: bytes, plan: Manifest) -> Manifest:
    """The plan with the finished layers whose files are still what was written.

    Raises ConfigError if the build was begun by another plan.
    """
    try:
        found = decode(begun)
    except ValueError as error:
        raise _no_resume(folder, f"its {PROGRESS} cannot be used ({error})") from error
    if reason := _difference(found, plan):
        raise _no_resume(folder, reason)
    num_whole = _num_whole(folder, found)
    variants = {
        variant: VariantFiles(files.quantization, found.variants[variant].layers[:num_whole])
        for variant, files in plan.variants.items()
    }
    return msgspec.structs.replace(plan, variants=variants)


def finished_as(plan: Manifest, target: Path) -> Manifest | None:
    """The manifest of the bundle at `target` if it is whole and the one the plan describes."""
    try:
        manifest = decode((target / MANIFEST).read_bytes())
    except ValueError:
        return None
    if _difference(manifest, plan):
        return None
    return manifest if _num_whole(target, manifest) == plan.architecture.num_layers else None


def _no_resume(folder: Path, reason: str) -> ConfigError:
    return ConfigError(
        f"{folder} cannot be resumed, {reason}: pass --force without --resume to begin anew"
    )


def _difference(begun: Manifest, plan: Manifest) -> str | None:
    """Why layers of one build do not fit another."""
    if begun.base.fingerprint != plan.base.fingerprint:
        return f"it was begun with other weights of {begun.base.name}"
    if begun.tool != plan.tool:
        return f"it was begun by {begun.tool} and this is {plan.tool}"
    if begun.variants.keys() != plan.variants.keys():
        return f"it was begun for {' and '.join(begun.variants)}"
    for variant, files in plan.variants.items():
        before, now = begun.variants[variant].quantization, files.quantization
        if before != now:
            return f"its {variant} layers have {_first_difference(before, now)}"
    return None


def _first_difference(before: Quantization | TextSample, now: Quantization | TextSample) -> str:
    """The first field that differs, with both values, of two that are not equal."""
    fields = now.__struct_fields__
    name = next(name for name in fields if getattr(before, name) != getattr(now, name))
    old, new = getattr(before, name), getattr(now, name)
    if isinstance(old, TextSample) and isinstance(new, TextSample):
        return f"{name} text with {_first_difference(old, new)}"
    return f"{name} {_shown(old)} instead of {_shown(new)}"


def _shown(value: object) -> str:
    if value is None:
        return "none"
    return value.source if isinstance(value, TextSample) else str(value)


def _num_whole(folder: Path, begun: Manifest) -> int:
    """Layers before the first that lacks a file or whose file is not what was written."""
    layers = list(zip(*(files.layers for files in begun.variants.values()), strict=False))
    for i, facts in enumerate(layers):
        if any(digest_file(folder / fact.name) != fact.sha256 for fact in facts):
            return i
    return len(layers)
