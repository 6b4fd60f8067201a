"""Prompts with right answers, from a file to the grades of a whole benchmark."""

import json
from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from fake_server import fake_server
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from morphserve.configs.schema import Slo
from morphserve.morphcli.bench.prompts import load_tokenizer
from morphserve.morphcli.bench.references import (
    BadReferences,
    Reference,
    load_references,
    longest_prompt,
    pair_references,
)
from morphserve.morphcli.bench.request import BenchRequest
from morphserve.morphcli.bench.run import run_bench
from morphserve.morphcli.bench.scores import f1
from morphserve.morphcli.traces.arrivals import Arrival
from morphserve.morphcli.traces.schedule import Schedule, Shape

DEMO = Path(__file__).parents[3] / "morphcli" / "demo_model"
FACTS = Path(__file__).with_name("facts.jsonl")


def written(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return path


def schedule_of(count: int) -> Schedule:
    return Schedule(tuple(Arrival(float(i), 7, 9) for i in range(count)), float(count))


def test_rows_as_longbench_has_them_become_questions_and_texts_to_summarise() -> None:
    facts = load_references(FACTS)
    assert len(facts) == 12
    assert facts[2] == Reference(
        "A spider has eight legs, an insect six.\n\n"
        "Question: How many legs does an insect have?\nAnswer:",
        ("six", "6"),
    )
    assert facts[8].prompt.endswith("there is money for both.\n\nSummary:")


def test_a_prompt_that_is_given_is_sent_as_it_is(tmp_path: Path) -> None:
    row = {"prompt": " 2 + 2 =", "context": "unused", "answers": "4"}
    bare = {"input": "Who?", "answers": ["me", ""]}
    path = written(tmp_path / "r.jsonl", row, "", bare)
    assert load_references(path) == [Reference(" 2 + 2 =", ("4",)), Reference("Who?", ("me", ""))]


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ("{", "line 2: .*; a row has answers, a list of texts, and a prompt"),
        ({"prompt": "a"}, "line 2: .*missing required field `answers`"),
        ({"prompt": "a", "answers": [1]}, "line 2: .*answers"),
        ({"prompt": "a", "answers": []}, "line 2 has no answers"),
        ({"prompt": " ", "answers": ["a"]}, "line 2 has no prompt, context nor input"),
        ({"answers": ["a"]}, "line 2 has no prompt, context nor input"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(tmp_path: Path, row: Any, what: str) -> None:
    good = {"prompt": "a", "answers": ["b"]}
    with pytest.raises(BadReferences, match=what):
        load_references(written(tmp_path / "r.jsonl", good, row))


def test_no_file_and_no_rows_are_said_so(tmp_path: Path) -> None:
    with pytest.raises(BadReferences, match="cannot read references from .*No such file"):
        load_references(tmp_path / "none.jsonl")
    with pytest.raises(BadReferences, match="holds no references: write one JSON object per line"):
        load_references(written(tmp_path / "empty.jsonl", ""))


@given(st.binary(max_size=60))
def test_any_file_is_read_or_refused_in_one_sentence(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(data)
    with pytest.raises(BadReferences):
        load_references(path)


def test_every_row_is_taken_before_one_is_taken_again() -> None:
    tokenizer, facts = load_tokenizer(DEMO), load_references(FACTS)
    wanted, prompts, schedule = pair_references(facts, tokenizer, schedule_of(30), 0, None)
    assert prompts.prompts == tuple(reference.prompt for reference in wanted)
    assert sorted(Counter(reference.prompt for reference in wanted).values()) == [2] * 6 + [3] * 6
    for prompt, arrival, before in zip(
        prompts.prompts, schedule.arrivals, schedule_of(30).arrivals, strict=True
    ):
        assert arrival.prompt_tokens == len(tokenizer.encode(prompt).ids)
        assert (arrival.time_s, arrival.output_tokens) == (before.time_s, before.output_tokens)
    again, _, _ = pair_references(facts, tokenizer, schedule_of(30), 0, None)
    other, _, _ = pair_references(facts, tokenizer, schedule_of(30), 1, None)
    assert again == wanted != other


def test_a_long_prompt_loses_its_middle() -> None:
    tokenizer, facts = load_tokenizer(DEMO), load_references(FACTS)
    _, prompts, schedule = pair_references(facts[:1], tokenizer, schedule_of(2), 0, 11)
    ids = tokenizer.encode(facts[0].prompt).ids
    assert prompts.prompts == (ids[:6] + ids[-5:],) * 2
    assert [arrival.prompt_tokens for arrival in schedule.arrivals] == [11, 11]
    assert (schedule.clipped_prompts, prompts.num_token_ids) == (2, 2)


@pytest.mark.parametrize(
    ("max_prompt", "max_model_len", "expected"),
    [(None, None, None), (50, None, 50), (None, 100, 91), (50, 100, 50), (95, 100, 91), (9, 5, 1)],
)
def test_prompts_leave_room_for_the_longest_output(
    max_prompt: int | None, max_model_len: int | None, expected: int | None
) -> None:
    assert longest_prompt(schedule_of(3), max_prompt, max_model_len) == expected  # 9 of output


def test_a_benchmark_with_references_grades_answers_of_any_length(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    rows = [f"2023-11-16 18:15:46.{i}00,{5 + i},{3 + i}" for i in range(4)]
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]))
    facts: list[dict[str, Any]] = [
        {"prompt": f"plain {i}", "answers": ["ab" * (3 + i)]} for i in range(4)
    ]
    with fake_server() as (url, server), (tmp_path / "out").open("w") as out:
        request = BenchRequest(
            "demo",
            trace,
            Shape(),
            ("server",),
            Slo(60.0, 60.0),
            tmp_path / "run",
            url=url,
            references=written(tmp_path / "facts.jsonl", *facts),
        )
        server.stop_after = 4
        summary = run_bench(request, Console(file=out))
    (policy,) = summary.policies
    assert policy.faults == []  # answers may end before the longest length
    bodies = server.bodies[-4:]  # after the warm-up
    assert sorted(body["prompt"] for body in bodies) == [fact["prompt"] for fact in facts]
    assert not any("ignore_eos" in body for body in bodies)
    # The server answers "ab" as often as it makes tokens.
    expected = [
        f1("ab" * min(body["max_tokens"], 4), facts[int(body["prompt"].split()[1])]["answers"])
        for body in bodies
    ]
    assert policy.answers is not None and policy.answers.f1 == fmean(expected)
    assert summary.settings.references == str(tmp_path / "facts.jsonl")
