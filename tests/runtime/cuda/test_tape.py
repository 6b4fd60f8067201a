"""The stand-in for CUDA graphs shows what a graph would do wrong."""

import pytest
import torch
from tape_graphs import TapeGpu


def test_a_replay_reads_what_lies_in_the_tensors_now() -> None:
    given, result = torch.tensor([1.0, 2.0]), torch.zeros(2)

    def run() -> None:
        twice = given * 2
        result.copy_(twice[1:].expand(2) + given)

    replay = TapeGpu().capture(run)
    assert result.tolist() == [0, 0], "a capture computes nothing"
    for first in (5.0, 6.0):
        given[0] = first
        replay()
        assert result.tolist() == [4 + first, 6]


def test_a_number_of_the_host_stays_as_it_was_captured() -> None:
    step, result = 1, torch.zeros(1)
    replay = TapeGpu().capture(lambda: result.fill_(step))
    step = 2
    replay()
    assert result.item() == 1


def test_memory_that_a_capture_made_holds_nothing_before_a_replay() -> None:
    kept: list[torch.Tensor] = []
    given = torch.ones(3)
    replay = TapeGpu().capture(lambda: kept.append(given + 1))
    assert kept[0].isnan().all()
    replay()
    assert kept[0].tolist() == [2, 2, 2]


def test_waiting_for_the_device_is_an_error() -> None:
    given = torch.ones(3)
    for wait in (given[0].item, given.nonzero, lambda: given[given > 0], lambda: torch.tensor([1])):
        with pytest.raises(AssertionError, match="in a capture"):
            TapeGpu().capture(wait)
