"""Reading a trace: every odd row is named, none is dropped in silence, whatever the format."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from morphserve.configs.errors import ConfigError
from morphserve.morphcli.traces.arrivals import Arrival, TraceError
from morphserve.morphcli.traces.formats import Columns, TimeUnit, parse_map, parse_where
from morphserve.morphcli.traces.readers import Reading, read_rows, read_trace
from morphserve.morphcli.traces.rows import sorted_rows
from morphserve.morphcli.traces.writer import write_rows

FILES = Path(__file__).parent / "files"
TOGETHER = Reading(spread_s=0.0)
PLAIN_CSV = Reading(Columns("sent_ms", "in", "out"))
PLAIN_JSON = Reading(Columns("at", "request", "reply"))


@pytest.mark.parametrize(
    ("name", "reading", "format", "arrivals", "bad"),
    [
        (
            "azure2023.csv",
            Reading(),
            "Azure LLM inference",
            [(0.0, 374, 44), (4.314579, 396, 109), (4.710427, 91, 16), (6.9, 64, 7)],
            {
                4: "TIMESTAMP is not a time: 'yesterday'",
                5: "GeneratedTokens is not a count of tokens: ''",
                7: "ContextTokens is not a count of tokens: '-5'",
                9: "too few fields: 1 field, the header has 3",
            },
        ),
        (
            "azure2024.csv",
            Reading(),
            "Azure LLM inference",
            [(0.0, 2399, 34), (0.000461, 2376, 69), (0.003362, 76, 15)],
            {
                6: "TIMESTAMP is not a time: '2024-13-12 00:00:00.0021130+00:00'",
                7: "ContextTokens is not a count of tokens: '1.5'",
            },
        ),
        (
            "burstgpt1.csv",
            TOGETHER,
            "BurstGPT",
            [(0.0, 472, 18), (0.0, 1087, 230), (0.0, 417, 276), (4.0, 185, 7), (7.0, 89, 12)],
            {
                5: "the request failed: it has no output token",
                6: "the request failed: it has no output token",
                8: "Timestamp is not a time: 'nan'",
                9: "too few fields: 2 fields, the header has 6",
                10: "Response tokens is not a count of tokens: 'x'",
            },
        ),
        (
            "burstgpt3.csv",
            TOGETHER,
            "BurstGPT",
            [(0.0, 40, 9), (1.0, 62, 21)],
            {
                3: "the request failed: it has no output token",
                5: "Request tokens is not a count of tokens: ''",
            },
        ),
        (
            "mooncake.jsonl",
            Reading(),
            "Mooncake",
            [(0.0, 6758, 500), (3.0, 7322, 490), (5.999, 1053, 26)],
            {3: "output_length is not a count of tokens: '0'"} | dict.fromkeys((4, 5, 6, 7)),
        ),
        ("bailian.jsonl", Reading(), "Bailian", [(0.0, 521, 132), (1.5, 90, 5)], {2: None}),
        (
            "vidur.csv",
            Reading(),
            "Vidur",
            [(0.0, 374, 44), (4.314579, 396, 109), (4.710427, 91, 16)],
            {
                4: "num_prefill_tokens is not a count of tokens: '0'",
                5: "arrived_at is not a time: 'inf'",
            },
        ),
        (
            "plain.csv",
            PLAIN_CSV,
            "plain",
            [(0.0, 10, 1), (1.5, 20, 2), (2.25, 40, 4)],
            {
                4: "too few fields: 1 field, the header has 4",
                5: "sent_ms is not a time: '1e99'",
                6: "in is not a count of tokens: '3\ufffd0'",
            },
        ),
        (
            "plain.jsonl",
            PLAIN_JSON,
            "plain",
            [(0.0, 11, 3), (2.5, 12, 4)],
            {1: None, 4: "at is not a time: 'tomorrow'"},
        ),
    ],
)
def test_each_format_is_read_by_name_and_its_dirty_rows_are_named(
    name: str,
    reading: Reading,
    format: str,
    arrivals: list[tuple[float, int, int]],
    bad: dict[int, str | None],
) -> None:
    rows = read_rows(FILES / name, reading)
    trace = read_trace(FILES / name, reading)
    assert rows.format == format
    assert trace.arrivals == tuple(Arrival(*each) for each in arrivals)
    assert [row.line for row in trace.bad_rows] == list(bad)
    for row in trace.bad_rows:
        assert bad[row.line] in (None, row.reason)
        assert row.reason.partition(": ")[2]


def test_dates_and_large_counts_of_seconds_are_absolute_others_are_not() -> None:
    assert read_rows(FILES / "azure2023.csv").start_us == 1_700_158_546_680_590
    assert read_rows(FILES / "plain.csv", PLAIN_CSV).start_us == 1_700_000_000_000_000
    assert read_rows(FILES / "burstgpt1.csv").start_us is None
    assert read_rows(FILES / "mooncake.jsonl").start_us is None


def test_whole_seconds_of_burstgpt_are_spread_inside_their_second_by_seed() -> None:
    traces = [read_trace(FILES / "burstgpt1.csv", Reading(seed=seed)) for seed in (1, 1, 2)]
    assert traces[0] == traces[1] != traces[2]
    gaps = [
        b.time_s - a.time_s
        for a, b in zip(traces[0].arrivals, traces[0].arrivals[1:], strict=False)
    ]
    assert all(0 < gap < 1 for gap in gaps[:2]) and 3 < sum(gaps[:3]) < 5
    lengths = sorted(a.prompt_tokens for a in traces[0].arrivals)
    assert lengths == [89, 185, 417, 472, 1087]


def test_other_formats_are_spread_only_if_asked() -> None:
    spread = read_trace(FILES / "mooncake.jsonl", Reading(spread_s=3.0)).arrivals
    assert spread[1].time_s != 3.0 and spread[-1].time_s < 9


def test_rows_that_are_not_wanted_are_left_out_and_counted() -> None:
    gpt4 = Reading(where=parse_where(["Model=GPT-4"]))
    rows = read_rows(FILES / "burstgpt1.csv", gpt4)
    assert sorted(rows.prompt_tokens.tolist()) == [185, 1087]
    assert rows.left_out == 6
    assert [bad.line for bad in rows.bad_rows] == [8, 9]
    text = read_rows(FILES / "bailian.jsonl", Reading(where=(("type", "text"),)))
    assert (len(text), text.left_out) == (1, 1)


def test_a_filter_on_a_column_that_is_not_there_is_refused() -> None:
    with pytest.raises(TraceError, match="has no Modell: its header holds Timestamp, Model, "):
        read_rows(FILES / "burstgpt1.csv", Reading(where=(("Modell", "GPT-4"),)))
    with pytest.raises(TraceError, match="holds no usable row .*--where leaves out 9"):
        read_rows(FILES / "burstgpt1.csv", Reading(where=(("Model", "Claude"),)))


def test_gzipped_files_are_read_whatever_their_name(tmp_path: Path) -> None:
    packed = tmp_path / "trace.csv"
    packed.write_bytes(gzip.compress((FILES / "azure2023.csv").read_bytes()))
    assert read_trace(packed).arrivals == read_trace(FILES / "azure2023.csv").arrivals
    packed.write_bytes(packed.read_bytes()[:60])
    with pytest.raises(TraceError, match="cannot read trace"):
        read_trace(packed)


def test_a_header_that_nobody_knows_is_told_with_the_formats_that_are(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("when,how much\n1,2\n", "utf-8")
    with pytest.raises(TraceError) as refused:
        read_trace(path)
    for part in ("when, how much", "Azure", "BurstGPT", "Mooncake", "Vidur", "--map time=COL"):
        assert part in str(refused.value)


def test_a_map_of_columns_that_are_not_there_names_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="has no sent: its header holds id, sent_ms, in, out"):
        read_trace(FILES / "plain.csv", Reading(parse_map("time=sent,prompt=in,output=out")))


def test_a_map_is_parsed_in_any_order() -> None:
    assert parse_map("output=c, time = a,prompt=b") == Columns("a", "b", "c")


@pytest.mark.parametrize(
    "text", ["", "time=a", "time=a,prompt=b,output=b", "time=a,prompt=b,out=c"]
)
def test_a_map_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--map time=COL,prompt=COL,output=COL"):
        parse_map(text)


@pytest.mark.parametrize("text", ["Model", "=GPT-4"])
def test_a_filter_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--where COL=VALUE"):
        parse_where([text])


@pytest.mark.parametrize(
    ("column", "stamps", "unit", "gap_s"),
    [
        ("t", ("10", "12.5"), None, 2.5),
        ("t_ms", ("10", "12"), None, 0.002),
        ("t_us", ("10", "12"), None, 0.000002),
        ("t", ("1700000000", "1700000002"), None, 2.0),
        ("t", ("1700000000000", "1700000002000"), None, 2.0),
        ("t", ("1700000000000000", "1700000002000000"), None, 2.0),
        ("t", ("2026-01-05 10:00", "2026-01-05T10:00:02Z"), None, 2.0),
        ("t", ("nonsense", "2026-01-05 10:00"), None, 0.0),
        ("t", ("10", "12"), TimeUnit.MILLISECONDS, 0.002),
    ],
)
def test_units_of_plain_files_are_told_by_name_and_size_or_given(
    tmp_path: Path, column: str, stamps: tuple[str, ...], unit: TimeUnit | None, gap_s: float
) -> None:
    path = tmp_path / "t.csv"
    rows = "".join(f"{stamp},1,1\n" for stamp in stamps)
    path.write_text(f"{column},p,o\n{rows}", "utf-8")
    trace = read_trace(path, Reading(Columns(column, "p", "o"), unit))
    assert trace.arrivals[-1].time_s == gap_s


def test_a_unit_that_is_given_overrules_the_formats(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(
        '{"timestamp": 1.5, "input_length": 1, "output_length": 2, "hash_ids": []}\n'
        '{"timestamp": 4.0, "input_length": 1, "output_length": 2, "hash_ids": []}\n',
        "utf-8",
    )
    assert read_trace(path, Reading(time_unit=TimeUnit.SECONDS)).arrivals[1].time_s == 2.5


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
