"""The demonstration finds the load that presses the machine it runs on."""

from dataclasses import replace
from pathlib import Path

import pytest
from small_target import FIXED_BYTES, SIZES, TARGET

from morphserve.configs.load import load_policy
from morphserve.configs.schema import CacheConfig, SchedulerConfig
from morphserve.morphcli.bench import demo
from morphserve.morphcli.bench.demo import DemoSettings, fit_load
from morphserve.morphcli.simulate.fleet import Fleet, simulate
from morphserve.morphcli.traces.readers import read_trace
from morphserve.morphcli.traces.schedule import shape_trace
from morphserve.quantize.costs import Curve
from morphserve.quantize.manifest import Variant
from morphserve.runtime.costs import AttentionCost, CostModel

FREE = AttentionCost(0.0, 0.0, 0.0, error=0.0)


def fleet(step_s: float) -> Fleet:
    """Four layers that together take `step_s` seconds, whatever they compute."""
    curve = Curve([1, 2], [step_s / 4, step_s / 4])
    layers = dict.fromkeys((Variant.FULL, Variant.INT4), curve)
    costs = CostModel(layers, FREE, FREE, Curve([1, 2], [1e-12, 1e-12]))
    target = replace(TARGET, costs=costs, max_position=640, sizes=SIZES)
    budget = FIXED_BYTES + 48 * 4096  # blocks, which all layers at INT4 double
    cache = CacheConfig(memory_budget=budget, min_run_bytes=1)
    return Fleet(target, cache=cache, limits=SchedulerConfig(max_model_len=640))


def fitted(monkeypatch: pytest.MonkeyPatch, step_s: float) -> DemoSettings:
    monkeypatch.setattr(demo, "_fleet", lambda *_: fleet(step_s))
    return fit_load(DemoSettings(), Path("unused"), "27MiB")


def test_a_faster_machine_is_given_more_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    slow, fast = fitted(monkeypatch, 5e-2), fitted(monkeypatch, 2e-3)
    assert 10 * slow.shape.rate_scale < fast.shape.rate_scale


def test_morphing_bears_the_load_and_full_precision_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = fitted(monkeypatch, 2e-3)
    trace = read_trace(Path(demo.__file__).with_name("azure2023_burst.csv"))

    def missed(policy: str, scale: float) -> float:
        shape = replace(settings.shape, rate_scale=scale * settings.shape.rate_scale)
        run = simulate(fleet(2e-3), shape_trace(trace, shape), load_policy(policy))
        found = [o.ttft_s for o in run.outcomes]
        return sum(ttft_s is None or ttft_s > 1 for ttft_s in found) / len(found)

    assert missed("balanced", 1.15) <= 0.02 and missed("off", 1.0) > 0.05
