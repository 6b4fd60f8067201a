"""Reading a trace: every odd row is named, none is dropped in silence."""

from pathlib import Path

import pytest

from morphserve.morphcli.traces.arrivals import Arrival, BadRow, TraceError
from morphserve.morphcli.traces.readers import read_trace
from morphserve.morphcli.traces.schedule import Shape, find_burst, shape_trace

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"
SHIPPED = Path(__file__).parents[3] / "morphcli" / "bench" / "azure2023_burst.csv"


def write(folder: Path, text: str) -> Path:
    path = folder / "trace.csv"
    path.write_bytes(text.encode())
    return path


def test_seven_digit_fractions_crlf_bom_and_no_last_newline(tmp_path: Path) -> None:
    rows = "2023-11-16 18:15:46.6805900,374,44\r\n2023-11-16 18:15:50.9305900,396,109"
    trace = read_trace(write(tmp_path, f"\ufeff{HEADER}\r\n{rows}"))
    assert trace.arrivals == (Arrival(0.0, 374, 44), Arrival(4.25, 396, 109))
    assert trace.bad_rows == () and trace.describe_bad_rows() == ""


def test_columns_are_found_by_name(tmp_path: Path) -> None:
    text = f"GeneratedTokens,Model,TIMESTAMP,ContextTokens\n7,gpt,2023-11-16 18:15:46,{11}\n"
    assert read_trace(write(tmp_path, text)).arrivals == (Arrival(0.0, 11, 7),)


def test_rows_out_of_order_and_time_zones_are_sorted_by_time(tmp_path: Path) -> None:
    rows = "2024-05-12 00:00:02+00:00,2,2\n2024-05-12 00:00:01+00:00,1,1\n"
    trace = read_trace(write(tmp_path, f"{HEADER}\n{rows}"))
    assert trace.arrivals == (Arrival(0.0, 1, 1), Arrival(1.0, 2, 2))


def test_bad_rows_are_counted_and_named_by_line(tmp_path: Path) -> None:
    good = "2023-11-16 18:15:46,3,4"
    bad = ["yesterday,1,1", "2023-11-16 18:15:47,-1,1", "2023-11-16 18:15:47,1,0", "x"]
    trace = read_trace(write(tmp_path, "\n".join(["# a comment", HEADER, good, "", *bad])))
    assert trace.arrivals == (Arrival(0.0, 3, 4),)
    assert trace.bad_rows == (
        BadRow(5, "TIMESTAMP is not a time: 'yesterday'"),
        BadRow(6, "ContextTokens is not a count of tokens: '-1'"),
        BadRow(7, "GeneratedTokens is not a count of tokens: '0'"),
        BadRow(8, "too few fields: 1 field, the header has 3"),
    )
    assert trace.describe_bad_rows().startswith("skipped 4 of 5 rows of ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("# only a comment\n", "is empty"),
        ("TIMESTAMP,Tokens\n1,2\n", "is of no known format: its header holds TIMESTAMP, Tokens"),
        (f"{HEADER}\n", "holds no usable row"),
        (f"{HEADER}\nx,1,1\n", r"holds no usable row \(line 2: TIMESTAMP is not a time"),
    ],
)
def test_a_file_without_requests_is_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        read_trace(write(tmp_path, text))


def test_fields_beyond_what_csv_reads_are_named(tmp_path: Path) -> None:
    long = "1" * 200_000
    trace = read_trace(write(tmp_path, f"{HEADER}\n2023-11-16 18:15:46,3,4\n{long},1,1\n"))
    assert [bad.line for bad in trace.bad_rows] == [3]
    with pytest.raises(TraceError, match="the header of"):
        read_trace(write(tmp_path, f"{long}\n1,1\n"))


def test_a_missing_or_binary_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="cannot read trace"):
        read_trace(tmp_path / "none.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TraceError, match="cannot read trace"):
        read_trace(tmp_path / "binary.csv")


def test_the_shipped_slice_is_calm_burst_calm_and_says_where_it_is_from() -> None:
    trace = read_trace(SHIPPED)
    assert len(trace.arrivals) == 869 and not trace.bad_rows
    schedule = shape_trace(trace, Shape())
    burst = find_burst(schedule.arrivals, schedule.duration_s)
    assert burst is not None and 10 < burst.start_s < burst.end_s < 45
    assert "CC-BY-4.0" in SHIPPED.read_text("utf-8")
