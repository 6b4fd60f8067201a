"""Plans: the fewest replicas and the least memory that keep an SLO."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from small_target import TICK_S, schedule, small_fleet
from typer.testing import CliRunner

from morphserve.configs.errors import ConfigError, OutOfBudget
from morphserve.configs.schema import Slo
from morphserve.morphcli.app import app
from morphserve.morphcli.bench.summary import Run
from morphserve.morphcli.simulate.fleet import Fleet, simulate
from morphserve.morphcli.simulate.plan import Need, Plan, make_plan, patience_s, usable_bytes
from morphserve.morphcli.traces.schedule import Schedule

EIGHT = schedule(*[0.0] * 8, prompt=8, output=2)
# Four prompts of 8 tokens through four layers, all in one step:
FLEET = small_fleet(96, slo=Slo(ttft_s=4 * 8 * 4 * TICK_S))


def needs(fleet: Fleet, *policies: str, share: float = 1.0, most: int = 8) -> list[Need]:
    return list(make_plan(fleet, EIGHT, policies, share, most))


def test_replicas_are_the_fewest_that_keep_the_slo() -> None:
    full, int4 = needs(FLEET, "full", "static:all")
    assert (full.replicas, full.met_share, full.demoted_token_share) == (2, 1.0, 0.0)
    assert (int4.replicas, int4.met_share, int4.demoted_token_share) == (1, 1.0, 1.0)


def test_a_share_of_requests_may_miss() -> None:
    half_at_once = schedule(0.0, 0.0, 0.0, 0.0, 5.0, 6.0, 7.0, 8.0, prompt=8, output=2)
    one_prompt = replace(FLEET, slo=Slo(ttft_s=4 * 8 * TICK_S))
    (all_of_them,) = make_plan(one_prompt, half_at_once, ["full"], 1.0, 8)
    (half,) = make_plan(one_prompt, half_at_once, ["full"], 0.5, 8)
    assert (all_of_them.replicas, half.replicas) == (4, 1)


def test_a_policy_that_misses_with_the_most_replicas_says_how_far_it_came() -> None:
    (full,) = needs(FLEET, "full", most=1)
    assert (full.replicas, full.budget_bytes, full.met_share) == (None, None, 0.0)


def test_memory_is_the_least_that_keeps_the_slo() -> None:
    (full,) = needs(FLEET, "full")
    assert full.budget_bytes is not None
    assert full.budget_bytes < usable_bytes(FLEET)
    step = usable_bytes(FLEET) // 32
    cache = replace(FLEET.cache, memory_budget=full.budget_bytes - step)
    with pytest.raises(OutOfBudget):
        needs(replace(FLEET, cache=cache), "full")


def test_every_step_above_the_memory_told_keeps_the_slo(monkeypatch: pytest.MonkeyPatch) -> None:
    (even,) = needs(FLEET, "full")
    most = usable_bytes(FLEET)

    def uneven(fleet: Fleet, *rest: Any) -> Run:
        run = simulate(fleet, *rest)
        if fleet.cache.memory_budget == most * 25 // 32:
            for outcome in run.outcomes:
                outcome.error = "missed"
        return run

    monkeypatch.setattr("morphserve.morphcli.simulate.plan.simulate", uneven)
    (full,) = needs(FLEET, "full")
    assert even.budget_bytes is not None
    assert even.budget_bytes < most * 25 // 32
    assert full.budget_bytes == most * 26 // 32


def test_a_server_that_would_not_start_is_no_missed_slo() -> None:
    with pytest.raises(OutOfBudget, match="raise --memory-budget"):
        needs(small_fleet(2, slo=FLEET.slo), "morph")


def test_requests_that_no_server_takes_are_counted_and_refused() -> None:
    mixed = Schedule((*EIGHT.arrivals, *schedule(0.0, 1.0, prompt=100, output=60).arrivals), 2.0)
    told = "2 of 10 requests are longer than 128 tokens.* --max-prompt 96 --max-output 32.* raise"
    with pytest.raises(ConfigError, match=told):
        list(make_plan(FLEET, mixed, ["full"], 1.0, 8))


def test_a_request_is_given_up_only_when_it_has_missed_the_slo() -> None:
    long = schedule(0.0, prompt=8, output=3000)
    assert patience_s(Slo(2.0, 0.1), long) == 2 * (2.0 + 0.1 * 3000)
    assert patience_s(Slo(2.0, 0.1), EIGHT) == 120
    assert patience_s(Slo(ttft_s=2.0), EIGHT) == math.inf
    assert patience_s(Slo(tpot_s=0.1), EIGHT) == math.inf


def test_a_plan_ends_where_no_request_is_given_up() -> None:
    (need,) = needs(replace(FLEET, timeout_s=math.inf), "morph")
    assert need.met_share == 1


@pytest.mark.parametrize(("share", "most"), [(0.0, 4), (1.5, 4), (0.9, 0)])
def test_what_cannot_be_planned_is_refused(share: float, most: int) -> None:
    with pytest.raises(ConfigError, match="--share|--max-replicas"):
        needs(FLEET, "full", share=share, most=most)


def test_the_command_plans_a_trace_on_a_device(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    rows = [f"2023-11-16 18:15:{i:02}.0,900,40" for i in range(20)]
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]))
    line = ["plan", "llama-3-8b", "--trace", str(trace), "--device", "h100"]
    result = CliRunner().invoke(app, [*line, "--json"])
    assert result.exit_code == 0, result.output
    plan = msgspec.json.decode(result.stdout, type=Plan)
    assert [(need.policy, need.replicas) for need in plan.needs] == [
        *(("full", 1), ("static:all", 1), ("morph", 1))
    ]
    full, int4, _ = plan.needs
    assert full.budget_bytes is not None
    assert full.budget_bytes >= 16 * 10**9
    shown = CliRunner().invoke(app, line).stdout
    assert "20 requests" in shown
