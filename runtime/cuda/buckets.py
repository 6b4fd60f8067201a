"""The batch sizes that steps are captured for: a smaller batch is padded up to one of them."""

from bisect import bisect_left
from collections.abc import Sequence


def fine_sizes(max_num_seqs: int) -> list[int]:
    """1, 2, 4, then steps of 8, up to `max_num_seqs`: at most 7 rows of padding beyond 8."""
    return _below([1, 2, 4, *range(8, max_num_seqs, 8)], max_num_seqs)


def coarse_sizes(max_num_seqs: int) -> list[int]:
    """Powers of two and what lies halfway from 16 on: 1, 2, 4, 8, 16, 24, 32, 48, 64, 96, ..."""
    powers = [2**i for i in range(max_num_seqs.bit_length())]
    halfway = [power + power // 2 for power in powers if power >= 16]
    return _below(sorted([*powers, *halfway]), max_num_seqs)


def fitting(sizes: Sequence[int], num_seqs: int) -> int | None:
    """The smallest of the ascending sizes that holds so many; None if none does."""
    i = bisect_left(sizes, num_seqs)
    return sizes[i] if i < len(sizes) else None


def _below(sizes: Sequence[int], most: int) -> list[int]:
    return [*(size for size in sizes if size < most), most]
