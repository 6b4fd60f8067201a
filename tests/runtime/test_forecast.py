"""Windows, the pass over requests, and predicted times at every rung."""

from typing import Any

import pytest

from morphserve.configs.schema import Slo
from morphserve.quantize.costs import Curve
from morphserve.quantize.manifest import Rung, Variant
from morphserve.runtime.costs import AttentionCost, CostModel
from morphserve.runtime.forecast import Forecaster, forecaster
from morphserve.runtime.ladder import Ladder
from morphserve.runtime.load import most_urgent, running_load
from morphserve.runtime.request import Demands, Request, SamplingParams
from morphserve.runtime.signals import Urgent
from morphserve.runtime.windows import Rolling

FULL, INT4 = Variant.FULL, Variant.INT4
MODEL = CostModel(
    layers={FULL: Curve([1, 100], [0.001, 0.1]), INT4: Curve([1, 100], [0.002, 0.2])},
    decode=AttentionCost(1e-5, 1e-6, 0.0, 0.0),
    prefill=AttentionCost(1e-5, 1e-7, 0.0, 0.0),
    rest=Curve([1, 100], [0.001, 0.001]),
)
LADDER = Ladder((Rung(1, INT4), Rung(0, INT4)), num_layers=3)


def request(prompt: int, output: int = 0, computed: int = 0, **demands: Any) -> Request:
    params = SamplingParams(max_tokens=100)
    made = Request("r", [1] * prompt, params, 10.0, Demands(**demands), output=[1] * output)
    made.num_computed = computed
    return made


def test_a_forecast_is_the_models_step_at_each_rung() -> None:
    forecast = Forecaster(MODEL, LADDER, num_rungs=3, max_step_tokens=20)
    spans = [(9, 10), (29, 30)]
    for rung in range(3):
        variants = LADDER.variants_at(rung)
        decode, chunk = forecast.decode_s(2, 40)[rung], forecast.chunk_s(2, 40)[rung]
        assert decode == pytest.approx(MODEL.step_seconds(variants, spans))
        assert chunk == pytest.approx(MODEL.step_seconds(variants, [*spans, (0, 18)]))


def test_a_slow_machine_is_believed_up_to_twice_the_model() -> None:
    forecast = Forecaster(MODEL, LADDER, num_rungs=3, max_step_tokens=20)
    before = forecast.decode_s(2, 40)[0]
    for _ in range(200):
        forecast.observe(measured_s=0.9, predicted_s=0.1)
    assert forecast.decode_s(2, 40)[0] == pytest.approx(2 * before)


def test_a_variant_that_was_not_measured_leaves_no_forecast() -> None:
    steps = Ladder((Rung(1, Variant.INT8), *LADDER.steps), num_layers=3)
    assert forecaster(MODEL, steps, 3, 20) is None
    assert forecaster(None, LADDER, 3, 20) is None


def test_running_requests_tell_what_they_will_take() -> None:
    decoding = request(10, output=2, computed=11, slo=Slo(tpot_s=0.02))
    decoding.blocks = [1]
    load = running_load([decoding, request(30, computed=10)], 8, 16, Slo(tpot_s=0.05))
    assert (load.num_decodes, load.context_tokens, load.prefill_tokens) == (1, 12, 20)
    assert load.growth == 1 + 3  # 20 and 38 tokens in blocks of 16
    assert load.tpot_target_s == 0.02


def test_the_most_urgent_request_counts_the_prefill_before_it() -> None:
    load = running_load([], 8, 16, Slo())
    waiting = [request(30), request(30, slo=Slo(ttft_s=1.0)), request(9, slo=Slo(ttft_s=5.0))]
    urgent = most_urgent(waiting, load, Slo(), step_tokens=20, step_s=0.1, now_s=10.5)
    assert urgent == Urgent(age_s=0.5, steps=3, target_s=1.0)


def test_a_window_forgets_what_is_older_than_its_span() -> None:
    window = Rolling(10.0)
    for second in range(100):
        window.add(float(second), 3)
    assert window.total(99.0) == 30
    assert window.per_second(99.0) == pytest.approx(3.0, rel=0.1)
    assert window.total(200.0) == 0


def test_a_young_window_counts_what_it_has_covered() -> None:
    window = Rolling(10.0)
    for tenth in range(20):
        window.add(5.0 + tenth / 10, 1)
    assert window.per_second(7.0) == pytest.approx(10.0)
