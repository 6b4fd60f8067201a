"""Processes of the load generator: how many, and that their shares are one plan."""

import pytest
from fake_server import fake_server

from morphserve.morphcli.bench.client import Outcome, Plan, PlannedRequest
from morphserve.morphcli.bench.replay import ReplayFailed, num_processes, replay


def requests(count: int, gap_s: float, output_tokens: int) -> list[PlannedRequest]:
    return [PlannedRequest(i, i * gap_s, "plain", 4, output_tokens) for i in range(count)]


@pytest.mark.parametrize(
    ("count", "gap_s", "output_tokens", "num_cores", "expected"),
    [
        (0, 0.0, 1, 64, 1),
        (100, 0.5, 100, 64, 1),  # 200 tokens per second
        (100, 0.05, 300, 64, 4),  # 6000
        (100, 0.05, 300, 4, 2),  # the server needs the others
        (100, 0.05, 300, 1, 1),
        (2, 0.0, 100_000, 64, 2),
    ],
)
def test_the_peak_decides_how_many_processes_send(
    count: int, gap_s: float, output_tokens: int, num_cores: int, expected: int
) -> None:
    assert num_processes(requests(count, gap_s, output_tokens), num_cores) == expected


def test_several_processes_send_one_plan() -> None:
    ended: list[Outcome] = []
    with fake_server() as (url, server):
        plan = Plan(url, "fake", 20.0, requests(7, 0.1, 5))
        epoch_s, outcomes = replay(plan, ended.append, processes=3)
    assert [outcome.index for outcome in outcomes] == list(range(7))
    assert [outcome.intended_s for outcome in outcomes] == [r.send_s for r in plan.requests]
    assert all(outcome.error is None and outcome.lag_s >= 0 for outcome in outcomes)
    assert sorted(outcome.index for outcome in ended) == list(range(7))
    assert len(server.bodies) == 7 and epoch_s > 0


def test_a_load_generator_that_dies_is_reported(capfd: pytest.CaptureFixture[str]) -> None:
    plan = Plan("no server's URL", "fake", 20.0, requests(3, 0.0, 5))
    with pytest.raises(ReplayFailed, match=r"ended early \(exit code 1\)"):
        replay(plan, lambda _: None, processes=2)
    assert "no server's URL" in capfd.readouterr().err
