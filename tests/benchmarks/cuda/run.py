"""Measures the CUDA runtime on the GPU of this machine: one JSON, and a table per section.

    python tests/benchmarks/cuda/run.py --output cuda.json

The sections that matter most, where four minutes have to do:

    python tests/benchmarks/cuda/run.py --output cuda.json --minutes 4 \\
        --sections correct steps linears swaps burst

Nothing needs to be installed beside torch, triton, numpy, safetensors, transformers and msgspec.
Where msgspec is missing, its wheel on the path will do, unpacked as the archive that it is:

    python -m zipfile -e msgspec-*.whl site && PYTHONPATH=site python tests/benchmarks/cuda/run.py

Random weights in the shape of an 8B model, made on the device. Each section runs in a process of
its own, so that a fault of one, even an illegal access, costs only that section; what it had found
is kept. The JSON is whole after every figure, whenever this is killed, and a section's table is
printed when it ends. Sections in order of importance, with the seconds that each may take; about
six minutes are expected of all (--minutes cuts the whole short, --sections chooses):

SECTIONS

--dry-run does everything in tiny on the CPU, kernels interpreted and graphs played from tapes: it
proves the script, no more.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from figures import Figure, Figures, decode, plain, table

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[2]
SUPPORT = ROOT / "tests" / "support"
DRY_FACTOR = 10  # by which a dry run may take longer: it asks for no speed
MARK = "\x1efigure "  # in a line of a worker, before a figure


@dataclass(frozen=True, slots=True)
class Section:
    module: str  # in this folder, with a function `run`
    limit_s: float  # on a GPU


SECTIONS = {
    "environment": Section("environment", 40),
    "correct": Section("correct", 90),
    "steps": Section("steps", 110),
    "linears": Section("linears", 70),
    "swaps": Section("swaps", 60),
    "burst": Section("burst", 170),
    "attention": Section("attention", 60),
    "graphs": Section("graphs", 50),
    "yardsticks": Section("yardsticks", 90),
    "mapping": Section("mapping", 20),
}
# Compiled at once by processes of their own: sections find most of their kernels in Triton's cache.
COMPILED = ("decode_step", "prefill_step", "int4_linears", "int8_linears", "sampler")


def main() -> None:
    arguments = _arguments()
    if arguments.worker:
        return _work(arguments.worker, arguments.dry_run)
    if arguments.dry_run:
        os.environ.setdefault("TRITON_INTERPRET", "1")
    # What the compiled kernels are kept under has it in it: all processes need the same.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    record = Record(arguments.output, arguments.commit, arguments.dry_run)
    most_s = 60 * arguments.minutes * (DRY_FACTOR if arguments.dry_run else 1)
    _run_all(arguments.sections or list(SECTIONS), record, time.monotonic() + most_s)
    missed = sum(figure.holds is False for figure in record.figures)
    print(f"{len(record.figures)} figures in {record.seconds} s, {missed} gates missed")
    if arguments.dry_run:
        print("a dry run: all times are the interpreter's, and no gate means anything")


class Record:
    """The figures so far, in a file that is whole at any time."""

    def __init__(self, path: Path, commit: str, dry: bool) -> None:
        self.figures: list[Figure] = []
        self.dry = dry
        self._path, self._commit, self._started = path, commit, time.monotonic()
        self._lock = threading.Lock()

    @property
    def seconds(self) -> float:
        return round(time.monotonic() - self._started, 1)

    def add(self, figure: Figure) -> None:
        with self._lock:
            self.figures.append(figure)
            self._write()

    def _write(self) -> None:
        result = {
            "commit": self._commit,
            "seconds": self.seconds,
            "dry_run": self.dry,
            "figures": [plain(figure) for figure in self.figures],
        }
        part = self._path.with_name(self._path.name + ".part")
        part.write_text(json.dumps(result, indent=1, allow_nan=False))
        part.replace(self._path)


def _arguments() -> argparse.Namespace:
    text = "\n".join(
        f"    {name:12} {section.limit_s:4.0f} s" for name, section in SECTIONS.items()
    )
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").replace("SECTIONS", text),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=Path("cuda.json"))
    parser.add_argument("--sections", nargs="+", choices=SECTIONS)
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything; default 8")
    parser.add_argument("--commit", default="", help="what is measured, if git is not at hand")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def _run_all(names: Sequence[str], record: Record, ends_at: float) -> None:
    """Starts each worker while the one before it computes: importing takes seconds."""
    dry, started = record.dry, [_start(names[0], record.dry)]
    compilers = [] if dry else [_compile(launches) for launches in COMPILED]
    try:
        for i, name in enumerate(names):
            started += [_start(following, dry) for following in names[i + 1 : i + 2]]
            limit_s = SECTIONS[name].limit_s * (DRY_FACTOR if dry else 1)
            _run_one(name, started[i], min(limit_s, ends_at - time.monotonic()), record)
            print(table(f for f in record.figures if f.section == name), flush=True)
    finally:
        for process in [*started, *compilers]:
            if process.poll() is None:
                _end(process)


def _end(process: "subprocess.Popen[Any]") -> None:
    """It and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _compile(launches: str) -> "subprocess.Popen[bytes]":
    tool = SUPPORT / "offline_compile.py"
    command = [sys.executable, str(tool), f"cuda_launches:{launches}", "--arch", "90"]
    nothing = subprocess.DEVNULL
    return subprocess.Popen(
        command, env=_environment(), stdout=nothing, stderr=nothing, process_group=0
    )


def _environment() -> dict[str, str]:
    paths = [str(ROOT / ".src"), str(SUPPORT), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def _start(name: str, dry: bool) -> "subprocess.Popen[str]":
    command = [sys.executable, str(FOLDER / "run.py"), "--worker", name]
    return subprocess.Popen(
        command + ["--dry-run"] * dry,
        env=_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        process_group=0,
    )


def _run_one(name: str, worker: "subprocess.Popen[str]", limit_s: float, record: Record) -> None:
    """Adds what the worker tells until it ends or its time is over."""
    if limit_s < 5:
        return record.add(Figure(name, "left out", "no time was left", ""))
    says: list[str] = []
    started = time.monotonic()
    reader = threading.Thread(target=_listen, args=(worker.stdout, record, says), daemon=True)
    reader.start()
    try:
        worker.stdin.write(f"{limit_s}\n")
        worker.stdin.close()
        code = worker.wait(limit_s)
        trouble = f"exit code {code}: {' / '.join(says[:-3:-1])}" if code else ""
    except (subprocess.TimeoutExpired, OSError):
        trouble = f"stopped after {limit_s:.0f} s: {' / '.join(says[:-3:-1])}"
    _end(worker)
    reader.join(5)
    record.add(Figure(name, "took", "", time.monotonic() - started, "s"))
    if trouble:
        record.add(Figure(name, "FAILED", "", trouble[:400]))
        print("\n".join([f"{name} FAILED", *says[-12:]]), flush=True)


def _listen(lines: IO[str], record: Record, says: list[str]) -> None:
    """Others may have begun the line that holds a figure: a bar of progress, say."""
    for line in lines:
        before, mark, figure = line.partition(MARK)
        if mark:
            record.add(decode(figure))
        if before.strip():
            says.append(before.rstrip()[:200])


def _work(name: str, dry: bool) -> None:
    """In a process of its own: imports, waits for its turn, measures."""
    import importlib

    import torch
    from bench import Bench
    from sizes import EIGHT_B, TINY

    if dry:
        _interpret()
    run: Callable[[Bench], None] = importlib.import_module(SECTIONS[name].module).run
    limit_s = float(sys.stdin.readline())
    figures = Figures(name, lambda figure: print(MARK + figure.encode(), flush=True))
    torch.manual_seed(0)
    sizes = TINY if dry else EIGHT_B
    bench = Bench("cpu" if dry else "cuda", sizes, figures, time.monotonic() + limit_s)
    with torch.no_grad():
        run(bench)


def _interpret() -> None:
    import torch
    from triton_interpreter import interpret_without_gpu

    interpret_without_gpu()
    torch.set_num_threads(1)
    import emulated_codes  # noqa: F401


if __name__ == "__main__":
    main()
