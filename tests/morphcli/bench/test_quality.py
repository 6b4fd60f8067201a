"""Perplexity of a number of INT4 layers is that of the layers a server demotes first."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from morphserve.morphcli.bench.quality import open_quality
from morphserve.profile.mixes import Model
from morphserve.profile.orders import RankSettings
from morphserve.profile.perplexity import perplexity
from morphserve.profile.ranking import draw_texts, rank
from morphserve.quantize.bundle import open_bundle
from morphserve.quantize.calibration import Part, draw_windows
from morphserve.quantize.checkpoint import open_checkpoint


@pytest.mark.parametrize("name", ["front-to-back", "back-to-front"])
def test_perplexities_follow_the_bundles_order(
    name: str, tiny_model: Callable[[str], Path], tiny_bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    text, folder = tmp_path / "text.txt", tmp_path / "bundle"
    text.write_text(" ".join(map(str, range(8000))))
    shutil.copytree(tiny_bundle("llama"), folder)
    checkpoint = open_checkpoint(str(tiny_model("llama")))
    bundle = open_bundle(str(folder), checkpoint)
    texts = draw_texts(checkpoint, str(text), 1, 32)
    bundle = bundle.with_ranking(rank(Model(checkpoint, bundle), texts, RankSettings([name])))
    order = {"front-to-back": [0, 1, 2], "back-to-front": [2, 1, 0]}[name]
    found = open_quality(str(checkpoint.path), folder, text).perplexities([0, 1, 2, 3, 4])
    assert list(found) == [0, 1, 2, 3]
    length = min(512, checkpoint.architecture.max_position)
    windows = draw_windows(checkpoint, str(text), Part.EVALUATION, 8, length).tokens
    for level, value in found.items():
        expected = perplexity(checkpoint, bundle, order[:level], windows)
        assert value == pytest.approx(expected, rel=1e-6)
    assert found[1] != pytest.approx(perplexity(checkpoint, bundle, order[1:2], windows), rel=1e-6)
