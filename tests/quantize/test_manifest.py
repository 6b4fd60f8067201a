"""What is written of a bundle is read back, and nothing else is."""

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from morphserve.quantize.architecture import Architecture, Rope
from morphserve.quantize.manifest import (
    FORMAT,
    SCHEMA,
    Base,
    LayerFile,
    Manifest,
    Quantization,
    Variant,
    VariantFiles,
    decode,
    encode,
)

ARCHITECTURE = Architecture(
    family="llama",
    num_layers=1,
    hidden_size=64,
    intermediate_size=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=264,
    max_position=256,
    norm_eps=1e-6,
    rope=Rope(10000.0),
    tied_head=False,
    qkv_bias=False,
    output_bias=False,
    mlp_bias=False,
    qk_norm=False,
    dtype="bfloat16",
    eos_token_ids=(257, 0),
)


def a_manifest(name: str = "model", weight_error: float = 0.1) -> Manifest:
    layer = LayerFile("layer-00000.int4.safetensors", 10, "00", weight_error)
    files = VariantFiles(Quantization("rtn", 4, 32, True), [layer])
    return Manifest(
        FORMAT, SCHEMA, "morphserve 0", Base(name, "00"), ARCHITECTURE, {Variant.INT4: files}
    )


@given(st.text(st.characters(codec="utf-8")), st.floats(allow_nan=False, allow_infinity=False))
def test_a_manifest_comes_back_as_it_was(name: str, weight_error: float) -> None:
    manifest = a_manifest(name, weight_error)
    found = decode(encode(manifest))
    assert (found.base, found.variants) == (manifest.base, manifest.variants)
    assert found.architecture == ARCHITECTURE


@pytest.mark.parametrize("name", ['"checksum": ""', "100 %s", "\\", '", "checksum": "'])
def test_names_cannot_confuse_the_checksum(name: str) -> None:
    assert decode(encode(a_manifest(name))).base.name == name


def test_the_checksum_is_of_the_file_without_it() -> None:
    data = encode(a_manifest())
    checksum = json.loads(data)["checksum"]
    assert hashlib.sha256(data.replace(checksum.encode(), b"")).hexdigest() == checksum


def test_not_even_blanks_may_change() -> None:
    data = encode(a_manifest())
    for changed in (data + b"\n", data.replace(b"  ", b" ", 1), data.replace(b"\n", b"\r\n")):
        with pytest.raises(ValueError, match="checksum does not match"):
            decode(changed)
