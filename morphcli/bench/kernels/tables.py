"""What was measured of kernels, on a terminal."""

from collections.abc import Iterator, Sequence
from itertools import groupby

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from morphserve.morphcli.bench.kernels.result import (
    KernelBench,
    KernelTime,
    Machine,
    Rates,
    StepTime,
)

DEFINITIONS = (
    "ms: median of calls in turns with the others of their line: with one thread the time that the "
    "processor worked for it, with several the time that passed. Weights and KV come from memory, "
    "not from caches, but for models that fit there.",
    "vs torch: the time of torch's fastest route over ours; vs bf16: that of our bf16 linear; vs "
    "full: that of full precision. Above 1 ours, or INT4, is faster.",
    "of max: the least time that reading the weights or KV and the multiply-adds can take at the "
    "rates above (bf16's, for INT4 and INT8 int8's; the longer of both), over the measured time.",
    "of read: bytes of weights and KV that a step reads, over its time and the read rate. of peak: "
    "its multiply-adds, over its time and the rate of bf16, at INT4 of int8.",
)


def print_bench(bench: KernelBench, console: Console) -> None:
    machine = bench.machine
    console.print(_place(machine), highlight=False, markup=False)
    linears = [time for time in bench.kernels if time.kernel.startswith("linear")]
    tables = [_machine_table(machine)]
    for size, times in groupby(linears, key=lambda time: time.size):
        tables.append(_linear_table(size, list(times)))
    tables.append(_others_table([time for time in bench.kernels if time not in linears]))
    if bench.decode:
        tables += [_decode_table(bench.decode), _prefill_table(bench.prefill)]
    for table in tables:
        console.print(table)
    for text in DEFINITIONS:
        console.print(text, style="dim", highlight=False, markup=False)
    for note in [*bench.notes, *([] if machine.is_quiet else [_busy(machine)])]:
        console.print(note, style="yellow", highlight=False, markup=False)


def _place(machine: Machine) -> str:
    return (
        f"{machine.device}, {_threads(machine.threads)} on {machine.cores} cores, torch "
        f"{machine.torch}, load average {machine.load_before:.2f} before and "
        f"{machine.load_after:.2f} after"
    )


def _busy(machine: Machine) -> str:
    return (
        "warning: by the load average, which is the whole machine's and of the last minute, other "
        f"work wanted {machine.others:.1f} cores; {machine.cores} may be used here. Where it went "
        "on, it took caches, memory bandwidth or processor time from what was measured"
    )


def _machine_table(machine: Machine) -> Table:
    columns = [_threads(count) for count in dict.fromkeys((1, machine.threads))]
    table = _table("what this machine can do", "", *columns)

    def add(label: str, rates: Rates, factor: float) -> None:
        values = (rates.one, rates.together)[: len(columns)]
        table.add_row(label, *(f"{factor * value / 1e9:,.0f}" for value in values))

    add("read from memory, GB/s", machine.read_bytes, 1.0)
    for kind, rates in machine.multiply_adds.items():
        add(f"multiply and add in registers, {kind}, GOP/s", rates, 2.0)
    return table


def _linear_table(size: str, times: Sequence[KernelTime]) -> Table:
    headings: tuple[str, ...] = ("bf16 ms", "vs torch", "of max")
    for name in ("INT4", "INT8"):
        headings += (f"{name} ms", "vs bf16", "vs torch", "of max")
    table = _table(f"linear, {size} (outputs x inputs)", "rows", *headings)
    for rows, alike in groupby(times, key=lambda time: time.rows):
        found = {time.kernel: time for time in alike}
        full = found["linear bf16"]
        cells = [_ms(full.seconds), _ratio(full.speedup), _share(full.of_limit)]
        for time in (found["linear INT4"], found["linear INT8"]):
            cells += [_ms(time.seconds), _ratio(full.seconds / time.seconds)]
            cells += [_ratio(time.speedup), _share(time.of_limit)]
        table.add_row(str(rows), *cells)
    return table


def _others_table(times: Sequence[KernelTime]) -> Table:
    sizes = ", ".join(dict.fromkeys(time.size for time in times))
    table = _table(f"other kernels: {sizes}", "kernel", "rows", "ms", "torch ms", "vs torch")
    table.add_column("of max", justify="right")
    table.add_column("torch's route")
    for time in sorted(times, key=lambda time: time.kernel):
        milliseconds = _ms(time.seconds), _ms(time.torch_seconds)
        shares = _ratio(time.speedup), _share(time.of_limit)
        table.add_row(time.kernel, str(time.rows), *milliseconds, *shares, time.torch_route or "")
    return table


def _decode_table(times: Sequence[StepTime]) -> Table:
    headings = ("ms", "tok/s", "of read", "of peak")
    table = _table(
        f"decode steps, random weights, context {times[0].context}",
        *("model", "batch", *headings, *(f"INT4 {h}" for h in headings), "vs full"),
    )
    for full, int4 in _pairs(times):
        cells = [*_step_cells(full), *_step_cells(int4), _ratio(full.seconds / int4.seconds)]
        table.add_row(full.model, str(full.sequences), *cells)
    return table


def _prefill_table(times: Sequence[StepTime]) -> Table:
    headings = ("tok/s", "of peak", "INT4 tok/s", "INT4 of peak", "vs full")
    title = f"prefill of {times[0].tokens} tokens in one chunk, random weights"
    table = _table(title, "model", *headings)
    for full, int4 in _pairs(times):
        cells = [cell for time in (full, int4) for cell in (_tokens(time), _share(time.of_peak))]
        table.add_row(full.model, *cells, _ratio(full.seconds / int4.seconds))
    return table


def _pairs(times: Sequence[StepTime]) -> Iterator[tuple[StepTime, StepTime]]:
    """The steps of each model and size: at full precision, at INT4."""
    for _, alike in groupby(times, key=lambda time: (time.model, time.sequences)):
        found = {time.variant: time for time in alike}
        yield found["full"], found["int4"]


def _step_cells(time: StepTime) -> list[str]:
    return [_ms(time.seconds), _tokens(time), _share(time.of_read), _share(time.of_peak)]


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column(first)
    for heading in others:
        table.add_column(heading, justify="right")
    return table


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def _tokens(time: StepTime) -> str:
    value = time.tokens_per_s
    return _digits(value) if value < 10_000 else f"{_digits(value / 1000)}k"


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{1e3 * seconds:.3f}" if seconds < 1e-3 else _digits(1e3 * seconds)


def _digits(value: float) -> str:
    """Three digits that count."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _ratio(value: float | None) -> str:
    """Red: slower than what it is compared with."""
    if value is None:
        return ""
    text = _digits(value)
    return f"[red]{text}[/]" if value < 1 else text


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"
