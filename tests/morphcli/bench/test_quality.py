"""What a mix of layers costs is measured with the weights that a server computes with in it."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from bench_runs import answered, make_run, make_summary

from morphserve.configs.errors import ConfigError
from morphserve.morphcli.bench.figures import PolicySummary
from morphserve.morphcli.bench.quality import open_quality
from morphserve.morphcli.bench.record import MixPerplexity
from morphserve.profile.perplexity import perplexity
from morphserve.quantize.build import QuantizeSettings, build_bundle
from morphserve.quantize.bundle import open_bundle
from morphserve.quantize.calibration import Part, draw_windows
from morphserve.quantize.checkpoint import open_checkpoint
from morphserve.quantize.manifest import Variant

FULL, INT8, INT4 = Variant.FULL, Variant.INT8, Variant.INT4
MIXES = [(FULL, FULL, FULL), (INT4, FULL, FULL), (INT8, INT8, INT8), (INT8, INT4, INT8)]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(map(str, range(8000))))
    return path


@pytest.fixture
def bundled(tiny_model: Callable[[str], Path], tmp_path: Path) -> tuple[str, Path]:
    """A model and a bundle of it with INT8 and INT4."""
    checkpoint, folder = open_checkpoint(str(tiny_model("llama"))), tmp_path / "bundle"
    build_bundle(checkpoint, folder, QuantizeSettings("rtn", 32, int8=True))
    return str(checkpoint.path), folder


def policies_that_served(*served: Mapping[tuple[Variant, ...], int]) -> list[PolicySummary]:
    runs = [make_run(f"policy {i}", [answered(0, 0.1)], []) for i in range(len(served))]
    return make_summary(runs)[0].policies


def by_mix(found: list[MixPerplexity]) -> dict[tuple[Variant, ...], MixPerplexity]:
    return {tuple(each.layers): each for each in found}


def test_each_mix_is_measured_with_its_own_weights(bundled: tuple[str, Path], text: Path) -> None:
    checkpoint = open_checkpoint(bundled[0])
    served = dict.fromkeys(MIXES[1:], 10)
    listed = open_quality(*bundled, text).judge(policies_that_served(served), [served])
    assert [each.perplexity for each in listed] == sorted(each.perplexity for each in listed)
    found = by_mix(listed)
    assert found.keys() == set(MIXES)
    assert len({each.perplexity for each in listed}) == len(MIXES)
    length = min(512, checkpoint.architecture.max_position)
    windows = draw_windows(checkpoint, str(text), Part.EVALUATION, 8, length).tokens
    bundle = open_bundle(str(bundled[1]), checkpoint)
    for int4_layers, mix in ((), MIXES[0]), ([0], MIXES[1]):
        expected = perplexity(checkpoint, bundle, int4_layers, windows)
        assert found[mix].perplexity == pytest.approx(expected, rel=1e-6)


def test_only_full_precision_does_not_diverge_from_itself(
    bundled: tuple[str, Path], text: Path
) -> None:
    served = dict.fromkeys(MIXES, 1)
    found = by_mix(open_quality(*bundled, text).judge(policies_that_served(served), [served]))
    kl = {mix: found[mix].kl or 0.0 for mix in MIXES}
    assert kl[MIXES[0]] == pytest.approx(0, abs=1e-9)
    assert all(kl[mix] > 1e-6 for mix in MIXES[1:])
    assert kl[INT8, INT8, INT8] < kl[INT8, INT4, INT8]


def test_a_policys_divergence_weighs_its_mixes_by_their_tokens(
    bundled: tuple[str, Path], text: Path
) -> None:
    served = [{MIXES[0]: 7}, {MIXES[0]: 30, MIXES[1]: 10}, {}]
    policies = policies_that_served(*served)
    found = by_mix(open_quality(*bundled, text).judge(policies, served))
    full, morph, idle = policies
    assert full.kl == pytest.approx(0, abs=1e-9)
    assert full.perplexity == pytest.approx(found[MIXES[0]].perplexity)
    assert morph.kl == pytest.approx((found[MIXES[1]].kl or 0) / 4)
    assert idle.kl is idle.perplexity is None  # it served nothing that could be judged


def test_without_a_bundle_full_precision_alone_is_known(
    tiny_model: Callable[[str], Path], text: Path
) -> None:
    quality = open_quality(str(tiny_model("llama")), None, text)
    served: list[Mapping[tuple[Variant, ...], int]] = [{MIXES[1]: 5}]
    policies = policies_that_served(*served)
    assert by_mix(quality.judge(policies, served)).keys() == {MIXES[0]}
    assert policies[0].kl is policies[0].perplexity is None


def test_prompts_that_are_rows_are_no_text_to_measure_on(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a"}\n' * 5000)
    with pytest.raises(ConfigError, match="give a longer --prompts FILE"):
        open_quality(str(tiny_model("llama")), None, rows)  # this model brings no text of its own
