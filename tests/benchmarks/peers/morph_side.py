"""MorphServe's engine on the workload: python morph_side.py MODEL, a checkpoint or a bundle"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from pathlib import Path

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

from morphserve.configs.load import load_policy
from morphserve.configs.schema import CacheConfig, EngineConfig, SchedulerConfig
from morphserve.runtime.build import build_engine
from morphserve.runtime.messages import Submit
from morphserve.runtime.request import SamplingParams


def load(folder: str, threads: int) -> Generate:
    """`folder` is a checkpoint, or a bundle beside one: then every layer is INT4."""
    bundle = Path(folder) if (Path(folder) / "bundle.json").exists() else None
    engine = build_engine(
        EngineConfig(
            str(bundle.parent / "checkpoint") if bundle else folder,
            load_policy("static:all" if bundle else "off"),
            str(bundle) if bundle else None,
            threads=threads,
            cache=CacheConfig(enable_prefix_caching=False),
            scheduler=SchedulerConfig(
                max_num_seqs=MAX_BATCH, max_model_len=PROMPT_TOKENS + OUTPUT_TOKENS
            ),
        )
    )
    greedy = SamplingParams(max_tokens=OUTPUT_TOKENS, temperature=0.0, ignore_eos=True)

    def generate(given: list[Prompt]) -> Answers:
        watch = Watch(len(given))
        for i, prompt in enumerate(given):
            refused = engine.submit(Submit(str(i), prompt, greedy))
            assert refused is None, refused
        while engine.has_work:
            step = engine.step()
            for output in step.outputs if step else []:
                watch.add(int(output.request_id), output.tokens)
        return watch.answers()

    return generate


if __name__ == "__main__":
    serve(load)
