"""Bias and penalties against `transformers` and closed forms, step after step."""

import pytest
import torch
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor

from morphserve.runtime.adjustments import Adjustments
from morphserve.runtime.request import Request, SamplingParams, Status, needs_history

VOCAB = 300
PROMPT = [3, 3, 7, 250]


def logits(step: int) -> Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(step)) * 4


def request(**params: object) -> Request:
    sampling = SamplingParams(**{"max_tokens": 500} | params)  # type: ignore[arg-type]
    return Request("a", list(PROMPT), sampling, 0.0)


def adjusted(adjustments: Adjustments, row: Tensor, of: Request) -> Tensor:
    row = row.clone()
    adjustments.apply(row, of)
    return row


def outputs(count: int) -> list[int]:
    return [(i * i * 13 + i) % VOCAB for i in range(count)]


@pytest.mark.parametrize("penalty", [0.5, 1.3, 10.0])
def test_repetition_is_over_prompt_and_output_as_in_transformers(penalty: float) -> None:
    asked, adjustments = request(repetition_penalty=penalty), Adjustments()
    reference = RepetitionPenaltyLogitsProcessor(penalty)
    for step, token in enumerate(outputs(200)):
        seen = torch.tensor([asked.prompt + asked.output])
        expected = reference(seen, logits(step)[None].clone())[0]
        torch.testing.assert_close(adjusted(adjustments, logits(step), asked), expected)
        asked.output.append(token)


@pytest.mark.parametrize(("presence", "frequency"), [(1.5, 0.0), (0.0, -0.7), (-2.0, 2.0)])
def test_presence_and_frequency_are_over_the_output_alone(
    presence: float, frequency: float
) -> None:
    asked = request(presence_penalty=presence, frequency_penalty=frequency)
    adjustments = Adjustments()
    for step, token in enumerate(outputs(200)):
        counts = torch.bincount(torch.tensor(asked.output, dtype=torch.int64), minlength=VOCAB)
        expected = logits(step) - presence * (counts > 0) - frequency * counts
        torch.testing.assert_close(adjusted(adjustments, logits(step), asked), expected)
        asked.output.append(token)


def test_the_bias_comes_first_then_repetition_then_the_others() -> None:
    asked = request(
        logit_bias={7: 5.0, 9: -100.0},
        repetition_penalty=2.0,
        presence_penalty=0.5,
        frequency_penalty=0.25,
    )
    asked.output += [9, 9, 11]
    row = torch.full((VOCAB,), 1.0)
    got = adjusted(Adjustments(), row, asked)
    assert got[7] == (1 + 5) / 2
    assert got[9] == (1 - 100) * 2 - 0.5 - 2 * 0.25
    assert got[11] == 1 / 2 - 0.5 - 0.25
    assert got[3] == 1 / 2 and got[4] == 1


def test_a_preempted_request_is_changed_as_if_nothing_had_happened() -> None:
    asked, adjustments = request(repetition_penalty=1.5, frequency_penalty=0.5), Adjustments()
    for step, token in enumerate(outputs(20)):
        adjusted(adjustments, logits(step), asked)
        asked.output.append(token)
        asked.num_computed, asked.blocks, asked.status = 0, [], Status.WAITING
    fresh = adjusted(Adjustments(), logits(99), asked)
    assert torch.equal(adjusted(adjustments, logits(99), asked), fresh)


def test_what_a_finished_request_has_seen_is_dropped() -> None:
    asked, adjustments = request(presence_penalty=1.0), Adjustments()
    adjusted(adjustments, logits(0), asked)
    adjustments.drop_finished()
    assert len(adjustments) == 1
    asked.status = Status.FINISHED
    adjustments.drop_finished()
    assert len(adjustments) == 0


def test_nothing_ends_an_output_before_min_tokens() -> None:
    asked = request(min_tokens=2, stop_token_ids=(5,))
    adjustments = Adjustments([9])
    for count in range(3):
        got = adjusted(adjustments, logits(0), asked)
        assert adjustments.concern(asked) is (count < 2)
        ruled_out = (got < -1e38).nonzero().flatten().tolist()
        assert ruled_out == ([5, 9] if count < 2 else [])
        asked.output.append(0)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, False),
        ({"logit_bias": {1: 2.0}, "min_tokens": 3}, False),
        ({"presence_penalty": 0.1}, True),
        ({"frequency_penalty": -0.1}, True),
        ({"repetition_penalty": 1.1}, True),
    ],
)
def test_only_penalties_need_to_know_the_output(params: dict[str, object], expected: bool) -> None:
    asked = request(**params)
    assert needs_history(asked.params) is expected
    asked.output += [3] if expected else [-1]  # one that is not known yet
    adjusted(Adjustments(), logits(0), asked)
