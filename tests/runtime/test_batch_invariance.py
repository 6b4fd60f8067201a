"""A request's answer on CPU is the same, bit for bit, whatever runs beside it and however."""

import random
from collections.abc import Sequence

import pytest
import torch

from morphserve.configs.load import load_policy
from morphserve.configs.schema import CacheConfig, EngineConfig, SchedulerConfig
from morphserve.runtime.build import build_engine
from morphserve.runtime.engine import Engine
from morphserve.runtime.messages import Submit, TokenLogprobs
from morphserve.runtime.request import SamplingParams

# Around the sizes of blocks and tiles; two prompts take several steps, and one context several
# splits of attention.
LENGTHS = (1, 2, 15, 16, 17, 31, 33, 64, 100, 129, 200, 255, 257, 300, 513, 1100)
VOCABULARY = 4096  # of the demo model
GREEDY = SamplingParams(max_tokens=24, temperature=0.0, logprobs=3, ignore_eos=True)

Answer = tuple[list[int], list[TokenLogprobs]]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    draw = random.Random(6)
    return [[draw.randrange(5, VOCABULARY) for _ in range(length)] for length in LENGTHS]


def engine_of(bundle: str, policy: str, step_tokens: int = 512) -> Engine:
    config = EngineConfig(
        model="demo",
        bundle=bundle,
        policy=load_policy(policy),
        cache=CacheConfig(enable_prefix_caching=False),  # every prompt is computed
        scheduler=SchedulerConfig(
            max_num_seqs=len(LENGTHS), max_num_batched_tokens=step_tokens, max_model_len=1200
        ),
    )
    engine = build_engine(config)
    assert (engine.hello().kernels, engine.hello().dtype) == ("native", "bfloat16")
    return engine


def answers(
    engine: Engine, prompts: Sequence[list[int]], params: SamplingParams = GREEDY
) -> list[Answer]:
    """Tokens of each prompt, with their log-probabilities, when all are sent at once."""
    found: list[Answer] = [([], []) for _ in prompts]
    for i, prompt in enumerate(prompts):
        assert engine.submit(Submit(str(i), prompt, params)) is None
    while engine.has_work:
        step = engine.step()
        for output in step.outputs if step else []:
            tokens, logprobs = found[int(output.request_id)]
            tokens += output.tokens
            logprobs += output.logprobs or []
    assert {len(tokens) for tokens, _ in found} == {params.max_tokens}
    return found


def alone(
    engine: Engine, prompts: Sequence[list[int]], params: SamplingParams = GREEDY
) -> list[Answer]:
    return [answers(engine, [prompt], params)[0] for prompt in prompts]


@pytest.mark.parametrize("policy", ["off", "static:all"])
def test_greedy_answers_are_the_same_alone_together_in_chunks_and_on_three_threads(
    bundle: str, prompts: list[list[int]], policy: str
) -> None:
    engine = engine_of(bundle, policy)
    expected = alone(engine, prompts)
    assert all(len(logprobs) == GREEDY.max_tokens for _, logprobs in expected)
    assert answers(engine, prompts) == expected
    assert answers(engine_of(bundle, policy, step_tokens=37), prompts) == expected
    torch.set_num_threads(3)
    assert alone(engine, prompts[-2:]) == expected[-2:]
    assert answers(engine, prompts) == expected


@pytest.mark.parametrize("policy", ["off", "static:all"])
def test_seeded_answers_are_the_same_alone_and_together(
    bundle: str, prompts: list[list[int]], policy: str
) -> None:
    params = SamplingParams(
        max_tokens=24, temperature=0.9, top_p=0.95, top_k=50, seed=3, ignore_eos=True
    )
    engine = engine_of(bundle, policy)
    assert answers(engine, prompts, params) == alone(engine, prompts, params)
