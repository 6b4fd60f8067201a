"""Table, verdict and page say what the figures say."""

import io
import json
from pathlib import Path

import msgspec
import pytest
from bench_runs import answered, make_run, make_summary, page_of, state, unanswered
from rich.console import Console

from morphserve.configs.errors import ConfigError, MorphError
from morphserve.morphcli.bench.figures import Interval, Repeats
from morphserve.morphcli.bench.record import (
    Summary,
    append_run,
    open_record,
    write_config,
    write_summary,
)
from morphserve.morphcli.bench.setup import how_measured
from morphserve.morphcli.bench.summary import Run
from morphserve.morphcli.bench.table import table_rows
from morphserve.morphcli.bench.terminal import print_table
from morphserve.morphcli.bench.verdict import verdict
from morphserve.morphcli.traces.formats import Columns, TimeUnit
from morphserve.morphcli.traces.readers import Reading
from morphserve.morphcli.traces.schedule import Burst, Shape

QUICK = [answered(i, 0.2) for i in range(5)]
SLOW = [answered(0, 0.2), *(answered(i, 3.0) for i in range(1, 4)), unanswered(4, status=503)]
CALM = [state(0, 0, 0), state(3, 0, 50)]


def morph_states() -> list:
    return [state(0, 0, 0), state(1, 4, 10), state(3, 0, 50)]


def three(full: list, static: list, morph: list) -> tuple[Summary, list[Run], str]:
    runs = [
        make_run("full", full, CALM),
        make_run("static:all", static, [state(0, 4, 0), state(3, 4, 50)]),
        make_run("morph", morph, morph_states()),
    ]
    summary, schedule = make_summary(runs)
    for policy, value in zip(summary.policies, (10.0, 11.0, 10.2), strict=True):
        policy.perplexity = value
    return summary, runs, page_of(summary, runs, schedule)


def test_a_win_is_told_with_its_price() -> None:
    found = verdict(three(SLOW, QUICK, QUICK)[0])
    assert found is not None and found.won
    assert found.sentences[0].startswith(
        "Morphing paid: 0 of 5 requests missed the target against 4"
    )
    text = " ".join(found.sentences)
    assert "50.0 % of the tokens with up to 4 INT4 layers" in text
    assert "perplexity 10.200 against 10.000 (+2.00 %)" in text
    assert "Static INT4 missed 0" in text and "worse than morph's" in text


def test_a_loss_is_called_a_loss() -> None:
    found = verdict(three([*QUICK[:4], answered(4, 3.0)], QUICK, SLOW)[0])
    assert found is not None and not found.won
    assert found.sentences[0].startswith("Morphing did not win here: 4 of 5 requests missed")


def test_a_burst_that_did_not_bind_is_no_win() -> None:
    found = verdict(three(QUICK, QUICK, QUICK)[0])
    assert found is not None and not found.won
    assert found.sentences[0].startswith("The burst did not bind")


def test_an_invalid_run_proves_nothing() -> None:
    late = [answered(i, 0.2) for i in range(5)]
    for outcome in late:
        outcome.sent_s += 1
    found = verdict(three(SLOW, QUICK, late)[0])
    assert found is not None and not found.won
    assert found.sentences[0].startswith("This run proves nothing (morph: requests left up to")


def test_no_verdict_without_both_sides() -> None:
    summary, _ = make_summary([make_run("full", QUICK, CALM)])
    assert verdict(summary) is None


def test_faults_are_told_whichever_policies_ran() -> None:
    broken = [*QUICK[:4], unanswered(4)]
    runs = [make_run("server", broken, [])]
    summary, schedule = make_summary(runs)
    found = verdict(summary)
    assert found is not None and not found.won
    sentence = "This run proves nothing (server: 1 requests failed without a whole answer)"
    assert found.sentences[0].startswith(sentence)
    assert sentence in page_of(summary, runs, schedule)


def test_nothing_is_won_without_a_swap() -> None:
    runs = [make_run("full", SLOW, CALM), make_run("morph", QUICK, CALM)]
    found = verdict(make_summary(runs)[0])
    assert found is not None and not found.won
    assert found.sentences[0].startswith("No layer was swapped")


@pytest.mark.parametrize(("missed", "won"), [(8, False), (7, True)])
def test_a_win_is_more_than_noise(missed: int, won: bool) -> None:
    def run(policy: str, misses: int, states: list) -> Run:
        slow = [answered(i, 3.0) for i in range(misses)]
        return make_run(policy, [*slow, *(answered(i, 0.2) for i in range(misses, 40))], states)

    summary, _ = make_summary([run("full", 10, CALM), run("morph", missed, morph_states())])
    found = verdict(summary)
    assert found is not None and found.won == won
    assert found.sentences[0].startswith("Morphing paid" if won else "There is no clear difference")


def with_repeats(first_token: Interval | None) -> Repeats:
    unknown = dict.fromkeys(Repeats.__struct_fields__)
    return Repeats(**unknown | {"count": 3, "ttft_p95_s": first_token})


@pytest.mark.parametrize(
    ("morph", "full", "won"),
    [
        (Interval(0.1, 0.3), None, True),  # full precision left requests unanswered
        (None, Interval(0.1, 0.3), False),
        (None, None, False),
        (Interval(0.1, 0.3), Interval(0.2, 3.0), False),
    ],
)
def test_an_unknown_interval_is_never_the_better_one(
    morph: Interval | None, full: Interval | None, won: bool
) -> None:
    summary, _ = make_summary(
        [make_run("full", SLOW, CALM), make_run("morph", QUICK, morph_states())]
    )
    for policy, between in zip(summary.policies, (full, morph), strict=True):
        policy.repeats = with_repeats(between)
    found = verdict(summary)
    assert found is not None and found.won == won
    assert "0 of 5 requests in 3 repeats missed" in found.sentences[0]


def test_intervals_stand_beside_the_figures_of_repeats() -> None:
    summary, _ = make_summary([make_run("full", QUICK, CALM)])
    summary.policies[0].repeats = with_repeats(Interval(0.9, 1.5))
    rows = {row.label: row.cells for row in table_rows(summary)}
    assert rows["95 % of requests had their first token within"] == ("200 ms [900 ms–1.5 s]",)
    assert "preemptions (work thrown away and redone), per run" in rows
    summary.policies[0].repeats = with_repeats(Interval(1.0, 1.5))
    console = Console(width=100, file=io.StringIO())
    print_table(summary, console, details=False)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "of 5 requests in 3 repeats" in shown and "200 ms [1–1.5 s]" in shown


def test_every_morph_policy_is_judged_by_name() -> None:
    runs = [
        make_run("full", SLOW, CALM),
        make_run("morph", QUICK, morph_states()),
        make_run("morph:accuracy", SLOW, morph_states()),
    ]
    found = verdict(make_summary(runs)[0])
    assert found is not None and found.won
    assert any(s.startswith("morph: Morphing paid") for s in found.sentences)
    assert any(s.startswith("morph:accuracy: There is no clear") for s in found.sentences)


def test_equal_perplexities_are_called_equal() -> None:
    summary = three(SLOW, QUICK, QUICK)[0]
    summary.policies[1].perplexity = 10.21
    found = verdict(summary)
    assert found is not None and "no measurable difference from morph's" in found.sentences[-1]


def test_a_later_swap_is_told() -> None:
    states = [*morph_states(), state(4, 2, 60), state(5, 0, 70)]
    runs = [make_run("full", SLOW, CALM), make_run("morph", QUICK, states)]
    found = verdict(make_summary(runs)[0])
    assert found is not None
    assert found.sentences[-1] == (
        "Every layer was back 1 s after the burst. It swapped again later, once."
    )


def test_no_answer_is_worse_than_a_slow_one() -> None:
    runs = [make_run("full", SLOW, CALM), make_run("morph", QUICK, morph_states())]
    rows = {row.label: row for row in table_rows(make_summary(runs)[0])}
    assert rows["95 % of requests had their first token within"].best == 1


def test_gaps_whole_answers_and_queues_have_rows_where_they_are_known() -> None:
    outcomes = [answered(i, 0.2) for i in range(4)]
    outcomes[0].event_times_s, outcomes[0].queue_s = [0.2, 0.3, 0.6], 0.05
    rows = {
        row.label: row.cells
        for row in table_rows(
            make_summary([make_run("full", outcomes, []), make_run("other", SLOW, [])])[0]
        )
    }
    assert rows["95 % of gaps between tokens were at most"] == ("300 ms", "–")
    assert rows["95 % of requests had their whole answer within"] == ("700 ms", "no answer")
    assert rows["95 % of requests were queued in the server for at most"] == ("50 ms", "–")
    assert not [row for row in table_rows(make_summary([make_run("a", SLOW, [])])[0])
                if "gaps" in row.label or "queued" in row.label]  # fmt: skip


def test_a_burst_out_of_silence_has_a_rate_and_no_factor() -> None:
    runs = [make_run("full", QUICK, CALM)]
    summary, schedule = make_summary(runs)
    summary.trace = msgspec.structs.replace(summary.trace, burst=Burst(1.0, 2.0, 0.0, 7.0))
    assert "a burst of up to 7 requests per second" in page_of(summary, runs, schedule)


def test_the_report_tells_the_scales_of_prompts_and_outputs() -> None:
    page = three(SLOW, QUICK, QUICK)[2]
    assert "prompts × 0.1, outputs × 1, seed 0" in page


def test_the_report_tells_how_the_trace_was_read_and_cut() -> None:
    summary, _ = make_summary([make_run("full", QUICK, CALM)])
    summary.settings = msgspec.structs.replace(
        summary.settings,
        shape=Shape(window_rows=(10, 20), max_prompt=1024, max_output=512),
        reading=Reading(Columns("t", "in", "out"), TimeUnit.MILLISECONDS),
    )
    told = dict(how_measured(summary))["trace"]
    assert (
        "t.csv, rows 10 to before 20, columns time=t, prompt=in, output=out, stamps in ms" in told
    )
    assert "cut to the longest allowed (prompts 1,024 tokens, outputs 512 tokens)" in told


def test_a_run_that_is_replaced_goes_whole_and_what_is_not_its_own_stays(tmp_path: Path) -> None:
    summary, runs, _ = three(SLOW, QUICK, QUICK)
    open_record(tmp_path, force=False)
    write_config(tmp_path, summary.settings)
    write_summary(tmp_path, summary)
    (tmp_path / "plots").mkdir()
    for name in ("report.html", "plots/old.svg", "plots/old.png", "server-full.log", "mine.txt"):
        (tmp_path / name).write_text("")
    open_record(tmp_path, force=True)
    assert {path.name for path in tmp_path.iterdir()} == {
        "requests.jsonl",
        "timeline.jsonl",
        "mine.txt",
    }


def test_a_finished_run_is_not_overwritten_unasked(tmp_path: Path) -> None:
    open_record(tmp_path, force=False)
    open_record(tmp_path, force=False)  # the first never finished
    write_summary(tmp_path, three(SLOW, QUICK, QUICK)[0])
    with pytest.raises(ConfigError, match="holds a run already"):
        open_record(tmp_path, force=False)
    open_record(tmp_path, force=True)
    assert not (tmp_path / "summary.json").exists()


def test_what_was_finished_of_an_interrupted_run_is_not_overwritten_unasked(
    tmp_path: Path,
) -> None:
    summary, runs, _ = three(SLOW, QUICK, QUICK)
    open_record(tmp_path, force=False)
    write_config(tmp_path, summary.settings)
    assert json.loads((tmp_path / "config.json").read_text())["settings"]["model"] == "demo"
    append_run(tmp_path, runs[0])
    with pytest.raises(ConfigError, match="what was finished of an interrupted run"):
        open_record(tmp_path, force=False)


def test_a_folder_that_cannot_be_written_to_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MorphError, match="cannot write to"):
        open_record(tmp_path / "file" / "run", force=False)


def test_rows_name_the_best_only_where_one_is_clearly_better() -> None:
    rows = {row.label: row for row in table_rows(three(SLOW, QUICK, QUICK)[0])}
    misses = rows["of 5 requests, missed the target (first token ≤ 1 s, per token ≤ 100 ms)"]
    assert misses.cells == ("4 (80.0 %)", "0 (0 %)", "0 (0 %)")
    assert misses.best is None  # two are equal
    first = rows["95 % of requests had their first token within"]
    assert first.cells == ("no answer", "200 ms", "200 ms")
    assert rows["perplexity of what was served (lower is better)"].cells[0] == "10.000"
    again = rows["all layers at full precision again after the burst"]
    assert again.cells == ("always", "no, 4 swapped", "after 1 s")
    assert rows["KV cache capacity, tokens"].cells == ("160", "288", "160–288")


def test_a_server_without_state_has_no_rows_about_memory() -> None:
    summary, schedule = make_summary([make_run("server", QUICK, [])])
    labels = [row.label for row in table_rows(summary)]
    assert not [label for label in labels if "KV" in label or "preempt" in label]
    page = page_of(summary, [make_run("server", QUICK, [])], schedule)
    assert "does not report its state" in page and ">first token<" in page


def test_the_run_folder_can_be_read_back(tmp_path: Path) -> None:
    summary, runs, _ = three(SLOW, QUICK, QUICK)
    open_record(tmp_path, force=False)
    for run in runs:
        append_run(tmp_path, run)
    write_summary(tmp_path, summary)
    written = json.loads((tmp_path / "summary.json").read_text())
    assert written["schema_version"] == 3
    assert written["policies"][0]["slo_misses"] == 4
    assert written["policies"][0]["ttft_s"]["p95"] is None
    assert written["policies"][0]["faults"] == []
    assert written["settings"]["shape"]["output_scale"] == 10.0
    assert written["settings"]["policies"] == ["full", "static:all", "morph"]
    requests = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
    assert len(requests) == 15 and requests[4]["status"] == 503
    timeline = [json.loads(line) for line in (tmp_path / "timeline.jsonl").read_text().splitlines()]
    assert [line["at_s"] for line in timeline if line["policy"] == "morph"] == [0, 1, 3]
