"""Predicted step times against closed forms."""

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from morphserve.quantize.costs import AttentionTime, Curve, DeviceCosts, LayerTimes
from morphserve.quantize.manifest import Variant
from morphserve.runtime.costs import cost_model, fit, interpolate, roofline

FULL, INT8, INT4 = Variant.FULL, Variant.INT8, Variant.INT4
TOKENS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
DECODE, PREFILL = (3e-6, 4e-8, 2e-7), (8e-6, 7e-9, 1e-7)  # a call, a pair, a query


def attention_time(num_seqs: int, query_tokens: int, context: int) -> AttentionTime:
    """By summing over every query what it looks at."""
    call, pair, query = DECODE if query_tokens == 1 else PREFILL
    looked_at = sum(range(context - query_tokens + 1, context + 1))
    seconds = call + num_seqs * (pair * looked_at + query * query_tokens)
    return AttentionTime(num_seqs, query_tokens, context, seconds)


def line(start: float, slope: float) -> Curve:
    return Curve(TOKENS, [start + slope * n for n in TOKENS])


COSTS = DeviceCosts(
    device="a device",
    kernels="cpu",
    threads=1,
    dtype="bfloat16",
    layer_weights=1000,
    layers=[
        LayerTimes("full", 2000, line(9e-5, 1e-5)),
        LayerTimes("int4", 600, line(4e-5, 2e-5)),
        LayerTimes("int8", 1100, line(5e-5, 1e-5)),
    ],
    attention=[
        *(attention_time(n, 1, c) for n, c in ((1, 64), (1, 900), (8, 200), (32, 64), (32, 400))),
        *(attention_time(n, q, c) for n, q, c in ((1, 32, 32), (1, 64, 512), (4, 64, 256))),
        attention_time(1, 256, 256),
    ],
    rest=line(1e-4, 2e-5),
)


def test_a_step_is_its_layers_their_attention_and_the_rest() -> None:
    contexts, chunk = [70, 333, 901], (128, 256)
    variants = [FULL, INT4, INT4, INT8]
    tokens = len(contexts) + chunk[1] - chunk[0]
    linears = (9e-5 + 1e-5 * tokens) + 2 * (4e-5 + 2e-5 * tokens) + (5e-5 + 1e-5 * tokens)
    decode = DECODE[0] + sum(DECODE[1] * c + DECODE[2] for c in contexts)
    prefill = attention_time(1, 128, 256).seconds
    rest = 1e-4 + 2e-5 * 4
    model = cost_model(COSTS)
    predicted = model.step_seconds(variants, [*((c - 1, c) for c in contexts), chunk])
    assert predicted == pytest.approx(linears + 4 * (decode + prefill) + rest, rel=1e-6)
    assert model.decode.error == pytest.approx(0, abs=1e-6)
    assert model.prefill.error == pytest.approx(0, abs=1e-6)


def test_a_step_without_prefill_pays_for_none() -> None:
    model = cost_model(COSTS)
    one = model.step_seconds([FULL], [(63, 64)])
    attention = DECODE[0] + 64 * DECODE[1] + DECODE[2]
    assert one == pytest.approx(9e-5 + 1e-5 + attention + 1.2e-4, rel=1e-6)


def test_curves_are_straight_between_points_and_beyond_them() -> None:
    curve = Curve([2, 4, 8], [1.0, 2.0, 6.0])
    seconds = [interpolate(curve, n) for n in (1, 2, 3, 4, 7, 8, 10)]
    assert seconds == pytest.approx([0.5, 1.0, 1.5, 2.0, 5.0, 6.0, 8.0])


def test_noise_in_the_last_points_never_makes_large_batches_free() -> None:
    assert interpolate(Curve([1, 2], [2.0, 1.0]), 512) == 1.0


@given(st.data())
def test_no_other_coefficients_that_are_not_negative_fit_better(data: st.DataObject) -> None:
    """The Karush-Kuhn-Tucker conditions, which only the optimum of a convex problem meets."""
    number = st.floats(0.1, 10)
    count = data.draw(st.integers(4, 8))
    terms = np.array(
        data.draw(st.lists(st.tuples(number, number, number), min_size=count, max_size=count))
    )
    values = np.array(data.draw(st.lists(number, min_size=count, max_size=count)))
    found = fit(terms, values)
    relative = terms / values[:, None]
    gradient = relative.T @ (relative @ found - 1)
    size = np.linalg.norm(relative, axis=0) * np.sqrt(count)
    assert (found >= 0).all()
    assert (gradient >= -1e-6 * size).all()
    assert (abs(gradient[found > 0]) <= 1e-6 * size[found > 0]).all()


def test_roofline_finds_the_constants_behind_a_curve() -> None:
    reading, flops = 2000 / 3e9, 5e10
    seconds = [float(np.hypot(reading, 2 * 1000 * n / flops)) for n in TOKENS]
    found = roofline(LayerTimes("full", 2000, Curve(TOKENS, seconds)), layer_weights=1000)
    assert found.bytes_per_s == pytest.approx(3e9, rel=1e-3)
    assert found.flops == pytest.approx(5e10, rel=1e-3)
    assert found.error < 1e-3


@pytest.mark.parametrize(
    ("bytes_per_s", "flops", "weights"),
    [(20e9, 400e9, 218_000_000), (20e9, 150e9, 50_000_000), (3.45e12, 780e12, 218_000_000)],
)
def test_roofline_finds_the_constants_of_large_layers(
    bytes_per_s: float, flops: float, weights: int
) -> None:
    seconds = [math.hypot(2 * weights / bytes_per_s, 2 * weights * n / flops) for n in TOKENS]
    times = LayerTimes("full", 2 * weights, Curve(TOKENS, seconds))
    found = roofline(times, weights)
    assert found.bytes_per_s == pytest.approx(bytes_per_s, rel=1e-6)
    assert found.flops == pytest.approx(flops, rel=1e-6)
    assert found.error < 1e-6


def test_the_cost_model_imports_no_torch() -> None:
    code = "import sys, morphserve.runtime.costs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
