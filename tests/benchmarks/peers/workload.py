"""The workload and its clock, for every engine's own interpreter: standard library only.

An engine's file calls `serve` with how it is loaded. A line of JSON per measurement goes to stdout.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

PROMPT_TOKENS, OUTPUT_TOKENS = 128, 64
VOCAB, FIRST_ID = 32_000, 300  # ids below may be special tokens
MAX_BATCH = 32
STREAMS = 16  # prompts of the equality test
MEASURED_S = 1.5  # least time measured per batch: single prompts take a fraction of a second

Prompt = list[int]


@dataclass(slots=True)
class Answers:
    """Greedy tokens by prompt, and seconds since the first prompt was handed in."""

    tokens: list[list[int]]
    first_s: float  # until each prompt had its first token
    total_s: float


Generate = Callable[[list[Prompt]], Answers]


def prompts(count: int, seed: int) -> list[Prompt]:
    draw = random.Random(seed)
    return [[draw.randrange(FIRST_ID, VOCAB) for _ in range(PROMPT_TOKENS)] for _ in range(count)]


class Watch:
    """Collects tokens as an engine hands them out, and keeps the two times."""

    def __init__(self, count: int) -> None:
        self._tokens: list[list[int]] = [[] for _ in range(count)]
        self._waiting = set(range(count))  # for a first token
        self._started = time.perf_counter()
        self._first_s = 0.0

    def add(self, prompt: int, tokens: Sequence[int]) -> None:
        self._tokens[prompt] += tokens
        if tokens and prompt in self._waiting:
            self._waiting.remove(prompt)
            self._first_s = time.perf_counter() - self._started

    def answers(self) -> Answers:
        total_s = time.perf_counter() - self._started
        lengths = {len(tokens) for tokens in self._tokens}
        assert lengths == {OUTPUT_TOKENS}, f"outputs of {lengths} tokens, not {OUTPUT_TOKENS}"
        return Answers(self._tokens, self._first_s, total_s)


@dataclass(frozen=True, slots=True)
class Measured:
    batch: int
    tokens_per_s: float  # output tokens over the whole time, prefill included
    first_ms: float  # until each prompt had its first token; others may decode meanwhile
    step_ms: float  # mean of the decode steps after that


def measure(generate: Generate, batch: int) -> Measured:
    """Medians over runs of the same prompts: one, or as many as MEASURED_S takes."""
    times: list[Answers] = []
    while sum(answers.total_s for answers in times) < MEASURED_S:
        times.append(generate(prompts(batch, seed=batch)))
    total_s = statistics.median(answers.total_s for answers in times)
    decode_s = statistics.median(answers.total_s - answers.first_s for answers in times)
    first_s = statistics.median(answers.first_s for answers in times)
    rate = batch * OUTPUT_TOKENS / total_s
    return Measured(batch, rate, first_s * 1e3, decode_s * 1e3 / (OUTPUT_TOKENS - 1))


@dataclass(frozen=True, slots=True)
class Equality:
    equal: int  # of STREAMS prompts, those whose tokens are the same alone and together
    first_tokens: list[int]  # engines that compute the same model agree on nearly all


def compare_batches(generate: Generate) -> Equality:
    given = prompts(STREAMS, seed=7)
    together = generate(given).tokens
    alone = [generate([prompt]).tokens[0] for prompt in given]
    equal = sum(a == b for a, b in zip(together, alone, strict=True))
    return Equality(equal, [tokens[0] for tokens in alone])


def serve(load: Callable[[str, int], Generate]) -> None:
    """The command line of one engine."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", help="what model.py made for this engine")
    parser.add_argument("--batch", default="1,4,16,32", help="prompts at once")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--equality", action="store_true", help="tokens alone against together")
    args = parser.parse_args()
    started = time.perf_counter()
    generate = load(args.model, args.threads)
    print(json.dumps({"load_s": time.perf_counter() - started}), flush=True)
    batches = [int(batch) for batch in args.batch.split(",")]
    generate(prompts(max(batches), seed=0))  # touches all memory
    for batch in batches:
        print(json.dumps(asdict(measure(generate, batch))), flush=True)
    if args.equality:
        print(json.dumps(asdict(compare_batches(generate))), flush=True)
