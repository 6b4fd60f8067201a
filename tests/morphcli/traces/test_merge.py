"""Traces are merged by date where they have dates, else by their starts."""

from pathlib import Path

from morphserve.morphcli.traces.merge import are_apart, merge_rows
from morphserve.morphcli.traces.readers import read_rows


def write(folder: Path, name: str, header: str, *rows: str) -> Path:
    path = folder / name
    path.write_text("\n".join([f"# from {name[0]}", header, *rows, ""]), "utf-8")
    return path


AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens"
VIDUR = "arrived_at,num_prefill_tokens,num_decode_tokens"


def test_dates_put_rows_of_both_in_their_order(tmp_path: Path) -> None:
    a = write(tmp_path, "a", AZURE, "2023-11-16 18:00:00,1,1", "2023-11-16 18:00:09,2,2")
    b = write(tmp_path, "b", AZURE, "2023-11-16 18:00:04,3,3", "2023-11-16 18:00:20,4,4")
    rows = merge_rows([read_rows(b), read_rows(a)])
    assert rows.prompt_tokens.tolist() == [1, 3, 2, 4]
    assert rows.time_us.tolist() == [0, 4_000_000, 9_000_000, 20_000_000]
    assert rows.start_us == read_rows(a).start_us
    assert rows.comments == ("# from b", "# from a")


def test_without_dates_the_first_rows_come_together(tmp_path: Path) -> None:
    a = write(tmp_path, "a", AZURE, "2023-11-16 18:00:00,1,1", "2023-11-16 18:00:09,2,2")
    b = write(tmp_path, "b", VIDUR, "100,3,3", "105,4,4")
    rows = merge_rows([read_rows(a), read_rows(b)])
    assert rows.prompt_tokens.tolist() == [1, 3, 4, 2]
    assert rows.start_us is None and rows.span_s == 9


def test_dates_can_be_overruled(tmp_path: Path) -> None:
    a = write(tmp_path, "a", AZURE, "2023-11-16 18:00:00,1,1")
    b = write(tmp_path, "b", AZURE, "2024-05-16 18:00:00,2,2")
    assert merge_rows([read_rows(a), read_rows(b)], by_start=True).span_s == 0
    assert merge_rows([read_rows(a), read_rows(b)]).span_s > 1e7


def test_traces_that_lie_apart_are_noticed(tmp_path: Path) -> None:
    day = "2023-11-16 18:00:"
    a, b, c = (
        read_rows(write(tmp_path, name, AZURE, f"{day}{start},1,1", f"{day}{end},1,1"))
        for name, start, end in (("a", "00", "30"), ("b", "05", "06"), ("c", "31", "40"))
    )
    assert not are_apart([b, a]) and are_apart([a, b, c]) and are_apart([c, b])
