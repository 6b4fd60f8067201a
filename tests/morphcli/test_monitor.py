import io

import pytest
from fake_engine import make_snapshot
from rich.console import Console

from morphserve.morphcli.monitor import Rates, View, log_line
from morphserve.quantize.manifest import Variant
from morphserve.runtime.messages import Event
from morphserve.runtime.metrics import Latency, Percentiles


def shown(view: View, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, record=True, color_system=None)
    console.print(view.render(width))
    return [line.rstrip() for line in console.export_text().splitlines()]


def test_the_log_line_reads_like_vllms_and_adds_precision() -> None:
    before = make_snapshot(time=10.0, prompt_tokens=100, generated_tokens={})
    now = make_snapshot(
        time=12.0, prompt_tokens=300, generated_tokens={Variant.FULL: 50}, running=4
    )
    assert log_line(now, Rates.between(before, now)) == (
        "Avg prompt throughput: 100.0 tokens/s, Avg generation throughput: 25.0 tokens/s, "
        "Running: 4 reqs, Waiting: 3 reqs, Preemptions: 0, KV cache usage: 50.0% of 60 blocks, "
        "INT4 layers: 1/4"
    )


def test_growth_of_the_cache_shows_over_time() -> None:
    view = View("demo")
    sizes = [(10, 40), (40, 40), (50, 60), (80, 80), (5, 40)]
    for i, (used, capacity) in enumerate(sizes):
        now = make_snapshot(time=100.0 + i, blocks_used=used, blocks_capacity=capacity)
        view.update(now, Latency(None, None))
    lines = shown(view, 100)
    assert "KV capacity ▄▄▆█▄" in lines
    assert "KV used     ▁▄▅█▁" in lines
    assert "KV blocks 5 used of 40 now (40 at full precision, 80 at most)" in lines


def test_precision_queue_latency_and_events_are_shown() -> None:
    view = View("demo")
    latency = Latency(Percentiles(0.02, 0.5, 1.25), None)
    events = [Event(1, 0.0, "demote", "layer 1 to INT4: demand 50 of 40 blocks")]
    view.update(make_snapshot(running=2, preemptions=7), latency, events)
    text = "\n".join(shown(view, 100))
    assert "policy balanced  INT4 1/4  rung 2 of 2 wanted" in text
    assert "layers  ■ ▪ ▼ ■   ■ full  ▪ int8  ▪ int4  ▼ demoting  ▲ promoting" in text
    assert "2 running  3 waiting (oldest 0.2 s)  7 preemptions" in text
    assert "TTFT         20 ms  500 ms  1250 ms" in text
    assert "demote    layer 1 to INT4: demand 50 of 40 blocks" in text


@pytest.mark.parametrize("width", [8, 20, 40, 300])
def test_any_width_is_kept(width: int) -> None:
    view = View("demo" * 20)
    for i in range(500):
        layers = [Variant.FULL, Variant.INT4] * 40
        view.update(make_snapshot(time=float(i), layers=layers), Latency(None, None))
    assert max(map(len, shown(view, width))) <= width
