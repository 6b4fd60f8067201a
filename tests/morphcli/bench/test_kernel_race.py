"""Calls in turns, and what rates and load averages come to."""

import math
from dataclasses import replace
from functools import partial

import pytest

from morphserve.morphcli.bench.kernels import race
from morphserve.morphcli.bench.kernels.race import in_turns
from morphserve.morphcli.bench.kernels.result import Machine, Rates, Work

MACHINE = Machine("cpu", 4, 2, "2", 0.0, 0.0, Rates(1e9, 2e9), {"float32": Rates(1e9, 2e9)})


def test_the_least_time_is_the_longer_of_reading_and_multiplying() -> None:
    assert MACHINE.least_seconds(Work(num_bytes=4)) == 2e-9
    assert MACHINE.least_seconds(Work(4, 8, "float32")) == 4e-9
    assert MACHINE.least_seconds(Work(4, 8, "int8")) == 4e-9  # it has no instruction for int8


def test_other_work_shows_in_the_load_average() -> None:
    assert MACHINE.is_quiet
    assert replace(MACHINE, load_after=2.2).is_quiet  # our own two threads
    assert not replace(MACHINE, load_before=1.0).is_quiet
    assert replace(MACHINE, load_after=3.5).others == 1.5


@pytest.mark.parametrize(
    ("spent_s", "turns", "goes_on"),
    [(0.5, 9, True), (1.1, 9, False), (1.1, 1, True), (8.5, 1, False), (8.5, 0, True)],
)
def test_long_calls_get_fewer_turns(spent_s: float, turns: int, goes_on: bool) -> None:
    assert race._goes_on(turns, spent_s, seconds=1.0) is goes_on


def test_calls_take_turns_and_the_first_turn_is_not_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(race, "LEAST_TURNS", 3)
    monkeypatch.setattr(race, "PATIENCE", math.inf)
    called: list[tuple[str, int]] = []
    calls = [partial(lambda name, i: called.append((name, i)), name) for name in "ab"]
    spent = in_turns([(call, int) for call in calls], seconds=1e-9)
    assert called == [(name, i) for i in range(4) for name in "ab"]
    assert len(spent) == 2 and all(map(math.isfinite, spent))
