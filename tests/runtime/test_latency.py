from fake_engine import make_snapshot

from morphserve.quantize.manifest import Variant
from morphserve.runtime.latency import LatencyWindow, Percentiles, Rates, recent_rates
from morphserve.runtime.messages import Snapshot


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def point(time: float, prompt: int, generated: int) -> Snapshot:
    return make_snapshot(
        time=time, prompt_tokens=prompt, generated_tokens={Variant.INT4: generated}
    )


def test_percentiles_are_latencies_that_somebody_saw() -> None:
    window = LatencyWindow(Clock())
    for value in range(1, 101):
        window.add(float(value))
    assert window.percentiles() == Percentiles(50.0, 95.0, 99.0)


def test_the_window_forgets_after_a_minute() -> None:
    clock = Clock()
    window = LatencyWindow(clock)
    assert window.percentiles() is None
    window.add(9.0)
    clock.now += 40
    window.add(1.0)
    assert window.percentiles() == Percentiles(1.0, 9.0, 9.0)
    clock.now += 21
    assert window.percentiles() == Percentiles(1.0, 1.0, 1.0)
    clock.now += 60
    assert window.percentiles() is None


def test_watchers_within_a_quarter_of_a_second_share_one_answer() -> None:
    clock = Clock()
    window = LatencyWindow(clock)
    window.add(1.0)
    told = window.percentiles()
    window.add(9.0)
    clock.now += 0.2
    assert window.percentiles() is told
    clock.now += 0.2
    assert window.percentiles() == Percentiles(1.0, 9.0, 9.0)


def test_rates_are_those_of_the_last_two_seconds() -> None:
    points = [point(0.0, 0, 0), point(9.0, 900, 50), point(11.0, 1000, 250)]
    assert recent_rates(points) == Rates(prompt=50.0, generation=100.0)


def test_one_snapshot_has_no_rate() -> None:
    assert recent_rates([point(1.0, 100, 100)]) == Rates(0.0, 0.0)


def test_an_engine_that_was_started_again_made_no_negative_tokens() -> None:
    assert recent_rates([point(1.0, 100, 100), point(2.0, 0, 7)]) == Rates(0.0, 0.0)


def test_a_clock_that_is_set_makes_no_rate_negative_or_endless() -> None:
    for jump_s in (-86_400.0, 0.0, 86_400.0):
        rates = recent_rates([point(1e6, 100, 100), point(1e6 + 1 + jump_s, 200, 300)])
        assert 0 <= rates.prompt <= 100 and 0 <= rates.generation <= 200
