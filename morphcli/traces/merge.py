"""Several traces as one."""

import itertools
from collections.abc import Sequence

import numpy as np

from morphserve.morphcli.traces.rows import Integers, Rows, sorted_rows


def merge_rows(parts: Sequence[Rows], *, by_start: bool = False) -> Rows:
    """All rows in order of time: by date where every part has dates, else from each part's first.

    `by_start` lays the first rows of all parts on each other, dates or not.
    """
    is_dated = not by_start and all(part.start_us is not None for part in parts)
    return sorted_rows(
        " + ".join(part.source for part in parts),
        "merged",
        np.concatenate([_stamps(part, is_dated) for part in parts]),
        np.concatenate([part.prompt_tokens for part in parts]),
        np.concatenate([part.output_tokens for part in parts]),
        is_dated=is_dated,
        comments=list(dict.fromkeys(line for part in parts for line in part.comments)),
    )


def are_apart(parts: Sequence[Rows]) -> bool:
    """Whether some part ends before the next one starts, by their dates."""
    spans = sorted(
        (part.start_us, part.start_us + int(part.time_us[-1]))
        for part in parts
        if part.start_us is not None
    )
    ends = itertools.accumulate((end for _, end in spans), max)
    return any(start > end for (start, _), end in zip(spans[1:], ends, strict=False))


def _stamps(part: Rows, is_dated: bool) -> Integers:
    return part.time_us + part.start_us if is_dated and part.start_us else part.time_us
