"""Perplexity of a mix of layers is that of the weights a server computes with in it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from morphserve.morphcli.bench.quality import open_quality
from morphserve.profile.perplexity import perplexity
from morphserve.quantize.build import QuantizeSettings, build_bundle
from morphserve.quantize.bundle import open_bundle
from morphserve.quantize.calibration import Part, draw_windows
from morphserve.quantize.checkpoint import open_checkpoint
from morphserve.quantize.manifest import Variant

FULL, INT8, INT4 = Variant.FULL, Variant.INT8, Variant.INT4


def test_each_mix_is_measured_with_its_own_weights(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    text, folder = tmp_path / "text.txt", tmp_path / "bundle"
    text.write_text(" ".join(map(str, range(8000))))
    checkpoint = open_checkpoint(str(tiny_model("llama")))
    build_bundle(checkpoint, folder, QuantizeSettings("rtn", 32, int8=True))
    mixes = [(FULL, FULL, FULL), (INT4, FULL, FULL), (INT8, INT8, INT8), (INT8, INT4, INT8)]
    found = open_quality(str(checkpoint.path), folder, text).perplexities(mixes[1:])
    assert found.keys() == set(mixes)
    assert len(set(found.values())) == len(mixes)
    length = min(512, checkpoint.architecture.max_position)
    windows = draw_windows(checkpoint, str(text), Part.EVALUATION, 8, length).tokens
    bundle = open_bundle(str(folder), checkpoint)
    for int4_layers, mix in ((), mixes[0]), ([0], mixes[1]):
        expected = perplexity(checkpoint, bundle, int4_layers, windows)
        assert found[mix] == pytest.approx(expected, rel=1e-6)


def test_without_a_bundle_full_precision_alone_is_known(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(map(str, range(8000))))
    quality = open_quality(str(tiny_model("llama")), None, text)
    assert quality.perplexities([(INT4, FULL, FULL)]).keys() == {(FULL, FULL, FULL)}
