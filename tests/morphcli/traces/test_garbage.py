"""Whatever a file holds, it is read or refused, and what is written is read back."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from morphserve.morphcli.traces.arrivals import TraceError
from morphserve.morphcli.traces.readers import read_rows, read_trace
from morphserve.morphcli.traces.rows import sorted_rows
from morphserve.morphcli.traces.writer import write_rows

HEADERS = {
    "TIMESTAMP,ContextTokens,GeneratedTokens": "2023-11-16 18:15:46.68,374,44",
    "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type": "5,GPT-4,4,5,9,API log",
    "arrived_at,num_prefill_tokens,num_decode_tokens": "0.5,3,4",
}
DIRT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
FIELD = st.one_of(DIRT, st.integers().map(str), st.floats().map(str), st.datetimes().map(str))
ROW = st.one_of(DIRT, st.lists(FIELD, max_size=8).map(",".join))


def count_rows(text: str) -> int:
    """Lines after the header as text files have them, without comments and blank ones."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in lines)


@given(
    st.sampled_from(sorted(HEADERS)), st.lists(ROW, max_size=20), st.sampled_from(["\n", "\r\n"])
)
def test_garbage_in_csv_never_fails_and_every_row_is_counted(
    tmp_path_factory: pytest.TempPathFactory, header: str, rows: list[str], end: str
) -> None:
    path = tmp_path_factory.mktemp("garbage") / "t.csv"
    body = end.join([HEADERS[header], *rows])
    path.write_bytes(f"{header}{end}{body}".encode())
    trace = read_trace(path)
    assert len(trace.arrivals) + len(trace.bad_rows) == count_rows(body)
    assert all(row.reason and len(row.reason) < 200 for row in trace.bad_rows)
    assert [a.time_s for a in trace.arrivals] == sorted(a.time_s for a in trace.arrivals)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats().map(str), DIRT),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)
KEYS = st.sampled_from(["timestamp", "input_length", "output_length", "hash_ids", "more"])


@given(st.lists(st.one_of(DIRT, st.dictionaries(KEYS, JSON, max_size=5)), max_size=20))
def test_garbage_in_json_lines_never_fails_and_every_row_is_counted(
    tmp_path_factory: pytest.TempPathFactory, rows: list[str | dict[str, object]]
) -> None:
    path = tmp_path_factory.mktemp("garbage") / "t.jsonl"
    good = {"timestamp": 3000, "input_length": 10, "output_length": 2, "hash_ids": [1]}
    lines = [row if isinstance(row, str) else json.dumps(row) for row in (good, *rows)]
    body = "\n".join(lines)
    path.write_bytes(body.encode())
    trace = read_trace(path)
    assert len(trace.arrivals) + len(trace.bad_rows) == count_rows(body)


def test_json_beyond_all_measure_is_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    row = '{"timestamp": 1, "input_length": 5, "output_length": %s}'
    values = ["1", "9" * 5000, "9" * 400, "1e500", f'"{"x" * 3000}"', "[" * 100_000]
    path.write_text("\n".join(row % value for value in values), "utf-8")
    trace = read_trace(path)
    assert len(trace.arrivals) == 1 and [bad.line for bad in trace.bad_rows] == [2, 3, 4, 5, 6]
    assert all(len(bad.reason) < 200 for bad in trace.bad_rows)


@given(st.binary(max_size=400))
def test_bytes_of_any_kind_are_a_trace_or_one_sentence(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.mktemp("garbage") / "t"
    path.write_bytes(content)
    with pytest.raises(TraceError):
        read_trace(path)


TOKENS = st.integers(1, 2**31 - 1)
REQUESTS = st.lists(st.tuples(st.integers(0, 10**12), TOKENS, TOKENS), min_size=1, max_size=20)


@pytest.mark.parametrize("start_us", [None, 1_700_158_546_680_590])
@given(requests=REQUESTS)
def test_what_is_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory,
    start_us: int | None,
    requests: list[tuple[int, int, int]],
) -> None:
    stamps, prompts, outputs = (np.array(column) for column in zip(*requests, strict=True))
    is_dated = start_us is not None
    rows = sorted_rows("s", "f", stamps + (start_us or 0), prompts, outputs, is_dated=is_dated)
    path = tmp_path_factory.mktemp("written") / "t.csv"
    write_rows(path, rows, ["a remark"])
    again = read_rows(path)
    assert again.start_us == rows.start_us and not again.bad_rows
    for name in ("time_us", "prompt_tokens", "output_tokens"):
        assert getattr(again, name).tolist() == getattr(rows, name).tolist()
    assert again.comments == ("# a remark",)
