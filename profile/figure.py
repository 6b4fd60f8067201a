"""Drawings of a profile."""

from collections.abc import Callable, Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from morphserve.profile.drawing import COLOURS, STYLE
from morphserve.profile.orders import BACK_TO_FRONT, FRONT_TO_BACK, KL_PER_BYTE, LIS, RANDOM
from morphserve.profile.verdict import chosen_order
from morphserve.quantize.manifest import Ladder, RankedOrder, Ranking, Variant

_LOOKS = {  # of each order: colour and marker
    LIS: ("blue", "o"),
    KL_PER_BYTE: ("orange", "s"),
    FRONT_TO_BACK: ("green", "^"),
    BACK_TO_FRONT: ("pink", "v"),
}
_MAX_NUMBERED_BARS = 40  # numbers above more bars would overlap
_KL = "KL, 10⁻³ nats per token"


def orders_figure(ranking: Ranking) -> Figure:
    """KL after each number of INT4 layers, by order."""
    return _figure((7.2, 4.0), lambda axes: _draw_orders(axes, ranking))


def layers_figure(ranking: Ranking) -> Figure:
    """KL of each layer alone at INT4."""
    return _figure((7.2, 3.0), lambda axes: _draw_layers(axes, ranking))


def ladder_figure(ranking: Ranking, ladder: Ladder) -> Figure:
    """KL against bytes freed: through INT8, and by INT4 alone."""
    return _figure((7.2, 3.4), lambda axes: _draw_ladder(axes, ranking, ladder))


def both_figure(ranking: Ranking) -> Figure:
    """Orders and layers side by side, for a file of its own."""
    return _figure(
        (12.5, 4.6),
        lambda axes: _draw_orders(axes, ranking),
        lambda axes: _draw_layers(axes, ranking),
    )


def _figure(inches: tuple[float, float], *drawings: Callable[[Axes], None]) -> Figure:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=inches, layout="constrained")
        for i, draw in enumerate(drawings):
            draw(figure.add_subplot(1, len(drawings), i + 1))
        return figure


def _draw_orders(axes: Axes, ranking: Ranking) -> None:
    numbers = ranking.replaced[1:]
    named = [order for order in ranking.orders if _is_drawn_by_name(order, ranking)]
    others = [order for order in ranking.orders if order not in named]
    for order in others:
        label = others[0].name if len(others) == 1 else f"{len(others)} random orders"
        costs = _thousandths(order.divergence[1:])
        axes.plot(
            numbers,
            costs,
            color=COLOURS["grey"],
            linewidth=1,
            label=label if order is others[0] else None,
        )
    for order in named:
        colour, marker = _LOOKS.get(order.name, ("ink", "D"))
        is_chosen = order.name == ranking.chosen
        axes.plot(
            numbers,
            _thousandths(order.divergence[1:]),
            color=COLOURS[colour],
            marker=marker,
            markersize=8 if is_chosen else 4,
            linewidth=3 if is_chosen else 1.3,
            zorder=4 if is_chosen else 3,
            label=f"{order.name} (chosen)" if is_chosen else order.name,
        )
    axes.set(title="What each order costs", xlabel="INT4 layers", ylabel=_KL)
    axes.set_xscale("log", base=2)
    _log_ticks(axes)
    axes.set_xticks(numbers, [str(number) for number in numbers])
    axes.set_xticks([], minor=True)
    axes.legend(loc="lower right")


def _is_drawn_by_name(order: RankedOrder, ranking: Ranking) -> bool:
    return order.name == ranking.chosen or not order.name.startswith(RANDOM)


def _draw_layers(axes: Axes, ranking: Ranking) -> None:
    costs = _thousandths([layer.divergence[Variant.INT4] for layer in ranking.layers])
    places = {layer: place for place, layer in enumerate(chosen_order(ranking).layers, 1)}
    bars = axes.bar(range(len(costs)), costs, color=COLOURS["blue"], width=0.72)
    label = "layer"
    if len(costs) <= _MAX_NUMBERED_BARS:
        label += f" (number above a bar: its place in {ranking.chosen})"
        size = 8.5 if len(costs) <= 24 else 6.5
        axes.bar_label(bars, [str(places[i]) for i in range(len(costs))], padding=2, fontsize=size)
    axes.set(title="One layer alone at INT4", xlabel=label, ylabel=_KL)
    axes.margins(x=0.02, y=0.12)
    axes.grid(visible=False, axis="x")
    if len(costs) <= 16:
        axes.set_xticks(range(len(costs)))


def _draw_ladder(axes: Axes, ranking: Ranking, ladder: Ladder) -> None:
    order = chosen_order(ranking)
    freed = [ranking.layers[i].freed_bytes[Variant.INT4] for i in order.layers]
    totals = [sum(freed[:number]) / 1e6 for number in ranking.replaced[1:]]
    costs = _thousandths(order.divergence[1:])
    axes.plot(totals, costs, "o-", color=COLOURS["blue"], label=f"INT4 only, {order.name}")
    totals, costs = [value / 1e6 for value in ladder.freed_bytes], _thousandths(ladder.divergence)
    axes.plot(totals, costs, ".-", color=COLOURS["orange"], label="through INT8")
    axes.set(title="Through INT8 to INT4", xlabel="MB freed", ylabel=_KL)
    _log_ticks(axes)
    axes.legend(loc="lower right")


def _thousandths(values: Sequence[float]) -> list[float]:
    return [1e3 * value for value in values]


def _log_ticks(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
