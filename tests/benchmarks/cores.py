"""What the distance between two cores does to a step: medians of both, of looks in turns.

    python tests/benchmarks/cores.py [--seconds N]

Where a hypervisor moves cores about, or cores share no cache, a line takes several times as long
from one to the other. The demo model, all layers at INT4, twelve requests, two threads.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from engine import config, run_batch
from rich.console import Console
from rich.table import Table

from morphserve.quantize.build import QuantizeSettings, build_bundle
from morphserve.quantize.checkpoint import open_checkpoint
from morphserve.runtime.build import build_engine
from morphserve.runtime.kernels.native import find_compiler

SOURCE = Path(__file__).with_name("cores.c")
REQUESTS = 12
FAR_NS = 200.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    end = time.monotonic() + parser.parse_args().seconds
    looks: list[tuple[float, float]] = []  # nanoseconds of a line, seconds of a step
    with tempfile.TemporaryDirectory() as folder:
        program, bundle = Path(folder, "cores"), Path(folder, "demo.morph")
        subprocess.run([find_compiler(), "-O2", "-pthread", SOURCE, "-o", program], check=True)
        build_bundle(open_checkpoint("demo"), bundle, QuantizeSettings("rtn", 64))
        engine = build_engine(config(bundle, "static:all", threads=2))
        run_batch(engine, REQUESTS)  # touches all memory
        while time.monotonic() < end:
            line = subprocess.run([program], capture_output=True, text=True, check=True).stdout
            _, step_s = run_batch(engine, REQUESTS)
            looks.append((float(line), step_s))
            time.sleep(1.0)
    table = Table("cores", "looks", "a line there and back, ns", "decode step, ms")
    near, far = ([look for look in looks if (look[0] > FAR_NS) is far] for far in (False, True))
    for name, found in (("near", near), ("far", far)):
        if found:
            line_ns, step_s = map(statistics.median, zip(*found, strict=True))
            table.add_row(name, str(len(found)), f"{line_ns:.0f}", f"{step_s * 1e3:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
