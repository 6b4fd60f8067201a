"""At which precision tokens were made: by policy, and by place in their answers."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from morphserve.morphcli.bench.answers import POSITIONS
from morphserve.morphcli.bench.figures import PolicySummary
from morphserve.morphcli.bench.looks import looks
from morphserve.morphcli.bench.panels import WIDTH_IN
from morphserve.morphcli.bench.summary import Run
from morphserve.morphcli.bench.table import policy_title
from morphserve.profile.drawing import COLOURS, STYLE
from morphserve.quantize.manifest import Variant

_LOOK = STYLE | {"font.size": 9, "axes.titlesize": 9.5, "legend.fontsize": 8.5}
_COLOURS = {Variant.FULL: "full", Variant.INT8: "int8", Variant.INT4: "orange"}
_NAMES = {Variant.FULL: "full precision", Variant.INT8: "INT8", Variant.INT4: "INT4"}
# Of all policies the same, however long their answers were.
_PLACES = [
    *(f"{start}–{end - 1}" for start, end in pairwise(POSITIONS)),
    f"{POSITIONS[-1]} and later",
]

TokenCounts = Mapping[str, Mapping[Variant, int]]  # policy -> precision -> tokens


def token_counts(policies: Sequence[PolicySummary], runs: Sequence[Run]) -> TokenCounts:
    """Output tokens by the lowest precision of the steps that made them, where it is known."""
    found: dict[str, Mapping[Variant, int]] = {}
    for policy in policies:
        if policy.answers is not None and policy.answers.tokens:
            found[policy.policy] = policy.answers.tokens
        elif counted := _counted(run for run in runs if run.policy == policy.policy):
            found[policy.policy] = counted
    return found


def _counted(runs: Iterable[Run]) -> Counter[Variant]:
    total: Counter[Variant] = Counter()
    for run in runs:
        if run.states:
            total.update(run.states[-1].generated_tokens)
            total.subtract(run.states[0].generated_tokens)
    return +total


def precisions_figure(counts: TokenCounts) -> Figure:
    """Shares of tokens by precision, a bar for each policy."""
    with mpl.rc_context(_LOOK):
        figure = Figure(figsize=(WIDTH_IN, 1.1 + 0.26 * len(counts)), layout="constrained")
        axes = figure.add_subplot()
        for row, tokens in enumerate(counts.values()):
            total, start = sum(tokens.values()), 0.0
            for variant, colour in _COLOURS.items():
                share = 100 * tokens.get(variant, 0) / total
                axes.barh(row, share, 0.66, left=start, color=COLOURS[colour], linewidth=0)
                start += share
        axes.set_yticks(range(len(counts)), [policy_title(policy) for policy in counts])
        axes.tick_params(axis="y", length=0, labelcolor=COLOURS["ink"])
        axes.set(xlim=(0, 100), ylim=(len(counts) - 0.5, -0.5), xlabel="of output tokens, %")
        axes.grid(visible=False, axis="y")
        met = [v for v in _COLOURS if any(tokens.get(v) for tokens in counts.values())]
        named = [Patch(color=COLOURS[_COLOURS[v]], label=_NAMES[v]) for v in met]
        figure.legend(handles=named, loc="outside lower center", ncols=3)
    return figure


def positions_figure(policies: Sequence[PolicySummary]) -> Figure | None:
    """Shares below full precision by the place of tokens in their answers; None: not known."""
    known = [p for p in policies if p.answers is not None and p.answers.positions]
    if not known:
        return None
    found = looks([policy.policy for policy in policies])
    with mpl.rc_context(_LOOK):
        figure = Figure(figsize=(WIDTH_IN, 2.9), layout="constrained")
        axes = figure.add_subplot()
        for policy in known:
            assert policy.answers is not None
            look, places = found[policy.policy], policy.answers.positions
            axes.plot(
                [POSITIONS.index(place.start) for place in places],
                [100 * place.below_full for place in places],
                color=COLOURS[look.colour],
                linestyle=look.dashes,
                marker=look.marker,
                markersize=4,
                label=policy_title(policy.policy),
            )
        axes.set_xticks(range(len(_PLACES)), _PLACES)
        axes.set(
            xlim=(-0.3, len(_PLACES) - 0.7),
            xlabel="place of the token in its answer, from 0",
            ylabel="made below full precision, %",
            ylim=(-2, 102),
        )
        figure.legend(loc="outside lower center", ncols=2)
    return figure
