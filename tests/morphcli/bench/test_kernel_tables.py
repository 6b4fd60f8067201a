"""What `morph bench --kernels` measured, on a terminal."""

import io
from dataclasses import replace

from rich.console import Console

from morphserve.morphcli.bench.kernels.result import (
    KernelBench,
    KernelTime,
    Machine,
    Rates,
    StepTime,
    Work,
)
from morphserve.morphcli.bench.kernels.tables import print_bench

RATES = Rates(123.4e9, 2345.6e9)
KINDS = {"float32": RATES, "bfloat16": RATES, "int8": RATES}
MACHINE = Machine("cpu", 64, 64, "2.13.0+cpu", 0.0, 60.0, RATES, KINDS)
WORK = Work(num_bytes=1)


def linear(kind: str, seconds: float) -> KernelTime:
    name, size = f"linear {kind}", "5632x2048"
    return KernelTime(name, size, 512, WORK, seconds, "oneDNN, packed", 22.2 * seconds, 1.0)


def step(variant: str, tokens: int) -> StepTime:
    return StepTime("1.1B", variant, 32, tokens, 512, WORK, 1.234, of_read=1.0, of_peak=1.0)


# The longest names that there are, and as many digits as a slow machine needs.
LINEARS = [linear("bf16", 9.876), linear("INT4", 0.876), linear("INT8", 1.234)]
OTHERS = [
    KernelTime("attention, prompt", "heads", 512, WORK, 1.2, "SDPA, own keys, float32", 99.9, 1.0),
    KernelTime(
        "sampler, top-p", "vocabulary 32000", 32, None, 1.2, "sort, multinomial", 99.9, None
    ),
]
BENCH = KernelBench(
    MACHINE,
    kernels=LINEARS + OTHERS,
    decode=[step("full", 9999), step("int4", 9999)],
    prefill=[step("full", 99999), step("int4", 99999)],
    notes=[],
)


def printed(bench: KernelBench, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    print_bench(bench, console)
    return console.export_text()


def words(text: str) -> list[str]:
    return sorted(word for word in text.split() if set(word) != {"─"})


def row(text: str, first: str) -> list[str]:
    return next(line.split() for line in text.splitlines() if line.split()[:1] == [first])


def test_the_tables_fit_into_80_columns_and_no_word_is_cut() -> None:
    narrow = printed(BENCH, 80)
    assert max(map(len, narrow.splitlines())) <= 80
    assert words(narrow) == words(printed(BENCH, 300))
    for title in ("what this machine", "linear, 5632x2048", "other kernels", "decode steps"):
        assert title in narrow


def test_columns_are_found_by_name_whatever_the_order() -> None:
    text = printed(BENCH, 80)
    assert [row(text, "512")[i] for i in (1, 4, 8)] == ["9,876", "876", "1,234"]
    turned = replace(
        BENCH,
        kernels=LINEARS[::-1] + OTHERS,
        decode=BENCH.decode[::-1],
        prefill=BENCH.prefill[::-1],
    )
    assert printed(turned, 80) == text


def test_where_torch_has_no_route_nothing_is_compared_with_it() -> None:
    alone = replace(LINEARS[1], torch_route=None, torch_seconds=None)
    text = printed(replace(BENCH, kernels=[LINEARS[0], alone, LINEARS[2]]), 80)
    assert row(text, "512").count("22.2") == 2


def test_the_warning_says_whose_the_load_average_is() -> None:
    assert "load average, which is" not in printed(BENCH, 300)
    busy = printed(replace(BENCH, machine=replace(MACHINE, load_before=20.0)), 300)
    assert "is the whole machine's and of the last minute" in busy
    assert "other work wanted 20.0 cores; 64 may be used here" in busy
