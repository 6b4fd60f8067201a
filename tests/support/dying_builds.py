"""Builds in child processes that are killed, again and again, until one ends.

A child is forked from a process that has torch loaded, so that it starts within milliseconds:
`dying_builds.py MODEL TARGET at-random|at-every-step SEED` prints how many children died, and
where the target stood after each death.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from morphserve.quantize.build import QuantizeSettings, build_bundle
from morphserve.quantize.checkpoint import open_checkpoint

KILLS = 10


def start(model: str, target: Path, prepare: Callable[[], None]) -> int:
    """A child that builds over whatever is there, going on where the last one stopped."""
    child = os.fork()
    if child:
        return child
    try:
        prepare()
        settings = QuantizeSettings("rtn", 32, int8=True)
        build_bundle(open_checkpoint(model), target, settings, force=True, resume=True)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        os._exit(1)
    os._exit(0)


def state(target: Path) -> str:
    """A digest of what lies at the target; `between` if the bundles are changing places."""
    if not target.exists():
        return "between" if target.with_name(f".{target.name}.replaced").exists() else "nothing"
    digest = hashlib.sha256()
    for path in sorted(target.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def ended(child: int, ways: list[int]) -> bool:
    """Whether it came to its end; otherwise it must have died in one of these ways."""
    _, status = os.waitpid(child, 0)
    if status and status not in ways:
        raise SystemExit(f"a child failed with {status}")
    return status == 0


def kill_at_random(model: str, target: Path, seed: int) -> list[str]:
    """Builds, each killed after a random part of the time that a build takes.

    Until ten of them left an unfinished build for the next one.
    """
    delays = random.Random(seed)
    took_s = _undisturbed_s(model, target.with_name("undisturbed"))
    states: list[str] = []
    num_unfinished = 0
    while num_unfinished < KILLS:
        child = start(model, target, lambda: None)
        time.sleep(delays.uniform(0, took_s))
        os.kill(child, signal.SIGKILL)
        if not ended(child, [signal.SIGKILL]):
            states.append(state(target))
            num_unfinished += target.with_name(f".{target.name}.partial").exists()
    return states


def _undisturbed_s(model: str, target: Path) -> float:
    start_s = time.monotonic()
    assert ended(start(model, target, lambda: None), [])
    shutil.rmtree(target)
    return time.monotonic() - start_s


def die_at_every_step(model: str, target: Path) -> list[str]:
    """Builds of which the n-th dies before its n-th change of the disk, until one needs fewer."""
    states: list[str] = []
    while True:
        child = start(model, target, partial(_die_at, len(states)))
        if ended(child, [9 << 8]):
            return states
        states.append(state(target))
        _discard(target.with_name(f".{target.name}.partial"))


def _discard(folder: Path) -> None:
    """Every build does all steps anew, unless it died while it took its place."""
    if not folder.with_name(folder.name.removesuffix("partial") + "replaced").exists():
        shutil.rmtree(folder, ignore_errors=True)


def _die_at(step: int) -> None:
    count = iter(range(1_000_000))

    def dying(change: Callable[..., object]) -> Callable[..., object]:
        def wrapper(*args: object, **kwargs: object) -> object:
            if next(count) == step:
                os._exit(9)
            return change(*args, **kwargs)

        return wrapper

    for owner, name in (
        (os, "fsync"),
        (Path, "rename"),
        (Path, "replace"),
        (Path, "unlink"),
        (Path, "mkdir"),
        (shutil, "rmtree"),
    ):
        setattr(owner, name, dying(getattr(owner, name)))


def main() -> None:
    model, target, kind, seed = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    torch.set_num_threads(1)
    if kind == "at-random":
        states = kill_at_random(model, target, seed)
    else:
        states = die_at_every_step(model, target)
    assert ended(start(model, target, lambda: None), [])
    print(json.dumps({"deaths": states, "end": state(target)}))


if __name__ == "__main__":
    main()
