"""Tiny random models of every family, saved as transformers saves them, and their bundles."""

import gc
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from triton_interpreter import interpret_without_gpu

from morphserve.quantize.build import QuantizeSettings, build_bundle
from morphserve.quantize.checkpoint import open_checkpoint

interpret_without_gpu()  # before a test imports kernels
HAS_TRITON = importlib.util.find_spec("triton") is not None
# What imports CUDA's kernels; where there is no triton it is left out, and the header says so.
collect_ignore_glob = (
    []
    if HAS_TRITON
    else [
        "runtime/cuda/*",
        "runtime/kernels/cuda/*",
        "runtime/device/test_c*.py",
        "runtime/test_rehearsal.py",
        "benchmarks/test_cuda_script.py",
    ]
)

SIZES: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# name -> model type and what differs from SIZES
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-mha-bias": (
        "llama",
        {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True},
    ),
    "llama3-tied": ("llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 32}),
}

settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None)  # pytest --hypothesis-profile=explore
settings.load_profile("repeatable")


def pytest_report_header() -> str | None:
    return None if HAS_TRITON else "no triton here: the tests of CUDA's kernels are left out"


def pytest_unconfigure() -> None:
    gc.unfreeze()  # what engines in this process froze: Triton tells at the exit what was not freed


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def the_same_random_numbers() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def cpu_serves(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines of tests that are not about GPUs run on the CPU, whatever the machine has."""
    if torch.cuda.is_available() and request.node.get_closest_marker("cuda") is None:
        monkeypatch.setattr("morphserve.runtime.device.num_gpus", lambda: 0)
        monkeypatch.setenv("MORPH_DEVICE", "cpu")  # of servers in processes of their own


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    """Runs a test once per family."""
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny random float32 model by its name in FAMILIES; don't write to it."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            _save_model(name, made[name])
            _save_tokenizer(made[name])
        return made[name]

    return get


@pytest.fixture(scope="session")
def demo_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's bundle, INT4 by rounding to nearest; don't write to it."""
    folder = tmp_path_factory.mktemp("demo") / "demo.morph"
    build_bundle(open_checkpoint("demo"), folder, QuantizeSettings("rtn", 64))
    return folder


@pytest.fixture(scope="session")
def tiny_bundle(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The bundle of a tiny model, groups of 32; don't write to it."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(f"{name}-bundle")
            build_bundle(
                open_checkpoint(str(tiny_model(name))), made[name], QuantizeSettings("rtn", 32)
            )
        return made[name]

    return get


def _save_model(name: str, folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model_type, changes = FAMILIES[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SIZES | changes))
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too, which start as 0 and 1
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
            else:
                torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)


def _save_tokenizer(folder: Path) -> None:
    """One token per byte, then the special ones."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<s>"), AddedToken("</s>")])
    tokenizer.save(str(folder / "tokenizer.json"))
