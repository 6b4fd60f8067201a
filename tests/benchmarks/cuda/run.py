"""Measures the CUDA runtime on the GPU of this machine: one JSON, and one table at the end.

    python tests/benchmarks/cuda/run.py --output cuda.json

Nothing needs to be installed beside torch, triton, numpy, safetensors, transformers and msgspec.
Where msgspec is missing, its wheel on the path will do, unpacked as the archive that it is:

    python -m zipfile -e msgspec-*.whl site && PYTHONPATH=site python tests/benchmarks/cuda/run.py

Random weights in the shape of an 8B model, made on the device. Each section runs in a process of
its own, so that a fault of one, even an illegal access, costs only that section; what it had found
is kept. Sections in order of importance, with the seconds that each may take; about 8 minutes are
expected of all (--minutes cuts the whole short, --sections chooses):

SECTIONS

--dry-run does everything in tiny on the CPU, kernels interpreted and graphs played from tapes: it
proves the script, no more.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from figures import Figure, Figures, decode, table

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[2]
SUPPORT = ROOT / "tests" / "support"
DRY_FACTOR = 10  # by which a dry run may take longer: it asks for no speed
MARK = "figure "  # begins the lines of a worker that hold one


@dataclass(frozen=True, slots=True)
class Section:
    module: str  # in this folder, with a function `run`
    limit_s: float  # on a GPU


SECTIONS = {
    "environment": Section("environment", 30),
    "correct": Section("correct", 90),
    "steps": Section("steps", 90),
    "attention": Section("attention", 60),
    "linears": Section("linears", 70),
    "swaps": Section("swaps", 60),
    "graphs": Section("graphs", 50),
    "mapping": Section("mapping", 20),
    "burst": Section("burst", 200),
    "yardsticks": Section("yardsticks", 90),
}
# Compiled at once by processes of their own: sections find most of their kernels in Triton's cache.
COMPILED = ("decode_step", "prefill_step", "int4_linears", "int8_linears", "sampler")


def main() -> None:
    arguments = _arguments()
    if arguments.worker:
        return _work(arguments.worker, arguments.dry_run)
    names = arguments.sections or list(SECTIONS)
    if arguments.dry_run:
        os.environ.setdefault("TRITON_INTERPRET", "1")
    started = time.monotonic()
    most_s = 60 * arguments.minutes * (DRY_FACTOR if arguments.dry_run else 1)
    figures = _run_all(names, arguments.dry_run, started + most_s)
    result = {
        "commit": arguments.commit,
        "seconds": round(time.monotonic() - started, 1),
        "dry_run": arguments.dry_run,
        "figures": [asdict(figure) | {"holds": figure.holds} for figure in figures],
    }
    arguments.output.write_text(json.dumps(result, indent=1))
    print(table(figures))
    missed = sum(figure.holds is False for figure in figures)
    print(f"{len(figures)} figures in {result['seconds']} s, {missed} gates missed")
    if arguments.dry_run:
        print("a dry run: all times are the interpreter's, and no gate means anything")


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


def _run_all(names: Sequence[str], dry: bool, ends_at: float) -> list[Figure]:
    """Starts each worker while the one before it computes: importing takes seconds."""
    figures: list[Figure] = []
    compilers = [] if dry else [_compile(launches) for launches in COMPILED]
    waiting = _start(names[0], dry)
    for i, name in enumerate(names):
        worker, following = waiting, names[i + 1 : i + 2]
        waiting = _start(following[0], dry) if following else None
        limit_s = SECTIONS[name].limit_s * (DRY_FACTOR if dry else 1)
        limit_s = min(limit_s, ends_at - time.monotonic())
        figures += _run_one(name, worker, limit_s)
    for compiler in compilers:
        compiler.kill()
    return figures


def _compile(launches: str) -> "subprocess.Popen[bytes]":
    tool = SUPPORT / "offline_compile.py"
    command = [sys.executable, str(tool), f"cuda_launches:{launches}", "--arch", "90"]
    nothing = subprocess.DEVNULL
    return subprocess.Popen(command, env=_environment(), stdout=nothing, stderr=nothing)


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
    )


def _run_one(name: str, worker: "subprocess.Popen[str]", limit_s: float) -> list[Figure]:
    """What the worker tells until it ends or its time is over."""
    figures: list[Figure] = []
    says: list[str] = []
    if limit_s < 5:
        worker.kill()
        return [Figure(name, "left out", "no time was left", "")]
    started = time.monotonic()
    reader = threading.Thread(target=_listen, args=(worker.stdout, figures, says), daemon=True)
    reader.start()
    try:
        worker.stdin.write(f"{limit_s}\n")
        worker.stdin.close()
        code = worker.wait(limit_s)
        trouble = f"exit code {code}: {' / '.join(says[:-3:-1])}" if code else ""
    except (subprocess.TimeoutExpired, OSError):
        worker.kill()
        trouble = f"stopped after {limit_s:.0f} s: {' / '.join(says[:-3:-1])}"
    reader.join(5)
    figures.append(
        Figure(name, "took", "", time.monotonic() - started, "s", in_table=bool(trouble))
    )
    if trouble:
        figures.append(Figure(name, "FAILED", "", trouble))
        print(f"{name}: " + "\n".join(says[-40:]), file=sys.stderr)
    return figures


def _listen(lines: IO[str], figures: list[Figure], says: list[str]) -> None:
    for line in lines:
        if line.startswith(MARK):
            figures.append(decode(line.removeprefix(MARK)))
        elif line.strip():
            says.append(line.rstrip())


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
