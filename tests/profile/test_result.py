"""A profile's studies are of the text that reports, whatever scored layers."""

from collections.abc import Callable
from pathlib import Path

import pytest

from morphserve.profile.independence import study_independence
from morphserve.profile.mixes import Model
from morphserve.profile.orders import RankSettings
from morphserve.profile.positions import study_positions
from morphserve.profile.ranking import draw_texts
from morphserve.profile.result import Study, make_profile
from morphserve.profile.verdict import chosen_order
from morphserve.quantize.bundle import open_bundle
from morphserve.quantize.checkpoint import open_checkpoint


def test_studies_are_measured_on_the_text_that_reports(
    tiny_model: Callable[[str], Path], tiny_bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(tiny_model("llama")))
    bundle = open_bundle(str(tiny_bundle("llama")), checkpoint)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(map(str, range(1000))))
    texts = draw_texts(checkpoint, str(text), 2, 64)
    found = make_profile(checkpoint, bundle, texts, RankSettings(["kl-per-byte"]), list(Study))
    assert found.positions is not None and found.independence is not None
    assert found.positions.text == found.independence.text == texts.evaluation.sample
    model = Model(checkpoint, bundle)
    positions = study_positions(model, texts.evaluation)
    for ours, expected in zip(found.positions.schedules, positions.schedules, strict=True):
        assert ours.divergence == pytest.approx(expected.divergence, rel=1e-4, abs=1e-7)
    order = chosen_order(found.ranking).layers
    independence = study_independence(model, order, texts.evaluation)
    assert found.independence.summed == pytest.approx(independence.summed, rel=1e-4)
    assert make_profile(checkpoint, bundle, texts, RankSettings(["kl-per-byte"])).positions is None
