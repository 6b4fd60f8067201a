"""Facts of a Llama-family model, read from its `config.json`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from morphserve.configs.errors import UnsupportedModel

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding; `kind` is default, linear, or llama3 (frequency-dependent)."""

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True, slots=True)
class Architecture:
    """Sizes and switches that the forward pass, the arena and the bundle need."""

    family: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    norm_eps: float
    rope: Rope
    tied_head: bool
    qkv_bias: bool
    output_bias: bool  # bias on the attention output projection
    mlp_bias: bool
    qk_norm: bool
    dtype: str  # of the checkpoint: bfloat16, float16 or float32
    eos_token_ids: tuple[int, ...]

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim


def read_architecture(config: Mapping[str, Any], generation: Mapping[str, Any]) -> Architecture:
    """The facts in a checkpoint's `config.json` and `generation_config.json` (may be empty).

    Raises UnsupportedModel, with the reason, for anything the forward pass does not compute, and
    KeyError, TypeError or ValueError for a config that lacks a fact or has a wrong one.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise UnsupportedModel(
            f"model type {family!r} is not supported; supported: {', '.join(FAMILIES)}"
        )
    if config.get("hidden_act", "silu") != "silu":
        raise UnsupportedModel(f"activation {config['hidden_act']!r} is not supported, only silu")
    heads = int(config["num_attention_heads"])
    hidden = int(config["hidden_size"])
    max_position = int(config["max_position_embeddings"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    if heads % kv_heads:
        raise ValueError(f"{heads} attention heads cannot share {kv_heads} key and value heads")
    attention_bias = bool(config.get("attention_bias", False)) and family != "mistral"
    _refuse_short_window(config, max_position)
    return Architecture(
        family=family,
        num_layers=int(config["num_hidden_layers"]),
        hidden_size=hidden,
        intermediate_size=int(config["intermediate_size"]),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=int(config.get("head_dim") or hidden // heads),
        vocab_size=int(config["vocab_size"]),
        max_position=max_position,
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope=_read_rope(config),
        tied_head=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2" or attention_bias,
        output_bias=attention_bias and family != "qwen2",
        mlp_bias=bool(config.get("mlp_bias", False)) and family == "llama",
        qk_norm=family == "qwen3",
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
        eos_token_ids=tuple(
            t for t in _read_eos(config, generation) if t < int(config["vocab_size"])
        ),
    )


def _refuse_short_window(config: Mapping[str, Any], max_position: int) -> None:
    window = config.get("sliding_window")
    used = config.get("use_sliding_window", config.get("model_type") == "mistral")
    if used and window is not None and window < max_position:
        raise UnsupportedModel(
            f"sliding-window attention ({window} of {max_position} positions) is not supported; "
            f"set max_position_embeddings to {window} in config.json to serve shorter contexts"
        )


def _read_rope(config: Mapping[str, Any]) -> Rope:
    """Rope settings of both spellings: `rope_parameters` (transformers 5) and `rope_scaling`."""
    settings = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    theta = float(settings.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = settings.get("rope_type") or settings.get("type") or "default"
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, kind, factor=float(settings["factor"]))
    if kind == "llama3":
        return Rope(
            theta,
            kind,
            factor=float(settings["factor"]),
            low_freq_factor=float(settings["low_freq_factor"]),
            high_freq_factor=float(settings["high_freq_factor"]),
            original_max_position=int(settings["original_max_position_embeddings"]),
        )
    raise UnsupportedModel(f"rope scaling {kind!r} is not supported; supported: linear, llama3")


def inverse_frequencies(rope: Rope, head_dim: int) -> list[float]:
    """Rotation per position of each pair of channels, [head_dim / 2], radians.

    Llama 3's scaling: long wavelengths are divided by `factor`, short ones kept, those between
    blended (Llama 3.1 model card; the rule of transformers' `_compute_llama3_parameters`).
    """
    plain = [rope.theta ** (-2.0 * i / head_dim) for i in range(head_dim // 2)]
    if rope.kind == "default":
        return plain
    if rope.kind == "linear":
        return [f / rope.factor for f in plain]
    return [_scale_llama3(f, rope) for f in plain]


def _scale_llama3(frequency: float, rope: Rope) -> float:
    turns = rope.original_max_position * frequency / (2 * math.pi)
    if turns < rope.low_freq_factor:
        return frequency / rope.factor
    if turns > rope.high_freq_factor:
        return frequency
    keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return (1 - keep) * frequency / rope.factor + keep * frequency


def _read_eos(config: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    eos = generation.get("eos_token_id")
    if eos is None:
        eos = config.get("eos_token_id")
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list) else (int(eos),)
