"""Orders that were asked for, by name."""

import pytest

from morphserve.configs.errors import ConfigError
from morphserve.profile.additive import Single
from morphserve.profile.orders import RankSettings, make_orders
from morphserve.profile.sensitivity import Lis, Ranked

SINGLES = [Single(divergence, 10) for divergence in (0.3, 0.1, 0.2, 0.5)]
NO_SCORES = [0.0] * 4


def test_every_order_holds_every_layer_once_and_random_ones_are_those_of_their_seeds() -> None:
    lis = Lis([Ranked(i, 1.0 - i) for i in (2, 1, 0, 3)], NO_SCORES, NO_SCORES, NO_SCORES)
    made = make_orders(RankSettings(num_random=3), SINGLES, lis)
    fixed = ["lis", "kl-per-byte", "front-to-back", "back-to-front"]
    assert list(made) == [*fixed, "random-0", "random-1", "random-2"]
    assert all(sorted(order.layers) == [0, 1, 2, 3] for order in made.values())
    assert made["lis"].layers == [2, 1, 0, 3]
    assert made["lis"].scores == [-1.0, 0.0, 1.0, -2.0]
    assert made["kl-per-byte"].layers == [1, 2, 0, 3]
    assert made["kl-per-byte"].scores == pytest.approx([0.01, 0.02, 0.03, 0.05])
    assert made["front-to-back"].layers == made["back-to-front"].layers[::-1] == [0, 1, 2, 3]
    assert made == make_orders(RankSettings(num_random=3), SINGLES, lis)
    assert len({tuple(made[f"random-{seed}"].layers) for seed in range(3)}) > 1


def test_only_what_is_asked_for_is_made() -> None:
    assert list(make_orders(RankSettings(orders=["back-to-front"]), SINGLES, None)) == [
        "back-to-front"
    ]


def test_unknown_orders_are_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match="no order 'alphabetical': choose from lis, kl-per-byte"):
        RankSettings(orders=["lis", "alphabetical"])
    with pytest.raises(ConfigError, match="leave `random` out"):
        RankSettings(num_random=0)
    settings = RankSettings(["front-to-back"], num_random=0)
    assert list(make_orders(settings, SINGLES, None)) == ["front-to-back"]
