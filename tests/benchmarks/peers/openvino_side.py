"""OpenVINO GenAI's continuous batching on the workload: python openvino_side.py MODEL"""

import numpy as np
import openvino as ov
from openvino_genai import ContinuousBatchingPipeline, GenerationConfig, SchedulerConfig
from workload import MAX_BATCH, OUTPUT_TOKENS, Answers, Generate, Prompt, Watch, serve


def load(folder: str, threads: int) -> Generate:
    scheduling = SchedulerConfig()
    scheduling.max_num_seqs = MAX_BATCH
    scheduling.cache_size = 1  # GB
    scheduling.enable_prefix_caching = False
    properties = {"INFERENCE_NUM_THREADS": threads}
    pipeline = ContinuousBatchingPipeline(folder, scheduling, "CPU", properties)
    greedy = GenerationConfig(max_new_tokens=OUTPUT_TOKENS, do_sample=False, ignore_eos=True)

    def generate(given: list[Prompt]) -> Answers:
        watch = Watch(len(given))
        handles = [
            pipeline.add_request(i, ov.Tensor(np.array([prompt], dtype=np.int64)), greedy)
            for i, prompt in enumerate(given)
        ]
        while pipeline.has_non_finished_requests():
            pipeline.step()
            for i, handle in enumerate(handles):
                if handle.can_read():
                    for output in handle.read().values():
                        watch.add(i, output.generated_ids)
        return watch.answers()

    return generate


if __name__ == "__main__":
    serve(load)
