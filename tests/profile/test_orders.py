"""Orders are compared on text they were not ranked on, and the closest to full precision wins."""

from collections.abc import Callable
from pathlib import Path

import pytest

from morphserve.profile.orders import fixed_orders, mean_divergence, rank, replacement_counts
from morphserve.quantize.bundle import open_bundle
from morphserve.quantize.calibration import Part, draw_windows
from morphserve.quantize.checkpoint import open_checkpoint


def test_orders_compare_at_powers_of_two_and_the_ends() -> None:
    assert replacement_counts(12) == [0, 1, 2, 4, 8, 12]
    assert replacement_counts(16) == [0, 1, 2, 4, 8, 16]
    assert replacement_counts(1) == [0, 1]


def test_fixed_orders_hold_every_layer_once() -> None:
    orders = fixed_orders(9, seed=1)
    assert orders["front-to-back"] == orders["back-to-front"][::-1] == list(range(9))
    assert sorted(orders["random-1"]) == list(range(9))
    assert (
        orders["random-1"] == fixed_orders(9, seed=1)["random-1"] != fixed_orders(9, 2)["random-2"]
    )


def test_the_order_closest_to_full_precision_is_chosen(
    tiny_model: Callable[[str], Path], tiny_bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(tiny_model("llama")))
    bundle = open_bundle(str(tiny_bundle("llama")), checkpoint)
    text = tmp_path / "text.txt"
    text.write_text("".join(map(chr, range(32, 127))) * 40)
    calibration = draw_windows(checkpoint, str(text), Part.CALIBRATION, 2, 64)
    selection = draw_windows(checkpoint, str(text), Part.SELECTION, 2, 64)
    seen: list[tuple[str, int, int]] = []
    ranking = rank(checkpoint, bundle, calibration, selection, 0, lambda *step: seen.append(step))
    means = {order.name: mean_divergence(order) for order in ranking.orders}
    assert set(means) == {"lis", "front-to-back", "back-to-front", "random-0"}
    assert means[ranking.chosen] == min(means.values())
    for order in ranking.orders:
        assert sorted(order.layers) == [0, 1, 2]
        assert len(order.perplexity) == len(order.divergence) == len(ranking.replaced)
        assert order.divergence[0] == 0
        assert order.divergence[-1] == pytest.approx(ranking.orders[0].divergence[-1])
    assert len(ranking.orders[0].scores) == 3
    assert (ranking.calibration, ranking.selection) == (calibration.sample, selection.sample)
    phases = ("ranking layers", "comparing orders")
    last = {phase: [step for step in seen if step[0] == phase][-1] for phase in phases}
    assert all(done == total for _, done, total in last.values())
