"""What single layers cost, and the orders and ladders made of such costs."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from morphserve.profile.additive import (
    Single,
    climb,
    mixes_along,
    order_by_cost,
    replace_singly,
)
from morphserve.profile.mixes import Model, mix_of
from morphserve.profile.perplexity import measure
from morphserve.quantize.build import QuantizeSettings, build_bundle
from morphserve.quantize.bundle import open_bundle
from morphserve.quantize.checkpoint import open_checkpoint
from morphserve.quantize.manifest import Rung, Variant

FULL, INT8, INT4 = Variant.FULL, Variant.INT8, Variant.INT4


def test_single_replacements_are_measured_one_by_one_and_freed_bytes_are_those_of_files(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(tiny_model("llama-mha-bias")))
    build_bundle(checkpoint, tmp_path, QuantizeSettings("rtn", 32, int8=True))
    model = Model(checkpoint, open_bundle(str(tmp_path), checkpoint))
    tokens = torch.randint(0, 256, (2, 48), generator=torch.Generator().manual_seed(1))
    singles = replace_singly(model, tokens)
    assert set(singles) == {INT8, INT4}
    for variant in (INT8, INT4):
        for i in range(3):
            mix = mix_of([i], 3, variant)
            alone = measure(model, tokens, [mix])[mix].divergence
            assert singles[variant][i].divergence == pytest.approx(alone, rel=1e-4)
            (file,) = tmp_path.glob(f"layer-*{i}.{variant}.*")
            layer = checkpoint.layer(i)
            weights = (layer.qkv, layer.o, layer.gate_up, layer.down)
            full = sum(4 * weight.numel() for weight in weights)
            assert singles[variant][i].freed_bytes == pytest.approx(
                full - file.stat().st_size, abs=0.1 * full
            )
            assert singles[INT8][i].divergence < singles[INT4][i].divergence
            assert singles[INT8][i].freed_bytes < singles[INT4][i].freed_bytes


def test_layers_that_cost_little_per_byte_come_first() -> None:
    singles = [Single(0.2, 100), Single(0.1, 10), Single(0.3, 1000), Single(0.0, 5)]
    assert order_by_cost(singles) == [3, 2, 0, 1]


costs = st.tuples(
    st.floats(0, 1), st.integers(1, 1000), st.floats(0, 1), st.integers(1, 1000)
)  # KL at INT8, bytes freed, what INT4 adds to both


@given(st.lists(costs, min_size=1, max_size=6))
def test_each_rung_is_the_cheapest_that_can_be_taken(layers: list[tuple[float, ...]]) -> None:
    singles = {
        INT8: [Single(kl, int(freed)) for kl, freed, _, _ in layers],
        INT4: [Single(kl + more, int(freed + rest)) for kl, freed, more, rest in layers],
    }
    price = {}
    for i, (kl, freed, more, rest) in enumerate(layers):
        price[Rung(i, INT8)] = kl / freed
        price[Rung(i, INT4)] = ((kl + more) - kl) / rest
    rungs = climb(singles)
    assert sorted(rungs) == sorted(price)
    for position, rung in enumerate(rungs):
        before = rungs[:position]
        assert rung.to is INT8 or Rung(rung.layer, INT8) in before
        for other in rungs[position + 1 :]:
            if other.to is INT8 or Rung(other.layer, INT8) in before:
                assert price[rung] <= price[other]


def test_a_ladder_leads_from_full_precision_to_int4() -> None:
    rungs = [Rung(1, INT8), Rung(0, INT8), Rung(1, INT4), Rung(0, INT4)]
    assert mixes_along(rungs, 2) == [(FULL, INT8), (INT8, INT8), (INT8, INT4), (INT4, INT4)]
