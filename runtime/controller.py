"""How many layers should be INT4 now: a pure function of signals, state and policy."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from morphserve.configs.schema import Policy


@dataclass(frozen=True, slots=True)
class Signals:
    """What the controller sees between two steps."""

    now_s: float  # monotonic clock
    rung: int  # layers that are INT4 or on their way there
    demand: int  # blocks that running and waiting requests want over the policy's horizon
    capacities: Sequence[int]  # blocks at rung 0, 1, ... the deepest allowed
    settled: bool  # no swap is under way
    memory_wait_s: float  # how long the oldest waiting request has been waiting for blocks; 0: none
    preemption_age_s: float  # time since the latest preemption


@dataclass(frozen=True, slots=True)
class ControlState:
    """What the controller remembers from one look to the next."""

    pressed_windows: int = 0  # consecutive looks under pressure
    calm_since_s: float | None = None
    direction: int = 0  # of the latest action: 1 demote, -1 promote
    acted_s: float = float("-inf")
    flips: tuple[float, ...] = ()  # when the direction changed, within the last minute


@dataclass(frozen=True, slots=True)
class Decision:
    """The rung to go to, and why, in words with numbers."""

    rung: int
    reason: str


def decide(
    signals: Signals, state: ControlState, policy: Policy
) -> tuple[Decision | None, ControlState]:
    """The next action or None, and the state to pass to the next look.

    Entry: demand over `demote_above` of the capacity, or a request that has waited for memory
    longer than `max_queue_delay_s`, in `entry_windows` consecutive looks. Depth: the fewest layers
    whose blocks bring demand under `demote_above`. Release: demand under `promote_below` of a
    shallower rung's capacity, nothing waiting for memory, no preemption for `quiet_s`, all of it
    for `dwell_s`.
    """
    if policy.static_layers >= 0:
        return None, state
    state = replace(state, flips=tuple(t for t in state.flips if t > signals.now_s - 60))
    pressure = _pressure(signals, policy)
    if pressure is not None:
        state = replace(state, pressed_windows=state.pressed_windows + 1, calm_since_s=None)
        return _enter(signals, state, policy, pressure)
    state = replace(state, pressed_windows=0)
    return _release(signals, state, policy)


def _pressure(signals: Signals, policy: Policy) -> str | None:
    capacity = signals.capacities[signals.rung]
    if signals.demand > policy.demote_above * capacity:
        return f"{signals.demand} blocks wanted of {capacity}"
    if signals.memory_wait_s > policy.max_queue_delay_s:
        return f"a request has waited {signals.memory_wait_s * 1000:.0f} ms for memory"
    return None


def _enter(
    signals: Signals, state: ControlState, policy: Policy, pressure: str
) -> tuple[Decision | None, ControlState]:
    deepest = len(signals.capacities) - 1
    if signals.rung >= deepest or state.pressed_windows < policy.entry_windows:
        return None, state
    if state.direction < 0 and signals.now_s - state.acted_s < policy.cooldown_s:
        return None, state
    now = signals.capacities[signals.rung]
    larger = (r for r, c in enumerate(signals.capacities) if c > now)
    if (next_rung := next(larger, None)) is None:
        return None, state
    enough = _least_rung(signals, policy.demote_above)
    if not signals.settled and enough <= signals.rung:
        return None, state  # what is under way may be all that the waiting request needs
    rung = max(enough, next_rung)
    return Decision(rung, f"{pressure}: to {rung} INT4 layers"), _acted(state, 1, signals.now_s)


def _release(
    signals: Signals, state: ControlState, policy: Policy
) -> tuple[Decision | None, ControlState]:
    rung = _least_rung(signals, policy.promote_below)
    quiet = signals.memory_wait_s == 0 and signals.preemption_age_s >= policy.quiet_s
    if rung >= signals.rung or not quiet:
        return None, replace(state, calm_since_s=None)
    since = signals.now_s if state.calm_since_s is None else state.calm_since_s
    state = replace(state, calm_since_s=since)
    hot = state.direction > 0 and signals.now_s - state.acted_s < policy.cooldown_s
    if hot or signals.now_s - since < policy.dwell_s:
        return None, state
    if state.direction > 0 and len(state.flips) >= policy.max_flips_per_minute:
        return None, state  # staying morphed costs quality, flapping costs quality and time
    capacity = signals.capacities[rung]
    reason = f"calm, {signals.demand} blocks wanted of {capacity}: back to {rung} INT4 layers"
    return Decision(rung, reason), _acted(state, -1, signals.now_s)


def _least_rung(signals: Signals, share: float) -> int:
    """The shallowest rung that needs at most `share` of its capacity, else the deepest."""
    fits = (r for r, c in enumerate(signals.capacities) if signals.demand <= share * c)
    return next(fits, len(signals.capacities) - 1)


def _acted(state: ControlState, direction: int, now_s: float) -> ControlState:
    turned = state.direction not in (0, direction)
    flips = (*state.flips, now_s) if turned else state.flips
    return replace(state, direction=direction, acted_s=now_s, flips=flips)
