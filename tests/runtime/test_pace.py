"""Steps that take far longer than predicted are told of, once in a while."""

from morphserve.configs.load import load_policy
from morphserve.configs.schema import SchedulerConfig, Slo
from morphserve.quantize.costs import Curve
from morphserve.quantize.manifest import Variant
from morphserve.runtime.blocks import BlockPool
from morphserve.runtime.costs import AttentionCost, CostModel
from morphserve.runtime.forecast import Forecaster
from morphserve.runtime.ladder import Ladder
from morphserve.runtime.messages import Event
from morphserve.runtime.monitor import Facts, Monitor
from morphserve.runtime.request import Request, SamplingParams
from morphserve.runtime.scheduler import Scheduler

MODEL = CostModel(
    layers={Variant.FULL: Curve([1, 100], [0.001, 0.1])},
    decode=AttentionCost(1e-5, 1e-6, 0.0, 0.0),
    prefill=AttentionCost(1e-5, 1e-7, 0.0, 0.0),
    rest=Curve([1, 100], [0.001, 0.001]),
)


class Clock:
    seconds = 100.0

    def now_s(self) -> float:
        return self.seconds

    epoch_s = now_s


class Serving:
    """One request that goes on and on, a second per look at it."""

    def __init__(self) -> None:
        self.clock = Clock()
        facts = Facts([64], int8_rung=0, block_tokens=4, max_step_tokens=16)
        forecaster = Forecaster(MODEL, Ladder((), 3), num_rungs=1, max_step_tokens=16)
        policy = load_policy("off")
        self.monitor = Monitor(policy, Slo(), facts, forecaster, self.clock)
        self.scheduler = Scheduler(SchedulerConfig(), BlockPool(range(64)), 4, 250, ())
        self.scheduler.add(Request("r", [1], SamplingParams(250, ignore_eos=True), 0.0))

    def run(self, seconds: int, pace: float) -> list[Event]:
        """Steps that take `pace` times as long as predicted."""
        variants, now_s = (Variant.FULL,) * 3, self.clock.seconds
        for second in range(seconds):
            batch = self.scheduler.schedule()
            step_s = pace * MODEL.step_seconds(variants, [(s.start, s.end) for s in batch])
            self.clock.seconds = now_s + second + 1
            self.scheduler.update(batch, [1])
            self.monitor.stepped(batch, 1, variants, Variant.FULL, self.clock.seconds, step_s)
            self.monitor.signals(self.clock.seconds, self.scheduler, 0, settled=True)
        return [event for event in self.monitor.take_events() if event.kind == "slow"]


def test_steps_that_are_far_too_slow_for_a_while_are_told_of_once_a_minute() -> None:
    serving = Serving()
    assert not serving.run(30, pace=1.5)
    assert not serving.run(8, pace=5.0), "not long enough"
    assert len(serving.run(50, pace=5.0)) == 1
    assert len(serving.run(60, pace=5.0)) == 1


def test_a_few_slow_steps_are_nothing_to_tell() -> None:
    serving = Serving()
    for _ in range(5):
        assert not serving.run(2, pace=10.0)
        assert not serving.run(20, pace=1.0)


def test_a_slow_step_after_hours_without_any_is_nothing_to_tell() -> None:
    serving = Serving()
    assert not serving.run(5, pace=1.0)
    serving.clock.seconds += 3600
    assert not serving.run(1, pace=100.0)
