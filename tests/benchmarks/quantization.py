"""Quality of every way to quantise the demo model, and how much calibration text it wants.

    python tests/benchmarks/quantization.py [--json FILE] [--threads N]

All layers are replaced at once. Calibration and evaluation share no text. KL is from full
precision in nats per token; output error is the mean over layers of the norm of the change of a
layer's output over the norm of what the layer adds, on the calibration text; seconds are those of
the whole build.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from morphserve.profile.mixes import Model, mix_of
from morphserve.profile.perplexity import measure
from morphserve.quantize.build import QuantizeSettings, build_bundle
from morphserve.quantize.bundle import open_bundle
from morphserve.quantize.calibration import Part, draw_windows
from morphserve.quantize.checkpoint import open_checkpoint
from morphserve.quantize.manifest import Variant

CHECKPOINT = open_checkpoint("demo")
EVALUATION = draw_windows(CHECKPOINT, None, Part.EVALUATION, samples=32, length=256).tokens
DEFAULT_TEXT = (64, 256)  # windows, tokens in each
TEXTS = ((8, 256), (16, 256), (32, 256), (128, 256), (230, 256))


@dataclass(frozen=True, slots=True)
class Row:
    method: str
    bits: int
    group_size: int  # 0: one scale per row
    symmetric: bool
    samples: int
    length: int
    perplexity: float
    divergence: float
    output_error: float
    bytes_share: float  # of the full-precision layers'
    build_s: float


def rows(settings: QuantizeSettings, samples: int, length: int) -> Iterator[Row]:
    """One for each variant of the bundle."""
    windows = draw_windows(CHECKPOINT, None, Part.CALIBRATION, samples, length)
    num_layers = CHECKPOINT.architecture.num_layers
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        build_bundle(CHECKPOINT, Path(folder) / "bundle", settings, windows)
        build_s = time.perf_counter() - started
        bundle = open_bundle(f"{folder}/bundle", CHECKPOINT)
        model = Model(CHECKPOINT, bundle)
        for variant, files in bundle.manifest.variants.items():
            mix = mix_of(range(num_layers), num_layers, variant)
            quality = measure(model, EVALUATION, [mix])[mix]
            how = files.quantization
            yield Row(
                method=f"{how.method}, in order" if is_plain(settings, variant) else how.method,
                bits=how.bits,
                group_size=how.group_size,
                symmetric=how.symmetric,
                samples=samples,
                length=length,
                perplexity=quality.perplexity,
                divergence=quality.divergence,
                output_error=sum(file.output_error or 0 for file in files.layers) / num_layers,
                bytes_share=sum(file.num_bytes for file in files.layers)
                / sum(CHECKPOINT.layer_bytes(i) for i in range(num_layers)),
                build_s=build_s,
            )


def is_plain(settings: QuantizeSettings, variant: Variant) -> bool:
    return variant is Variant.INT4 and settings.method == "gptq" and not settings.act_order


def every_method() -> Iterator[Row]:
    samples, length = DEFAULT_TEXT
    yield from rows(QuantizeSettings("rtn", 32, int8=True), samples, length)
    for group_size in (32, 64, 128):
        for symmetric in (True, False):
            for method in ("rtn", "awq", "gptq"):
                if (method, group_size, symmetric) != ("rtn", 32, True):
                    yield from rows(
                        QuantizeSettings(method, group_size, symmetric), samples, length
                    )
    for group_size in (64, 128):
        yield from rows(QuantizeSettings("gptq", group_size, act_order=False), samples, length)


def every_text() -> Iterator[Row]:
    for samples, length in TEXTS:
        yield from rows(QuantizeSettings("gptq", 64), samples, length)


def table(title: str, results: list[Row]) -> Table:
    view = Table(title=title)
    for heading in ("method", "bits", "group", "zero", "text", "of full bytes"):
        view.add_column(heading)
    for heading in ("perplexity", "KL", "output error", "seconds"):
        view.add_column(heading, justify="right")
    for row in sorted(results, key=lambda row: (-row.bits, row.group_size, not row.symmetric)):
        view.add_row(
            row.method,
            str(row.bits),
            str(row.group_size or "row"),
            "symmetric" if row.symmetric else "own",
            f"{row.samples} x {row.length}",
            f"{row.bytes_share:.1%}",
            f"{row.perplexity:.3f}",
            f"{row.divergence:.5f}",
            f"{row.output_error:.4f}",
            f"{row.build_s:.1f}",
        )
    return view


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    full = mix_of((), CHECKPOINT.architecture.num_layers)
    perplexity = measure(Model(CHECKPOINT, None), EVALUATION, [full])[full].perplexity
    with Progress(console=Console(stderr=True)) as progress:
        methods = list(progress.track(every_method(), description="methods"))
        texts = list(progress.track(every_text(), description="calibration text"))
    console = Console(width=120)
    console.print(f"{args.threads} threads; full precision: perplexity {perplexity:.3f}")
    console.print(table("every method, all layers replaced", methods))
    console.print(table("GPTQ by calibration text", texts))
    if args.json:
        results = {
            "perplexity": perplexity,
            "methods": [asdict(row) for row in methods],
            "texts": [asdict(row) for row in texts],
        }
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
