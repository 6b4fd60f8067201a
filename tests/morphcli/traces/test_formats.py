"""Headers, maps and filters: what is of no use is told with what would be."""

from pathlib import Path

import pytest

from morphserve.configs.errors import ConfigError
from morphserve.morphcli.traces.arrivals import TraceError
from morphserve.morphcli.traces.formats import Columns, parse_map, parse_where
from morphserve.morphcli.traces.readers import Reading, read_trace

FILES = Path(__file__).parent / "files"


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
    ("text", "message"),
    [
        ("arrived_at;num_prefill_tokens;num_decode_tokens\n0,5;3;4\n", "by semicolons: write it"),
        ("arrived_at\tnum_prefill_tokens\tnum_decode_tokens\n0.5\t3\t4\n", "by tabs: write it"),
        (
            '[\n{"timestamp": 1, "input_length": 5, "output_length": 6}\n]\n',
            "is a JSON array: write",
        ),
    ],
)
def test_what_is_not_quite_csv_or_json_lines_is_told(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "t"
    path.write_text(text, "utf-8")
    with pytest.raises(TraceError, match=message):
        read_trace(path)


def test_names_that_a_terminal_would_act_on_are_quoted(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("when,\x1b[2Jhow much\n1,2\n", "utf-8")
    for reading in (Reading(), Reading(parse_map("time=a,prompt=b,output=c"))):
        with pytest.raises(TraceError, match=r"header holds when, '\\x1b\[2Jhow much'") as refused:
            read_trace(path, reading)
        assert "\x1b" not in str(refused.value)
