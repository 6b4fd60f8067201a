"""What is measured, never how fast it was."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor

from morphserve.configs.schema import SchedulerConfig
from morphserve.quantize.build import QuantizeSettings, build_bundle
from morphserve.quantize.bundle import Bundle, open_bundle
from morphserve.quantize.checkpoint import Checkpoint, open_checkpoint
from morphserve.quantize.costs import DeviceCosts
from morphserve.quantize.machine import device_name
from morphserve.quantize.manifest import Variant
from morphserve.runtime import measure
from morphserve.runtime.costs import cost_model
from morphserve.runtime.device import open_device
from morphserve.runtime.kernels import AttentionShape, BatchMeta, load_kernels
from morphserve.runtime.kernels.reference import ReferenceKernels
from morphserve.runtime.measure import measure_costs
from morphserve.runtime.rigs import build_rigs

LINEARS = ("qkv", "o", "gate_up", "down")
LIMITS = SchedulerConfig(4, 64, 64)
HOST = open_device("cpu")


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
    assert (costs.kernels, costs.threads, costs.dtype) == (load_kernels(kernels).name, 1, "float32")
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


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_each_timed_engine_runs_its_own_variant(made: tuple[Checkpoint, Bundle], name: str) -> None:
    checkpoint, bundle = made
    kernels = load_kernels(name)
    rigs = build_rigs(checkpoint, bundle, kernels, torch.float32, LIMITS, 64, HOST)
    assert list(rigs) == [Variant.FULL, Variant.INT4, Variant.INT8]
    full = rigs.pop(Variant.FULL).parts.model.layers
    assert len(full) == checkpoint.architecture.num_layers
    for i, weights in enumerate(full):
        for linear in LINEARS:
            packed = kernels.pack_full(getattr(checkpoint.layer(i), linear))
            assert torch.equal(getattr(weights, linear).weight, packed.weight)
    for variant, rig in rigs.items():
        assert rig.parts.model.layers == rig.parts.layers.active
        assert len(rig.parts.layers.active) == checkpoint.architecture.num_layers
        for i, weights in enumerate(rig.parts.layers.active):
            for linear in LINEARS:
                found = getattr(weights, linear)
                packed = kernels.pack_quantized(getattr(bundle.layer(i, variant), linear))
                assert found.bits == packed.bits
                assert torch.equal(found.codes, packed.codes)
                assert torch.equal(found.scales, packed.scales)


@pytest.mark.parametrize("point", [(1, 1, 16), (3, 1, 20), (2, 8, 24)])
def test_attention_is_timed_at_its_points_sizes(
    made: tuple[Checkpoint, Bundle], point: tuple[int, int, int]
) -> None:
    num_seqs, query_tokens, context = point
    called = []

    class Watched(ReferenceKernels):
        def attention(
            self, q: Tensor, cache: Tensor, meta: BatchMeta, shape: AttentionShape
        ) -> Tensor:
            called.append((len(q), meta.query_start.diff().tolist(), meta.context_len.tolist()))
            return super().attention(q, cache, meta, shape)

    rigs = build_rigs(*made, Watched(), torch.float32, LIMITS, 256, HOST)
    with measure._attention(rigs[Variant.FULL].parts, *point) as run:
        spent = run()
    alone = (num_seqs, [1] * num_seqs, [1] * num_seqs)
    timed = (num_seqs * query_tokens, [query_tokens] * num_seqs, [context] * num_seqs)
    # In the pass that takes the caches; as asked for; and what is taken off.
    assert called == [alone, timed, alone] * made[0].architecture.num_layers
    assert len(spent) == made[0].architecture.num_layers


def test_the_lower_quartile_of_all_turns_runs_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "MAX_RUNS", 1)
    times = measure._Times()
    for spent in ([9.0, 2.0, 7.0, 5.0], [8.0, 1.0, 3.0, 6.0, 4.0]):
        times.measure("point", nullcontext(lambda spent=spent: list(spent)))
        times.measure("other", nullcontext(lambda: [0.5]))
    assert times.seconds("point") == 3.0  # 2 of 9 runs are shorter
    assert times.seconds("other") == 0.5


@pytest.mark.parametrize("max_position", [24, 40, 100])
def test_a_short_context_is_measured_as_far_as_it_goes(
    made: tuple[Checkpoint, Bundle], max_position: int
) -> None:
    checkpoint, _ = made
    checkpoint.architecture = replace(checkpoint.architecture, max_position=max_position)
    costs = measure_costs(*made, "cpu", threads=1)
    points = [(t.num_seqs, t.query_tokens, t.context_tokens) for t in costs.attention]
    assert len(set(points)) == len(points)
    assert max(context for *_, context in points) == max_position
    assert all(query <= context for _, query, context in points)
    spans = [(max_position - 1, max_position), (0, max_position)]
    assert cost_model(costs).step_seconds([Variant.INT4], spans) > 0


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
    assert [entry.kernels for entry in kept] == ["reference", "native"]
    assert kept[-1] == latest


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_timed_at_more_sizes(made: tuple[Checkpoint, Bundle]) -> None:
    costs = measure_costs(*made, "cuda", threads=1)
    assert (costs.device, costs.threads) == (device_name("cuda:0"), 0)
    assert costs.layers[0].curve.tokens[-1] == 2048
    assert costs.rest.tokens[-1] == 256
    for curve in [times.curve for times in costs.layers] + [costs.rest]:
        assert 0 < min(curve.seconds) and max(curve.seconds) < 0.1
