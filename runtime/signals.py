"""What the controller sees, remembers and answers, as values that can be written down."""

from collections.abc import Sequence
from dataclasses import dataclass

NEVER = float("-inf")


@dataclass(frozen=True, slots=True)
class Urgent:
    """The waiting request with the least time left to its first token."""

    age_s: float
    steps: int  # of prefill until its first token
    target_s: float  # from its arrival to its first token


@dataclass(frozen=True, slots=True)
class Signals:
    """What the controller sees between two steps. Seconds are of the monotonic clock."""

    now_s: float
    rung: int  # that is wanted; the layers are there or on their way
    demand: int  # blocks that running and waiting requests want over the policy's horizon
    running_demand: int  # what running requests hold and want, paused ones included
    capacities: Sequence[int]  # blocks at rung 0, 1, ... the deepest that is allowed and of use
    settled: bool  # no swap is under way
    memory_wait_s: float  # how long requests have been waiting for blocks without a break; 0: none
    preemption_age_s: float  # time since the latest preemption
    arrival_age_s: float  # time since the latest arrival
    waiting: int  # requests, those held for precision included
    held: int  # requests that wait for a higher precision, not for blocks
    int8_rung: int  # the deepest rung without an INT4 layer
    token_share: float  # of the tokens generated in the quality window, those with INT4 layers
    tpot_target_s: float | None = None  # the tightest one of running requests
    urgent: Urgent | None = None  # None: nobody waits with a target, or no measured costs
    decode_s: Sequence[float] = ()  # predicted decode step at each rung; empty: no measured costs
    chunk_s: Sequence[float] = ()  # the same with a full chunk of prefill in it

    def ttft_s(self, rung: int) -> float | None:
        """Predicted time to first token of the urgent request; at least, as memory may lack."""
        if self.urgent is None or not self.chunk_s:
            return None
        return self.urgent.age_s + self.urgent.steps * self.chunk_s[rung]


@dataclass(frozen=True, slots=True)
class ControlState:
    """What the controller remembers from one look to the next."""

    pressed_windows: int = 0  # consecutive looks under pressure
    calm_since_s: float | None = None
    calm_rung: int = 0  # the deepest that demand needed in this time
    direction: int = 0  # of the latest action: 1 demote, -1 promote
    acted_s: float = NEVER
    flips: tuple[float, ...] = ()  # when the direction changed, within the last minute
    spent: bool = False  # the quality budget
    told: bool = False  # that this pressure is not answered, and why


@dataclass(frozen=True, slots=True)
class Decision:
    """The rung to go to, or to stay at against pressure, and why, in words with numbers."""

    rung: int
    reason: str


def numbers(signals: Signals, rung: int) -> dict[str, float]:
    """What stands behind a decision for `rung`, by name; what is not known is not there."""
    urgent = signals.urgent
    known: dict[str, float | None] = {
        "rung": signals.rung,
        "target_rung": rung,
        "demand": signals.demand,
        "running_demand": signals.running_demand,
        "capacity": signals.capacities[signals.rung],
        "target_capacity": signals.capacities[rung],
        "waiting": signals.waiting,
        "held": signals.held,
        "memory_wait_s": signals.memory_wait_s,
        "int4_token_share": signals.token_share,
        "tpot_target_s": signals.tpot_target_s,
        "ttft_target_s": None if urgent is None else urgent.target_s,
        "predicted_ttft_s": signals.ttft_s(signals.rung),
        "target_predicted_ttft_s": signals.ttft_s(rung),
        "predicted_decode_s": signals.decode_s[signals.rung] if signals.decode_s else None,
        "target_predicted_decode_s": signals.decode_s[rung] if signals.decode_s else None,
    }
    return {name: value for name, value in known.items() if value is not None}
