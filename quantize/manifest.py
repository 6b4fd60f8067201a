"""What `bundle.json` says: base checkpoint, quantisation, files, ranking and measured costs.

Unknown fields and wrong types are errors.
"""

import hashlib
from enum import StrEnum
from typing import Any

import msgspec

from morphserve.quantize.costs import DeviceCosts

FORMAT = "morphserve-bundle"
SCHEMA = 2


class Variant(StrEnum):
    """Precisions that a layer can have."""

    FULL = "full"
    INT8 = "int8"
    INT4 = "int4"


class Base(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The full-precision checkpoint a bundle belongs to."""

    name: str
    fingerprint: str  # Checkpoint.fingerprint()


class TextSample(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Token windows that something was measured on."""

    source: str  # file name and part
    sha256: str  # of the token ids
    num_windows: int
    window_tokens: int
    seed: int  # of the choice of windows


class Quantization(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a variant's weights were made."""

    method: str  # rtn, gptq, awq; or imported
    bits: int
    group_size: int  # inputs that share a scale; 0: all inputs of a row
    symmetric: bool
    act_order: bool = False  # columns were rounded in order of their inputs' size (GPTQ)
    calibration: TextSample | None = None  # text whose activations weighed the errors
    source: str | None = None  # imported: the checkpoint's folder name and format


class LayerFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One layer's variant; the position in the list is the layer."""

    name: str
    num_bytes: int
    sha256: str
    weight_error: float  # norm of the rounding error over norm of the weights, all linears
    output_error: float | None = None  # the same of the linears' outputs on calibration text


class VariantFiles(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    quantization: Quantization
    layers: list[LayerFile]


class Rung(msgspec.Struct, frozen=True, forbid_unknown_fields=True, order=True):
    """One step of a ladder: this layer takes this variant."""

    layer: int
    to: Variant


class RankedOrder(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An order of demotion to INT4, first layer first, and what it costs."""

    name: str  # lis, kl-per-byte, front-to-back, back-to-front, random-SEED
    layers: list[int]
    scores: list[float]  # of each layer when it was taken; empty for orders without scores
    perplexity: list[float]  # after each number of replacements in Ranking.replaced
    divergence: list[float]  # KL from full precision there, nats per token


class Ladder(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Steps through INT8 to INT4, each layer taking both in this order, and what they cost."""

    name: str
    rungs: list[Rung]
    freed_bytes: list[int]  # after each rung, of the layers' files, from all at full precision
    divergence: list[float]  # KL from full precision after each rung, nats per token


class Ranking(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `morph profile` found. Calibration and selection share no text."""

    calibration: TextSample  # that layers were scored on
    selection: TextSample  # that orders were compared on
    replaced: list[int]  # numbers of INT4 layers at which orders were compared
    orders: list[RankedOrder]
    chosen: str  # name of the order with the lowest mean divergence
    ladder: Ladder | None = None  # of bundles with INT8


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole of `bundle.json`; it is written last, so that a folder with it is complete."""

    format: str
    schema: int
    tool: str  # program and version that wrote the bundle
    base: Base
    architecture: dict[str, Any]
    variants: dict[Variant, VariantFiles]
    ranking: Ranking | None = None
    costs: list[DeviceCosts] = []  # one entry per device
    checksum: str = ""  # sha256 of all the rest


class _Header(msgspec.Struct):
    """The part that every schema has."""

    format: str
    schema: int


def encode(manifest: Manifest) -> bytes:
    """The file's content, indented, with its checksum filled in."""
    sealed = msgspec.structs.replace(manifest, checksum=_checksum(manifest))
    return msgspec.json.format(msgspec.json.encode(sealed), indent=2) + b"\n"


def decode(data: bytes) -> Manifest:
    """The manifest in a file's content. Raises ValueError with the reason it cannot be used."""
    header = msgspec.json.decode(data, type=_Header)
    if header.format != FORMAT:
        raise ValueError(f"its format is {header.format!r}, not {FORMAT!r}")
    if header.schema != SCHEMA:
        raise ValueError(f"its schema is {header.schema}, this program reads {SCHEMA}")
    manifest = msgspec.json.decode(data, type=Manifest)
    if Variant.INT4 not in manifest.variants or Variant.FULL in manifest.variants:
        raise ValueError("its variants must be int4 and, if wanted, int8")
    if manifest.checksum != _checksum(manifest):
        raise ValueError("its checksum does not match: it was edited or damaged")
    _check_ranking(manifest)
    return manifest


def _checksum(manifest: Manifest) -> str:
    bare = msgspec.structs.replace(manifest, checksum="")
    return hashlib.sha256(msgspec.json.encode(bare)).hexdigest()


def _check_ranking(manifest: Manifest) -> None:
    if manifest.ranking is None:
        return
    layers = list(range(len(manifest.variants[Variant.INT4].layers)))
    if any(sorted(order.layers) != layers for order in manifest.ranking.orders):
        raise ValueError("an order in its ranking does not hold every layer once")
    if manifest.ranking.chosen not in [order.name for order in manifest.ranking.orders]:
        raise ValueError("the order it chose is not in its ranking")
