"""Reading a trace: every odd row is named, none is dropped in silence, whatever the format."""

import gzip
from pathlib import Path

import pytest

from morphserve.morphcli.traces.arrivals import Arrival, TraceError
from morphserve.morphcli.traces.formats import Columns, TimeUnit, parse_where
from morphserve.morphcli.traces.readers import Reading, read_rows, read_trace

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


@pytest.mark.parametrize("row", ["2.0,1,374,44", "2.0,374,44,0", '2.0,"1,374",44'])
def test_a_row_of_more_fields_than_the_header_is_bad(tmp_path: Path, row: str) -> None:
    path = tmp_path / "t.csv"
    header = "arrived_at,num_prefill_tokens,num_decode_tokens"
    path.write_text(f"{header}\n0.5,3,4\n1.0,5,6,\n{row}\n", "utf-8")
    trace = read_trace(path)
    assert [a.prompt_tokens for a in trace.arrivals] == [3, 5]
    assert [bad.line for bad in trace.bad_rows] == [4]


def test_a_surplus_field_is_bad_before_its_row_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("t,p,o,kind\n1,2,3,a\n2,1,374,44,a\n", "utf-8")
    rows = read_rows(path, Reading(Columns("t", "p", "o"), where=(("kind", "a"),)))
    assert (len(rows), rows.left_out) == (1, 0)
    assert rows.bad_rows[0].reason == "too many fields: 5 fields, the header has 4"


@pytest.mark.parametrize("row", ["1_0,3,4", "1,1_000,4", "1,3,1_0"])
def test_numbers_are_not_written_as_in_python(tmp_path: Path, row: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(f"t,p,o\n1_0,0,0\n1,3,4\n{row}\n", "utf-8")
    trace = read_trace(path, Reading(Columns("t", "p", "o")))
    assert [bad.line for bad in trace.bad_rows] == [2, 4]


@pytest.mark.parametrize(
    ("name", "reason"), [("none", "No such file or directory"), ("", "Is a d")]
)
def test_a_path_that_cannot_be_read_is_told_once(tmp_path: Path, name: str, reason: str) -> None:
    with pytest.raises(TraceError, match=reason) as refused:
        read_trace(tmp_path / name)
    assert str(refused.value).count(str(tmp_path)) == 1 and "Errno" not in str(refused.value)
