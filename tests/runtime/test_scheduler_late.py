"""What the scheduler does while the newest tokens are being computed."""

from collections.abc import Sequence

import pytest

from morphserve.configs.schema import SchedulerConfig
from morphserve.runtime.blocks import BlockPool
from morphserve.runtime.request import PENDING, FinishReason, Request, SamplingParams, Status
from morphserve.runtime.scheduler import Batch, Scheduler

EOS = 2


def scheduler(blocks: int = 16, max_model_len: int = 64) -> Scheduler:
    return Scheduler(SchedulerConfig(4, 16), BlockPool(range(blocks)), 4, max_model_len, [EOS])


def add(s: Scheduler, prompt: int, max_tokens: int = 8, **params: float) -> Request:
    """A request of so many tokens, no two with the same beginning."""
    name = str(len(s.running) + len(s.waiting))
    sampling = SamplingParams(max_tokens, **params)  # type: ignore[arg-type]
    request = Request(name, [100 * int(name) + i + 10 for i in range(prompt)], sampling, 0.0)
    s.add(request)
    return request


def launch(s: Scheduler, rung: int = 0) -> Batch:
    batch = s.schedule(rung)
    s.launched(batch)
    return batch


def follow(s: Scheduler, before: Batch, tokens: Sequence[int | None]) -> Batch:
    """Schedules a step, then notes what the one before it gave."""
    assert not s.must_know(0)
    batch = s.schedule()
    s.computed(before, tokens)
    s.launched(batch)
    return batch


def shape(batch: Batch) -> list[tuple[str, int, int]]:
    return [(piece.request.id, piece.start, piece.end) for piece in batch]


def test_a_request_goes_on_from_a_token_that_is_not_known() -> None:
    s = scheduler()
    request = add(s, prompt=3)
    first = launch(s)
    assert request.output == [PENDING]
    second = follow(s, first, [7])
    assert (request.output, request.num_computed) == ([7, PENDING], 4)
    assert shape(second) == [("0", 3, 4)]
    assert shape(follow(s, second, [8])) == [("0", 4, 5)]
    assert request.output == [7, 8, PENDING]


@pytest.mark.parametrize(("max_tokens", "max_model_len"), [(2, 64), (8, 5)])
def test_a_request_whose_last_token_is_being_computed_is_not_scheduled_again(
    max_tokens: int, max_model_len: int
) -> None:
    s = scheduler(max_model_len=max_model_len)
    request = add(s, 3, max_tokens)
    last = follow(s, launch(s), [7])
    assert request.is_ending and s.has_work
    assert s.schedule() == []
    assert s.computed(last, [8]) == [(request, [8])]
    assert (request.finish_reason, request.output) == (FinishReason.LENGTH, [7, 8])
    assert not s.has_work and s.num_used == 0


def test_a_request_that_has_ended_is_passed_over_when_the_next_step_is_noted() -> None:
    s = scheduler()
    request, other = add(s, 3), add(s, 3)
    second = follow(s, launch(s), [EOS, 7])
    assert shape(second) == [("0", 3, 4), ("1", 3, 4)]
    assert (request.output, request.status, request.blocks) == ([EOS], Status.FINISHED, [])
    assert other.output == [7, PENDING]


def test_an_aborted_request_keeps_no_placeholder() -> None:
    s = scheduler()
    request = add(s, 3)
    launch(s)
    s.abort("0")
    assert (request.output, request.finish_reason) == ([], FinishReason.ABORT)
    assert s.num_used == 0


def test_blocks_are_found_once_what_they_hold_is_known_to_be_sound() -> None:
    s = scheduler()
    request = add(s, prompt=7)
    second = follow(s, launch(s), [7])  # whose token fills the second block
    assert request.num_registered == 1
    third = follow(s, second, [8])
    assert request.num_registered == 2
    s.computed(third, [None])
    assert request.finish_reason is FinishReason.ERROR
    assert not s.reuse.find(Request("again", request.prompt, request.params, 0.0), 0).blocks


def test_blocks_have_the_rung_of_their_step_whatever_is_committed_before_it_is_read() -> None:
    s = scheduler()
    request = add(s, prompt=8)
    batch = launch(s, rung=0)
    for token in (50, 51, 52, 53, 54):
        following = s.schedule(rung=3)
        s.computed(batch, [token])
        s.launched(following)
        batch = following
    again = Request("again", [*request.prompt, 50, 51, 52, 53, 54], SamplingParams(1), 0.0)
    assert (s.reuse.find(again, 0).rung, len(s.reuse.find(again, 0).blocks)) == (0, 2)
    assert (s.reuse.find(again, 3).rung, len(s.reuse.find(again, 3).blocks)) == (3, 3)


@pytest.mark.parametrize(
    "params", [{"presence_penalty": 1.0}, {"frequency_penalty": -1.0}, {"repetition_penalty": 1.1}]
)
def test_penalties_make_the_next_step_wait(params: dict[str, float]) -> None:
    s = scheduler()
    plain = add(s, 3)
    penalised = add(s, 20, **params)
    first = launch(s)
    assert plain.is_pending and not penalised.is_pending
    assert not s.must_know(0), "its prompt is not complete"
    second = follow(s, first, [7])
    assert s.must_know(0)
    s.computed(second, [7, 7])
    assert not s.must_know(0)


def test_a_step_that_would_preempt_waits() -> None:
    s = scheduler(blocks=4)
    old, young = add(s, 7), add(s, 3)
    first = launch(s)
    assert (len(old.blocks), len(young.blocks)) == (2, 1)
    second = follow(s, first, [7, 7])
    assert s.must_know(0), "both want a block, and one is free"
    s.computed(second, [7, EOS])
    assert not s.must_know(0)
    assert shape(s.schedule()) == [("0", 8, 9)]
    assert s.num_preemptions == 0


def test_a_step_that_pauses_somebody_waits_as_his_blocks_may_be_taken() -> None:
    s = scheduler(blocks=5)
    strict = add(s, 13)
    strict.max_rung = 0
    first = launch(s)
    waiting = add(s, 8)
    assert s.must_know(1) and not s.must_know(0)
    s.computed(first, [7])
    assert shape(s.schedule(1)) == [(waiting.id, 0, 8)]
    assert (strict.status, strict.output) == (Status.WAITING, [7])
