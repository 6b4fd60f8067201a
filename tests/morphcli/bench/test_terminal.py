"""The table of a comparison on a terminal: no figure is cut off."""

import io

import pytest
from bench_runs import answered, make_run, make_summary, state
from rich.console import Console

from morphserve.morphcli.bench.terminal import print_table

NAMES = ("full", "static:all", "static:8", "morph", "morph:accuracy", "morph:performance")


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6])
def test_every_figure_is_whole_on_a_terminal_of_80_columns(count: int) -> None:
    states = [state(0.0, 0, 0), state(2.0, 2, 30)]
    runs = [make_run(name, [answered(0, 0.1), answered(1, 0.2)], states) for name in NAMES[:count]]
    summary, _ = make_summary(runs)
    for policy in summary.policies:
        policy.output_tokens_per_s = 12345.0
    out = io.StringIO()
    print_table(summary, Console(file=out, width=80), details=True)
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in out.getvalue()
    assert out.getvalue().count("12,345") == count
