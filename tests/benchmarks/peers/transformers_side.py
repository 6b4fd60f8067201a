"""transformers' continuous batching on the workload: python transformers_side.py MODEL"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import time

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig
from workload import MAX_BATCH, OUTPUT_TOKENS, PROMPT_TOKENS, Answers, Generate, Prompt, serve

PAGE_TOKENS = 16


def load(folder: str, threads: int) -> Generate:
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    pages = MAX_BATCH * (PROMPT_TOKENS + OUTPUT_TOKENS) // PAGE_TOKENS
    limits = ContinuousBatchingConfig(  # left to itself it takes most of the memory, and crawls
        page_size=PAGE_TOKENS,
        num_blocks=pages + MAX_BATCH,
        max_batch_tokens=512,
        allow_block_sharing=False,
    )
    greedy = GenerationConfig(max_new_tokens=OUTPUT_TOKENS, do_sample=False, eos_token_id=-1)
    manager = model.init_continuous_batching(greedy, limits)
    manager.start()

    def generate(given: list[Prompt]) -> Answers:
        started = time.perf_counter()
        names = manager.add_requests(given, record_timestamps=True)
        outputs = {}
        while len(outputs) < len(given):
            if (output := manager.get_result(timeout=1)) and output.is_finished():
                outputs[output.request_id] = output
        first_s = max(output.timestamps[0] for output in outputs.values()) - started
        tokens = [outputs[name].generated_tokens for name in names]
        return Answers(tokens, first_s, time.perf_counter() - started)

    return generate


if __name__ == "__main__":
    serve(load)
    os._exit(0)  # the manager's thread would keep the process
