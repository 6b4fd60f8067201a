"""The extra cost of one more layer, and costs alone against costs together."""

from collections.abc import Callable
from pathlib import Path

import pytest

from morphserve.profile.independence import study_independence
from morphserve.profile.mixes import Model
from morphserve.profile.perplexity import perplexity
from morphserve.quantize.bundle import open_bundle
from morphserve.quantize.calibration import Part, draw_windows
from morphserve.quantize.checkpoint import open_checkpoint


def test_a_probe_is_the_difference_of_two_whole_measurements(
    tiny_model: Callable[[str], Path], tiny_bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(tiny_model("llama")))
    bundle = open_bundle(str(tiny_bundle("llama")), checkpoint)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(map(str, range(1000))))
    windows = draw_windows(checkpoint, str(text), Part.EVALUATION, 2, 64)
    seen: list[tuple[str, int, int]] = []
    study = study_independence(
        Model(checkpoint, bundle), [1, 0, 2], windows, lambda *step: seen.append(step)
    )
    assert study.text == windows.sample
    assert study.probed == [0, 1, 2]
    assert [probe.layer for probe in study.probes] == [2]  # the only one behind the first two
    for n, extra in zip(study.probed, study.probes[0].perplexity, strict=True):
        taken = [1, 0][:n]
        more = perplexity(checkpoint, bundle, [*taken, 2], windows.tokens)
        less = perplexity(checkpoint, bundle, taken, windows.tokens)
        assert extra == pytest.approx(more - less, abs=1e-2 * abs(more - less) + 1e-4)
    assert study.replaced == [1, 2, 3]
    assert study.joint[0] == study.summed[0]
    assert study.summed == sorted(study.summed)
    probe = study.probes[0].divergence
    assert study.joint[2] == pytest.approx(study.joint[1] + probe[2])
    assert study.summed[2] == pytest.approx(study.summed[1] + probe[0])
    assert seen[-1][1] == seen[-1][2]
