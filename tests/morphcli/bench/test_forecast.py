"""The forecast of a server: the scheduler that serves, on a clock of measured costs."""

from dataclasses import replace

import pytest

from morphserve.configs.schema import SchedulerConfig
from morphserve.morphcli.bench.forecast import Server, first_tokens
from morphserve.morphcli.traces.arrivals import Arrival
from morphserve.morphcli.traces.schedule import Schedule
from morphserve.quantize.costs import Curve
from morphserve.quantize.manifest import Variant
from morphserve.runtime.costs import AttentionCost, CostModel

FREE = AttentionCost(0.0, 0.0, 0.0, error=0.0)
# A layer takes 1 ms per token at full precision and half of it at INT4; all else takes no time.
COSTS = CostModel(
    layers={
        Variant.FULL: Curve([1, 2], [0.001, 0.002]),
        Variant.INT4: Curve([1, 2], [0.0005, 0.001]),
    },
    decode=FREE,
    prefill=FREE,
    rest=Curve([1, 2], [1e-12, 1e-12]),
)
SERVER = Server(COSTS, [Variant.FULL] * 2, 8, 16, 128, SchedulerConfig(4, 64))


def schedule(*times_s: float, prompt: int = 10, output: int = 5) -> Schedule:
    return Schedule(tuple(Arrival(at, prompt, output) for at in times_s), 10.0)


def test_a_lone_request_waits_for_its_prompt_alone() -> None:
    assert first_tokens(SERVER, schedule(3.0), 1.0) == pytest.approx([2 * 10 * 0.001])


def test_faster_layers_and_slower_machines_count() -> None:
    int4 = replace(SERVER, variants=[Variant.INT4] * 2, slowdown=3.0)
    assert first_tokens(int4, schedule(0.0), 1.0) == pytest.approx([3 * 0.01])


def test_requests_that_find_no_blocks_wait_for_those_before_them() -> None:
    three = schedule(0.0, 0.0, 0.0, prompt=60, output=20)
    small = first_tokens(SERVER, three, 10.0)
    large = first_tokens(replace(SERVER, num_blocks=80), three, 10.0)
    assert len(small) == len(large) == 3
    assert small[2] > large[2]


def test_it_ends_once_patience_does() -> None:
    many = schedule(*[0.0] * 50, prompt=60, output=20)
    found = first_tokens(SERVER, many, patience_s=0.5)
    assert 0 < len(found) < 50
