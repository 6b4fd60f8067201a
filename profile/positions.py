"""INT4 early against INT4 late in a request: the question of the paper's Table 1.

Each position of a window has its own precision in every layer. Its keys and values stay in the
cache as they were written, and later positions read them, whatever their own precision is.
"""

import math

import msgspec
import torch
from torch import Tensor
from torch.nn import functional as F

from morphserve.configs.errors import ConfigError
from morphserve.profile.mixes import Model, batches, num_batches
from morphserve.profile.perplexity import Reference, surprises
from morphserve.profile.ranking import OnProgress, steps_of
from morphserve.quantize import dense
from morphserve.quantize.calibration import Windows
from morphserve.quantize.manifest import TextSample, Variant

PARTS = 8  # of a window, that a schedule tells the precision of
SCHEDULES = {  # where a request is computed by INT4 layers: q
    "nowhere": "ffffffff",
    "first half": "qqqqffff",
    "second half": "ffffqqqq",
    "middle": "ffqqqqff",
    "both ends": "qqffffqq",
    "odd eighths": "qfqfqfqf",
    "even eighths": "fqfqfqfq",
    "everywhere": "qqqqqqqq",
}


class Schedule(msgspec.Struct, frozen=True):
    """What INT4 in some parts of a request costs."""

    name: str
    int4: list[bool]  # of each part
    divergence: list[float]  # of each part: KL from full precision, nats per token
    mean_divergence: float  # over all tokens; parts may differ by one token
    perplexity: float  # over all tokens


class Positions(msgspec.Struct, frozen=True):
    text: TextSample
    schedules: list[Schedule]


def study_positions(
    model: Model, windows: Windows, on_progress: OnProgress = lambda phase, done, total: None
) -> Positions:
    """Cost of every schedule; `INT4` means that all layers are."""
    tokens = windows.tokens
    length = tokens.shape[1]
    if length <= PARTS:
        raise ConfigError(
            f"windows of {length} tokens have no {PARTS} parts: raise --length to at least "
            f"{PARTS + 1}"
        )
    total = len(SCHEDULES) * num_batches(tokens)
    step = steps_of("placing INT4 early and late", total, on_progress)
    sums = {name: torch.zeros(2, PARTS, dtype=torch.double) for name in SCHEDULES}
    with torch.inference_mode():
        for batch in batches(tokens):
            full = Reference(_logits(model, batch, _where("f" * PARTS, length))[:, :-1])
            for name, parts in SCHEDULES.items():
                mixed = F.log_softmax(_logits(model, batch, _where(parts, length))[:, :-1], dim=-1)
                costs = torch.stack((full.divergences(mixed), surprises(mixed, batch)))
                sums[name] += _by_part(costs.double().sum(dim=1))
                step()
    counts = _by_part(torch.ones(1, length - 1, dtype=torch.double))[0] * len(tokens)
    return Positions(
        windows.sample,
        [
            Schedule(
                name=name,
                int4=[part == "q" for part in parts],
                divergence=(sums[name][0] / counts).tolist(),
                mean_divergence=float(sums[name][0].sum() / counts.sum()),
                perplexity=math.exp(float(sums[name][1].sum() / counts.sum())),
            )
            for name, parts in SCHEDULES.items()
        ],
    )


def _where(parts: str, length: int) -> Tensor:
    """Bool [length]: which positions are INT4."""
    int4 = torch.tensor([part == "q" for part in parts])
    return int4[torch.arange(length) * PARTS // length]


def _by_part(values: Tensor) -> Tensor:
    """[n, length - 1] values of positions, all but the last, to sums [n, PARTS]."""
    length = values.shape[1] + 1
    part = torch.arange(length - 1) * PARTS // length
    return torch.zeros(len(values), PARTS, dtype=values.dtype).index_add_(1, part, values)


def _logits(model: Model, tokens: Tensor, int4: Tensor) -> Tensor:
    """[n, length, vocab], positions where `int4` is true computed with INT4 layers."""
    x = model.embed(tokens)
    for i in range(model.num_layers):
        x = _layer(model, x, i, int4.unsqueeze(-1))
    return model.logits(x)


def _layer(model: Model, x: Tensor, i: int, int4: Tensor) -> Tensor:
    """[n, length, hidden] through both variants of layer `i`; `int4` [length, 1] picks rows."""
    arch = model.architecture
    full, quantized = model.weights(i, Variant.FULL), model.weights(i, Variant.INT4)
    cos_sin = dense.rotation(arch, x.shape[1])
    pairs = zip(
        dense.project(x, quantized, arch, cos_sin),
        dense.project(x, full, arch, cos_sin),
        strict=True,
    )
    attended = dense.attend(*(torch.where(int4, a, b) for a, b in pairs))
    return torch.where(
        int4,
        dense.finish(x, attended, quantized, arch),
        dense.finish(x, attended, full, arch),
    )
