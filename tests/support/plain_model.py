"""A tiny Llama whose weights come from Python's own random numbers, the same wherever it is made.

It needs no more than torch and safetensors, so that programs of other environments make it too.
"""

import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

HIDDEN, INNER, HEADS, VOCAB = 64, 128, 4, 264


def write_plain_model(folder: Path, kv_heads: int, num_layers: int = 1) -> None:
    """A bfloat16 checkpoint with a tied head, no biases, heads of 16 channels."""
    folder.mkdir(parents=True, exist_ok=True)
    config = plain_config(kv_heads, num_layers)
    (folder / "config.json").write_text(json.dumps(config, indent=2), "utf-8")
    numbers = random.Random(kv_heads)
    kv = kv_heads * HIDDEN // HEADS
    tensors = {"model.embed_tokens.weight": _matrix(numbers, VOCAB, HIDDEN)}
    for i in range(num_layers):
        sizes = {
            "self_attn.q_proj": (HIDDEN, HIDDEN),
            "self_attn.k_proj": (kv, HIDDEN),
            "self_attn.v_proj": (kv, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HIDDEN),
            "mlp.gate_proj": (INNER, HIDDEN),
            "mlp.up_proj": (INNER, HIDDEN),
            "mlp.down_proj": (HIDDEN, INNER),
        }
        for name, (outputs, inputs) in sizes.items():
            tensors[f"model.layers.{i}.{name}.weight"] = _matrix(numbers, outputs, inputs)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{norm}.weight"] = _norm(numbers)
    tensors["model.norm.weight"] = _norm(numbers)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def plain_config(kv_heads: int, num_layers: int = 1) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_attention_heads": HEADS,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": num_layers,
        "vocab_size": VOCAB,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "torch_dtype": "bfloat16",
    }


def plain_windows(num_windows: int = 16, length: int = 128) -> list[list[int]]:
    """Calibration tokens."""
    numbers = random.Random(0)
    return [[numbers.randrange(VOCAB) for _ in range(length)] for _ in range(num_windows)]


def _matrix(numbers: random.Random, rows: int, columns: int) -> Tensor:
    """Bell-shaped, deviation 0.15."""
    values = [numbers.gauss(0, 0.15) for _ in range(rows * columns)]
    return torch.tensor(values).view(rows, columns).to(torch.bfloat16)


def _norm(numbers: random.Random) -> Tensor:
    values = [1 + numbers.gauss(0, 0.3) for _ in range(HIDDEN)]
    return torch.tensor(values).to(torch.bfloat16)
