"""What the timelines of a report share, so that the eye may compare them: axes and bins."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from morphserve.configs.schema import Slo
from morphserve.morphcli.bench.client import Outcome
from morphserve.morphcli.bench.server import State
from morphserve.morphcli.bench.summary import Run
from morphserve.morphcli.traces.schedule import Burst

_FEET_S = 0.001, 0.01  # between which the axis of first tokens begins
_MAX_BINS = 120
_BINS_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600)


@dataclass(frozen=True, slots=True)
class Frame:
    """Ends of the axes that hold every run, and how time is counted."""

    end_s: float
    bin_s: float  # events are counted in bins of this width
    rate: float  # requests offered per second
    requests: float
    kv_tokens: float
    fastest_s: float  # to the first token
    slowest_s: float
    layers: list[int]  # as the ladder takes them, then the others
    swaps: float  # in one bin
    preemptions: float
    slo: Slo
    burst: Burst | None

    @property
    def unit(self) -> tuple[str, float]:
        """What time is told in, and its seconds."""
        if self.end_s <= 600:
            return "seconds", 1.0
        return ("minutes", 60.0) if self.end_s <= 3 * 3600 else ("hours", 3600.0)

    @property
    def hair_s(self) -> float:
        """A time too short to be seen."""
        return self.end_s / 600


@dataclass(frozen=True, slots=True)
class Events:
    """Counts in each bin of a run that has any."""

    offered: Counter[int]
    swaps: Counter[int]
    preemptions: Counter[int]


def make_frame(runs: Sequence[Run], duration_s: float, slo: Slo, burst: Burst | None) -> Frame:
    """A frame that holds all `runs`."""
    outcomes = [o for run in runs for o in run.outcomes]
    states = [s for run in runs for s in run.states]
    ends = [o.intended_s + (o.e2e_s or 0.0) for o in outcomes]
    ends += [run.at_s(run.states[-1]) for run in runs if run.states]
    end_s = max([*ends, duration_s, 1.0])
    bin_s = next((b for b in _BINS_S if end_s / b <= _MAX_BINS), end_s / _MAX_BINS)
    events = [count_events(run, bin_s) for run in runs]
    firsts = [o.ttft_s for o in outcomes if o.ttft_s is not None]
    slowest = max([*firsts, 2 * (slo.ttft_s or 0.1), 0.1])
    fastest = min([*firsts, slo.ttft_s or 0.1])
    in_server = [max(s.running, s.waiting) for s in states]
    in_server += [most for run in runs if not run.states for _, most in in_flight(run.outcomes)]
    return Frame(
        end_s=end_s,
        bin_s=bin_s,
        rate=_most(e.offered for e in events) / bin_s,
        requests=max([1, *in_server]),
        kv_tokens=max(
            [1, *(max(s.blocks_capacity, s.blocks_full) * s.block_tokens for s in states)]
        ),
        fastest_s=min(
            max(10 ** (math.floor(2 * math.log10(max(fastest, 1e-9))) / 2), _FEET_S[0]), _FEET_S[1]
        ),
        slowest_s=10 ** (math.ceil(10 * math.log10(slowest)) / 10),
        layers=_layer_order([run.states[0] for run in runs if run.states]),
        swaps=_most(e.swaps for e in events),
        preemptions=_most(e.preemptions for e in events),
        slo=slo,
        burst=burst,
    )


def _layer_order(states: Sequence[State]) -> list[int]:
    if not states:
        return []
    longest = max(states, key=lambda state: len(state.ladder))
    steps = [step.layer for step in longest.ladder]
    return list(dict.fromkeys([*steps, *range(len(longest.layers))]))


def count_events(run: Run, bin_s: float) -> Events:
    """What happened in each bin of `run`."""
    swaps: Counter[int] = Counter()
    preemptions: Counter[int] = Counter()
    for before, after in pairwise(run.states):
        at = max(0, int(run.at_s(after) / bin_s))
        swaps[at] += after.swaps - before.swaps
        preemptions[at] += after.preemptions - before.preemptions
    offered = Counter(int(outcome.intended_s / bin_s) for outcome in run.outcomes)
    return Events(offered, swaps, preemptions)


def in_flight(outcomes: Sequence[Outcome]) -> list[tuple[float, int]]:
    """Requests sent and not yet answered, as (second, number from then on).

    Those that never were answered are left out: when they ended is not recorded.
    """
    answered = [o for o in outcomes if o.e2e_s is not None]
    turns = [(o.intended_s, 1) for o in answered]
    turns += [(o.intended_s + (o.e2e_s or 0.0), -1) for o in answered]
    found, level = [(0.0, 0)], 0
    for at_s, change in sorted(turns):
        level += change
        found.append((at_s, level))
    return found


def _most(counters: Iterable[Counter[int]]) -> int:
    return max((most for counter in counters for most in counter.values()), default=0)
