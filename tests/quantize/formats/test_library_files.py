"""What maintained libraries wrote is read as they read it themselves (make_fixtures.py)."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_model import write_plain_model
from torch import Tensor

from morphserve.quantize import modules
from morphserve.quantize.checkpoint import Checkpoint, open_checkpoint
from morphserve.quantize.formats.source import open_quantized
from morphserve.quantize.packing import split
from morphserve.quantize.rounding import dequantize
from morphserve.quantize.weights import LayerTensors, QuantizedWeight

DATA = Path(__file__).parent / "data"
IMPORTED = sorted(folder.name for folder in DATA.iterdir() if folder.name != "awq-mha")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Checkpoint]:
    """The model that the libraries quantised, by its number of key and value heads."""

    def get(kv_heads: int) -> Checkpoint:
        folder = tmp_path_factory.mktemp("base") / "model"
        write_plain_model(folder, kv_heads)
        return open_checkpoint(str(folder))

    return get


def expected(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DATA / name / "expected.json").read_text("utf-8"))
    return found


def digest(weight: Tensor) -> str:
    positive = (weight + 0.0).contiguous()  # a zero of either sign is the same weight
    return hashlib.sha256(positive.view(torch.uint8).numpy().tobytes()).hexdigest()


def linears(
    layer: LayerTensors[QuantizedWeight], checkpoint: Checkpoint
) -> dict[str, QuantizedWeight]:
    """The seven linears of a layer by their names."""
    sizes = {n: shape[0] for n, shape in modules.linear_shapes(checkpoint.architecture).items()}
    fused = {
        modules.QKV: layer.qkv,
        modules.OUTPUT: layer.o,
        modules.GATE_UP: layer.gate_up,
        modules.DOWN: layer.down,
    }
    return {
        name: part
        for names, weight in fused.items()
        for name, part in zip(names, split(weight, [sizes[n] for n in names]), strict=True)
    }


@pytest.mark.parametrize("name", IMPORTED)
def test_every_weight_is_the_one_the_library_dequantises(
    name: str, base: Callable[[int], Checkpoint]
) -> None:
    checkpoint = base(2)
    layer = open_quantized(str(DATA / name), checkpoint).layer(0)
    wanted = expected(name)["weights"]
    assert len(wanted) == 7
    for linear, weight in linears(layer, checkpoint).items():
        fact = wanted[f"model.layers.0.{linear}"]
        dtype = getattr(torch, fact["dtype"].removeprefix("torch."))
        assert digest(dequantize(weight).to(dtype)) == fact["sha256"], linear
