"""llm-compressor's weights for one checkpoint and one set of windows; run by a Python that has it.

    python llmcompressor_side.py MODEL WINDOWS GROUP_SIZE OUT [--whole]

Writes OUT/NAME.safetensors for each of its settings: every decoder linear's weight as quantised and
dequantised by it, float32, under its name in the checkpoint. Its `basic` pipeline calibrates on
full-precision inputs; with --whole its `sequential` one, on quantised inputs, runs as well.
"""

import argparse
import re
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

OBSERVERS = {"its defaults": "memoryless_minmax", "MSE": "memoryless_mse"}
WHOLE = "MSE"


def run(folder: str, windows: Tensor, group_size: int, setting: str, pipeline: str) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    weights = QuantizationArgs(
        num_bits=4,
        group_size=group_size,
        symmetric=True,
        strategy="group",
        observer=OBSERVERS[setting],
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    rows = [{"input_ids": row} for row in windows]
    oneshot(
        model=model,
        dataset=DataLoader(rows, batch_size=8),
        recipe=GPTQModifier(config_groups={"all": scheme}, ignore=["lm_head"]),
        pipeline=pipeline,
        num_calibration_samples=len(windows),
    )
    return model


def decoder_weights(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.weight": module.weight.detach().float().contiguous()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and re.search(r"\.layers\.\d+\.", name)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("windows", type=Path)
    parser.add_argument("group_size", type=int)
    parser.add_argument("out", type=Path)
    parser.add_argument("--whole", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    windows = load_file(args.windows)["tokens"]
    runs = [(setting, "basic", setting) for setting in OBSERVERS]
    if args.whole:
        runs.append((WHOLE, "sequential", f"{WHOLE}, whole run"))
    for setting, pipeline, name in runs:
        model = run(args.model, windows, args.group_size, setting, pipeline)
        save_file(decoder_weights(model), args.out / f"{name}.safetensors")


if __name__ == "__main__":
    main()
