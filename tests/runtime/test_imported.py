"""Another tool's GPTQ layers, their inputs out of order, are served as their file describes."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from morphserve.configs.load import load_policy
from morphserve.configs.schema import CacheConfig, EngineConfig, SchedulerConfig
from morphserve.quantize import dense
from morphserve.quantize.build import QuantizeSettings, build_bundle
from morphserve.quantize.checkpoint import open_checkpoint
from morphserve.quantize.formats.source import open_quantized
from morphserve.runtime.build import build_engine
from morphserve.runtime.request import Request, SamplingParams
from morphserve.runtime.runner import pack
from morphserve.runtime.scheduler import Slice

GROUP = 32
PROMPT = torch.randint(256, (24,), generator=torch.Generator().manual_seed(0)).tolist()
# Linears that read the same inputs: desc_act sorts them by the same moments.
_READS = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1, "gate_proj": 2, "up_proj": 2}


def write_desc_act(model: Path, folder: Path, symmetric: bool) -> dict[str, Tensor]:
    """The model as GPTQ of version 1, written from the format's description; what it stands for.

    Returns the tensors of the checkpoint with the rounded weights in place of the exact ones.
    """
    folder.mkdir()
    rounded, stored = load_file(model / "model.safetensors"), {}
    for name, tensor in rounded.items():
        linear = name.removesuffix(".weight")
        if tensor.dim() != 2 or ".layers." not in name:
            stored[name] = tensor
            continue
        layer, kind = name.split(".")[2], linear.split(".")[-1]
        order = np.random.default_rng([int(layer), _READS.get(kind, 3)])
        packed, values = _packed(tensor.numpy(), order.permutation(tensor.shape[1]), symmetric)
        stored |= {f"{linear}.{end}": torch.from_numpy(part) for end, part in packed.items()}
        rounded[name] = torch.from_numpy(values)
    save_file(stored, folder / "model.safetensors")
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": GROUP,
        "sym": symmetric,
        "desc_act": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return rounded


def _packed(
    weight: np.ndarray, order: np.ndarray, symmetric: bool
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Tensors of a [N, K] weight, and the weight that they stand for."""
    num_rows, num_inputs = weight.shape
    groups = num_inputs // GROUP
    group_of = np.empty(num_inputs, np.int32)
    group_of[order] = np.arange(num_inputs) // GROUP
    low = np.stack([weight[:, group_of == g].min(1) for g in range(groups)]).clip(max=0)
    high = np.stack([weight[:, group_of == g].max(1) for g in range(groups)]).clip(min=0)
    if symmetric:
        scales = (np.maximum(-low, high) / 7.5).astype(np.float16)
        zeros = np.full(scales.shape, 8)
    else:
        scales = ((high - low) / 15).astype(np.float16)
        zeros = np.round(-low / scales.astype(np.float32)).clip(1, 15).astype(int)
    scale, zero = scales.astype(np.float32)[group_of], zeros[group_of]  # [K, N]
    codes = (np.round(weight.T / scale) + zero).clip(0, 15).astype(int)
    return {
        "qweight": _words(codes),
        "qzeros": np.ascontiguousarray(_words(zeros.T - 1).T),
        "scales": scales,
        "g_idx": group_of,
    }, np.ascontiguousarray(((codes - zero) * scale).T.astype(np.float32))


def _words(codes: np.ndarray) -> np.ndarray:
    """[K, N] codes as [K / 8, N] words, the first code in the lowest bits."""
    words = np.zeros((len(codes) // 8, codes.shape[1]), np.uint32)
    for i in range(8):
        words |= codes[i::8].astype(np.uint32) << np.uint32(4 * i)
    return words.view(np.int32)


def expected_logits(model: Path) -> Tensor:
    """[tokens, vocabulary] of a full-precision checkpoint."""
    checkpoint = open_checkpoint(str(model))
    arch, static = checkpoint.architecture, checkpoint.static()
    cos_sin = dense.rotation(arch, len(PROMPT))
    x = dense.embed(static, torch.tensor([PROMPT]))
    for i in range(arch.num_layers):
        x = dense.decoder_layer(x, dense.to_float32(checkpoint.layer(i)), arch, cos_sin)
    return dense.logits(x, static, arch)[0]


def served_logits(model: Path, bundle: Path, kernels: str) -> Tensor:
    """The same with every layer in INT4, of an engine."""
    engine = build_engine(
        EngineConfig(
            model=str(model),
            bundle=str(bundle),
            policy=load_policy("static:all"),
            kernels=kernels,
            dtype="float32",
            cache=CacheConfig(memory_budget=8 * 2**20),
            scheduler=SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=64),
        )
    )
    runner, pool = engine._parts.runner, engine._parts.pool
    block = runner._model.shape.block_tokens
    request = Request("request", PROMPT, SamplingParams(max_tokens=1), arrival_s=0.0)
    request.blocks = pool.allocate(-(-len(PROMPT) // block))
    tokens, meta, _ = pack([Slice(request, 0, len(PROMPT))], block)
    with torch.inference_mode():
        return runner._model.forward(tokens, meta, torch.arange(len(PROMPT))).float()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("name", ["llama-mha-bias", "qwen3"])
def test_from_a_desc_act_folder_to_logits(
    name: str,
    kernels: str,
    symmetric: bool,
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    model = tiny_model(name)
    rounded = write_desc_act(model, tmp_path / "gptq", symmetric)
    checkpoint = open_checkpoint(str(model))
    source = open_quantized(str(tmp_path / "gptq"), checkpoint)
    build_bundle(checkpoint, tmp_path / "b", QuantizeSettings(), imported=source)
    (tmp_path / "rounded").mkdir()
    save_file(rounded, tmp_path / "rounded" / "model.safetensors")
    (tmp_path / "rounded" / "config.json").write_text((model / "config.json").read_text())
    expected = expected_logits(tmp_path / "rounded")
    served = served_logits(model, tmp_path / "b", kernels)
    off, rounding_off = (served - expected).norm(), (expected_logits(model) - expected).norm()
    # The C kernels round activations to eight bits, some 0.7 % of a product.
    assert off < (0.05 if kernels == "auto" else 1e-3) * expected.norm()
    assert off < 0.5 * rounding_off
