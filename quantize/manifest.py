"""What `bundle.json` says: base checkpoint, quantisation, files, and the ranking of layers.

Unknown fields and wrong types are errors.
"""

import hashlib
from typing import Any

import msgspec

FORMAT = "morphserve-bundle"
SCHEMA = 1


class Base(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The full-precision checkpoint a bundle belongs to."""

    name: str
    fingerprint: str  # Checkpoint.fingerprint()


class Quantization(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    method: str  # rtn
    group_size: int  # inputs that share a scale
    bits: int = 4
    symmetric: bool = True
    zero_code: int = 8  # the code of weight 0; there is no qzeros tensor
    layout: str = "gptq-v1"  # inputs in order: there is no g_idx tensor


class LayerFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One layer's INT4 variant; the position in the list is the layer."""

    name: str
    num_bytes: int
    sha256: str
    relative_error: float  # norm of the rounding error over norm of the weights, all linears


class TextSample(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Token windows that something was measured on."""

    source: str  # file name and part
    sha256: str  # of the token ids
    num_windows: int
    window_tokens: int


class RankedOrder(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An order of demotion, first layer first, and what it costs."""

    name: str  # lis, front-to-back, back-to-front, random
    layers: list[int]
    scores: list[float]  # LIS of each layer when it was taken; empty for other orders
    perplexity: list[float]  # after each number of replacements in Ranking.replaced
    divergence: list[float]  # KL from full precision there, nats per token


class Ranking(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `morph profile` found. Calibration and evaluation share no text."""

    seed: int
    calibration: TextSample
    evaluation: TextSample
    replaced: list[int]  # numbers of INT4 layers at which orders were compared
    orders: list[RankedOrder]
    chosen: str  # name of the order with the lowest mean divergence


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole of `bundle.json`; it is written last, so that a folder with it is complete."""

    format: str
    schema: int
    tool: str  # program and version that wrote the bundle
    base: Base
    architecture: dict[str, Any]
    quantization: Quantization
    layers: list[LayerFile]
    ranking: Ranking | None = None
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
    layers = list(range(len(manifest.layers)))
    if any(sorted(order.layers) != layers for order in manifest.ranking.orders):
        raise ValueError("an order in its ranking does not hold every layer once")
    if manifest.ranking.chosen not in [order.name for order in manifest.ranking.orders]:
        raise ValueError("the order it chose is not in its ranking")
