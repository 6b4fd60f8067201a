"""Our logits and greedy tokens against `transformers` on tiny random models of each family."""

import os
from pathlib import Path

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from morphserve.configs.load import load_policy
from morphserve.configs.schema import CacheConfig, EngineConfig, SchedulerConfig
from morphserve.runtime.build import build_engine
from morphserve.runtime.engine import Engine
from morphserve.runtime.messages import Submit
from morphserve.runtime.request import Request, SamplingParams
from morphserve.runtime.runner import pack
from morphserve.runtime.scheduler import Slice

SIZES = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
FAMILIES: dict[str, tuple[type[PreTrainedModel], PreTrainedConfig]] = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES)),
    "llama-mha-tied": (
        LlamaForCausalLM,
        LlamaConfig(**SIZES | {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    ),
    "llama-3.1-rope": (LlamaForCausalLM, LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE)),
    "llama-linear-rope": (LlamaForCausalLM, LlamaConfig(**SIZES, rope_parameters=LINEAR_ROPE)),
    "llama-biases": (LlamaForCausalLM, LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "mistral": (MistralForCausalLM, MistralConfig(**SIZES, head_dim=32, sliding_window=None)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=32)),
}
PROMPTS = [[5, 9, 23, 42], list(range(3, 40)), [150, 2, 2, 77, 8] * 5]
NEW_TOKENS = 20


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def theirs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random model of one family, every parameter random, biases and norms too."""
    build, config = FAMILIES[request.param]
    torch.manual_seed(11)
    model = build(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.rand_like(parameter) + (0.5 if "norm" in name else -0.5))
    folder = tmp_path_factory.mktemp("golden") / request.param
    model.save_pretrained(folder)
    return folder


def oracle(folder: Path) -> PreTrainedModel:
    build, _ = FAMILIES[folder.name]
    return build.from_pretrained(folder, dtype=torch.float32).eval()


def ours(folder: Path, kernels: str) -> Engine:
    return build_engine(
        EngineConfig(
            model=os.fspath(folder),
            policy=load_policy("off"),
            kernels=kernels,
            dtype="float32",
            cache=CacheConfig(memory_budget=8 * 2**20),
            scheduler=SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=16),
        )
    )


@pytest.mark.parametrize("kernels", ["reference", "auto"])
def test_logits_equal(theirs: Path, kernels: str) -> None:
    parts = ours(theirs, kernels)._parts
    model, prompt = parts.runner._model, PROMPTS[1]
    request = Request("x", prompt, SamplingParams(max_tokens=1), arrival_s=0.0)
    request.blocks = parts.pool.allocate(4)
    with torch.inference_mode():
        tokens, meta, _ = pack([Slice(request, 0, len(prompt))], model.shape.block_tokens)
        mine = model.forward(tokens, meta, torch.arange(len(prompt)))
        wanted = oracle(theirs)(torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(mine.float(), wanted, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("kernels", ["reference", "auto"])
def test_greedy_tokens_equal_with_chunked_prefill_and_batching(theirs: Path, kernels: str) -> None:
    engine = ours(theirs, kernels)
    greedy = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
    for i, prompt in enumerate(PROMPTS):
        assert engine.submit(Submit(str(i), prompt, greedy)) is None
    produced: dict[str, list[int]] = {}
    while engine.has_work:
        step = engine.step()
        for output in step.outputs if step else []:
            produced.setdefault(output.request_id, []).extend(output.tokens)
    model = oracle(theirs)
    for i, prompt in enumerate(PROMPTS):
        ids = torch.tensor([prompt])
        for _ in range(NEW_TOKENS):
            with torch.inference_mode():
                ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), dim=1)
        assert produced[str(i)] == ids[0, len(prompt) :].tolist()
