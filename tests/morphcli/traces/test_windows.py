"""Windows are found where a made trace has them."""

import numpy as np
import pytest

from morphserve.configs.errors import ConfigError
from morphserve.morphcli.traces.arrivals import TraceError
from morphserve.morphcli.traces.rows import Rows, sorted_rows
from morphserve.morphcli.traces.windows import find_windows


def rows_of(rates: list[int]) -> Rows:
    """So many requests in each second, evenly spread, the longer the later."""
    stamps = [
        second * 1_000_000 + i * 1_000_000 // count
        for second, count in enumerate(rates)
        for i in range(count)
    ]
    sizes = np.arange(1, len(stamps) + 1)
    return sorted_rows("t.csv", "made", np.array(stamps), sizes, sizes, is_dated=False)


CALM = [2] * 200
BURST = [20] * 20
# A burst that is calm on both sides, then a long rush that is denser and never calm.
TWO = rows_of([*CALM, *BURST, *CALM, *([12, 14] * 100), *CALM])


def test_calm_burst_calm_is_found_with_the_burst_in_the_middle() -> None:
    found = find_windows(TWO, 100)[0]
    assert abs(found.start_s + 50 - 210) <= 2 and found.end_s == found.start_s + 100
    assert found.peak_1s == found.peak_10s == 20
    assert max(found.shape[:4] + found.shape[-4:]) == 2 and max(found.shape) == 20
    assert found.requests == 100 * found.rate == 20 * 20 + 80 * 2


def test_the_densest_window_is_the_rush() -> None:
    found = find_windows(TWO, 100, densest=True)[0]
    assert 420 <= found.start_s <= 520 and found.rate == 13


def test_windows_hold_their_rows_and_none_lies_over_another() -> None:
    found = find_windows(TWO, 60, densest=True, most=4)
    assert len(found) == 4
    assert [w.rate for w in found] == sorted((w.rate for w in found), reverse=True)
    for window in found:
        stamps_s = TWO.time_us / 1e6
        assert stamps_s[window.first_row] >= window.start_s > stamps_s[window.first_row - 1]
        assert stamps_s[window.end_row - 1] < window.end_s <= stamps_s[window.end_row]
        part = TWO.prompt_tokens[window.first_row : window.end_row]
        assert window.prompt_tokens == pytest.approx(part.mean())
        assert all(other is window or abs(other.start_s - window.start_s) >= 60 for other in found)


def test_chance_is_no_burst() -> None:
    for seed in range(5):
        counts = np.random.default_rng(seed).poisson(4, 900)
        with pytest.raises(TraceError, match="has no burst between calm"):
            find_windows(rows_of(counts.tolist()), 300)


def test_a_trace_shorter_than_the_window_is_one_sentence() -> None:
    with pytest.raises(TraceError, match="lasts 400 s: give --seconds 400 or less"):
        find_windows(rows_of(CALM + CALM), 401)
    with pytest.raises(ConfigError, match="at least 20"):
        find_windows(TWO, 19)
    with pytest.raises(TraceError, match="lasts 2 s, and a window 20 s at least: replay it whole"):
        find_windows(rows_of([2, 2]), 300)


def test_a_cut_starts_at_its_first_row() -> None:
    cut = TWO.cut(10, 14)
    assert len(cut) == 4 and cut.time_us[0] == 0 and cut.prompt_tokens.tolist() == [11, 12, 13, 14]
