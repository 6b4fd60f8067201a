"""GPUs by constants: the times and sizes that published measurements and papers tell."""

import subprocess
import sys

import pytest

from morphserve.configs.errors import ConfigError, OutOfBudget
from morphserve.morphcli.simulate.devices import DEVICES, find_device
from morphserve.morphcli.simulate.gpu import gpu_target
from morphserve.morphcli.simulate.sizes import find_model, known_models, layer_weights
from morphserve.morphcli.simulate.target import Target
from morphserve.quantize.manifest import Variant
from morphserve.runtime.memory import plan_memory

FULL, INT8, INT4 = Variant.FULL, Variant.INT8, Variant.INT4


def target(model: str, device: str, **options: int) -> Target:
    return gpu_target(find_device(device), find_model(model), model, **options)  # type: ignore[arg-type]


def decode_ms(on: Target, batch: int, variant: Variant = FULL, context: int = 1024) -> float:
    layers = [variant] * on.sizes.num_layers
    return 1000 * on.costs.step_seconds(layers, [(context - 1, context)] * batch)


def prefill_ms(on: Target, tokens: int, variant: Variant = FULL) -> float:
    return 1000 * on.costs.step_seconds([variant] * on.sizes.num_layers, [(0, tokens)])


# Built from vLLM 0.24's measured GEMM and attention tables, 1024 tokens of context.
@pytest.mark.parametrize(
    ("batch", "measured_ms"), [(1, 4.9), (8, 5.1), (32, 6.4), (64, 7.6), (128, 9.8), (256, 14.9)]
)
def test_llama_3_8b_decodes_on_h200_as_measured_kernels_add_up(
    batch: int, measured_ms: float
) -> None:
    on = target("llama-3-8b", "h200")
    assert decode_ms(on, batch) == pytest.approx(measured_ms, rel=0.12)


@pytest.mark.parametrize(("tokens", "linears_ms"), [(512, 9.1), (1024, 18.0), (2048, 39.2)])
def test_prefill_on_h200_is_its_measured_linears_and_a_little(
    tokens: int, linears_ms: float
) -> None:
    assert linears_ms < prefill_ms(target("llama-3-8b", "h200"), tokens) < 1.35 * linears_ms


# The last one: 75 tokens/s of vLLM 0.23 on a rented A100 of 40 GB, johnmusgrave.com.
@pytest.mark.parametrize(
    ("device", "told_ms"), [("l4", 63), ("a100", 9.5), ("h100", 6.2), ("a100-40", 13.3)]
)
def test_one_sequence_decodes_at_about_the_told_time(device: str, told_ms: float) -> None:
    assert decode_ms(target("llama-3-8b", device), 1) == pytest.approx(told_ms, rel=0.21)


@pytest.mark.parametrize("device", DEVICES)
def test_int4_pays_in_small_batches_and_costs_in_prefill_at_most_a_third(device: str) -> None:
    on = target("qwen2.5-7b", device)
    full, int4 = on.costs.layers[FULL], on.costs.layers[INT4]
    speedups = {n: a / b for n, a, b in zip(full.tokens, full.seconds, int4.seconds, strict=True)}
    assert 1.6 < speedups[1] < 3.8
    assert speedups[16] > 1.4
    assert all(0.72 < speedups[n] < 1.1 for n in full.tokens if n >= 1024)


@pytest.mark.parametrize("device", DEVICES)
def test_a_layer_takes_no_less_time_for_more_tokens(device: str) -> None:
    on = gpu_target(find_device(device), find_model("llama-2-7b"), "", int8=True)
    assert on.costs.layers.keys() == {FULL, INT8, INT4}
    for curve in (*on.costs.layers.values(), on.costs.rest):
        assert sorted(curve.seconds) == curve.seconds
        assert sorted(set(curve.tokens)) == curve.tokens


@pytest.mark.parametrize(
    ("model", "blocks"), [("llama-2-7b", 35), ("llama-3-8b", 152), ("codellama-34b", 323)]
)
def test_a_swapped_layer_frees_the_papers_blocks(model: str, blocks: int) -> None:
    sizes = target(model, "a100").sizes
    freed = sizes.full_bytes[0] - sizes.image_bytes[INT4][0]
    assert freed / (sizes.page_bytes * sizes.num_layers) == pytest.approx(blocks, rel=0.03)


@pytest.mark.parametrize(
    ("model", "device", "blocks", "within"),
    [
        ("vicuna-7b", "l4", 958, 0.05),
        ("llama-2-7b", "l4", 958, 0.05),
        ("llama-3-8b", "l4", 2599, 0.06),
        ("codellama-34b", "a100", 3435, 0.25),  # of what weights of 67 GB leave on 80 GB
    ],
)
def test_full_precision_leaves_the_papers_kv_blocks(
    model: str, device: str, blocks: int, within: float
) -> None:
    on = target(model, device)
    usable = on.memory_bytes - on.reserved_bytes
    plan = plan_memory(on.sizes, usable, staging_slots=0, min_run_bytes=1)
    assert len(plan.base_blocks) == pytest.approx(blocks, rel=within)


@pytest.mark.parametrize(
    ("model", "billions"),
    [("llama-2-7b", 6.74), ("llama-3.1-8b", 8.03), ("codellama-34b", 33.7), ("llama-3-70b", 70.6)],
)
def test_models_have_their_weights(model: str, billions: float) -> None:
    arch = find_model(model)
    weights = arch.num_layers * layer_weights(arch) + 2 * arch.vocab_size * arch.hidden_size
    assert weights / 1e9 == pytest.approx(billions, rel=0.005)


def test_a_model_that_does_not_fit_is_refused_with_the_memory_it_takes() -> None:
    with pytest.raises(OutOfBudget, match=r"131\.\d GiB .* 71\.7 GiB .* --tensor-parallel"):
        target("llama-3-70b", "h100")


def test_tensor_parallel_divides_a_layer_and_adds_messages() -> None:
    one, four = target("llama-3-8b", "h100"), target("llama-3-8b", "h100", tensor_parallel=4)
    assert four.sizes.full_bytes[0] == pytest.approx(one.sizes.full_bytes[0] / 4, rel=0.01)
    assert four.sizes.kv_bytes_per_token == one.sizes.kv_bytes_per_token // 4
    assert decode_ms(one, 8) / 4 < decode_ms(four, 8) < decode_ms(one, 8)


def test_what_no_devices_can_do_is_refused() -> None:
    with pytest.raises(ConfigError, match="no link"):
        target("llama-3-8b", "l4", tensor_parallel=2)
    with pytest.raises(ConfigError, match="8 key and value heads"):
        target("llama-3-8b", "h100", tensor_parallel=3)
    with pytest.raises(ConfigError, match="use l4, l40s"):
        find_device("b300")


def test_an_unknown_model_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ConfigError, match="codellama-34b, llama-2-7b"):
        find_model("llama-9")
    assert "vicuna-7b" in known_models()


def test_targets_are_made_without_torch() -> None:
    code = "import sys; import morphserve.morphcli.simulate.gpu; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", DEVICES)
def test_a_devices_constants_are_told_in_words_with_units(name: str) -> None:
    told = find_device(name).about()
    assert "GB/s and" in told["linears at INT4"] and told["attention of a prefill"].endswith(
        "FLOP/s"
    )
    assert not [
        text for text in told.values() if "Linear(" in text or "=" in text or "None" in text
    ]
