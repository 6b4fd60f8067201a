"""The controller: sustained entry, least depth, calm release, no flapping."""

from dataclasses import replace
from typing import Any

import pytest

from morphserve.configs.load import load_policy
from morphserve.configs.schema import Policy
from morphserve.runtime.controller import decide
from morphserve.runtime.signals import ControlState, Decision, Signals

CAPACITIES = (100, 110, 120, 130, 140)
POLICY = Policy(
    name="test",
    max_demoted_share=1.0,
    static_layers=-1,
    window_s=0.1,
    entry_windows=3,
    demote_above=0.9,
    max_queue_delay_s=0.1,
    slo_share=0.5,
    horizon_tokens=16,
    promote_below=0.8,
    quiet_s=5.0,
    dwell_s=2.0,
    cooldown_s=1.0,
    max_flips_per_minute=4,
    tail_s=2.0,
    max_demoted_token_share=0.5,
    quality_window_s=60.0,
)
CALM = Signals(
    now_s=100.0,
    rung=0,
    demand=10,
    running_demand=10,
    capacities=CAPACITIES,
    settled=True,
    memory_wait_s=0.0,
    preemption_age_s=1000.0,
    arrival_age_s=0.0,
    waiting=0,
    held=0,
    int8_rung=0,
    token_share=0.0,
)


class Run:
    """Feeds the controller one look after another, as the engine does."""

    def __init__(self, policy: Policy = POLICY) -> None:
        self.policy, self.state, self.rung, self.now_s = policy, ControlState(), 0, 100.0
        self.decisions: list[Decision] = []

    def look(self, count: int = 1, **changes: Any) -> list[int]:
        """The rung after each of `count` looks, one `window_s` apart."""
        rungs = []
        for _ in range(count):
            self.now_s += self.policy.window_s
            signals = replace(CALM, now_s=self.now_s, rung=self.rung, **changes)
            decision, self.state = decide(signals, self.state, self.policy)
            if decision:
                self.decisions.append(decision)
                self.rung = decision.rung
            rungs.append(self.rung)
        return rungs


def test_pressure_must_last_before_a_layer_goes() -> None:
    run = Run()
    assert run.look(2, demand=95) == [0, 0]
    assert run.look(1, demand=10) == [0]
    assert run.look(3, demand=95) == [0, 0, 1]


def test_depth_is_the_least_that_meets_the_demand() -> None:
    run = Run()
    run.look(3, demand=115)
    assert run.rung == 3  # 115 <= 0.9 * 130, but not 0.9 * 120
    assert "115 blocks wanted of 100" in run.decisions[0].reason


def test_a_request_waiting_for_memory_is_pressure_even_when_demand_is_not() -> None:
    run = Run()
    assert run.look(3, memory_wait_s=0.2) == [0, 0, 1]


def test_a_wait_takes_no_further_layer_while_one_is_on_its_way() -> None:
    run = Run()
    run.look(3, memory_wait_s=0.2)
    assert set(run.look(20, memory_wait_s=0.5, settled=False)) == {1}
    assert run.look(1, memory_wait_s=0.6) == [2]


def test_layers_that_free_nothing_are_passed_over() -> None:
    run = Run()
    run.look(3, memory_wait_s=0.2, capacities=(100, 100, 110))
    assert run.rung == 2
    run = Run()
    run.look(9, memory_wait_s=0.2, capacities=(100, 100, 100))
    assert run.rung == 0


def test_the_deepest_rung_is_never_passed() -> None:
    run = Run()
    run.look(50, demand=1000, memory_wait_s=9.0)
    assert run.rung == 4


def test_layers_come_back_after_calm_has_lasted() -> None:
    run = Run()
    run.look(3, demand=1000)
    run.look(19, demand=10)
    assert run.rung == 4
    run.look(3, demand=10)
    assert run.rung == 0


def test_release_goes_only_as_far_as_demand_allows() -> None:
    run = Run()
    run.look(3, demand=1000)
    run.look(40, demand=90)
    assert run.rung == 2  # 90 <= 0.8 * 120


@pytest.mark.parametrize("unrest", [{"memory_wait_s": 0.05}, {"preemption_age_s": 1.0}])
def test_no_release_while_something_waits_or_was_just_preempted(unrest: dict[str, float]) -> None:
    run = Run()
    run.look(3, demand=1000)
    run.look(100, demand=10, **unrest)
    assert run.rung == 4


def test_opposite_actions_keep_their_distance() -> None:
    run = Run(replace(POLICY, dwell_s=0.1, cooldown_s=3.0))
    run.look(3, demand=1000)
    went_down = run.now_s
    while run.rung:
        run.look(1, demand=10)
    assert run.now_s - went_down >= 3.0


def test_flapping_traffic_ends_in_a_morphed_server_not_in_endless_swaps() -> None:
    run = Run(replace(POLICY, dwell_s=0.1, cooldown_s=0.1, entry_windows=1))
    for _ in range(30):
        run.look(4, demand=1000)
        run.look(4, demand=10)
    directions = len(run.decisions)
    assert directions <= POLICY.max_flips_per_minute + 2
    run.look(700, demand=10)
    assert run.rung == 0


def test_static_policies_hold_their_rung_whatever_happens() -> None:
    run = Run(load_policy("static:2"))
    run.rung = 2
    assert set(run.look(50, demand=1000, memory_wait_s=9.0)) == {2}
    assert set(run.look(500, demand=0)) == {2}


def test_off_never_swaps() -> None:
    run = Run(load_policy("off"))
    run.look(100, demand=1000, memory_wait_s=10.0)
    assert run.rung == 0
