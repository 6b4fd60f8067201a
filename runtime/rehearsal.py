"""The largest step that limits allow, run for what it takes."""

from morphserve.configs.schema import SchedulerConfig
from morphserve.runtime.parts import Parts
from morphserve.runtime.request import Request, SamplingParams
from morphserve.runtime.scheduler import Slice

# Every request draws from what top-p leaves and wants log-probabilities, which takes the most.
_PARAMS = SamplingParams(max_tokens=1, temperature=1.0, top_p=0.9, seed=0, logprobs=1)


def largest_step(parts: Parts, limits: SchedulerConfig) -> None:
    """Runs it: as many tokens as one step may have, of as many requests, all of which sample.

    And once more with all tokens in the prompt of one, as far as the model's context goes.
    """
    tokens, num_seqs = limits.max_num_batched_tokens, limits.max_num_seqs
    longest = min(tokens, parts.max_model_len - 1)
    counts = [tokens // num_seqs + (i < tokens % num_seqs) for i in range(num_seqs)]
    for lengths in ([longest], [min(count, longest) for count in counts]):
        _run(parts, lengths)


def _run(parts: Parts, lengths: list[int]) -> None:
    batch = []
    for i, length in enumerate(lengths):
        request = Request(str(i), [0] * length, _PARAMS, 0.0)
        request.blocks = parts.pool.allocate(-(-length // parts.hello.block_tokens))
        batch.append(Slice(request, 0, length))
    parts.runner.launch(batch).result()
    for piece in batch:
        parts.pool.free(piece.request.blocks)
