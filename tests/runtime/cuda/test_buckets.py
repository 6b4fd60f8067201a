"""Sizes that decode steps are captured in."""

import pytest

from morphserve.runtime.cuda.buckets import coarse_sizes, fine_sizes, fitting


def test_sizes_grow_in_steps_of_eight() -> None:
    assert fine_sizes(256) == [1, 2, 4, *range(8, 257, 8)]
    assert fine_sizes(30) == [1, 2, 4, 8, 16, 24, 30]


def test_coarse_sizes_grow_by_half_at_most_from_16_on() -> None:
    assert coarse_sizes(256) == [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256]
    assert coarse_sizes(100) == [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 100]


@pytest.mark.parametrize("most", [1, 2, 3, 7, 8, 9, 256, 257, 512])
def test_every_batch_has_a_size(most: int) -> None:
    for sizes in (fine_sizes(most), coarse_sizes(most)):
        assert sizes == sorted(set(sizes)) and sizes[-1] == most
        for num_seqs in range(1, most + 1):
            size = fitting(sizes, num_seqs)
            assert size is not None and size >= num_seqs
            assert all(smaller < num_seqs for smaller in sizes if smaller < size)
        assert fitting(sizes, most + 1) is None
