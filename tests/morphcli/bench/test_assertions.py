"""`--assert`: figures that have to hold."""

import pytest
from bench_runs import answered, make_run, make_summary, unanswered

from morphserve.configs.errors import ConfigError
from morphserve.morphcli.bench.assertions import broken, parse_assertions

SUMMARY, _ = make_summary(
    [
        make_run("full", [answered(0, 0.2), unanswered(1, 503)], []),
        make_run("morph:accuracy", [answered(0, 0.2), answered(1, 0.4)], []),
    ]
)
POLICIES = ["full", "morph:accuracy"]


def failures(*texts: str) -> list[str]:
    return list(broken(SUMMARY, parse_assertions(texts, POLICIES)))


def test_what_holds_is_not_told() -> None:
    assert failures("morph:accuracy.slo_attainment>=1", "refused<2", "full.ttft_s.p50 <= 0.2") == []


def test_what_does_not_hold_names_the_policy_and_its_figure() -> None:
    assert failures("slo_attainment>=0.9") == ["slo_attainment>=0.9 does not hold: full has 0.5"]


def test_a_figure_that_is_unknown_does_not_hold() -> None:
    assert failures("full.ttft_s.p95<=1") == ["full.ttft_s.p95<=1 does not hold: full has unknown"]
    assert failures("full.server.swaps==0") == [
        "full.server.swaps==0 does not hold: full has unknown"
    ]


def test_every_number_of_a_policy_can_be_asserted() -> None:
    texts = ["server.swaps==0", "answers.tokens.int4>1", "repeats.ttft_p95_s.high<=1", "kl<1"]
    assert len(parse_assertions(texts, POLICIES)) == 4


def test_shares_hold_at_the_number_itself() -> None:
    outcomes = [answered(0, 0.2), *(unanswered(i, 503) for i in range(1, 5))]
    summary, _ = make_summary([make_run("full", outcomes, [])])
    wanted = parse_assertions(["slo_attainment>=0.2", "slo_attainment<=0.2"], ["full"])
    assert list(broken(summary, wanted)) == []


def test_an_invalid_run_holds_nothing() -> None:
    summary, _ = make_summary([make_run("full", [answered(0, 0.2), unanswered(1, 500)], [])])
    (failure,) = broken(summary, parse_assertions(["slo_attainment>=0"], ["full"]))
    assert failure.startswith("slo_attainment>=0 cannot be told: the run of full is invalid (1 req")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slo_attainment", "write .POLICY..FIGURE>=NUMBER"),
        ("morph.slo_attainment>=1", "a policy of this run is one of full, morph:accuracy"),
        ("speed>=1", "a figure is one of offered"),
        ("ttft_s.p90<=1", "ttft_s.p90 is no number in summary.json"),
        ("full.ttft_s<=1", "ttft_s is no number"),
        ("faults==0", "faults is no number"),
    ],
)
def test_what_cannot_be_understood_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_assertions([text], POLICIES)
