"""Positions of different precision share one cache, as in a server that swaps between tokens."""

from collections.abc import Callable
from inspect import signature
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from morphserve.configs.errors import ConfigError
from morphserve.profile.mixes import Model, mix_of
from morphserve.profile.perplexity import measure
from morphserve.profile.positions import SCHEDULES, study_positions
from morphserve.quantize.bundle import open_bundle
from morphserve.quantize.calibration import Windows
from morphserve.quantize.checkpoint import Checkpoint, open_checkpoint
from morphserve.quantize.manifest import TextSample, Variant

LENGTH = 40


@pytest.fixture
def checkpoint(tiny_model: Callable[[str], Path]) -> Checkpoint:
    return open_checkpoint(str(tiny_model("llama")))


@pytest.fixture
def model(checkpoint: Checkpoint, tiny_bundle: Callable[[str], Path]) -> Model:
    return Model(checkpoint, open_bundle(str(tiny_bundle("llama")), checkpoint))


def windows(n: int, length: int) -> Windows:
    tokens = torch.randint(0, 256, (n, length), generator=torch.Generator().manual_seed(2))
    return Windows(TextSample("random", "", n, length, 2), tokens)


def transformers_model(checkpoint: Checkpoint, model: Model, variant: Variant) -> torch.nn.Module:
    """transformers' model with the weights that a variant stands for."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32)
    for i, layer in enumerate(theirs.model.layers):
        ours = model.weights(i, variant)
        attention, mlp = layer.self_attn, layer.mlp
        q, k, v = ours.qkv.split(
            [p.out_features for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
        )
        gate, up = ours.gate_up.chunk(2)
        for linear, weight in (
            *((attention.q_proj, q), (attention.k_proj, k), (attention.v_proj, v)),
            *((attention.o_proj, ours.o), (mlp.down_proj, ours.down)),
            *((mlp.gate_proj, gate), (mlp.up_proj, up)),
        ):  # fmt: skip
            linear.weight.data = weight
    return theirs


@torch.no_grad()
@pytest.mark.parametrize(
    ("number", "length", "starts"),
    [
        (2, 40, [0, 5, 10, 15, 20, 25, 30, 35]),
        (60, 43, [0, 6, 11, 17, 22, 27, 33, 38]),  # two batches
    ],
)
def test_every_schedule_is_that_of_two_models_that_hand_one_cache_over(
    checkpoint: Checkpoint, model: Model, number: int, length: int, starts: list[int]
) -> None:
    full = transformers_model(checkpoint, model, Variant.FULL)
    int4 = transformers_model(checkpoint, model, Variant.INT4)
    text = windows(number, length)
    sizes = [end - start for start, end in pairwise([*starts, length])]
    # transformers 5.24 renamed it.
    parameter = "cache" if "cache" in signature(full.forward).parameters else "past_key_values"

    def log_probabilities(parts: str) -> Tensor:
        cache, pieces = DynamicCache(config=full.config), []
        for precision, tokens in zip(parts, text.tokens.split(sizes, dim=1), strict=True):
            forward = int4 if precision == "q" else full
            pieces.append(forward(tokens, **{parameter: cache}).logits)
        return torch.cat(pieces, dim=1).log_softmax(dim=-1)[:, :-1]

    reference = log_probabilities("ffffffff")
    study = study_positions(model, text)
    assert [schedule.name for schedule in study.schedules] == list(SCHEDULES)
    for schedule in study.schedules:
        theirs = log_probabilities(SCHEDULES[schedule.name])
        divergence = (reference.exp() * (reference - theirs)).sum(dim=-1).mean(dim=0)
        pieces = divergence.split([*sizes[:-1], sizes[-1] - 1])
        expected = [float(piece.mean()) for piece in pieces]
        assert schedule.divergence == pytest.approx(expected, rel=2e-3, abs=1e-6)
        mean = float(divergence.mean())
        assert schedule.mean_divergence == pytest.approx(mean, rel=2e-3, abs=1e-6)
        surprise = -theirs.gather(-1, text.tokens[:, 1:, None])
        assert schedule.perplexity == pytest.approx(float(surprise.mean().exp()), rel=1e-4)


def test_int4_costs_nothing_before_it_begins_and_lingers_after_it_ends(model: Model) -> None:
    found = {s.name: s.divergence for s in study_positions(model, windows(2, LENGTH)).schedules}
    assert all(cost == pytest.approx(0, abs=1e-6) for cost in found["nowhere"])
    late, early = found["second half"], found["first half"]
    assert late[:4] == pytest.approx([0] * 4, abs=1e-6)
    assert all(cost > 1e-4 for cost in late[4:])
    assert all(cost > 1e-4 for cost in early)


def test_int4_everywhere_costs_what_all_layers_at_int4_do(model: Model) -> None:
    text = windows(3, 43)
    everywhere = study_positions(model, text).schedules[-1]
    mix = mix_of(range(model.num_layers), model.num_layers)
    quality = measure(model, text.tokens, [mix])[mix]
    assert everywhere.mean_divergence == pytest.approx(quality.divergence, rel=1e-4)
    assert everywhere.perplexity == pytest.approx(quality.perplexity, rel=1e-5)


def test_windows_too_short_for_parts_are_refused(model: Model) -> None:
    with pytest.raises(ConfigError, match="raise --length to at least 9"):
        study_positions(model, windows(1, 8))
