"""Orders are compared on text they were not scored on, reported of a third, and one wins."""

from collections.abc import Callable
from pathlib import Path

import pytest

from morphserve.profile.mixes import Model, mix_of
from morphserve.profile.orders import RankSettings
from morphserve.profile.perplexity import measure
from morphserve.profile.ranking import (
    Texts,
    choose,
    draw_texts,
    mean_between,
    rank,
    replacement_counts,
)
from morphserve.profile.sensitivity import rank_layers
from morphserve.quantize.build import QuantizeSettings, build_bundle
from morphserve.quantize.bundle import open_bundle
from morphserve.quantize.checkpoint import open_checkpoint
from morphserve.quantize.manifest import LisSettings, RankedOrder, Ranking, Variant


def test_orders_compare_at_powers_of_two_and_the_ends() -> None:
    assert replacement_counts(12) == [0, 1, 2, 4, 8, 12]
    assert replacement_counts(16) == [0, 1, 2, 4, 8, 16]
    assert replacement_counts(1) == [0, 1]
    assert mean_between([0, 1, 2, 9]) == 1.5


def test_only_the_text_that_chooses_chooses() -> None:
    low, high = [0.0, 0.1, 0.2, 0.9], [0.0, 0.2, 0.2, 0.8]
    good = RankedOrder("good", [0, 1, 2], [], low, perplexity=high, divergence=high)
    lucky = RankedOrder("lucky", [2, 1, 0], [], high, perplexity=low, divergence=low)
    assert choose([lucky, good]) == good


@pytest.fixture(params=[False, True], ids=["int4", "int8 and int4"])
def model(
    request: pytest.FixtureRequest, tiny_model: Callable[[str], Path], tmp_path: Path
) -> Model:
    checkpoint = open_checkpoint(str(tiny_model("llama")))
    build_bundle(checkpoint, tmp_path / "b", QuantizeSettings("rtn", 32, int8=request.param))
    return Model(checkpoint, open_bundle(str(tmp_path / "b"), checkpoint))


@pytest.fixture
def texts(tiny_model: Callable[[str], Path], tmp_path: Path) -> Texts:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(map(str, range(1000))))
    return draw_texts(open_checkpoint(str(tiny_model("llama"))), str(text), 2, 64)


def test_the_order_closest_to_full_precision_is_chosen_and_reported_on_other_text(
    model: Model, texts: Texts
) -> None:
    seen: list[tuple[str, int, int]] = []
    ranking = rank(model, texts, RankSettings(num_random=2), lambda *step: seen.append(step))
    fixed = {"lis", "kl-per-byte", "front-to-back", "back-to-front"}
    assert {order.name for order in ranking.orders} == {*fixed, "random-0", "random-1"}
    assert ranking.chosen == choose(ranking.orders).name
    for order in ranking.orders:
        for k, perplexity, reported, chosen_by in zip(
            *(ranking.replaced, order.perplexity, order.divergence, order.selection_divergence),
            strict=True,
        ):
            mix = mix_of(order.layers[:k], 3)
            quality = measure(model, texts.evaluation.tokens, [mix])[mix]
            assert perplexity == pytest.approx(quality.perplexity, rel=1e-5)
            assert reported == pytest.approx(quality.divergence, rel=1e-4, abs=1e-9)
            other = measure(model, texts.selection.tokens, [mix])[mix]
            assert chosen_by == pytest.approx(other.divergence, rel=1e-4, abs=1e-9)
    samples = (texts.calibration.sample, texts.selection.sample, texts.evaluation.sample)
    assert (ranking.calibration, ranking.selection, ranking.evaluation) == samples
    assert len({sample.sha256 for sample in samples}) == 3
    assert ranking.lis == LisSettings()
    last = {phase: (done, total) for phase, done, total in seen}
    assert len(last) == 4
    assert all(done == total for done, total in last.values())


def test_layers_are_scored_on_the_text_of_calibration(model: Model, texts: Texts) -> None:
    ranking = rank(model, texts, RankSettings(orders=["lis"]))
    lis = rank_layers(model, texts.calibration.tokens)
    assert ranking.orders[0].layers == [entry.layer for entry in lis.order]
    for i, layer in enumerate(ranking.layers):
        assert (layer.lts, layer.lrs, layer.mds) == pytest.approx(
            (lis.lts[i], lis.lrs[i], lis.mds[i]), abs=1e-7
        )
        for variant in model.variants:
            mix = mix_of([i], 3, variant)
            cost = measure(model, texts.calibration.tokens, [mix])[mix].divergence
            assert layer.divergence[variant] == pytest.approx(cost, rel=1e-4)


def test_a_bundle_with_int8_gets_a_ladder(model: Model, texts: Texts) -> None:
    ranking = rank(model, texts, RankSettings(orders=["front-to-back"]))
    assert ranking.lis is None
    assert [layer.lts for layer in ranking.layers] == [None] * 3
    if Variant.INT8 not in model.variants:
        assert ranking.ladder is None
        return
    check_ladder(ranking)


def check_ladder(ranking: Ranking) -> None:
    ladder = ranking.ladder
    assert ladder is not None
    assert len(ladder.rungs) == 6
    assert ladder.freed_bytes == sorted(ladder.freed_bytes)
    freed = [layer.freed_bytes[Variant.INT4] for layer in ranking.layers]
    assert ladder.freed_bytes[-1] == sum(freed)
    all_int4 = ranking.orders[0].divergence[-1]
    assert ladder.divergence[-1] == pytest.approx(all_int4, rel=1e-5)
    assert 0 < ladder.divergence[0] < all_int4
