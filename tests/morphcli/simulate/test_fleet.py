"""Simulated replicas: the control plane that serves, on a clock of costs."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_target import TARGET, TICK_S, schedule, small_fleet

from morphserve.configs.errors import OutOfBudget
from morphserve.configs.load import load_policy
from morphserve.configs.schema import SchedulerConfig, Slo
from morphserve.morphcli.bench.summary import Run
from morphserve.morphcli.simulate.device import SimulatedDevice
from morphserve.morphcli.simulate.engine import SimulatedEngine
from morphserve.morphcli.simulate.fleet import simulate
from morphserve.morphcli.traces.arrivals import Arrival
from morphserve.morphcli.traces.schedule import Schedule
from morphserve.runtime.blocks import BlockPool
from morphserve.runtime.control import Control

FULL, MORPH = load_policy("off"), load_policy("performance")


def times(run: Run) -> list[tuple[float | None, float | None]]:
    return [(o.ttft_s, o.e2e_s) for o in run.outcomes]


def test_a_lone_request_takes_its_prompt_and_a_step_per_further_token() -> None:
    (outcome,) = simulate(small_fleet(), schedule(3.0, prompt=10, output=5), FULL).outcomes
    assert outcome.ttft_s == 4 * 10 * TICK_S
    assert outcome.e2e_s == 4 * (10 + 4) * TICK_S
    assert (outcome.output_tokens, outcome.finish_reason, outcome.error) == (5, "length", None)


def test_int4_layers_are_faster_and_a_busy_machine_is_slower() -> None:
    alone = schedule(0.0)
    ((ttft_s, _),) = times(simulate(small_fleet(), alone, load_policy("static:2")))
    assert ttft_s == (2 + 2 / 2) * 10 * TICK_S
    ((ttft_s, _),) = times(simulate(small_fleet(slowdown=3.0), alone, FULL))
    assert ttft_s == 3 * 4 * 10 * TICK_S


def test_requests_that_find_no_blocks_wait_for_those_before_them() -> None:
    three = schedule(0.0, 0.0, 0.0, prompt=100, output=20)
    small, large = (simulate(small_fleet(n), three, FULL) for n in (12, 48))
    assert small.outcomes[2].ttft_s > large.outcomes[2].ttft_s
    assert small.outcomes[2].queue_s > large.outcomes[2].queue_s


def burst(count: int) -> Schedule:
    return Schedule(tuple(Arrival(1 + i / 64, 60, 30) for i in range(count)), 20.0)


def test_pressure_demotes_layers_whose_memory_becomes_blocks_and_gives_them_back() -> None:
    run = simulate(small_fleet(), burst(24), MORPH)
    most = max(s.num_int4 for s in run.states)
    assert most > 1
    assert max(s.blocks_capacity for s in run.states) == run.states[0].blocks_full + most * 12
    assert run.states[-1].num_int4 == 0 and run.states[-1].swaps >= 2 * most
    assert run.states[-1].num_generated == 24 * 30
    waited = simulate(small_fleet(), burst(24), FULL)
    assert max(o.ttft_s for o in run.outcomes) < max(o.ttft_s for o in waited.outcomes)


def test_a_slow_link_brings_relief_later() -> None:
    slow = replace(TARGET, copy_bytes_per_s=2.0**14)
    first = [
        next(s.time for s in simulate(fleet, burst(24), MORPH).states if s.num_int4)
        for fleet in (small_fleet(), small_fleet(target=slow))
    ]
    assert first[0] < first[1]


def test_copies_that_do_not_overlap_prolong_steps() -> None:
    sequential = small_fleet(target=replace(TARGET, copies_overlap=False))
    overlapped, prolonged = (
        simulate(fleet, burst(24), MORPH).outcomes[0] for fleet in (small_fleet(), sequential)
    )
    assert prolonged.e2e_s > overlapped.e2e_s


def test_what_can_never_be_served_or_is_too_much_is_refused() -> None:
    run = simulate(small_fleet(), Schedule((Arrival(0.0, 200, 5),), 1.0), FULL)
    assert run.outcomes[0].status == 400 and "limit of 128 tokens" in str(run.outcomes[0].error)
    crowd = Schedule(tuple(Arrival(0.0, 60, 2) for _ in range(600)), 1.0)
    assert {o.status for o in simulate(small_fleet(), crowd, FULL).outcomes} == {200, 503}


def test_a_client_leaves_after_its_timeout() -> None:
    run = simulate(small_fleet(12, timeout_s=1.0), burst(40), FULL)
    left = [o for o in run.outcomes if o.timed_out]
    assert left and all(o.e2e_s is None for o in left)
    assert all(o.timed_out or o.e2e_s is not None for o in run.outcomes)


def test_more_replicas_serve_a_burst_sooner() -> None:
    one, two = (simulate(small_fleet(replicas=n), burst(40), FULL) for n in (1, 2))
    assert max(o.e2e_s for o in two.outcomes) < max(o.e2e_s for o in one.outcomes)


arrivals = st.lists(
    st.builds(
        Arrival,
        st.integers(0, 3000).map(lambda tick: tick * TICK_S),
        st.integers(1, 100),
        st.integers(1, 60),
    ),
    min_size=1,
    max_size=40,
)


def cell(control: Control, time_s: float) -> float:
    return time_s if math.isinf(time_s) else time_s // control._policy.window_s


def looks_on_a_grid(control: Control, now_s: float) -> bool:
    """The first step in each window looks, whatever looks came before."""
    return control.may_swap(now_s) and cell(control, now_s) > cell(control, control._looked_s)


def end_of_cell(control: Control) -> float:
    return (cell(control, control._looked_s) + 1) * control._policy.window_s


@settings(max_examples=100)
@given(
    arrivals=arrivals,
    policy=st.sampled_from(["off", "static:2", "accuracy", "balanced", "performance"]),
    num_blocks=st.sampled_from([12, 24, 60, 240]),
    seats=st.sampled_from([2, 8, 16]),
    slo=st.sampled_from([Slo(), Slo(ttft_s=0.5, tpot_s=0.05)]),
    timeout_s=st.sampled_from([0.5, 60.0]),
)
def test_steps_that_are_skipped_would_have_changed_nothing(
    arrivals: Sequence[Arrival],
    policy: str,
    num_blocks: int,
    seats: int,
    slo: Slo,
    timeout_s: float,
) -> None:
    ordered = Schedule(tuple(sorted(arrivals, key=lambda a: a.time_s)), 4.0)
    limits = SchedulerConfig(seats, 64, 128)
    fleet = small_fleet(num_blocks, slo=slo, timeout_s=timeout_s, limits=limits)
    # The share of tokens made at INT4 is counted by buckets of time, which skipping may change.
    unlimited = replace(load_policy(policy), max_demoted_token_share=1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Control, "is_due", looks_on_a_grid)
        patch.setattr(Control, "due_s", end_of_cell)
        skipped = simulate(fleet, ordered, unlimited)
        patch.setattr(SimulatedEngine, "stretch", lambda _: None)
        patch.setattr(SimulatedEngine, "_may_count", lambda _: False)
        patch.setattr("morphserve.morphcli.simulate.engine.CountingPool", BlockPool)
        patch.setattr(SimulatedDevice, "copy_blocks", lambda *_: None)
        stepped = simulate(fleet, ordered, unlimited)
    assert skipped.outcomes == stepped.outcomes
    counted = [(r.states[-1].swaps, r.states[-1].preemptions) for r in (skipped, stepped)]
    assert counted[0] == counted[1]
    assert skipped.states[-1].blocks_used == 0


def test_limits_are_those_of_the_server() -> None:
    few = SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=64, max_model_len=128)
    run = simulate(small_fleet(limits=few), burst(4), FULL)
    assert max(s.running for s in run.states) == 1


def test_a_fleet_without_room_for_one_request_is_refused() -> None:
    with pytest.raises(OutOfBudget, match="raise --memory-budget"):
        simulate(small_fleet(2), schedule(0.0), MORPH)


def test_every_request_that_has_come_is_told() -> None:
    told: list[int] = []
    many = Schedule(tuple(Arrival(i / 8, 10, 2) for i in range(1203)), 160.0)
    simulate(small_fleet(), many, FULL, on_requests=told.append)
    assert told == [1000, 203]
