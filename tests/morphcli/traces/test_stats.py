"""The figures of a trace, on traces whose figures are known."""

from pathlib import Path

import numpy as np
import pytest

from morphserve.morphcli.traces.arrivals import TraceError
from morphserve.morphcli.traces.readers import read_rows
from morphserve.morphcli.traces.rows import Rows, sorted_rows
from morphserve.morphcli.traces.stats import describe

SHIPPED = Path(__file__).parents[3] / "morphcli" / "bench" / "azure2023_burst.csv"


def rows_at(*times_s: float, prompt: int = 10, output: int = 2) -> Rows:
    stamps = np.array([round(at * 1e6) for at in times_s], dtype=np.int64)
    sizes = np.ones(len(stamps), dtype=np.int64)
    return sorted_rows("t.csv", "made", stamps, prompt * sizes, output * sizes, is_dated=False)


def test_an_even_trace_has_no_dispersion_and_no_variation() -> None:
    found = describe(rows_at(*(i / 4 for i in range(481))))
    assert found.gaps is not None and found.minute is not None
    assert (found.requests, found.span_s, found.gaps.cv, found.gaps.max_s) == (481, 120, 0, 0.25)
    assert (found.dispersion.per_1s, found.dispersion.per_60s) == (0, 0)
    assert (found.seconds.total, found.seconds.empty, found.seconds.max_requests) == (121, 0, 4)
    assert (found.minute.min, found.minute.max) == (pytest.approx(3.95), 4)
    assert found.offered_prompt.minute_max == 40 and found.offered_output.minute_max == 8


def test_alternating_seconds_are_told_by_dispersion_and_autocorrelation() -> None:
    bursts = [second + i / 10 for second in range(0, 200, 2) for i in range(4)]
    found = describe(rows_at(*bursts, 200))
    assert found.dispersion.per_1s == pytest.approx(2)  # variance 4, mean 2
    assert found.dispersion.per_10s == 0
    assert found.autocorrelation.lag_1s == pytest.approx(-1, abs=0.02)
    assert found.autocorrelation.lag_30s == pytest.approx(0.85, abs=0.02)
    assert found.seconds.empty == 100


def test_the_densest_minute_is_found_where_it_is() -> None:
    found = describe(rows_at(*range(300), *(150 + i / 5 for i in range(300))))
    assert found.minute is not None
    assert (found.minute.max_starts_s, found.minute.max) == (150, 6)


def test_lengths_are_those_of_requests() -> None:
    rows = rows_at(*range(100))
    rows = sorted_rows(
        "t", "made", rows.time_us, np.arange(1, 101), rows.output_tokens, is_dated=True
    )
    found = describe(rows)
    assert (found.prompt_tokens.p50, found.prompt_tokens.p90) == (50, 90)
    assert (found.prompt_tokens.p99, found.prompt_tokens.max) == (99, 100)
    assert found.start == "1970-01-01T00:00:00Z"


@pytest.mark.parametrize("times_s", [(0.0,), (1.0, 1.0), (0.0, 3.0)])
def test_a_trace_too_short_for_a_figure_has_none(times_s: tuple[float, ...]) -> None:
    found = describe(rows_at(*times_s))
    assert found.minute is None and found.dispersion.per_60s is None
    assert found.rate is None or found.rate > 0


def test_a_stamp_that_is_far_off_is_one_sentence() -> None:
    with pytest.raises(TraceError, match="runs over 11,574 days"):
        describe(rows_at(0, 1, 1e9))


def test_the_shipped_slice_is_burstier_than_chance() -> None:
    found = describe(read_rows(SHIPPED))
    assert found.requests == 869 and found.start == "2023-11-16T18:30:59.029469Z"
    assert found.dispersion.per_1s is not None and found.dispersion.per_1s > 5
    assert found.seconds.max_requests == 72
