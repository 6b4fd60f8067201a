"""Whether GPTQModel computes from an export what the bundle stands for; run by hand, twice.

    python load_export.py ours BUNDLE MODEL LOGITS      where MorphServe is installed
    python load_export.py theirs EXPORT LOGITS          where GPTQModel is installed

The first writes float32 logits of random tokens through the dequantised layers; the second prints
how far GPTQModel's are from them.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # it refuses to start on two cores otherwise

import torch
from safetensors.torch import load_file, save_file


def ours(bundle: str, model: str, logits: str) -> None:
    from morphserve.quantize import dense
    from morphserve.quantize.bundle import open_bundle
    from morphserve.quantize.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(model)
    opened, arch = open_bundle(bundle, checkpoint), checkpoint.architecture
    tokens = torch.randint(arch.vocab_size, (2, 128), generator=torch.Generator().manual_seed(0))
    static = checkpoint.static()
    x, cos_sin = dense.embed(static, tokens), dense.rotation(arch, tokens.shape[1])
    for i in range(arch.num_layers):
        x = dense.decoder_layer(x, dense.quantized_to_float32(opened.layer(i)), arch, cos_sin)
    save_file({"tokens": tokens, "logits": dense.logits(x, static, arch)}, logits)


def theirs(export: str, logits: str) -> None:
    from gptqmodel import BACKEND, GPTQModel

    saved = load_file(logits)
    for dtype in (torch.float16, torch.bfloat16):
        loaded = GPTQModel.load(export, backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=dtype)
        with torch.inference_mode():
            found = loaded.model(saved["tokens"]).logits.float()
        expected = saved["logits"]
        difference = (found - expected).norm() / expected.norm()
        same = (found.argmax(-1) == expected.argmax(-1)).float().mean()
        print(
            f"{Path(export).name} in {dtype}: relative difference of logits {difference:.5f}, "
            f"same most likely token at {same:.1%} of positions"
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    command, *arguments = sys.argv[1:]
    {"ours": ours, "theirs": theirs}[command](*arguments)
