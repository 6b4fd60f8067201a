"""Orders in which layers may be demoted to INT4, by name."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from morphserve.configs.errors import ConfigError
from morphserve.profile.additive import Single, order_by_cost
from morphserve.profile.sensitivity import Lis
from morphserve.quantize.manifest import LisSettings

LIS = "lis"
KL_PER_BYTE = "kl-per-byte"
FRONT_TO_BACK = "front-to-back"
BACK_TO_FRONT = "back-to-front"
RANDOM = "random"  # stands for random-0, random-1, ...
ORDERS = (LIS, KL_PER_BYTE, FRONT_TO_BACK, BACK_TO_FRONT, RANDOM)


@dataclass(frozen=True, slots=True)
class RankSettings:
    """Which orders are compared."""

    orders: Sequence[str] = ORDERS
    num_random: int = 5
    lis: LisSettings = field(default_factory=LisSettings)

    def __post_init__(self) -> None:
        unknown = [name for name in self.orders if name not in ORDERS]
        if unknown or not self.orders:
            what = f"no order {unknown[0]!r}" if unknown else "no order to compare"
            raise ConfigError(f"there is {what}: choose from {', '.join(ORDERS)}")
        if RANDOM in self.orders and self.num_random < 1:
            raise ConfigError("0 random orders cannot be compared: leave `random` out instead")


@dataclass(frozen=True, slots=True)
class Order:
    """Layers, first to be demoted first."""

    layers: list[int]
    scores: list[float]  # of each when it was taken; empty where nothing was measured


def make_orders(
    settings: RankSettings, singles: Sequence[Single], lis: Lis | None
) -> dict[str, Order]:
    """The orders that were asked for; `singles` is each layer at INT4, `lis` None if not wanted."""
    front_to_back = list(range(len(singles)))
    made: dict[str, Order] = {}
    if lis is not None:
        made[LIS] = Order(
            [entry.layer for entry in lis.order], [entry.score for entry in lis.order]
        )
    if KL_PER_BYTE in settings.orders:
        layers = order_by_cost(singles)
        made[KL_PER_BYTE] = Order(layers, [singles[i].per_byte for i in layers])
    if FRONT_TO_BACK in settings.orders:
        made[FRONT_TO_BACK] = Order(front_to_back, [])
    if BACK_TO_FRONT in settings.orders:
        made[BACK_TO_FRONT] = Order(front_to_back[::-1], [])
    if RANDOM in settings.orders:
        for seed in range(settings.num_random):
            layers = random.Random(seed).sample(front_to_back, len(front_to_back))
            made[f"{RANDOM}-{seed}"] = Order(layers, [])
    return made
