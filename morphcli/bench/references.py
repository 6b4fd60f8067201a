"""Prompts with reference answers: rows of a JSONL file, given to the requests of a trace."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
from tokenizers import Tokenizer

from morphserve.configs.errors import MorphError
from morphserve.morphcli.bench.prompts import Prompts
from morphserve.morphcli.traces.schedule import Schedule


class BadReferences(MorphError):
    """A file of references cannot be used; the message names the line and what it lacks."""


@dataclass(frozen=True, slots=True)
class Reference:
    """What a request asks, and what would be right to answer."""

    prompt: str
    answers: tuple[str, ...]  # any of them


class _Row(msgspec.Struct):
    """A prompt as it is, or a context and what is asked of it, as rows of LongBench have them.

    Other fields, as length, dataset, language and all_classes, are not needed.
    """

    answers: list[str] | str
    prompt: str | None = None
    context: str = ""
    input: str = ""


_decode_row = msgspec.json.Decoder(_Row).decode


def load_references(path: Path) -> list[Reference]:
    """The rows of `path`, in their order. Raises BadReferences."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise BadReferences(f"cannot read references from {path}: {error.strerror}") from error
    found = [_reference(path, n, line) for n, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise BadReferences(f"{path} holds no references: write one JSON object per line")
    return found


def _reference(path: Path, number: int, line: bytes) -> Reference:
    try:
        row = _decode_row(line)
    except msgspec.MsgspecError as error:
        raise BadReferences(
            f"{path}, line {number}: {error}; a row has answers, a list of texts, and a prompt, or "
            "a context and an input"
        ) from error
    answers = [row.answers] if isinstance(row.answers, str) else row.answers
    prompt = _prompt(row) if row.prompt is None else row.prompt
    for name, given in ("prompt, context nor input", prompt), ("answers", "".join(answers)):
        if not given.strip():
            raise BadReferences(f"{path}, line {number} has no {name}")
    return Reference(prompt, tuple(answers))


def _prompt(row: _Row) -> str:
    """A question of a context, or a context to be summarised where nothing is asked."""
    if not row.context:
        return row.input
    return (
        f"{row.context}\n\nQuestion: {row.input}\nAnswer:"
        if row.input
        else (f"{row.context}\n\nSummary:")
    )


def longest_prompt(
    schedule: Schedule, max_prompt: int | None, max_model_len: int | None
) -> int | None:
    """Tokens of a prompt that a request of `schedule` may have; None: as many as it likes."""
    if max_model_len is None:
        return max_prompt
    longest_output = max(arrival.output_tokens for arrival in schedule.arrivals)
    beside_output = max(1, max_model_len - longest_output)
    return beside_output if max_prompt is None else min(max_prompt, beside_output)


def pair_references(
    references: Sequence[Reference],
    tokenizer: Tokenizer,
    schedule: Schedule,
    seed: int,
    max_prompt: int | None,
) -> tuple[list[Reference], Prompts, Schedule]:
    """A reference for each arrival, its prompt, and the schedule with the lengths of these prompts.

    Every row is taken before one is taken again. Of a prompt with more than `max_prompt` tokens the
    middle is cut out: it begins with what it is about and ends with what is asked.
    """
    order = list(range(len(references)))
    random.Random(seed).shuffle(order)
    fitted = [_fit(tokenizer, reference.prompt, max_prompt) for reference in references]
    chosen = [order[i % len(order)] for i in range(len(schedule.arrivals))]
    arrivals = tuple(
        replace(arrival, prompt_tokens=fitted[row][1])
        for arrival, row in zip(schedule.arrivals, chosen, strict=True)
    )
    prompts = Prompts(tuple(fitted[row][0] for row in chosen), _shortest(fitted), tokenizer)
    cut = sum(isinstance(fitted[row][0], list) for row in chosen)
    fitted_schedule = replace(schedule, arrivals=arrivals, clipped_prompts=cut)
    return [references[row] for row in chosen], prompts, fitted_schedule


def _shortest(fitted: Sequence[tuple[str | list[int], int]]) -> str | list[int]:
    prompt, _ = min(fitted, key=lambda entry: entry[1])
    return prompt


def _fit(tokenizer: Tokenizer, prompt: str, most: int | None) -> tuple[str | list[int], int]:
    """The prompt and its number of tokens; as token ids if it had to be cut."""
    ids: list[int] = tokenizer.encode(prompt).ids
    if most is None or len(ids) <= most:
        return prompt, len(ids)
    head = (most + 1) // 2
    return ids[:head] + ids[len(ids) - (most - head) :], most
