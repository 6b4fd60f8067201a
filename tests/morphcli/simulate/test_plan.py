"""Plans: the fewest replicas and the least memory that keep an SLO."""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import Result
from small_target import TICK_S, schedule, small_fleet
from typer.testing import CliRunner

from morphserve.configs.errors import ConfigError, OutOfBudget
from morphserve.configs.schema import SchedulerConfig, Slo
from morphserve.morphcli.app import app
from morphserve.morphcli.bench.summary import Run
from morphserve.morphcli.simulate.devices import DEVICES
from morphserve.morphcli.simulate.fleet import Fleet, simulate
from morphserve.morphcli.simulate.plan import Need, Plan, make_plan, patience_s, usable_bytes
from morphserve.morphcli.simulate.sizes import known_models
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


def morph_plan(tmp_path: Path, *words: str, bad_row: str = "", output: int = 40) -> Result:
    """`morph plan` for twenty requests in twenty seconds, on a terminal of 80 columns."""
    trace = tmp_path / "trace.csv"
    rows = [f"2023-11-16 18:15:{i:02}.0,900,{output}" for i in range(20)]
    rows += [bad_row] if bad_row else []
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]))
    line = ["plan", "llama-3-8b", "--trace", str(trace), "--device", "h100"]
    return CliRunner().invoke(app, [*line, *words], env={"COLUMNS": "80"})


def decoded(result: Result) -> Plan:
    assert result.exit_code == 0, result.output
    return msgspec.json.decode(result.stdout, type=Plan)


def test_the_command_plans_a_trace_on_a_device(tmp_path: Path) -> None:
    plan = decoded(morph_plan(tmp_path, "--json"))
    assert [(need.policy, need.replicas) for need in plan.needs] == [
        *(("full", 1), ("static:all", 1), ("morph", 1))
    ]
    full, int4, _ = plan.needs
    assert full.budget_bytes is not None
    assert full.budget_bytes >= 16 * 10**9


def test_limits_are_a_servers_unless_told(tmp_path: Path) -> None:
    plan = decoded(morph_plan(tmp_path, "--policies", "full", "--json"))
    assert plan.limits == SchedulerConfig(max_model_len=940)
    assert plan.timeout_s == 120
    few = ["--max-num-seqs", "4", "--slo", "ttft=2s", "--max-output", "30"]
    plan = decoded(morph_plan(tmp_path, "--policies", "full", *few, "--json"))
    assert plan.limits == SchedulerConfig(max_num_seqs=4, max_model_len=930)
    assert (plan.timeout_s, plan.clipped_prompts, plan.clipped_outputs) == (None, 0, 20)


def test_the_table_fits_80_columns_and_tells_devices(tmp_path: Path) -> None:
    words = ["--policies", "full,static:16", "--tensor-parallel", "2"]
    shown = morph_plan(tmp_path, *words).stdout
    assert max(map(len, shown.splitlines())) <= 80
    assert "…" not in shown
    headings = shown.splitlines()[1:4]
    assert all(any(word in line for line in headings) for word in ("devices", "memory", "in SLO"))
    assert re.search(r"full precision +1 +2 +\d+\.\d GiB +100\.00% ", shown)
    caption = " ".join(shown.split())
    assert "20 requests in" in caption
    assert "Memory is that of each device" in caption
    assert "at most 64 requests at once and 512 tokens a step" in caption
    assert "given up after 120 s" in caption


def test_rows_that_are_left_out_are_told(tmp_path: Path) -> None:
    result = morph_plan(tmp_path, "--policies", "full", "--json", bad_row="yesterday,1,1")
    assert "skipped 1 of 21 rows" in " ".join(result.stderr.split())
    assert decoded(result).requests == 20


def test_columns_of_a_trace_may_be_named(tmp_path: Path) -> None:
    names = "time=TIMESTAMP,prompt=GeneratedTokens,output=ContextTokens"
    plan = decoded(morph_plan(tmp_path, "--policies", "full", "--json", "--map", names))
    assert plan.limits.max_model_len == 940
    assert plan.timeout_s == 2 * (2 + 900 * 0.1)


def test_a_budget_that_no_server_starts_with_ends_the_command(tmp_path: Path) -> None:
    result = morph_plan(tmp_path, "--memory-budget", "100GiB")
    assert isinstance(result.exception, OutOfBudget)
    assert "lower --memory-budget below" in str(result.exception)


def test_help_names_every_model_and_device() -> None:
    shown = CliRunner().invoke(app, ["plan", "--help"], env={"COLUMNS": "240"}).output
    assert all(name in shown for name in (*known_models(), *DEVICES))
