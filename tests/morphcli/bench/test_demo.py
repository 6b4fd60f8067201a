"""The demonstration finds the load that presses the machine it runs on."""

from dataclasses import replace
from pathlib import Path

import pytest
from small_target import SIZES, TARGET

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


def fleet(token_s: float) -> Fleet:
    """Four layers that together take `token_s` seconds per token of a step."""
    curve = Curve([1, 2], [token_s / 4, token_s / 2])
    layers = dict.fromkeys((Variant.FULL, Variant.INT4), curve)
    costs = CostModel(layers, FREE, FREE, Curve([1, 2], [1e-12, 1e-12]))
    target = replace(TARGET, costs=costs, max_position=640, sizes=SIZES)
    cache = CacheConfig(memory_budget=2**20, min_run_bytes=1)
    return Fleet(target, cache=cache, limits=SchedulerConfig(max_model_len=640))


def fitted(monkeypatch: pytest.MonkeyPatch, token_s: float) -> DemoSettings:
    monkeypatch.setattr(demo, "_fleet", lambda *_: fleet(token_s))
    return fit_load(DemoSettings(), Path("unused"), "27MiB")


def test_a_faster_machine_is_given_more_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    slow, fast = fitted(monkeypatch, 2e-3), fitted(monkeypatch, 4e-4)
    assert 2 * slow.shape.rate_scale < fast.shape.rate_scale


def test_the_load_is_borne_and_a_third_more_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = fitted(monkeypatch, 4e-4)
    trace = read_trace(Path(demo.__file__).with_name("azure2023_burst.csv"))

    def late(scale: float) -> float:
        shape = replace(settings.shape, rate_scale=scale * settings.shape.rate_scale)
        run = simulate(fleet(4e-4), shape_trace(trace, shape), load_policy("balanced"))
        found = [o.ttft_s for o in run.outcomes]
        return sum(ttft_s is None or ttft_s > 0.75 for ttft_s in found) / len(found)

    assert late(1.0) <= 0.01 < late(1.34)
