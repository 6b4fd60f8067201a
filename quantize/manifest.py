"""What `bundle.json` says: base checkpoint, quantisation, files, ranking and measured costs.

Unknown fields and wrong types are errors.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Any

import msgspec

from morphserve.quantize.architecture import Architecture
from morphserve.quantize.costs import DeviceCosts

FORMAT = "morphserve-bundle"
SCHEMA = 2
_BITS = {"int4": 4, "int8": 8}


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
    calibration: TextSample | None = None  # that output errors were measured on
    source: str | None = None  # imported: the checkpoint's folder name and format
    source_sha256: str | None = None  # imported: of its settings and layers, to tell it again


class LayerFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One layer's variant; the position in the list is the layer."""

    name: str
    num_bytes: int
    sha256: str
    weight_error: float  # norm of the rounding error over norm of the weights, all linears
    # Norm of the change of the layer's output over norm of what the layer adds, calibration text:
    output_error: float | None = None


class VariantFiles(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    quantization: Quantization
    layers: list[LayerFile]


class Rung(msgspec.Struct, frozen=True, forbid_unknown_fields=True, order=True):
    """One step of a ladder: this layer takes this variant."""

    layer: int
    to: Variant


class Distance(StrEnum):
    """Between vectors, from 0; a similarity of LIS is 1 less the distance."""

    COSINE = "cosine"  # 1 - cos(a, b)
    L2 = "l2"  # |a - b| / (|a| + |b|)


class LisSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How LIS was computed."""

    weights: tuple[float, float, float] = (0.25, 0.25, 0.5)  # of LTS, LRS and MDS
    distance: Distance = Distance.COSINE

    def __post_init__(self) -> None:
        if not (min(self.weights) >= 0 and 0 < sum(self.weights) < math.inf):
            raise ValueError(f"weights {self.weights} of LIS must be at least 0 and not all 0")


class LayerScores(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What replacing one layer alone does, on the calibration text; None: LIS was not asked for."""

    freed_bytes: dict[Variant, int]  # of its files, against full precision
    divergence: dict[Variant, float]  # KL from full precision, nats per token
    lts: float | None = None  # how little the layer transforms its input
    lrs: float | None = None  # how close its INT4 variant comes
    mds: float | None = None  # how little the logits move


class RankedOrder(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An order of demotion to INT4, first layer first, and what it costs.

    Costs are lists over the numbers of replacements in Ranking.replaced; divergence is KL from
    full precision in nats per token.
    """

    name: str  # lis, kl-per-byte, front-to-back, back-to-front, random-SEED
    layers: list[int]
    scores: list[float]  # of each layer when it was taken; empty for orders without scores
    selection_divergence: list[float]  # on the text that chooses
    perplexity: list[float]  # on the text that reports
    divergence: list[float]  # on the text that reports


class Ladder(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Steps through INT8 to INT4, each layer taking both in this order, and what they cost."""

    name: str
    rungs: list[Rung]
    freed_bytes: list[int]  # after each rung, of the layers' files, from all at full precision
    divergence: list[float]  # after each rung, on the text that reports


class Ranking(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `morph profile` found. Its three texts share nothing."""

    calibration: TextSample  # that layers were scored on
    selection: TextSample  # that an order was chosen by
    evaluation: TextSample  # that figures are reported of
    replaced: list[int]  # numbers of INT4 layers at which orders were compared
    layers: list[LayerScores]
    orders: list[RankedOrder]
    chosen: str  # name of the order that is kept
    lis: LisSettings | None = None  # if LIS was asked for
    ladder: Ladder | None = None  # of bundles with INT8


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole of `bundle.json`; it is written last, so that a folder with it is complete."""

    format: str
    schema: int
    tool: str  # program and version that wrote the bundle
    base: Base
    architecture: Architecture
    variants: dict[Variant, VariantFiles]
    ranking: Ranking | None = None
    costs: list[DeviceCosts] = []  # one entry per device
    checksum: str = ""  # sha256 of the file as it is with "" here


class _Header(msgspec.Struct):
    """The part that every schema has."""

    format: str
    schema: int


class _Facts(msgspec.Struct):
    architecture: dict[str, Any]


def encode(manifest: Manifest) -> bytes:
    """The file's content, indented, with its checksum filled in."""
    bare = msgspec.structs.replace(manifest, checksum="")
    data = msgspec.json.format(msgspec.json.encode(bare), indent=2) + b"\n"
    head, tail = data.rsplit(b'"checksum": ""', 1)
    return head + b'"checksum": "' + _digest(data) + b'"' + tail


def decode(data: bytes) -> Manifest:
    """The manifest in a file's content. Raises ValueError with the reason it cannot be used."""
    header = msgspec.json.decode(data, type=_Header)
    if header.format != FORMAT:
        raise ValueError(f"its format is {header.format!r}, not {FORMAT!r}")
    if header.schema != SCHEMA:
        raise ValueError(f"its schema is {header.schema}, this program reads {SCHEMA}")
    manifest = msgspec.json.decode(data, type=Manifest)
    if manifest.checksum.encode() != _digest(data.replace(manifest.checksum.encode(), b"", 1)):
        raise ValueError("its checksum does not match: it was edited or damaged")
    _check_variants(manifest.variants)
    facts = msgspec.json.decode(data, type=_Facts).architecture
    if facts != msgspec.json.decode(msgspec.json.encode(manifest.architecture)):
        raise ValueError("its architecture does not hold exactly the facts of this schema")
    if any(fact < 1 for fact in facts.values() if type(fact) is int):
        raise ValueError("its architecture has sizes that are not positive")
    _check_ranking(manifest)
    for costs in manifest.costs:
        _check_costs(costs)
    return manifest


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).hexdigest().encode()


def _check_variants(variants: Mapping[Variant, VariantFiles]) -> None:
    if Variant.INT4 not in variants or Variant.FULL in variants:
        raise ValueError("its variants must be int4 and, if wanted, int8")
    for variant, files in variants.items():
        if files.quantization.bits != _BITS[variant]:
            raise ValueError(f"its {variant} variant has {files.quantization.bits} bits")
        if files.quantization.group_size < 0:
            raise ValueError(f"its {variant} variant has a negative group size")


def _check_ranking(manifest: Manifest) -> None:
    ranking = manifest.ranking
    if ranking is None:
        return
    layers = list(range(len(manifest.variants[Variant.INT4].layers)))
    if len(ranking.layers) != len(layers):
        raise ValueError("its ranking does not hold scores of every layer")
    for order in ranking.orders:
        if sorted(order.layers) != layers:
            raise ValueError("an order in its ranking does not hold every layer once")
        costs = order.selection_divergence, order.perplexity, order.divergence
        if len(order.scores) not in (0, len(layers)) or not _all_of(costs, ranking.replaced):
            raise ValueError("an order in its ranking lacks scores or costs, or has too many")
    if ranking.chosen not in [order.name for order in ranking.orders]:
        raise ValueError("the order it chose is not in its ranking")
    ladder = ranking.ladder
    if ladder and not _all_of((ladder.freed_bytes, ladder.divergence), ladder.rungs):
        raise ValueError("the ladder in its ranking lacks costs, or has too many")
    steps = [Rung(layer, to) for layer in layers for to in (Variant.INT8, Variant.INT4)]
    if ladder and sorted(ladder.rungs, key=lambda rung: rung.layer) != steps:
        raise ValueError("the ladder in its ranking does not take each layer to int8, then int4")
    if ladder and Variant.INT8 not in manifest.variants:
        raise ValueError("its ranking has a ladder through int8, which it lacks")


def _all_of(lists: Iterable[Sequence[float]], steps: Sequence[object]) -> bool:
    """Whether each list has one entry per step."""
    return all(len(entries) == len(steps) for entries in lists)


def _check_costs(costs: DeviceCosts) -> None:
    if any(layer.variant not in (*Variant,) for layer in costs.layers):
        raise ValueError(f"its costs on {costs.device} are of an unknown variant")
    curves = [costs.rest, *(layer.curve for layer in costs.layers)]
    if any(len(curve.tokens) != len(curve.seconds) for curve in curves):
        raise ValueError(f"its costs on {costs.device} lack times of some numbers of tokens")
    if any(sorted(set(curve.tokens)) != curve.tokens for curve in curves):
        raise ValueError(f"its costs on {costs.device} are of numbers of tokens that do not rise")
    measured = [number for curve in curves for number in (*curve.tokens, *curve.seconds)]
    measured += [entry.seconds for entry in costs.attention]
    if min(measured, default=1) <= 0:
        raise ValueError(f"its costs on {costs.device} hold times or tokens that are not positive")
