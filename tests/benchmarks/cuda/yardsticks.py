"""What others do with the same work on the same GPU, where they are installed."""

import gc
import importlib.util
import time
from functools import partial
from typing import Any

import torch
from bench import Bench, Gate
from caches import attention_shape
from model import random_model
from serving import serve

from morphserve.runtime.loader import LoadedModel
from morphserve.runtime.messages import Submit
from morphserve.runtime.request import SamplingParams

REQUESTS, PROMPT, OUTPUT = 64, 512, 128  # of the throughput that is compared


def run(bench: Bench) -> None:
    for name, measure in {
        "morphserve": _morphserve,
        "flashinfer": _flashinfer,
        "transformers": _transformers,
    }.items():
        try:
            measure(bench)
        except Exception as error:
            bench.figures.add(name, "FAILED", f"{type(error).__name__}: {error}"[:150])
        gc.collect()
        if not bench.dry:
            torch.cuda.empty_cache()


def _load(bench: Bench) -> tuple[list[list[int]], int]:
    """Prompts, and how many tokens each is answered with."""
    requests, prompt, output = (3, 20, 4) if bench.dry else (REQUESTS, PROMPT, OUTPUT)
    vocab = bench.sizes.architecture.vocab_size
    return torch.randint(5, vocab, (requests, prompt)).tolist(), output


def _morphserve(bench: Bench) -> None:
    """Without swaps, and with the default policy where nothing presses: it should cost nothing."""
    model = random_model(bench)
    off_s = _serve_all(bench, model, "off")
    _tell(bench, "morphserve", *_load(bench), off_s)
    gc.collect()
    idle_s = _serve_all(bench, model, "balanced")
    bench.figures.add("morphing when idle", "throughput", off_s / idle_s, gate=Gate(">=", 0.995))


def _serve_all(bench: Bench, model: LoadedModel, policy: str) -> float:
    """Seconds, at best of two after one that compiles."""
    prompts, output = _load(bench)
    longest = len(prompts[0]) + output
    served = serve(
        bench,
        model,
        policy,
        max_seqs=len(prompts),
        max_batched_tokens=64 if bench.dry else 2048,
        kv_tokens=2 * len(prompts) * longest,
        max_model_len=longest,
    )
    params = SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True)
    spent = []
    for turn in range(3):
        started = time.perf_counter()
        for i, prompt in enumerate(prompts):
            served.engine.submit(Submit(f"{turn}-{i}", prompt, params))
        while served.engine.has_work:
            served.engine.step()
        spent.append(time.perf_counter() - started)
    return min(spent[1:])


def _tell(bench: Bench, name: str, prompts: list[list[int]], output: int, spent_s: float) -> None:
    line = f"{len(prompts)} x {len(prompts[0])} in, {output} out"
    bench.figures.add(line, name, len(prompts) * output / spent_s, "tokens/s")


def _transformers(bench: Bench) -> None:
    """Its continuous batching over torch's attention, which needs nothing to be installed."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model, (prompts, output) = _llama(bench), _load(bench)
    settings = GenerationConfig(max_new_tokens=output, do_sample=False, eos_token_id=-1)
    sizes = {"num_blocks": 64, "max_batch_tokens": 64} if bench.dry else {"max_memory_percent": 0.5}
    for load in (prompts[:8], prompts):  # the first is to get ready
        batching = ContinuousBatchingConfig(
            allow_block_sharing=False, use_cuda_graph=False if bench.dry else None, **sizes
        )
        started = time.perf_counter()
        results = model.generate_batch(
            inputs=load, generation_config=settings, continuous_batching_config=batching
        )
        spent_s = time.perf_counter() - started
    made = sum(len(result.generated_tokens) for result in results.values())
    if made != len(prompts) * output:
        bench.figures.add("transformers", "made", f"{made} of {len(prompts) * output} tokens")
    _tell(bench, "transformers paged|sdpa", prompts, output, spent_s)


def _llama(bench: Bench) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    arch = bench.sizes.architecture
    config = LlamaConfig(
        vocab_size=arch.vocab_size,
        hidden_size=arch.hidden_size,
        intermediate_size=arch.intermediate_size,
        num_hidden_layers=arch.num_layers,
        num_attention_heads=arch.num_heads,
        num_key_value_heads=arch.num_kv_heads,
        max_position_embeddings=arch.max_position,
    )
    with torch.device(bench.device):
        model = LlamaForCausalLM._from_config(
            config, attn_implementation="sdpa", dtype=torch.bfloat16
        )
    return model.eval()


def _flashinfer(bench: Bench) -> None:
    """Its decode attention; compiles for half a minute or more."""
    if bench.dry or importlib.util.find_spec("flashinfer") is None:
        return bench.figures.add("flashinfer", "", "is not installed")
    import flashinfer

    shape, tokens = attention_shape(bench, 16), 16
    for batch, context in bench.sizes.attention[:2]:
        per_seq = context // tokens
        pages = batch * per_seq
        caches = [
            bench.random(pages, 2, tokens, shape.num_kv_heads, shape.head_dim) for _ in range(4)
        ]
        workspace = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "NHD", use_tensor_cores=True
        )
        wrapper.plan(
            torch.arange(0, pages + 1, per_seq, dtype=torch.int32),
            torch.randperm(pages, dtype=torch.int32).cuda(),
            torch.full((batch,), tokens, dtype=torch.int32),
            *(shape.num_heads, shape.num_kv_heads, shape.head_dim, tokens),
            q_data_type=torch.bfloat16,
            kv_data_type=torch.bfloat16,
        )
        q = bench.random(batch, shape.num_heads, shape.head_dim)
        spent_s = bench.seconds([partial(wrapper.run, q, cache) for cache in caches])
        num_bytes = 2 * 2 * shape.num_kv_heads * shape.head_dim * batch * context
        label = f"{batch}x{context}"
        bench.figures.add("flashinfer decode", label, num_bytes / spent_s / 1e12, "TB/s")
