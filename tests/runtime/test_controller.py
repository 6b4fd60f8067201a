"""The controller: sustained entry, least depth, vetoes, budgets, calm release, no flapping."""

import logging
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from morphserve.configs.load import load_policy
from morphserve.configs.schema import Policy
from morphserve.runtime.control import Control, read_record
from morphserve.runtime.controller import decide
from morphserve.runtime.signals import ControlState, Decision, Signals, Urgent

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


def test_a_short_dip_of_demand_brings_back_only_what_it_has_left_free_all_the_time() -> None:
    run = Run()
    run.look(3, demand=115)
    assert run.rung == 3
    run.look(19, demand=90)  # fits under 0.8 of 120, the capacity of rung 2
    assert run.look(4, demand=10)[-1] == 2
    assert set(run.look(40, demand=90)) == {2}


def test_after_a_return_calm_must_last_anew() -> None:
    run = Run()
    run.look(3, demand=115)
    assert run.look(22, demand=90)[-1] == 2
    assert set(run.look(19, demand=10)) == {2}
    assert run.look(4, demand=10)[-1] == 0


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


def urgent(age_s: float, steps: int = 1, target_s: float = 1.0) -> Urgent:
    return Urgent(age_s, steps, target_s)


EQUAL, SLOWER, FASTER = (0.01,) * 5, (0.01, 0.02, 0.03, 0.04, 0.05), (0.1, 0.09, 0.08, 0.07, 0.06)


def test_a_late_first_token_is_pressure_when_deeper_steps_are_faster() -> None:
    run = Run()
    assert run.look(3, urgent=urgent(0.1, 5), chunk_s=FASTER, decode_s=EQUAL) == [0, 0, 2]
    assert "its target is 1000 ms" in run.decisions[0].reason  # 0.1 + 5 * 0.08 <= 0.5 * 1.0


def test_a_late_first_token_that_no_rung_helps_is_none() -> None:
    run = Run()
    run.look(50, urgent=urgent(0.9, 5), chunk_s=SLOWER, decode_s=EQUAL)
    assert run.rung == 0


def test_a_target_makes_a_wait_for_memory_count_sooner() -> None:
    late: dict[str, Any] = {"memory_wait_s": 0.01, "chunk_s": EQUAL, "decode_s": EQUAL}
    run = Run()
    assert run.look(3, urgent=urgent(0.6), **late) == [0, 0, 1]
    run = Run()
    assert run.look(3, urgent=urgent(0.1), **late) == [0, 0, 0]


def test_slow_steps_are_taken_only_where_capacity_is_worth_it() -> None:
    run = Run()
    run.look(20, demand=95, decode_s=SLOWER)
    assert run.rung == 0
    assert [d.rung for d in run.decisions] == [0]  # told once
    assert "20.0 ms there, 10.0 ms now: stays at rung 0" in run.decisions[0].reason
    run.look(1, demand=95, running_demand=101, decode_s=SLOWER)
    assert run.rung == 1
    assert "although" in run.decisions[1].reason


def test_a_rung_that_breaks_a_token_target_is_not_taken() -> None:
    run = Run()
    run.look(3, demand=125, decode_s=(0.0100, 0.0101, 0.0104, 0.0104, 0.0104), tpot_target_s=0.0102)
    assert run.rung == 1
    assert "no further as" in run.decisions[0].reason


def test_a_spent_quality_budget_gives_int4_back_whatever_the_demand() -> None:
    run = Run()
    run.look(3, demand=1000, int8_rung=2)
    assert run.rung == 4
    run.look(20, demand=1000, token_share=0.6, int8_rung=2)
    assert run.rung == 2
    run.look(100, demand=1000, token_share=0.45, int8_rung=2)
    assert run.rung == 2  # spent until the share is under 0.8 * 0.5
    assert "the quality budget is spent" in run.decisions[-1].reason
    run.look(3, demand=1000, token_share=0.3, int8_rung=2)
    assert run.rung == 4


def test_a_tail_takes_no_layer_unless_a_preemption_is_at_hand() -> None:
    run = Run()
    run.look(20, demand=95, arrival_age_s=3.0)
    assert run.rung == 0
    run.look(3, demand=105, running_demand=105, arrival_age_s=3.0)
    assert run.rung == 2


def test_requests_held_for_precision_pull_towards_release_never_towards_entry() -> None:
    run = Run(replace(POLICY, dwell_s=60.0))
    run.look(3, demand=115)
    run.look(20, demand=10)
    assert run.rung == 3
    run.look(1, demand=10, held=1, waiting=1)
    assert run.rung == 0
    run.look(50, demand=10, held=5, waiting=5)
    assert run.rung == 0


def test_a_decision_can_be_made_again_from_its_log_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    control = Control(POLICY, target=0)
    with caplog.at_level(logging.DEBUG):
        for i in range(3):
            now_s = 100.0 + i
            control.look(replace(CALM, now_s=now_s, demand=95, preemption_age_s=float("inf")))
    (line,) = (record.getMessage() for record in caplog.records)
    record = read_record(line)
    assert decide(record.signals, record.state, POLICY)[0] == record.decision


def test_a_pin_survives_pressure_until_it_is_freed() -> None:
    control = Control(POLICY, target=0)
    control.pin(2, deepest=4)
    for i in range(10):
        assert control.look(replace(CALM, now_s=100.0 + i, rung=2, demand=1000)) is None
    assert (control.target, control.pinned) == (2, True)
    control.pin(None, deepest=4)
    for i in range(3):
        control.look(replace(CALM, now_s=200.0 + i, rung=2, demand=1000))
    assert control.target == 4


def test_a_pin_survives_a_failed_swap_which_is_tried_again_after_a_pause() -> None:
    control = Control(POLICY, target=0)
    control.pin(3, deepest=4)
    control.swap_failed(rung=1, now_s=100.0)
    assert (control.target, control.pinned) == (3, True)
    assert [control.may_swap(now_s) for now_s in (101.0, 102.0)] == [False, True]
    control.pin(None, deepest=4)
    control.swap_failed(rung=1, now_s=200.0)
    assert control.target == 1 and not control.may_swap(203.0) and control.may_swap(204.0)
    control.pin(2, deepest=4)
    assert control.may_swap(200.0)


LOOKS = st.fixed_dictionaries(
    {
        "demand": st.integers(0, 300),
        "running_demand": st.integers(0, 300),
        "memory_wait_s": st.sampled_from([0.0, 0.05, 0.5]),
        "preemption_age_s": st.sampled_from([0.0, 10.0]),
        "arrival_age_s": st.sampled_from([0.0, 60.0]),
        "waiting": st.integers(0, 3),
        "held": st.integers(0, 1),
        "settled": st.booleans(),
        "token_share": st.floats(0, 1),
        "int8_rung": st.integers(0, 4),
        "decode_s": st.sampled_from([(), EQUAL, SLOWER, FASTER]),
        "chunk_s": st.sampled_from([EQUAL, SLOWER, FASTER]),
        "urgent": st.sampled_from([None, Urgent(0.1, 1, 1.0), Urgent(0.9, 9, 1.0)]),
        "tpot_target_s": st.sampled_from([None, 0.015]),
    }
)


@given(
    st.sampled_from(["accuracy", "balanced", "performance"]),
    st.lists(st.tuples(st.integers(1, 60), LOOKS), max_size=30),
)
def test_whatever_happens_rungs_stay_in_range_and_turn_at_most_every_two_seconds(
    preset: str, phases: list[tuple[int, dict[str, Any]]]
) -> None:
    run, turns, direction = Run(load_policy(preset)), [], 0
    for count, signals in phases:
        for _ in range(count):
            was = run.rung
            run.look(1, **signals)
            assert 0 <= run.rung < len(CAPACITIES)
            now = (run.rung > was) - (run.rung < was)
            if now and direction and now != direction:
                turns.append(run.now_s)
            direction = now or direction
    assert all(late - early >= 2.0 - 1e-6 for early, late in pairwise(turns))
    run.look(2000)
    assert run.rung == 0
    told = len(run.decisions)
    run.look(100)
    assert len(run.decisions) == told  # an idle controller does nothing


def test_a_budget_of_every_token_is_never_spent() -> None:
    run = Run(replace(POLICY, max_demoted_token_share=1.0))
    run.look(23, demand=1000, token_share=1.03)
    assert run.rung == 4


def test_rungs_that_free_nothing_more_are_neither_taken_nor_kept() -> None:
    capacities = (10, 14, 18, 18, 18)
    run = Run()
    run.look(3, demand=100, capacities=capacities)
    assert run.rung == 2
    run.rung = 4
    run.look(40, demand=16, running_demand=16, capacities=capacities)
    assert run.rung == 2


def test_a_return_leaves_room_for_requests_that_no_deeper_rung_would_help() -> None:
    run = Run()
    run.look(3, demand=1000)
    run.look(100, demand=0, running_demand=110)
    assert run.rung == 4  # 110 > 0.8 * 130
    run.look(40, demand=0, running_demand=10)
    assert run.rung == 0


def test_a_return_breaks_no_target_that_is_kept() -> None:
    run = Run()
    run.look(3, demand=1000)
    slower = (0.05, 0.04, 0.03, 0.02, 0.01)
    run.look(100, demand=10, tpot_target_s=0.035, decode_s=slower, chunk_s=slower)
    assert run.rung == 2
    run.look(100, demand=10, tpot_target_s=None, decode_s=slower, chunk_s=slower)
    assert run.rung == 0
