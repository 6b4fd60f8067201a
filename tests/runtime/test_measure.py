"""What is measured, never how fast it was."""

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch

from morphserve.quantize.build import QuantizeSettings, build_bundle
from morphserve.quantize.bundle import Bundle, open_bundle
from morphserve.quantize.checkpoint import Checkpoint, open_checkpoint
from morphserve.quantize.costs import DeviceCosts
from morphserve.quantize.manifest import Variant
from morphserve.runtime import measure
from morphserve.runtime.costs import cost_model
from morphserve.runtime.measure import device_name, measure_costs


@pytest.fixture
def made(tiny_model: Callable[[str], Path], tmp_path: Path) -> tuple[Checkpoint, Bundle]:
    checkpoint = open_checkpoint(str(tiny_model("llama3-tied")))
    settings = QuantizeSettings("rtn", 32, symmetric=False, int8=True)
    build_bundle(checkpoint, tmp_path / "bundle", settings)
    return checkpoint, open_bundle(str(tmp_path / "bundle"), checkpoint)


@pytest.fixture(autouse=True)
def short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "ROUNDS", 2)
    monkeypatch.setattr(measure, "TURN_S", 0.0)


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
def test_every_variant_of_the_bundle_is_timed(
    made: tuple[Checkpoint, Bundle], kernels: str
) -> None:
    costs = measure_costs(*made, kernels, threads=1)
    assert (costs.kernels, costs.threads, costs.dtype) == (kernels, 1, "float32")
    assert costs.device == device_name() != ""
    assert [times.variant for times in costs.layers] == ["full", "int4", "int8"]
    full, int4, int8 = (times.num_bytes for times in costs.layers)
    assert int4 < int8 < full
    curves = [times.curve for times in costs.layers] + [costs.rest]
    for curve in curves:
        assert curve.tokens == sorted(curve.tokens)
        assert len(curve.seconds) == len(curve.tokens)
        assert min(curve.seconds) > 0
    checkpoint, _ = made
    assert (
        max(time.context_tokens for time in costs.attention) <= checkpoint.architecture.max_position
    )
    assert all(time.seconds > 0 for time in costs.attention)
    assert msgspec.json.decode(msgspec.json.encode(costs), type=DeviceCosts) == costs


def test_the_cost_model_is_made_of_what_was_measured(made: tuple[Checkpoint, Bundle]) -> None:
    model = cost_model(measure_costs(*made, "cpu", threads=1))
    spans = [(9, 10), (0, 32)]
    for variant in Variant:
        assert model.step_seconds([variant] * 3, spans) > 0


def test_weights_of_a_layer_are_those_of_its_linears(made: tuple[Checkpoint, Bundle]) -> None:
    checkpoint, _ = made
    layer = checkpoint.layer(0)
    linears = (layer.qkv, layer.o, layer.gate_up, layer.down)
    costs = measure_costs(*made, "cpu", threads=1)
    assert costs.layer_weights == sum(linear.numel() for linear in linears)


def test_sizes_that_would_take_too_long_are_left_to_extrapolation(
    made: tuple[Checkpoint, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "LONGEST_S", 0.0)
    costs = measure_costs(*made, "cpu", threads=1)
    assert costs.layers[0].curve.tokens == [1, 2]
    assert cost_model(costs).step_seconds([Variant.FULL] * 3, [(0, 200)]) > 0


def test_threads_are_as_they_were_afterwards(made: tuple[Checkpoint, Bundle]) -> None:
    measure_costs(*made, "cpu", threads=2)
    assert torch.get_num_threads() == 1


def test_measured_costs_are_kept_in_the_bundle_one_entry_per_set_up(
    made: tuple[Checkpoint, Bundle],
) -> None:
    checkpoint, bundle = made
    bundle.with_costs(measure_costs(*made, "reference", threads=1))
    bundle.with_costs(measure_costs(*made, "cpu", threads=1))
    latest = measure_costs(*made, "cpu", threads=1)
    bundle.with_costs(latest)
    kept = open_bundle(str(bundle.path), checkpoint).manifest.costs
    assert [entry.kernels for entry in kept] == ["reference", "cpu"]
    assert kept[-1] == latest
