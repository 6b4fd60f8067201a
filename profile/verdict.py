"""What a ranking means, in words."""

from collections.abc import Sequence

from morphserve.profile.orders import FRONT_TO_BACK, RANDOM
from morphserve.profile.ranking import mean_between
from morphserve.quantize.manifest import RankedOrder, Ranking

_TIE = 0.005  # relative difference under which costs are called equal


def chosen_order(ranking: Ranking) -> RankedOrder:
    return next(order for order in ranking.orders if order.name == ranking.chosen)


def headline(ranking: Ranking) -> str:
    """Which order was chosen, and what it costs at the most layers below all."""
    order, at = chosen_order(ranking), -2
    if len(order.layers) == 1:
        return f"the only layer costs {show_kl(order.divergence[-1])} nats of KL per token at INT4"
    return (
        f"{order.name} is the order to demote layers in: {ranking.replaced[at]} of "
        f"{len(order.layers)} layers at INT4 cost {show_kl(order.divergence[at])} nats of KL per "
        f"token, all of them {show_kl(order.divergence[-1])}"
    )


def verdict(ranking: Ranking) -> list[str]:
    """Sentences on the order that was chosen, by the text that reports."""
    order = chosen_order(ranking)
    perplexity = order.perplexity
    sentences = [
        f"Perplexity is {perplexity[0]:.3f} at full precision and {perplexity[-1]:.3f} "
        f"({perplexity[-1] / perplexity[0] - 1:+.2%}) with every layer at INT4."
    ]
    rivals = [other for other in ranking.orders if other.layers != order.layers]
    if rivals:
        sentences.insert(0, _margins(order, rivals, ranking))
    return sentences


def show_kl(value: float) -> str:
    """In thousandths, as tables and drawings have it: 3.40e-3."""
    return f"{1e3 * value:.2f}e-3"


def _margins(order: RankedOrder, rivals: Sequence[RankedOrder], ranking: Ranking) -> str:
    own = mean_between(order.divergence)
    costs = {rival.name: mean_between(rival.divergence) for rival in rivals}
    nearest = min(costs, key=lambda name: costs[name])
    random = [cost for name, cost in costs.items() if name.startswith(f"{RANDOM}-")]
    margins = [f"{_margin(own, costs[nearest])} {nearest}, the best of the others"]
    if FRONT_TO_BACK in costs and nearest != FRONT_TO_BACK:
        margins.append(f"{_margin(own, costs[FRONT_TO_BACK])} {FRONT_TO_BACK}")
    if len(random) > 1:
        mean = sum(random) / len(random)
        margins.append(f"{_margin(own, mean)} {len(random)} random orders on average")
    numbers = ", ".join(map(str, ranking.replaced[1:-1] or ranking.replaced))
    return (
        f"On text that neither scored layers nor chose an order, its mean KL over {numbers} INT4 "
        f"layers is {show_kl(own)}: {'; '.join(margins)}."
    )


def _margin(own: float, other: float) -> str:
    if abs(own - other) <= _TIE * other:
        return "as much as"
    share = f"{abs(own / other - 1):.0%} " if other else ""
    return f"{share}{'below' if own < other else 'above'}"
