"""The model of the comparison in each engine's format, made by that engine's interpreter.

    python model.py morph FOLDER       first, with MorphServe's; transformers and vllm read it too
    python model.py openvino FOLDER    an interpreter with optimum-intel and nncf, not GenAI's
    python model.py llama FOLDER       one with llama-cpp-python and gguf

optimum-intel brings torchvision, whose usual build fails beside a CPU build of torch: uninstall it.
Random weights, 124.7 million parameters: speed does not depend on what they say.
"""

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np

GROUP_SIZE = 64  # of INT4 weights; llama.cpp's own formats have 32
SIZES = {
    "vocab_size": 32_000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}


def make_morph(folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from morphserve.quantize.build import QuantizeSettings, build_bundle
    from morphserve.quantize.bundle import open_bundle
    from morphserve.quantize.checkpoint import open_checkpoint
    from morphserve.quantize.formats.export import export_gptq

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).to(torch.bfloat16)
    model.save_pretrained(folder / "checkpoint")
    train_tokenizer(folder / "checkpoint")
    checkpoint = open_checkpoint(str(folder / "checkpoint"))
    build_bundle(checkpoint, folder / "bundle", QuantizeSettings("rtn", GROUP_SIZE))
    export_gptq(open_bundle(str(folder / "bundle"), checkpoint), checkpoint, folder / "gptq")


def train_tokenizer(folder: Path) -> None:
    """Some engines load none without one; the text is this Python's own library."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    text = [str(path) for path in Path(sysconfig.get_path("stdlib")).glob("*.py")]
    special = ["<unk>", "<s>", "</s>"]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train(text, vocab_size=SIZES["vocab_size"], special_tokens=special)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def make_openvino(folder: Path) -> None:
    int4 = ["--sym", "--group-size", str(GROUP_SIZE), "--ratio", "1.0"]
    for name, options in {"fp16": [], "int4": int4}.items():
        subprocess.run(
            [
                Path(sys.executable).with_name("optimum-cli"),
                *("export", "openvino", "--task", "text-generation-with-past"),
                *("--model", folder / "checkpoint", "--weight-format", name, *options),
                folder / f"openvino-{name}",
            ],
            check=True,
        )


def make_llama(folder: Path) -> None:
    full = folder / "llama-bf16.gguf"
    write_gguf(folder / "checkpoint", full)
    from llama_cpp import llama_cpp

    for name in ("Q4_0", "Q4_K_M"):
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}")
        out = folder / f"llama-{name.lower()}.gguf"
        if llama_cpp.llama_model_quantize(bytes(full), bytes(out), params):
            sys.exit(f"llama.cpp could not make {out}")


def write_gguf(checkpoint: Path, out: Path) -> None:
    """Without a vocabulary: the comparison speaks in token ids."""
    import gguf

    heads = {"q_proj": SIZES["num_attention_heads"], "k_proj": SIZES["num_key_value_heads"]}
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_vocab_size(SIZES["vocab_size"])
    writer.add_context_length(SIZES["max_position_embeddings"])
    writer.add_embedding_length(SIZES["hidden_size"])
    writer.add_feed_forward_length(SIZES["intermediate_size"])
    writer.add_block_count(SIZES["num_hidden_layers"])
    writer.add_head_count(SIZES["num_attention_heads"])
    writer.add_head_count_kv(SIZES["num_key_value_heads"])
    writer.add_rope_dimension_count(SIZES["hidden_size"] // SIZES["num_attention_heads"])
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, SIZES["num_hidden_layers"])
    for name, bits in read_bits(checkpoint / "model.safetensors").items():
        linear = name.split(".")[-2]
        if linear in heads:  # rows that rotate together lie side by side in this format
            pairs = bits.reshape(heads[linear], 2, -1, bits.shape[-1])
            bits = np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(bits.shape)
        path = names.get_name(name, try_suffixes=(".weight",))
        if bits.ndim == 1:
            writer.add_tensor(path, (bits.astype(np.uint32) << 16).view(np.float32))
        else:
            raw = bits.view(np.uint8)
            writer.add_tensor(path, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_bits(file: Path) -> dict[str, np.ndarray]:
    """bfloat16 tensors of a safetensors file, as the uint16 that numpy has for them."""
    data = file.read_bytes()
    body = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:body])
    header.pop("__metadata__", None)
    return {
        name: np.frombuffer(data, np.uint16, offset=body)[
            slice(*(offset // 2 for offset in entry["data_offsets"]))
        ].reshape(entry["shape"])
        for name, entry in header.items()
    }


if __name__ == "__main__":
    makers = {"morph": make_morph, "openvino": make_openvino, "llama": make_llama}
    makers[sys.argv[1]](Path(sys.argv[2]))
