"""What steers the rung from look to look: the controller, an administrator's pin, failed swaps."""

import json
import logging
from dataclasses import dataclass, replace

import msgspec

from morphserve.configs.schema import Policy
from morphserve.runtime.controller import decide
from morphserve.runtime.signals import ControlState, Decision, Signals

logger = logging.getLogger(__name__)

_LONGEST_PAUSE_S = 60.0


@dataclass(frozen=True, slots=True)
class Record:
    """A decision and all that it was made from: `decide` on it gives the same again."""

    signals: Signals
    state: ControlState  # before
    decision: Decision


def write_record(record: Record) -> str:
    """One line of JSON; times that never were are -Infinity, as Python's json has it."""
    return json.dumps(msgspec.to_builtins(record))


def read_record(line: str) -> Record:
    return msgspec.convert(json.loads(line), Record)


class Control:
    """The rung that is wanted, and who wants it."""

    def __init__(self, policy: Policy, target: int) -> None:
        self.target = target
        self.pinned = False  # an administrator holds the rung
        self._policy = policy
        self._state = ControlState()
        self._looked_s = float("-inf")
        self._failed_swaps = 0  # since the latest one that succeeded
        self._paused_until_s = float("-inf")  # no decision and no swap before, after a failed one

    def is_due(self, now_s: float) -> bool:
        """Whether it is time for a look at the signals."""
        rested = now_s - self._looked_s >= self._policy.window_s
        return rested and self.may_swap(now_s)

    def may_swap(self, now_s: float) -> bool:
        """Whether the pause that follows a failed swap is over."""
        return now_s >= self._paused_until_s

    def due_s(self) -> float:
        """When the next look is due."""
        return max(self._looked_s + self._policy.window_s, self._paused_until_s)

    def rest(self, now_s: float) -> None:
        """Notes a look, under no pressure at rung 0, that could not have led to anything."""
        self._looked_s = now_s
        state = self._state
        if state.pressed_windows or state.told or state.calm_since_s is not None:
            self._state = replace(state, pressed_windows=0, calm_since_s=None, told=False)

    def look(self, signals: Signals) -> Decision | None:
        """Shows the controller the signals; its decision, if it made one, is the new target."""
        self._looked_s = signals.now_s
        if self.pinned:
            return None
        before = self._state
        decision, self._state = decide(signals, before, self._policy)
        if decision is not None:
            self.target = decision.rung
            _log(Record(signals, before, decision))
        return decision

    def pin(self, rung: int | None, deepest: int) -> str | None:
        """Holds a rung, or none any more; says what has changed, or None if nothing has."""
        if rung is None:
            was, self.pinned = self.pinned, False
            self._state = replace(self._state, pressed_windows=0, calm_since_s=None)
            return "the controller decides again" if was else None
        self._paused_until_s = float("-inf")  # who asks now is not made to wait
        self.pinned, self.target = True, min(max(rung, 0), deepest)
        return f"held at rung {self.target}"

    def swap_done(self) -> None:
        self._failed_swaps = 0

    def swap_failed(self, rung: int, now_s: float) -> None:
        """Gives up the target for the rung that is, and waits longer each time in a row.

        A pinned target is tried again after the wait.
        """
        self._failed_swaps += 1
        if not self.pinned:
            self.target = rung
        self._paused_until_s = now_s + min(_LONGEST_PAUSE_S, 2.0**self._failed_swaps)


def _log(record: Record) -> None:
    if logger.isEnabledFor(logging.DEBUG):
        logger.debug("%s", write_record(record))
