"""The checkpoints and tokens that every side gets."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from morphserve.configs.load import resolve_model
from morphserve.quantize.calibration import Part, draw_windows
from morphserve.quantize.checkpoint import open_checkpoint

TEXTS = ("calibration", "held-out")


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    checkpoint: Path
    group_size: int
    calibration: Tensor  # [n, length] tokens
    held_out: Tensor
    has_text: bool  # otherwise tokens are random and perplexity says nothing

    @property
    def texts(self) -> dict[str, Tensor]:
        return dict(zip(TEXTS, (self.calibration, self.held_out), strict=True))


def demo_case(group_size: int) -> Case:
    checkpoint = open_checkpoint("demo")
    calibration, held_out = (
        draw_windows(checkpoint, None, part, samples, 256).tokens
        for part, samples in ((Part.CALIBRATION, 64), (Part.EVALUATION, 32))
    )
    name = f"demo model, group {group_size}"
    return Case(name, checkpoint.path, group_size, calibration, held_out, has_text=True)


def wide_case(folder: Path) -> Case:
    """Two random layers of width 1024 whose inputs are correlated and heavy-tailed."""
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=2,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        few = torch.randn(2048, 128) @ torch.randn(128, 1024) / 128**0.5
        model.model.embed_tokens.weight.copy_(few + 0.3 * torch.randn(2048, 1024))
        for name, weight in model.named_parameters():
            if "layernorm" in name:
                weight.copy_(torch.randn_like(weight).exp())
            elif ".layers." in name:
                tails = torch.distributions.StudentT(5.0).sample(weight.shape)
                weight.copy_(tails / weight.shape[1] ** 0.5)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):  # llm-compressor wants some tokenizer
        shutil.copy(resolve_model("demo") / name, folder)
    calibration, held_out = torch.randint(2048, (2, 32, 256))
    return Case("1024 wide, group 128", folder, 128, calibration, held_out, has_text=False)
