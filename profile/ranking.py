"""Layers scored, orders of demotion compared, and the one that is kept."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, takewhile

from morphserve.profile.additive import Singles, climb, mixes_along, replace_singly
from morphserve.profile.mixes import Mix, Model, mix_of, num_batches
from morphserve.profile.orders import KL_PER_BYTE, LIS, Order, RankSettings, make_orders
from morphserve.profile.perplexity import Quality, measure
from morphserve.profile.sensitivity import Lis, rank_layers
from morphserve.quantize.calibration import Part, Windows, draw_windows
from morphserve.quantize.checkpoint import Checkpoint
from morphserve.quantize.manifest import (
    Ladder,
    LayerScores,
    LisSettings,
    RankedOrder,
    Ranking,
    Rung,
    Variant,
)

OnProgress = Callable[[str, int, int], None]  # phase, steps done, steps in all


@dataclass(frozen=True, slots=True)
class Texts:
    """Windows that share nothing."""

    calibration: Windows  # scores layers
    selection: Windows  # chooses an order
    evaluation: Windows  # is reported of


def draw_texts(
    checkpoint: Checkpoint, source: str | None, samples: int, length: int, seed: int = 0
) -> Texts:
    """`samples` windows for each purpose; see `draw_windows`."""

    def draw(part: Part) -> Windows:
        return draw_windows(checkpoint, source, part, samples, length, seed)

    return Texts(draw(Part.CALIBRATION), draw(Part.SELECTION), draw(Part.EVALUATION))


def rank(
    model: Model,
    texts: Texts,
    settings: RankSettings,
    on_progress: OnProgress = lambda phase, done, total: None,
) -> Ranking:
    """Scores layers on one text, chooses between orders on another, reports of a third."""
    num_layers = model.num_layers
    singles = _score_singly(model, texts.calibration, on_progress)
    lis = None
    if LIS in settings.orders:
        lis = _score_by_lis(model, texts.calibration, settings.lis, on_progress)
    orders = make_orders(settings, singles[Variant.INT4], lis)
    counts = replacement_counts(num_layers)
    paths = {
        name: [mix_of(order.layers[:k], num_layers) for k in counts]
        for name, order in orders.items()
    }
    rungs = climb(singles) if Variant.INT8 in singles else []
    steps = mixes_along(rungs, num_layers)
    mixes = {mix for path in paths.values() for mix in path}
    selected = measured(model, texts.selection, mixes, "comparing orders", on_progress)
    mixes.update(steps)
    reported = measured(model, texts.evaluation, mixes, "measuring quality", on_progress)
    described = [
        _describe(name, order, paths[name], selected, reported) for name, order in orders.items()
    ]
    return Ranking(
        calibration=texts.calibration.sample,
        selection=texts.selection.sample,
        evaluation=texts.evaluation.sample,
        replaced=counts,
        layers=[_layer_scores(i, singles, lis) for i in range(num_layers)],
        orders=described,
        chosen=choose(described).name,
        lis=settings.lis if lis else None,
        ladder=_ladder(model, rungs, steps, reported) if rungs else None,
    )


def replacement_counts(num_layers: int) -> list[int]:
    """0, 1, 2, 4, 8, ... and all layers: the numbers of replacements at which orders compare."""
    powers = takewhile(lambda power: power < num_layers, (2**i for i in count()))
    return [0, *powers, num_layers]


def choose(orders: Sequence[RankedOrder]) -> RankedOrder:
    """The order with the lowest mean KL from full precision, on the text that chooses.

    Perplexity is recorded but does not choose: on a text of practical size one layer moves it by
    less than chance does, and rounding may even seem to improve it.
    """
    return min(orders, key=lambda order: mean_between(order.selection_divergence))


def mean_between(costs: Sequence[float]) -> float:
    """Over the numbers of replacements at which orders can differ: not none, not all."""
    between = costs[1:-1] or costs
    return sum(between) / len(between)


def measured(
    model: Model, windows: Windows, mixes: Collection[Mix], phase: str, on_progress: OnProgress
) -> dict[Mix, Quality]:
    """Quality of each mix, its steps told as those of a phase."""
    step = steps_of(phase, len(set(mixes)) * num_batches(windows.tokens), on_progress)
    return measure(model, windows.tokens, mixes, step)


def steps_of(phase: str, total: int, on_progress: OnProgress) -> Callable[[], None]:
    """A function that reports one more step of a phase each time it is called."""
    done = count(1)
    return lambda: on_progress(phase, next(done), total)


def _score_singly(model: Model, windows: Windows, on_progress: OnProgress) -> Singles:
    total = len(model.variants) * model.num_layers * num_batches(windows.tokens)
    step = steps_of("replacing single layers", total, on_progress)
    return replace_singly(model, windows.tokens, step)


def _score_by_lis(
    model: Model, windows: Windows, settings: LisSettings, on_progress: OnProgress
) -> Lis:
    candidates = model.num_layers * (model.num_layers + 1) // 2
    step = steps_of("ranking by LIS", candidates * num_batches(windows.tokens), on_progress)
    return rank_layers(model, windows.tokens, settings, step)


def _describe(
    name: str,
    order: Order,
    path: Sequence[Mix],
    selected: Mapping[Mix, Quality],
    reported: Mapping[Mix, Quality],
) -> RankedOrder:
    return RankedOrder(
        name=name,
        layers=order.layers,
        scores=order.scores,
        selection_divergence=[selected[mix].divergence for mix in path],
        perplexity=[reported[mix].perplexity for mix in path],
        divergence=[reported[mix].divergence for mix in path],
    )


def _layer_scores(i: int, singles: Singles, lis: Lis | None) -> LayerScores:
    return LayerScores(
        freed_bytes={variant: of_layers[i].freed_bytes for variant, of_layers in singles.items()},
        divergence={variant: of_layers[i].divergence for variant, of_layers in singles.items()},
        lts=lis.lts[i] if lis else None,
        lrs=lis.lrs[i] if lis else None,
        mds=lis.mds[i] if lis else None,
    )


def _ladder(
    model: Model, rungs: Sequence[Rung], steps: Sequence[Mix], reported: Mapping[Mix, Quality]
) -> Ladder:
    return Ladder(
        name=KL_PER_BYTE,
        rungs=list(rungs),
        freed_bytes=[
            sum(model.freed_bytes(i, variant) for i, variant in enumerate(mix)) for mix in steps
        ],
        divergence=[reported[mix].divergence for mix in steps],
    )
