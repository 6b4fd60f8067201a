"""The run folder: settings, environment and figures, for people and scripts."""

import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import msgspec

from morphserve.morphcli.bench.schedule import Burst, Schedule
from morphserve.morphcli.bench.summary import PolicySummary, Run, Slo

SCHEMA_VERSION = 1


class Settings(msgspec.Struct, frozen=True):
    """What was asked for; None: not given."""

    trace: str
    window_s: tuple[float, float] | None
    rate_scale: float
    time_scale: float
    length_scale: float
    max_prompt: int | None
    max_output: int | None
    seed: int
    model: str
    bundle: str | None
    memory_budget: str | None
    max_model_len: int | None
    url: str | None
    policies: tuple[str, ...]  # in the order of the runs
    slo: Slo
    timeout_s: float


class Environment(msgspec.Struct, frozen=True):
    morphserve: str
    commit: str | None  # of the source tree, if it is one
    python: str
    torch: str
    platform: str
    cpu: str
    cores: int  # usable by this process


class TraceFacts(msgspec.Struct, frozen=True):
    """What the schedule offered."""

    requests: int
    duration_s: float
    prompt_tokens: int
    output_tokens: int
    clipped_prompts: int
    clipped_outputs: int
    prompts_as_token_ids: int
    skipped_rows: str  # a sentence; empty without any
    burst: Burst | None


class Summary(msgspec.Struct):
    """`summary.json`."""

    settings: Settings
    environment: Environment
    trace: TraceFacts
    policies: list[PolicySummary]
    perplexities: dict[int, float]  # by the number of INT4 layers, in the bundle's order
    same_text_as_first: dict[str, float]  # share of equal greedy answers, by policy
    created: str
    schema_version: int = SCHEMA_VERSION


def trace_facts(
    schedule: Schedule, prompts_as_token_ids: int, skipped_rows: str, burst: Burst | None
) -> TraceFacts:
    """What `schedule` offers."""
    return TraceFacts(
        requests=len(schedule.arrivals),
        duration_s=schedule.duration_s,
        prompt_tokens=sum(a.prompt_tokens for a in schedule.arrivals),
        output_tokens=sum(a.output_tokens for a in schedule.arrivals),
        clipped_prompts=schedule.clipped_prompts,
        clipped_outputs=schedule.clipped_outputs,
        prompts_as_token_ids=prompts_as_token_ids,
        skipped_rows=skipped_rows,
        burst=burst,
    )


def now() -> str:
    """The time as in `2026-01-31 12:00 UTC`."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


def environment() -> Environment:
    """Of this process."""
    return Environment(
        morphserve=version("morphserve"),
        commit=_commit(),
        python=platform.python_version(),
        torch=version("torch"),
        platform=platform.platform(terse=True),
        cpu=_cpu(),
        cores=len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1,
    )


def _commit() -> str | None:
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def write_record(folder: Path, summary: Summary, runs: Sequence[Run]) -> None:
    """`summary.json`, `requests.jsonl` and `timeline.jsonl` in `folder`.

    Lines of the two lists start with the policy; `at_s` counts from the start of the schedule.
    """
    summary_json = msgspec.json.format(msgspec.json.encode(summary), indent=2)
    (folder / "summary.json").write_bytes(summary_json + b"\n")
    requests = ({"policy": r.policy} | msgspec.to_builtins(o) for r in runs for o in r.outcomes)
    _write_lines(folder / "requests.jsonl", requests)
    states = (
        {"policy": r.policy, "at_s": round(r.at_s(s), 3)} | msgspec.to_builtins(s)
        for r in runs
        for s in r.states
    )
    _write_lines(folder / "timeline.jsonl", states)


def _write_lines(path: Path, rows: Iterable[object]) -> None:
    with path.open("wb") as file:
        file.writelines(msgspec.json.encode(row) + b"\n" for row in rows)
