"""What a dry run says of the disk is exact; of memory and time it is as the work is."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from morphserve.quantize.build import QuantizeSettings, build_bundle, plan_variants
from morphserve.quantize.calibration import Windows
from morphserve.quantize.checkpoint import Checkpoint, open_checkpoint
from morphserve.quantize.estimate import Estimate, estimate
from morphserve.quantize.manifest import TextSample, Variant


def some_text(num_windows: int = 2) -> Windows:
    tokens = torch.randint(256, (num_windows, 32), generator=torch.Generator().manual_seed(0))
    return Windows(TextSample("random", "00", num_windows, 32, 0), tokens)


def forecast(
    checkpoint: Checkpoint, settings: QuantizeSettings, windows: Windows | None
) -> Estimate:
    return estimate(checkpoint, plan_variants(settings, windows, None))


def written(folder: Path) -> dict[Variant, int]:
    return {
        variant: total
        for variant in (Variant.INT4, Variant.INT8)
        if (total := sum(path.stat().st_size for path in folder.glob(f"layer-*.{variant}.*")))
    }


@pytest.mark.parametrize(
    "settings",
    [
        QuantizeSettings("rtn", 32, int8=True),
        QuantizeSettings("rtn", 64, symmetric=False),
        QuantizeSettings("gptq", 32),
        QuantizeSettings("awq", 32, int8=True),
    ],
    ids=str,
)
def test_the_disk_a_build_takes_is_known_to_the_byte(
    settings: QuantizeSettings, family: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(tiny_model(family)))
    windows = None if settings.method == "rtn" else some_text()
    found = forecast(checkpoint, settings, windows)
    assert list(tmp_path.iterdir()) == []
    build_bundle(checkpoint, tmp_path / "tiny.morph", settings, windows)
    assert found.file_bytes == written(tmp_path / "tiny.morph")


def test_the_disk_of_the_demo_model_is_known_to_the_byte(tmp_path: Path) -> None:
    checkpoint = open_checkpoint("demo")
    settings = QuantizeSettings("rtn", 64)
    found = forecast(checkpoint, settings, None)
    build_bundle(checkpoint, tmp_path / "demo.morph", settings)
    assert found.file_bytes == written(tmp_path / "demo.morph")


def test_memory_holds_the_program_a_layer_and_the_text() -> None:
    checkpoint = open_checkpoint("demo")
    settings = QuantizeSettings("gptq", 64)
    little = forecast(checkpoint, settings, some_text(2))
    much = forecast(checkpoint, settings, some_text(2002))
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    layer = 4 * checkpoint.layer_bytes(0)  # bfloat16 in float32, full precision and variant
    assert little.memory_bytes > 0.9 * resident + layer
    states = 2000 * 32 * checkpoint.architecture.hidden_size * 4
    assert states < much.memory_bytes - little.memory_bytes < 20 * states
    assert 0 < little.seconds < much.seconds


def test_a_model_of_more_layers_takes_longer_but_no_more_memory() -> None:
    checkpoint = open_checkpoint("demo")
    settings = QuantizeSettings("rtn", 64)
    short = forecast(checkpoint, settings, None)
    deep = Checkpoint(
        checkpoint.path,
        replace(checkpoint.architecture, num_layers=12_000),
        checkpoint._entries,
    )
    long = forecast(deep, settings, None)
    assert long.seconds > short.seconds
    assert long.file_bytes[Variant.INT4] == 1000 * short.file_bytes[Variant.INT4]
    assert long.memory_bytes - short.memory_bytes < 1000 * checkpoint.layer_bytes(0)
