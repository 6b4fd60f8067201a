"""Which rung is wanted now: a pure function of signals, state and policy."""

from dataclasses import dataclass, replace

from morphserve.configs.schema import Policy
from morphserve.runtime.signals import ControlState, Decision, Signals

_NOTABLE = 1.05  # predicted times that differ by less count as equal
_REGAINED = 0.8  # a spent budget opens again when its share has fallen to this part of the limit


@dataclass(frozen=True, slots=True)
class Pressure:
    text: str  # with numbers
    memory: bool  # more blocks relieve it; else only faster steps do


def decide(
    signals: Signals, state: ControlState, policy: Policy
) -> tuple[Decision | None, ControlState]:
    """The next action or None, and the state to pass to the next look.

    docs/controller.md tells the rules in words: entry, depth, veto, quality budget, release.
    """
    if policy.static_layers >= 0:
        return None, state
    flips = tuple(t for t in state.flips if t > signals.now_s - 60)
    state = replace(state, flips=flips, spent=_is_spent(signals, state, policy))
    if state.spent and signals.rung > signals.int8_rung:
        return _restore(signals, state, policy)
    pressure = None if _is_tail(signals, policy) else _pressure(signals, policy)
    if pressure is not None:
        state = replace(state, pressed_windows=state.pressed_windows + 1, calm_since_s=None)
        return _enter(signals, state, policy, pressure)
    state = replace(state, pressed_windows=0, told=False)
    return _release(signals, state, policy)


def _is_spent(signals: Signals, state: ControlState, policy: Policy) -> bool:
    limit = policy.max_demoted_token_share
    if limit >= 1:
        return False
    return signals.token_share > (_REGAINED * limit if state.spent else limit)


def _preemption_at_hand(signals: Signals) -> bool:
    """Whether running requests alone outgrow the capacity within the horizon."""
    return signals.running_demand > signals.capacities[signals.rung]


def _is_tail(signals: Signals, policy: Policy) -> bool:
    """Whether arrivals have ended, so that what runs needs nothing but time."""
    ended = signals.arrival_age_s >= policy.tail_s and signals.waiting == 0
    return ended and not _preemption_at_hand(signals)


def _pressure(signals: Signals, policy: Policy) -> Pressure | None:
    capacity = signals.capacities[signals.rung]
    if signals.demand > policy.demote_above * capacity:
        return Pressure(f"{signals.demand} blocks wanted of {capacity}", memory=True)
    if signals.memory_wait_s > policy.max_queue_delay_s:
        waited = signals.memory_wait_s * 1000
        return Pressure(f"a request has waited {waited:.0f} ms for memory", memory=True)
    return _late_first_token(signals, policy)


def _late_first_token(signals: Signals, policy: Policy) -> Pressure | None:
    """Pressure of a waiting request's target, if a deeper rung helps it."""
    urgent, ttft_s = signals.urgent, signals.ttft_s(signals.rung)
    if urgent is None or ttft_s is None or ttft_s <= policy.slo_share * urgent.target_s:
        return None
    memory = signals.memory_wait_s > 0
    faster = min(signals.chunk_s[signals.rung :]) * _NOTABLE < signals.chunk_s[signals.rung]
    if not memory and not faster:
        return None
    predicted, target = ttft_s * 1000, urgent.target_s * 1000
    text = f"a first token is predicted after {predicted:.0f} ms, its target is {target:.0f} ms"
    return Pressure(text, memory)


def _enter(
    signals: Signals, state: ControlState, policy: Policy, pressure: Pressure
) -> tuple[Decision | None, ControlState]:
    if state.pressed_windows < policy.entry_windows:
        return None, state
    if state.direction < 0 and signals.now_s - state.acted_s < policy.cooldown_s:
        return None, state
    deepest = len(signals.capacities) - 1
    if state.spent and signals.rung < deepest:
        deepest = min(deepest, signals.int8_rung)
        if signals.rung >= deepest:
            return _stay(signals, state, pressure, _spent(signals, policy))
    wanted = _depth(signals, policy, pressure, deepest)
    if wanted is None:
        return None, state
    return _demote(signals, state, pressure, wanted)


def _depth(signals: Signals, policy: Policy, pressure: Pressure, deepest: int) -> int | None:
    """The shallowest rung that relieves the pressure, or the best one; None: none does more."""
    rungs = range(signals.rung + 1, deepest + 1)
    if not pressure.memory:
        return _depth_for_time(signals, policy, rungs) if signals.settled else None
    now = signals.capacities[signals.rung]
    larger = next((r for r in rungs if signals.capacities[r] > now), None)
    if larger is None:
        return None
    enough = _least_rung(signals, policy.demote_above, deepest)
    if not signals.settled and enough <= signals.rung:
        return None  # what is under way may be all that the waiting request needs
    return max(enough, larger)


def _depth_for_time(signals: Signals, policy: Policy, rungs: range) -> int | None:
    assert signals.urgent is not None
    target_s = policy.slo_share * signals.urgent.target_s
    now_s = signals.chunk_s[signals.rung]
    faster = [r for r in rungs if signals.chunk_s[r] * _NOTABLE < now_s]
    soon = (r for r in faster if (signals.ttft_s(r) or 0.0) <= target_s)
    best = min(faster, key=signals.chunk_s.__getitem__, default=None)
    return next(soon, best)


def _demote(
    signals: Signals, state: ControlState, pressure: Pressure, wanted: int
) -> tuple[Decision | None, ControlState]:
    """To the wanted rung, or less far if its steps are too slow for what it brings."""
    objection = _objection(signals, wanted)
    worth = signals.memory_wait_s > 0 or _preemption_at_hand(signals)
    if objection is None or worth:
        although = "" if objection is None else f", although {objection}"
        reason = f"{pressure.text}: to rung {wanted}{although}"
        return Decision(wanted, reason), _acted(state, 1, signals.now_s)
    now = signals.capacities[signals.rung]
    for rung in range(wanted - 1, signals.rung, -1):
        gains = signals.capacities[rung] > now or not pressure.memory
        if gains and _objection(signals, rung) is None:
            reason = f"{pressure.text}: to rung {rung}, no further as {objection}"
            return Decision(rung, reason), _acted(state, 1, signals.now_s)
    return _stay(signals, state, pressure, objection)


def _objection(signals: Signals, rung: int) -> str | None:
    """What speaks against the decode steps of a deeper rung, by the cost model."""
    if not signals.decode_s:
        return None
    now_s, then_s = signals.decode_s[signals.rung], signals.decode_s[rung]
    target_s = signals.tpot_target_s
    steps = f"a decode step is predicted to take {then_s * 1e3:.1f} ms there"
    if target_s is not None and now_s <= target_s < then_s:
        return f"{steps}, over the target of {target_s * 1e3:.1f} ms"
    if then_s > _NOTABLE * now_s:
        return f"{steps}, {now_s * 1e3:.1f} ms now"
    return None


def _spent(signals: Signals, policy: Policy) -> str:
    share, regained = signals.token_share, _REGAINED * policy.max_demoted_token_share
    return (
        f"the quality budget is spent ({share:.0%} of tokens made with INT4 layers, "
        f"open again at {regained:.0%})"
    )


def _stay(
    signals: Signals, state: ControlState, pressure: Pressure, why: str
) -> tuple[Decision | None, ControlState]:
    """Says once per pressure that it goes unanswered."""
    if state.told:
        return None, state
    reason = f"{pressure.text}, but {why}: stays at rung {signals.rung}"
    return Decision(signals.rung, reason), replace(state, told=True)


def _release(
    signals: Signals, state: ControlState, policy: Policy
) -> tuple[Decision | None, ControlState]:
    least = _least_rung(_with_paused(signals), policy.promote_below, len(signals.capacities) - 1)
    fast = (r for r in range(least, signals.rung) if _is_fast(signals, policy, r))
    rung = next(fast, signals.rung)
    if state.calm_since_s is not None:
        rung = max(rung, state.calm_rung)
    quiet = signals.memory_wait_s == 0 and signals.preemption_age_s >= policy.quiet_s
    if rung >= signals.rung or not quiet:
        return None, replace(state, calm_since_s=None)
    since = signals.now_s if state.calm_since_s is None else state.calm_since_s
    state = replace(state, calm_since_s=since, calm_rung=rung)
    dwell_s = 0.0 if signals.held else policy.dwell_s
    if signals.now_s - since < dwell_s or not _may_promote(signals, state, policy):
        return None, state
    capacity = signals.capacities[rung]
    held = f", {signals.held} waiting for a higher precision" if signals.held else ""
    reason = (
        f"calm, {capacity} blocks were enough for {signals.now_s - since:.1f} s, "
        f"{signals.demand} wanted now{held}: back to rung {rung}"
    )
    return Decision(rung, reason), _acted(state, -1, signals.now_s)


def _with_paused(signals: Signals) -> Signals:
    """Demand that a return must leave room for: also of those that no deeper rung would help.

    Unless some are held, which a return is for.
    """
    if signals.held:
        return signals
    return replace(signals, demand=max(signals.demand, signals.running_demand))


def _is_fast(signals: Signals, policy: Policy, rung: int) -> bool:
    """Whether a shallower rung keeps the targets, by the cost model, as far as this one does."""
    urgent, ttft_s = signals.urgent, signals.ttft_s(rung)
    if urgent and ttft_s is not None and ttft_s > policy.slo_share * urgent.target_s:
        return False
    target_s, decode_s = signals.tpot_target_s, signals.decode_s
    if target_s is None or not decode_s:
        return True
    return not decode_s[signals.rung] <= target_s < decode_s[rung]


def _restore(
    signals: Signals, state: ControlState, policy: Policy
) -> tuple[Decision | None, ControlState]:
    """Gives INT4 up because the quality budget is spent, whatever the demand: it may queue."""
    state = replace(state, pressed_windows=0, calm_since_s=None, told=False)
    if not _may_promote(signals, state, policy):
        return None, state
    reason = (
        f"{signals.token_share:.0%} of the latest {policy.quality_window_s:.0f} s' tokens were "
        f"made with INT4 layers: back to rung {signals.int8_rung}"
    )
    return Decision(signals.int8_rung, reason), _acted(state, -1, signals.now_s)


def _may_promote(signals: Signals, state: ControlState, policy: Policy) -> bool:
    if state.direction <= 0:
        return True
    if signals.now_s - state.acted_s < policy.cooldown_s:
        return False
    # Staying morphed costs quality, flapping costs quality and time.
    return len(state.flips) < policy.max_flips_per_minute


def _least_rung(signals: Signals, share: float, deepest: int) -> int:
    """The shallowest rung that needs at most `share` of its capacity, else of the most capacity."""
    capacities = signals.capacities[: deepest + 1]
    fits = (r for r, capacity in enumerate(capacities) if signals.demand <= share * capacity)
    return next(fits, capacities.index(capacities[-1]))


def _acted(state: ControlState, direction: int, now_s: float) -> ControlState:
    turned = state.direction not in (0, direction)
    flips = (*state.flips, now_s) if turned else state.flips
    return replace(
        state, direction=direction, acted_s=now_s, flips=flips, told=False, calm_since_s=None
    )
