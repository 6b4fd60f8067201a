"""The error of our GPTQ beside that of maintained libraries, on the same layers and text.

    python tests/benchmarks/yardstick/compare.py --library-python PYTHON [--json]

PYTHON is the interpreter of an environment that has GPTQModel or llm-compressor, which do not fit
into one environment with each other or with MorphServe; give the option once for each. Everything
is INT4 and symmetric. Every side gets the same checkpoint and tokens, and transformers alone
measures: the error of a linear is |X (Q - W)^T| / |X W^T|, Frobenius norms, where X is what the
full-precision model feeds it; of a layer, rounded alone, how much its output changes over how much
it adds. Exits with 1 where our mean error is over 2 % above the libraries' best.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from cases import TEXTS, Case, demo_case, wide_case
from measuring import Result, evaluate
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor

from morphserve.quantize import dense, modules
from morphserve.quantize.checkpoint import open_checkpoint
from morphserve.quantize.dense import Linear
from morphserve.quantize.gptq import quantize_gptq, quantize_layer_gptq
from morphserve.quantize.moments import Calibration
from morphserve.quantize.rounding import Grid, dequantize, quantize_rtn

SIDES = {"gptqmodel": "gptqmodel_side.py", "llmcompressor": "llmcompressor_side.py"}
RTN, SOLVER = "MorphServe RTN", "MorphServe GPTQ, linears apart"
OURS = "MorphServe GPTQ"  # linears of a layer one after the other
NAMES: dict[Linear, tuple[str, ...]] = {
    "qkv": modules.QKV,
    "o": modules.OUTPUT,
    "gate_up": modules.GATE_UP,
    "down": modules.DOWN,
}
TOLERANCE = 1.02


def our_weights(case: Case) -> dict[str, dict[str, Tensor]]:
    checkpoint = open_checkpoint(str(case.checkpoint))
    arch = checkpoint.architecture
    grid = Grid(4, case.group_size)
    calibration = Calibration(checkpoint.static(), arch, case.calibration)
    rounded: dict[str, dict[str, Tensor]] = {RTN: {}, SOLVER: {}, OURS: {}}
    for i in range(arch.num_layers):
        layer = dense.to_float32(checkpoint.layer(i))
        calibration.enter(layer)
        moments = calibration.moments()
        chained = quantize_layer_gptq(layer, calibration.inputs(), grid)
        for linear, names in NAMES.items():
            weight = getattr(layer, linear)
            quantized = {
                RTN: quantize_rtn(weight, grid),
                SOLVER: quantize_gptq(weight, moments[linear], grid),
                OURS: getattr(chained, linear),
            }
            sizes = [modules.linear_shapes(arch)[name][0] for name in names]
            paths = [modules.layer_prefix(i) + name for name in names]
            for candidate, fused in quantized.items():
                parts = dequantize(fused).split(sizes)
                rounded[candidate] |= dict(zip(paths, parts, strict=True))
    return rounded


def library_weights(case: Case, python: str) -> dict[str, dict[str, Tensor]]:
    """What each library of that interpreter makes of the case, by library and setting."""
    with tempfile.TemporaryDirectory() as folder:
        windows = Path(folder) / "windows"
        save_file({"tokens": case.calibration.contiguous()}, windows)
        packages = find_packages(python)
        for package in packages:
            (Path(folder) / package).mkdir()
            script = Path(__file__).parent / SIDES[package]
            whole = ["--whole"] if case.has_text else []
            run(python, str(script), *map(str, (case.checkpoint, windows, case.group_size)),
                str(Path(folder) / package), *whole)  # fmt: skip
        return {
            f"{package} {file.stem}": {
                name.removesuffix(".weight"): tensor for name, tensor in load_file(file).items()
            }
            for package in packages
            for file in sorted((Path(folder) / package).glob("*.safetensors"))
        }


def find_packages(python: str) -> list[str]:
    look = "import importlib.util as u, sys; print(*(p for p in sys.argv[1:] if u.find_spec(p)))"
    packages = run(python, "-c", look, *SIDES).split()
    if not packages:
        sys.exit(f"{python} has none of {', '.join(SIDES)}: install one into its environment")
    return packages


def run(*command: str) -> str:
    with tempfile.TemporaryDirectory() as folder:  # libraries leave logs where they are started
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{command[1]} failed:\n{done.stderr[-4000:]}")
    return done.stdout


def table(results: Mapping[str, dict[str, Result]]) -> Table:
    columns = (*(f"linears, {text}" for text in TEXTS), "layers, held-out", "KL", "perplexity")
    view = Table("INT4, symmetric; mean error of outputs", *columns)
    for case, by_name in results.items():
        view.add_row(f"[bold]{case}[/bold]")
        for name, result in by_name.items():
            errors = [f"{mean(of):.2%}" for of in measures(result).values()]
            view.add_row(f"  {name}", *errors, *losses(result))
        view.add_section()
    return view


def measures(result: Result) -> dict[str, dict[str, float]]:
    """Errors by what was measured, then by name."""
    linears = {f"linears on {text} text": of for text, of in result.linears.items()}
    return {**linears, "layers on held-out text": result.layers}


def mean(errors: Mapping[str, float]) -> float:
    return statistics.fmean(errors.values())


def losses(result: Result) -> tuple[str, ...]:
    if result.divergence is None or result.perplexity is None:
        return ()
    return f"{result.divergence:.5f}", f"{result.perplexity:.4f}"


def verdict(case: str, results: Mapping[str, Result]) -> tuple[str, bool]:
    """Our errors against the best setting's, in words, and whether they are near enough."""
    words, near = [f"{case}, ours against the best of the libraries:"], True
    rivals = [name for name in results if name not in (RTN, SOLVER, OURS)]
    for what in measures(results[OURS]):
        errors = {name: measures(result)[what] for name, result in results.items()}
        ours = errors[SOLVER if what.startswith("linears") else OURS]
        best = min(rivals, key=lambda name: mean(errors[name]))
        ratio = mean(ours) / mean(errors[best])
        worst = max(ours[x] / errors[best][x] for x in ours)
        near = near and ratio <= TOLERANCE
        words.append(f"{what} {ratio - 1:+.1%} (worst of them {worst - 1:+.1%}) to {best}")
    return "\n  ".join(words), near


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--library-python", action="append", required=True, metavar="PYTHON")
    parser.add_argument("--json", action="store_true", help="every linear's errors as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, dict[str, Result]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for case in (demo_case(64), demo_case(128), wide_case(Path(folder))):
            candidates = our_weights(case)
            for python in args.library_python:
                candidates |= library_weights(case, python)
            results[case.name] = evaluate(case, candidates)
    verdicts = [verdict(case, by_name) for case, by_name in results.items()]
    if args.json:
        print(
            json.dumps({case: {n: asdict(r) for n, r in x.items()} for case, x in results.items()})
        )
    else:
        console = Console(width=130)
        console.print(table(results))
        for line, _ in verdicts:
            console.print(line)
    sys.exit(0 if all(near for _, near in verdicts) else 1)


if __name__ == "__main__":
    main()
