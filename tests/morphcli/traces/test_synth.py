"""Made traffic has the rate and the burstiness that were asked for."""

import numpy as np
import pytest

from morphserve.configs.errors import ConfigError
from morphserve.morphcli.traces.arrivals import TraceError
from morphserve.morphcli.traces.rows import Rows, sorted_rows
from morphserve.morphcli.traces.stats import describe, dispersion
from morphserve.morphcli.traces.synth import Kind, MadeLengths, Traffic, make_rows, traffic

LENGTHS = MadeLengths(prompt_tokens=900.0, output_tokens=150.0)


def made(kind: Kind, rate: float, seconds: float, **wanted: float) -> Rows:
    return make_rows(Traffic(kind, rate, seconds, **wanted), LENGTHS, seed=7)


def test_poisson_arrivals_come_by_chance() -> None:
    found = describe(made(Kind.POISSON, 5, 4000))
    assert found.rate == pytest.approx(5, rel=0.05)
    assert found.dispersion.per_1s == pytest.approx(1, rel=0.1)
    assert found.gaps is not None and found.gaps.cv == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("cv", [0.3, 1.0, 4.0])
def test_gamma_gaps_vary_as_wanted_without_tilting_the_rate(cv: float) -> None:
    found = describe(made(Kind.GAMMA, 5, 8000, cv=cv))
    assert found.gaps is not None and found.gaps.cv == pytest.approx(cv, rel=0.1)
    assert found.rate == pytest.approx(5, rel=0.1)


@pytest.mark.parametrize("kind", [Kind.GAMMA, Kind.ONOFF, Kind.NBINOM])
@pytest.mark.parametrize(("rate", "wanted"), [(2.6, 13.0), (5.5, 1.5), (8.0, 5.0)])
def test_each_kind_meets_a_wanted_dispersion(kind: Kind, rate: float, wanted: float) -> None:
    rows = made(kind, rate, 1800, dispersion=wanted)
    assert dispersion(rows.time_us) == pytest.approx(wanted, rel=0.2)
    assert len(rows) / 1800 == pytest.approx(rate, rel=0.15)


@pytest.mark.parametrize(("rate", "seconds"), [(2_000.0, 100), (60_000.0, 5)])
def test_gamma_gaps_at_high_rates_vary_by_the_root_of_the_dispersion(
    rate: float, seconds: float
) -> None:
    found = describe(made(Kind.GAMMA, rate, seconds, dispersion=9.0))
    assert found.gaps is not None and found.gaps.cv == pytest.approx(3, rel=0.03)


def test_a_dispersion_that_gamma_cannot_reach_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match="gamma reaches no dispersion of 900000 at 1 requests/s"):
        made(Kind.GAMMA, 1, 1800, dispersion=900_000.0)


def test_a_model_with_a_stamp_far_off_is_one_sentence() -> None:
    sizes = np.ones(3, dtype=np.int64)
    stamps = np.array([0, 1_700_000_000, 1_700_000_001]) * 1_000_000
    model = sorted_rows("t.csv", "made", stamps, sizes, sizes, is_dated=False)
    with pytest.raises(TraceError, match="t.csv runs over 19,676 days"):
        traffic("poisson", None, None, None, None, 15.0, model)


def test_bursts_that_are_on_and_off_last_and_others_do_not() -> None:
    lasting, brief = (
        describe(made(kind, 4, 1800, dispersion=8.0)).dispersion.per_10s
        for kind in (Kind.ONOFF, Kind.NBINOM)
    )
    assert lasting is not None and brief is not None and lasting > 3 * brief


def test_what_is_left_out_is_that_of_the_trace_to_be_like() -> None:
    model = made(Kind.NBINOM, 4, 600, dispersion=6.0)
    wanted = traffic("onoff", None, None, None, None, 15.0, model)
    assert wanted.rate == pytest.approx(len(model) / model.span_s)
    assert wanted.seconds == model.span_s
    assert wanted.dispersion == dispersion(model.time_us)
    rows = make_rows(wanted, model, seed=0)
    pairs = set(zip(model.prompt_tokens.tolist(), model.output_tokens.tolist(), strict=True))
    assert set(zip(rows.prompt_tokens.tolist(), rows.output_tokens.tolist(), strict=True)) <= pairs


def test_made_lengths_have_their_means() -> None:
    rows = made(Kind.POISSON, 10, 2000)
    assert rows.prompt_tokens.mean() == pytest.approx(900, rel=0.05)
    assert rows.output_tokens.mean() == pytest.approx(150, rel=0.05)
    assert rows.output_tokens.min() >= 1


@pytest.mark.parametrize("kind", list(Kind))
def test_equal_seeds_give_equal_traffic_and_others_do_not(kind: Kind) -> None:
    first, again, other = (
        make_rows(traffic(kind, 5, 100, None, None, 15.0, None), LENGTHS, seed)
        for seed in (1, 1, 2)
    )
    assert np.array_equal(first.time_us, again.time_us)
    assert np.array_equal(first.output_tokens, again.output_tokens)
    assert not np.array_equal(first.time_us, other.time_us)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"kind": "weibull"}, "choose one of poisson, gamma, onoff, nbinom"),
        ({"kind": "poisson", "rate": None}, "give --rate"),
        ({"kind": "poisson", "rate": -1.0}, "--rate must be above 0"),
        ({"kind": "poisson", "seconds": 0.0}, "--seconds must be above 0"),
        ({"kind": "poisson", "dispersion": 3.0}, "a Poisson process has dispersion 1"),
        ({"kind": "nbinom", "dispersion": 0.9}, "--dispersion must be above 1"),
        ({"kind": "nbinom", "cv": 3.0}, "--cv is for gamma"),
        ({"kind": "gamma", "cv": 3.0, "dispersion": 3.0}, "without --dispersion"),
        ({"kind": "gamma", "cv": 1000.0}, "--cv must be between"),
        ({"kind": "poisson", "rate": 1e9}, "between 1 and 50,000,000 requests"),
        ({"kind": "poisson", "rate": 0.01}, "between 1 and"),
        ({"kind": "poisson", "rate": 1e-6, "seconds": 1e9}, "--seconds must be at most 40,000,000"),
    ],
)
def test_traffic_that_cannot_be_is_refused(wanted: dict[str, object], message: str) -> None:
    settings = {
        **dict.fromkeys(("dispersion", "cv", "like")),
        "rate": 5.0,
        "seconds": 60.0,
        "burst_s": 15.0,
        **wanted,
    }
    with pytest.raises(ConfigError, match=message):
        traffic(**settings)  # type: ignore[arg-type]
