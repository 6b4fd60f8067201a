"""The run folder: settings, environment and figures, for people and scripts."""

import contextlib
import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import msgspec

from morphserve.configs.errors import ConfigError, MorphError
from morphserve.configs.schema import Slo
from morphserve.configs.version import version
from morphserve.morphcli.bench.figures import PolicySummary
from morphserve.morphcli.bench.summary import Run
from morphserve.morphcli.traces.readers import Reading
from morphserve.morphcli.traces.schedule import Burst, Schedule, Shape
from morphserve.quantize.manifest import Variant

SCHEMA_VERSION = 3
SUMMARY = "summary.json"
REPORT, PLOTS = "report.html", "plots"
_REQUESTS, _TIMELINE, _CONFIG = "requests.jsonl", "timeline.jsonl", "config.json"


class Simulated(msgspec.Struct, frozen=True):
    """What stood in for servers."""

    device: str
    replicas: int
    router: str
    slowdown: float  # of steps
    constants: dict[str, str]  # of the device, with their sources


class Settings(msgspec.Struct, frozen=True):
    """What was asked for; None: not given."""

    trace: str
    shape: Shape
    prompts: str | None  # file; None: the model folder's held-out text
    model: str
    bundle: str | None
    memory_budget: str | None
    max_model_len: int | None
    url: str | None
    policies: tuple[str, ...]  # in the order of the table
    slo: Slo
    timeout_s: float
    repeat: int = 1  # runs of each policy
    rates: tuple[float, ...] = (1.0,)  # loads of a sweep, over that of the shape
    device: str = "auto"  # of the servers that were started
    references: str | None = None  # file of prompts with answers
    simulated: Simulated | None = None  # None: servers were measured
    reading: Reading = Reading()  # of the trace, beyond what its header tells


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


class MixPerplexity(msgspec.Struct, frozen=True):
    """What a mix of layers costs."""

    layers: list[Variant]
    perplexity: float
    kl: float | None = None  # nats per token from full precision

    def __str__(self) -> str:
        counts = ((self.layers.count(v), v.value.upper()) for v in (Variant.INT8, Variant.INT4))
        return " + ".join(f"{count} {name}" for count, name in counts if count) or "full precision"


class LoadPoint(msgspec.Struct, frozen=True):
    """One policy at one load of a sweep. None: the request at that rank was never answered."""

    policy: str
    rate: float  # over the schedule's
    offered_per_s: float
    attainment: float  # share of offered requests within the target
    goodput_per_s: float
    output_tokens_per_s: float
    ttft_p95_s: float | None
    tpot_p95_s: float | None
    repeats: int = 1
    faults: list[str] = []  # reasons for which it proves nothing


class Summary(msgspec.Struct):
    """`summary.json`."""

    settings: Settings
    environment: Environment
    trace: TraceFacts
    policies: list[PolicySummary]
    perplexities: list[MixPerplexity]  # of each mix of layers that was served, best first
    created: str
    runs: list[PolicySummary] = []  # each repeat alone, in the order in which they ran
    curve: list[LoadPoint] = []  # of a sweep over load
    served_by: list[str] = []  # devices and kernels that servers computed with, as they tell
    notes: list[str] = []  # sentences that a reader of the timelines must know
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
        morphserve=version(),
        commit=_commit(),
        python=platform.python_version(),
        torch=metadata.version("torch"),
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


def open_record(folder: Path, *, force: bool) -> None:
    """Make `folder` ready for the lines of a run.

    A run that `force` replaces goes whole. Raises ConfigError if there is one, or what was
    finished of one that was interrupted, and not `force`, MorphError if it cannot be written to.
    """
    summary, requests = folder / SUMMARY, folder / _REQUESTS
    if not force and (summary.exists() or (requests.exists() and requests.stat().st_size)):
        what = "a run already" if summary.exists() else "what was finished of an interrupted run"
        raise ConfigError(
            f"{folder} holds {what}: choose another --output, or replace it with --force"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if summary.exists() or requests.exists():
            _remove_run(folder)
        for name in (_REQUESTS, _TIMELINE):
            (folder / name).write_bytes(b"")
    except OSError as error:
        raise MorphError(f"cannot write to {folder}: {error.strerror}") from error


def _remove_run(folder: Path) -> None:
    """What a run wrote there, and nothing else."""
    plots = folder / PLOTS
    written = [folder / name for name in (SUMMARY, _CONFIG, REPORT)]
    for path in (
        *written,
        *folder.glob("server-*.log"),
        *plots.glob("*.svg"),
        *plots.glob("*.png"),
    ):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # it is not there, or holds what is someone else's
        plots.rmdir()


def write_config(folder: Path, settings: Settings) -> None:
    """`config.json` in `folder`: what is about to be run, and on what."""
    config = {"settings": settings, "environment": environment(), "started": now()}
    _write_json(folder / _CONFIG, config)


def append_run(folder: Path, run: Run) -> None:
    """Add the lines of `run` to `requests.jsonl` and `timeline.jsonl` in `folder`.

    Lines start with the policy; `at_s` counts from the start of the schedule.
    """
    about = {"policy": run.policy, "repeat": run.repeat, "rate": run.rate}
    requests = (about | msgspec.to_builtins(o) for o in run.outcomes)
    _append_lines(folder / _REQUESTS, requests)
    states = (about | {"at_s": round(run.at_s(s), 3)} | msgspec.to_builtins(s) for s in run.states)
    _append_lines(folder / _TIMELINE, states)


def write_summary(folder: Path, summary: Summary) -> None:
    """`summary.json` in `folder`."""
    _write_json(folder / SUMMARY, summary)


def _write_json(path: Path, value: object) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")


def _append_lines(path: Path, rows: Iterable[object]) -> None:
    with path.open("ab") as file:
        file.writelines(msgspec.json.encode(row) + b"\n" for row in rows)
