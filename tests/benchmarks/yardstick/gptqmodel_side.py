"""GPTQModel's weights for one checkpoint and one set of windows; run by a Python that has it.

    python gptqmodel_side.py MODEL WINDOWS GROUP_SIZE OUT [--whole]

Writes OUT/NAME.safetensors for each of its settings: every decoder linear's weight as quantised and
dequantised by GPTQModel's own solver, float32, under its name in the checkpoint. Its solver sees
the full-precision model's inputs in float32; with --whole its own pipeline runs as well.
"""

import os

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # it refuses to start on two cores otherwise

import argparse
import re
from collections.abc import Callable
from pathlib import Path

import torch
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.quantization import GPTQ, QuantizeConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

STATIC = {"desc_act": True, "static_groups": True, "act_group_aware": False}
SETTINGS = {
    "its defaults": {},  # whole groups in order of activation, damping of 5 %
    "act order": STATIC,
    "act order, MSE": {**STATIC, "mse": 2.0, "damp_percent": 0.01},  # its best on the demo model
}
WHOLE = "act order, MSE"


def config(name: str, group_size: int) -> QuantizeConfig:
    return QuantizeConfig(bits=4, group_size=group_size, sym=True, **SETTINGS[name])


def decoder_linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and re.search(r"\.layers\.\d+\.", name)
    }


def solve(folder: str, windows: Tensor, group_size: int, out: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    linears = decoder_linears(model)
    tasks = {
        setting: {name: task(linear, setting, group_size) for name, linear in linears.items()}
        for setting in SETTINGS
    }
    for name, linear in linears.items():
        linear.register_forward_pre_hook(feed([tasks[setting][name] for setting in SETTINGS]))
    with torch.inference_mode():
        for batch in windows.split(8):
            model.model(batch)
    for setting, solvers in tasks.items():
        weights = {f"{name}.weight": s.quantize()[0].clone() for name, s in solvers.items()}
        save_file(weights, out / f"{setting}.safetensors")


def task(linear: nn.Linear, setting: str, group_size: int) -> GPTQ:
    solver = GPTQ(linear, config(setting, group_size))
    solver.quantizer.configure(perchannel=True)
    return solver


def feed(solvers: list[GPTQ]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def add(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        for solver in solvers:
            solver.add_batch(args[0], None)

    return add


def run_whole(folder: str, windows: Tensor, group_size: int, out: Path) -> None:
    model = GPTQModel.load(folder, config(WHOLE, group_size))
    model.quantize(
        [{"input_ids": row, "attention_mask": [1] * len(row)} for row in windows.tolist()],
        batch_size=8,
    )
    model.save(str(out / "checkpoint"))
    loaded = GPTQModel.load(str(out / "checkpoint"), backend=BACKEND.TORCH, device="cpu")
    weights = {
        f"{name}.weight": module.dequantize_weight().t().float().contiguous()
        for name, module in loaded.model.named_modules()
        if hasattr(module, "dequantize_weight")
    }
    save_file(weights, out / f"{WHOLE}, whole run.safetensors")


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
    solve(args.model, windows, args.group_size, args.out)
    if args.whole:
        run_whole(args.model, windows, args.group_size, args.out)


if __name__ == "__main__":
    main()
