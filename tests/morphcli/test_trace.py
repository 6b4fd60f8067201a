"""`morph trace`: what it prints, writes and refuses, and that each command names the next."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from morphserve.configs.errors import ConfigError, MorphError
from morphserve.morphcli.app import app
from morphserve.morphcli.traces.arrivals import TraceError
from morphserve.morphcli.traces.readers import read_rows

ROOT = Path(__file__).parents[2]
FILES = Path(__file__).parent / "traces" / "files"
SHIPPED = ROOT / "morphcli" / "bench" / "azure2023_burst.csv"
PLAIN_MAP = ("--map", "time=sent_ms,prompt=in,output=out")


def morph(*words: str | Path) -> Result:
    return invoke("trace", *words)


def bench(*words: str | Path) -> Result:
    return invoke("bench", "demo", "--compare", "full", *words)


def invoke(*words: str | Path) -> Result:
    result = CliRunner().invoke(app, [*map(str, words)], env={"COLUMNS": "100"})
    if isinstance(result.exception, MorphError):
        raise result.exception
    return result


def test_describe_tells_figures_bad_rows_and_the_next_command() -> None:
    result = morph("describe", FILES / "burstgpt1.csv")
    assert result.exit_code == 0
    assert "(BurstGPT)" in result.stdout and "5 (2: the request failed; 1: " in result.stdout
    assert result.stdout.splitlines()[-1].startswith("try: morph bench MODEL --trace ")
    assert result.stderr.startswith("warning: skipped 5 of 10 rows of ")


def test_describe_has_its_figures_as_json_too() -> None:
    found = json.loads(morph("describe", SHIPPED, "--json").stdout)
    assert (found["requests"], found["bad_rows"]) == (869, 0)
    assert found["format"] == "Azure LLM inference"
    assert found["seconds"]["max_requests"] == 72


def test_describe_leads_to_a_window_that_the_trace_has() -> None:
    last = morph("describe", SHIPPED).stdout.splitlines()[-1]
    assert last == f"find its burst: morph trace window {SHIPPED} --seconds 31"


def test_next_commands_keep_what_reading_takes() -> None:
    told = morph("describe", FILES / "plain.csv", *PLAIN_MAP, "--time-unit", "ms").stdout
    assert f"--trace {FILES / 'plain.csv'} {' '.join(PLAIN_MAP)} --time-unit ms" in told


OF_GPT4 = ("--spread", "0.5", "--where", "Model=GPT-4", "--seed", "3")


def test_what_bench_cannot_read_is_first_written(tmp_path: Path) -> None:
    file = FILES / "burstgpt1.csv"
    told = morph("describe", file, *OF_GPT4).stdout.splitlines()[-1]
    options = " ".join(OF_GPT4)
    assert told.endswith(
        f"write the rows first: morph trace merge {file} {options} --output part.csv"
    )
    part = tmp_path / "part.csv"
    morph("merge", file, *OF_GPT4, "--output", part)
    assert len(read_rows(part)) == 2


def test_a_window_of_some_rows_is_first_written(tmp_path: Path) -> None:
    file, part = tmp_path / "models.csv", tmp_path / "part.csv"
    calm, burst = range(0, 60, 2), (20 + i / 10 for i in range(100))
    lines = (f"{at},5,5,{model}" for at in (*calm, *burst) for model in "ab")
    file.write_text("t,p,o,model\n" + "\n".join(lines), "utf-8")
    reading = ("--map", "time=t,prompt=p,output=o", "--where", "model=a")
    options = ("--seconds", "30", "--densest")
    told = morph("describe", file, *reading).stdout.splitlines()[-1]
    assert told == f"find its burst: morph trace window {file} {' '.join(reading)} --seconds 29"
    told = morph("window", file, *reading, *options).stdout.splitlines()[-1]
    command = f"window {file} {' '.join(reading)} {' '.join(options)} --output part.csv"
    assert told.endswith(f"write the rows first: morph trace {command}")
    words = told.partition("morph trace ")[2].split()
    morph(*words[:-1], part)
    assert read_rows(part).left_out == 0 and len(read_rows(part)) > 100


def test_a_seed_is_kept_as_bench_has_it_too() -> None:
    told = morph("describe", FILES / "burstgpt1.csv", "--seed", "3").stdout
    assert told.endswith(f"--trace {FILES / 'burstgpt1.csv'} --seed 3\n")


def test_window_lists_windows_and_how_to_replay_the_best() -> None:
    result = morph("window", SHIPPED, "--seconds", "40")
    assert result.exit_code == 0 and "█" in result.stdout
    best = json.loads(morph("window", SHIPPED, "--seconds", "40", "--json").stdout)[0]
    window = f"t:{best['start_s']}-{best['end_s']}"
    last = result.stdout.splitlines()[-1]
    assert last == f"try: morph bench MODEL --trace {SHIPPED} --window {window}"


def test_window_writes_the_slice_with_whose_data_it_is(tmp_path: Path) -> None:
    path = tmp_path / "slice.csv"
    result = morph("window", SHIPPED, "--seconds", "30", "--densest", "-o", path)
    assert f"wrote {path}: " in result.stdout and result.stdout.endswith(f"--trace {path}\n")
    text = path.read_text("utf-8")
    assert "CC-BY-4.0" in text and "\nTIMESTAMP,ContextTokens,GeneratedTokens\n" in text
    part, whole = read_rows(path), read_rows(SHIPPED)
    assert part.span_s < 30 and not part.bad_rows
    assert part.start_us is not None and whole.start_us is not None
    first = (part.start_us - whole.start_us) == whole.time_us
    assert part.prompt_tokens[0] in whole.prompt_tokens[first]


def test_a_file_that_is_there_is_replaced_only_by_force(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    make = ("synth", "poisson", "--rate", "5", "--seconds", "30", "-o", path)
    morph(*make)
    with pytest.raises(ConfigError, match="is there already: give --force"):
        morph(*make)
    assert morph(*make, "--force").exit_code == 0


@pytest.mark.parametrize("kind", ["poisson", "gamma", "onoff", "nbinom"])
def test_synth_writes_what_describe_reads(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "made.csv"
    told = morph("synth", kind, "--like", SHIPPED, "-o", path).stdout
    assert told.endswith(f"try: morph trace describe {path}\n")
    found = json.loads(morph("describe", path, "--json").stdout)
    assert found["bad_rows"] == 0 and found["rate"] == pytest.approx(869 / 62, rel=0.35)
    assert read_rows(path).comments == (
        f"# Made by morph trace synth {kind} like {SHIPPED.name}, seed 0.",
    )


def test_merge_lays_traces_together_and_rewrites_a_single_one(tmp_path: Path) -> None:
    path = tmp_path / "merged.csv"
    files = FILES / "azure2023.csv", FILES / "azure2024.csv"
    told = morph("merge", *files, "--by-start", "-o", path).stdout
    assert "7 requests over 6.9 s, merged by their starts, try: morph bench" in told
    apart = morph("merge", *files, "-o", path, "--force")
    assert "lie apart in time: --by-start joins them" in apart.stderr
    morph("merge", FILES / "plain.csv", *PLAIN_MAP, "-o", path, "--force")
    assert read_rows(path).format == "Azure LLM inference" and len(read_rows(path)) == 3


def test_a_pick_beyond_the_list_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match="--pick 9: there are"):
        morph("window", SHIPPED, "--seconds", "40", "--pick", "9")


def test_variables_of_nested_commands_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MORPH_BY_STARTS", "1")
    assert "did you mean MORPH_BY_START?" in morph("describe", SHIPPED).stderr


def test_bench_reads_by_the_same_options() -> None:
    with pytest.raises(TraceError, match="has no sent: its header holds id, sent_ms, in, out"):
        bench("--trace", FILES / "plain.csv", "--map", "time=sent,prompt=in,output=out")
    with pytest.raises(TraceError, match="is left in the window idx:3-9 "):
        bench("--trace", FILES / "plain.csv", *PLAIN_MAP, "--window", "idx:3-9")
