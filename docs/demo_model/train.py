"""Train the demo model: a 10.5M-parameter Llama on the Python standard library's own text.

    python docs/demo_model/train.py OUT_DIR --hours 1

Writes a Hugging Face folder (config.json, generation_config.json, model.safetensors in bf16,
tokenizer files), held-out text and a report. Corpus: source and documentation of the running
interpreter's standard library, PSF licence. The learning rate follows the clock, so the number
of tokens seen, and with it the quality, depends on the machine.
"""

import argparse
import json
import math
import os
import pathlib
import random
import sysconfig
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pydoc_data.topics

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EOT = "<|endoftext|>"
BATCH_TOKENS = 4096
SHORT, LONG = 512, 1024  # tokens per window: short first, long for the last fifth of the time
SKIP = {"site-packages", "encodings", "lib2to3", "msilib", "cjkencodings", "data"}


def corpus() -> tuple[list[str], list[str]]:
    """(training texts, held-out texts); every 40th file is held out."""
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    files = sorted(f for f in root.rglob("*.py") if not SKIP & set(f.relative_to(root).parts))
    texts = []
    for file in files:
        try:
            text = file.read_text("utf-8")
        except UnicodeDecodeError:
            continue
        if 500 < len(text) < 400_000:
            texts.append(text)
    texts += [text for _, text in sorted(pydoc_data.topics.topics.items())]
    random.Random(0).shuffle(texts)
    return [t for i, t in enumerate(texts) if i % 40], texts[::40]


def make_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=4096, special_tokens=[EOT], initial_alphabet=alphabet)
    )
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(texts):
        ids.append(0)
        ids += encoding.ids
    return np.array(ids, dtype=np.int64)


def windows(tokens: np.ndarray, length: int, rng: np.random.Generator) -> torch.Tensor:
    """[BATCH_TOKENS // length, length] token ids from random places."""
    starts = rng.integers(0, len(tokens) - length - 1, BATCH_TOKENS // length)
    return torch.from_numpy(np.stack([tokens[s : s + length] for s in starts]))


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, tokens: np.ndarray) -> float:
    """Mean cross-entropy in nats per token over held-out windows."""
    model.eval()
    rng = np.random.default_rng(1)
    losses = []
    for _ in range(8):
        batch = windows(tokens, LONG, rng)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses.append(model(input_ids=batch, labels=batch).loss.item())
    model.train()
    return sum(losses) / len(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--hours", type=float, default=1.0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    train_texts, held_out = corpus()
    tokenizer = make_tokenizer(train_texts)
    train, val = encode(tokenizer, train_texts), encode(tokenizer, held_out)
    bytes_per_token = sum(len(t.encode()) for t in held_out) / len(val)
    print(
        f"{len(train):,} training tokens, {len(val):,} held out, {bytes_per_token:.2f} bytes/token",
        flush=True,
    )

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
        rope_theta=10000.0,
    )
    model = LlamaForCausalLM(config)
    compiled = torch.compile(model, dynamic=False)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    peaks = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]

    def save() -> None:
        model.to(torch.bfloat16).save_pretrained(args.out)
        model.to(torch.float32)

    rng = np.random.default_rng(0)
    start, budget, step, running = time.monotonic(), args.hours * 3600, 0, None
    while (elapsed := time.monotonic() - start) < budget:
        progress = elapsed / budget
        # Warm up over 100 steps, stay flat for half of the time, then fall linearly.
        scale = min(1.0, (step + 1) / 100) * min(1.0, (1 - progress) / 0.5 + 0.02)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * scale
        batch = windows(train, SHORT if progress < 0.8 else LONG, rng)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = compiled(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        step += 1
        if step % 100 == 0:
            tokens_per_s = step * BATCH_TOKENS / (time.monotonic() - start)
            print(
                f"step {step} {progress:.0%} loss {running:.3f} {tokens_per_s:.0f} tok/s "
                f"scale {scale:.2f}",
                flush=True,
            )
        if step % 500 == 0:
            print(f"  held-out loss {evaluate(model, val):.3f}", flush=True)

    loss_val = evaluate(model, val)
    save()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=EOT, eos_token=EOT, model_max_length=2048
    ).save_pretrained(args.out)
    (args.out / "held_out.txt").write_text("\n".join(held_out)[:600_000])
    report = {
        "tokens_seen": step * BATCH_TOKENS,
        "held_out_nats_per_token": loss_val,
        "held_out_bits_per_byte": loss_val / math.log(2) / bytes_per_token,
        "steps": step,
    }
    (args.out / "training.json").write_text(json.dumps(report, indent=1))
    print(report)


if __name__ == "__main__":
    main()
