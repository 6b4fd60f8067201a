"""Lets maintained libraries quantise a tiny model and keeps what they wrote; run by hand.

    python make_fixtures.py gptqmodel       in an environment with GPTQModel 7.6.0
    python make_fixtures.py llmcompressor   in an environment with llm-compressor 0.14.0.1
    python make_fixtures.py autoawq         in an environment with AutoAWQ 0.2.9

Each folder of data/ then holds the library's config.json and the tensors of its decoder layer,
and expected.json: of each linear, the sha256 of the weight that the library itself dequantises.
"""

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # it refuses to start on two cores otherwise
sys.path.insert(0, str(Path(__file__).parents[2] / "support"))

import torch
from plain_model import VOCAB, plain_windows, write_plain_model
from safetensors.torch import load_file, save_file
from torch import Tensor

DATA = Path(__file__).parent / "data"
GPTQMODEL: dict[str, tuple[int, dict[str, Any]]] = {  # name -> key and value heads, settings
    "gptq-v1": (2, {"bits": 4, "group_size": 32, "sym": True, "desc_act": False}),
    "gptq-v1-order": (
        2,
        {"bits": 4, "group_size": 32, "sym": True, "desc_act": True, "static_groups": False},
    ),
    "gptq-v1-asymmetric": (2, {"bits": 4, "group_size": 32, "sym": False, "desc_act": False}),
    "gptq-v2-asymmetric": (
        2,
        {"bits": 4, "group_size": 32, "sym": False, "desc_act": False, "format": "gptq_v2"},
    ),
    "gptq-v1-rows": (2, {"bits": 4, "group_size": -1, "sym": True, "desc_act": False}),
}


def with_gptqmodel(only: list[str]) -> None:
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    for name, (kv_heads, settings) in GPTQMODEL.items():
        if only and name not in only:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            base, out = Path(scratch) / "base", Path(scratch) / "out"
            write_plain_model(base, kv_heads)
            _write_tokenizer(base)  # the library insists on one
            model = GPTQModel.load(str(base), QuantizeConfig(**settings, act_group_aware=False))
            model.quantize(
                [{"input_ids": row, "attention_mask": [1] * len(row)} for row in plain_windows()],
                batch_size=8,
            )
            model.save(str(out))
            loaded = GPTQModel.load(
                str(out), backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16
            )
            weights = {
                module_name: module.dequantize_weight().t()
                for module_name, module in loaded.model.named_modules()
                if hasattr(module, "qweight")
            }
            keep(name, out, weights, f"gptqmodel {version('gptqmodel')}")


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {f"{i:03d}": i for i in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="000"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "000", "pad_token": "000"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")


def with_autoawq(only: list[str]) -> None:
    from awq import AutoAWQForCausalLM
    from awq.utils.packing_utils import dequantize_gemm
    from transformers import AutoTokenizer

    settings = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    for name, kv_heads in {"awq-gqa": 2, "awq-mha": 4}.items():
        if only and name not in only:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            base, out = Path(scratch) / "base", Path(scratch) / "out"
            write_plain_model(base, kv_heads)
            _write_tokenizer(base)
            model = AutoAWQForCausalLM.from_pretrained(str(base), device_map="cpu")
            tokenizer = AutoTokenizer.from_pretrained(base)
            texts = [" ".join(f"{token:03d}" for token in row) for row in plain_windows()]
            model.quantize(
                tokenizer,
                quant_config=settings,
                calib_data=texts,
                max_calib_seq_len=128,
                apply_clip=False,  # its search of clips wants 64 outputs and more
            )
            model.save_quantized(str(out))
            weights = {
                module_name: dequantize_gemm(
                    module.qweight, module.qzeros, module.scales, 4, module.group_size
                ).t()
                for module_name, module in model.model.named_modules()
                if hasattr(module, "qweight")
            }
            keep(name, out, weights, f"autoawq {version('autoawq')}")


def with_llmcompressor(only: list[str]) -> None:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.gptq import GPTQModifier

    def gptq(**args: Any) -> Callable[[], Any]:
        scheme = QuantizationScheme(
            targets=["Linear"], weights=QuantizationArgs(num_bits=4, **args)
        )
        return lambda: GPTQModifier(
            config_groups={"group_0": scheme}, ignore=["lm_head"], actorder=None
        )

    group = {"strategy": "group", "group_size": 32}
    recipes: dict[str, tuple[int, Callable[[], Any]]] = {
        "compressed-group": (2, gptq(**group, symmetric=True)),
        "compressed-asymmetric": (2, gptq(**group, symmetric=False)),
        "compressed-channel": (2, gptq(strategy="channel", symmetric=True)),
    }
    for name, (kv_heads, recipe) in recipes.items():
        if not only or name in only:
            _run_llmcompressor(name, kv_heads, recipe())


def _run_llmcompressor(name: str, kv_heads: int, recipe: Any) -> None:
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM

    rows = plain_windows()
    dataset = Dataset.from_dict(
        {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
    )
    with tempfile.TemporaryDirectory() as scratch:
        base, out = Path(scratch) / "base", Path(scratch) / "out"
        write_plain_model(base, kv_heads)
        _write_tokenizer(base)
        model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
        oneshot(
            model=model,
            dataset=dataset,
            recipe=recipe,
            num_calibration_samples=len(rows),
            max_seq_length=len(rows[0]),
        )
        model.save_pretrained(out, save_compressed=True)
        from transformers.utils.quantization_config import CompressedTensorsConfig

        loaded = AutoModelForCausalLM.from_pretrained(
            out,
            dtype="auto",
            quantization_config=CompressedTensorsConfig(run_compressed=False),
        )
        weights = {
            module_name: module.weight.detach()
            for module_name, module in loaded.named_modules()
            if isinstance(module, torch.nn.Linear) and ".layers." in module_name
        }
        keep(name, out, weights, f"llmcompressor {version('llmcompressor')}")


def keep(name: str, out: Path, weights: dict[str, Tensor], library: str) -> None:
    folder = DATA / name
    folder.mkdir(parents=True, exist_ok=True)
    tensors = load_file(out / "model.safetensors")
    layers = {name: tensor for name, tensor in tensors.items() if ".layers." in name}
    save_file(layers, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text("utf-8"))
    config["quantization_config"].get("meta", {}).pop("offload_to_disk_path", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    expected = {
        "library": library,
        "weights": {linear: digest(weight) for linear, weight in sorted(weights.items())},
    }
    (folder / "expected.json").write_text(json.dumps(expected, indent=2) + "\n", "utf-8")


def digest(weight: Tensor) -> dict[str, str]:
    positive = (weight + 0.0).contiguous()  # a zero of either sign is the same weight
    data = positive.view(torch.uint8).numpy().tobytes()
    return {"dtype": str(weight.dtype), "sha256": hashlib.sha256(data).hexdigest()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    library, *only = sys.argv[1:]
    libraries = {
        "gptqmodel": with_gptqmodel,
        "llmcompressor": with_llmcompressor,
        "autoawq": with_autoawq,
    }
    libraries[library](only)
