"""This machine as a target: a model and its bundle as they are served here, by measured costs."""

import os
import time
from pathlib import Path

import numpy as np

from morphserve.configs.errors import ConfigError
from morphserve.configs.load import load_policy
from morphserve.configs.schema import CacheConfig, EngineConfig
from morphserve.morphcli.simulate.target import Target

HERE = "here"  # what this machine is called among devices
_COPIES, _COPY_BYTES = 64, 2**20  # together more than caches hold
_IDLE_LOOK_S = 0.02  # between two looks of an engine without work


def this_machine(model: str, bundle: Path, cache: CacheConfig) -> Target:
    """Raises ConfigError if nobody measured this machine, MorphError if a file cannot be used."""
    from morphserve.runtime.build import measured_costs
    from morphserve.runtime.sizing import outline_model

    policy = load_policy("performance")
    found = outline_model(EngineConfig(model, policy, str(bundle), device="cpu", cache=cache))
    costs = measured_costs(found)
    if costs is None:
        raise ConfigError(
            f"{bundle} holds no times that were measured on this machine: run "
            f"`morph profile {model} --bundle {bundle} --device cpu`"
        )
    return Target(
        device=found.device.name,
        model=model,
        max_position=found.architecture.max_position,
        sizes=found.sizes(cache.block_tokens),
        costs=costs,
        copy_bytes_per_s=_copy_rate(),
        copies_overlap=False,
        memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        idle_step_s=_IDLE_LOOK_S,
        ladder=found.ladder.steps,
    )


def _copy_rate() -> float:
    """Bytes per second of a copy from memory to memory; the median of a few dozen."""
    sources = [np.ones(_COPY_BYTES, np.uint8) for _ in range(_COPIES)]
    arena = np.zeros((_COPIES, _COPY_BYTES), np.uint8)
    seconds = []
    for source, home in zip(sources, arena, strict=True):
        started = time.perf_counter()
        np.copyto(home, source)
        seconds.append(time.perf_counter() - started)
    return _COPY_BYTES / sorted(seconds)[_COPIES // 2]
