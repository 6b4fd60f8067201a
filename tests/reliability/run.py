"""What breaks servers, tried on `morph serve demo`: a table of rules, exit code 1 if one breaks.

    python tests/reliability/run.py [--only NAME ...] [--seconds N] [--streams N]

Takes some ten minutes; everything stays on this machine. Times mean something on a quiet one.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # of everything that is started from here

import argparse
import sys
import tempfile
from pathlib import Path

from crowds import crowds, fairness
from faults import busy_neighbour, few_descriptors, little_memory, removed_bundle, stalled, watchers
from harness import Given, Rules
from inputs import bad_inputs
from overload import bursts, overload
from processes import blocked_loop, killed_engine, stopped

ALL = {
    "overload": overload,
    "bursts": bursts,
    "crowds": crowds,
    "fairness": fairness,
    "killed": killed_engine,
    "stopped": stopped,
    "blocked": blocked_loop,
    "stalled": stalled,
    "descriptors": few_descriptors,
    "bundle": removed_bundle,
    "memory": little_memory,
    "neighbour": busy_neighbour,
    "watchers": watchers,
    "input": bad_inputs,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="*", choices=list(ALL), default=list(ALL))
    parser.add_argument("--seconds", type=float, default=8.0, help="of each load")
    parser.add_argument("--streams", type=int, default=1000, help="at once")
    arguments = parser.parse_args()
    rules = Rules()
    with tempfile.TemporaryDirectory() as folder:
        given = Given(Path(folder), arguments.seconds, arguments.streams)
        for name in arguments.only:
            print(f"{name}: {(ALL[name].__doc__ or '').strip()}", flush=True)
            ALL[name](rules, given)
    return rules.show()


if __name__ == "__main__":
    sys.exit(main())
