"""A bundle on disk is served as the weights that its files stand for."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from morphserve.configs.load import load_policy
from morphserve.configs.schema import CacheConfig, EngineConfig, SchedulerConfig
from morphserve.quantize import dense
from morphserve.quantize.build import QuantizeSettings, build_bundle
from morphserve.quantize.bundle import open_bundle
from morphserve.quantize.checkpoint import open_checkpoint
from morphserve.quantize.manifest import Variant
from morphserve.runtime.build import build_engine
from morphserve.runtime.loader import warn_of_float32
from morphserve.runtime.messages import Submit
from morphserve.runtime.request import SamplingParams

PROMPT = [5, 9, 23, 42, 7, 7, 130]
NEW_TOKENS = 12


@pytest.mark.parametrize("kernels", ["reference", "auto"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_greedy_tokens_are_those_of_the_dequantised_layers(
    tiny_model: Callable[[str], Path], tmp_path: Path, kernels: str, symmetric: bool
) -> None:
    checkpoint = open_checkpoint(str(tiny_model("qwen3")))
    settings = QuantizeSettings("rtn", 32, symmetric=symmetric, int8=True)
    build_bundle(checkpoint, tmp_path / "bundle", settings)
    engine = build_engine(
        EngineConfig(
            str(checkpoint.path),
            load_policy("static:all"),
            str(tmp_path / "bundle"),
            kernels=kernels,
            dtype="float32",
            cache=CacheConfig(memory_budget=8 * 2**20),
            scheduler=SchedulerConfig(max_num_seqs=2, max_num_batched_tokens=16, max_model_len=64),
        )
    )
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
    assert engine.submit(Submit("r", PROMPT, params)) is None
    served: list[int] = []
    while engine.has_work:
        step = engine.step()
        served += step.outputs[0].tokens if step else []
    bundle = open_bundle(str(tmp_path / "bundle"), checkpoint)
    assert bundle.layer(0, Variant.INT8).qkv.bits == 8
    assert (bundle.layer(0).qkv.zeros is None) == symmetric
    arch, static, tokens = checkpoint.architecture, checkpoint.static(), list(PROMPT)
    layers = [dense.quantized_to_float32(bundle.layer(i)) for i in range(arch.num_layers)]
    for _ in range(NEW_TOKENS):
        x = dense.embed(static, torch.tensor([tokens]))
        for layer in layers:
            x = dense.decoder_layer(x, layer, arch, dense.rotation(arch, len(tokens)))
        tokens.append(int(dense.logits(x, static, arch)[0, -1].argmax()))
    assert served == tokens[len(PROMPT) :]


def test_an_engine_tells_how_long_each_part_of_its_start_took(
    tiny_model: Callable[[str], Path], tiny_bundle: Callable[[str], Path]
) -> None:
    cache = CacheConfig(memory_budget=8 * 2**20)
    policy, bundle = load_policy("performance"), str(tiny_bundle("llama"))
    engine = build_engine(EngineConfig(str(tiny_model("llama")), policy, bundle, cache=cache))
    phases = engine.hello().startup_s
    assert list(phases) == ["kernels", "checkpoint", "bundle", "arena"]
    assert all(seconds > 0 for seconds in phases.values())


def test_float32_on_a_gpu_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_float32("cpu", torch.float32)
    warn_of_float32("cuda", torch.bfloat16)
    assert not caplog.records
    warn_of_float32("cuda", torch.float32)
    assert "--dtype bfloat16" in caplog.text
