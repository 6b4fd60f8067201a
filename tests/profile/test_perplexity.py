"""Perplexity and divergence of mixes of full-precision and INT4 layers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from morphserve.configs.errors import ConfigError
from morphserve.profile.mixes import Mix, Model, Run, mix_of
from morphserve.profile.perplexity import measure, perplexity
from morphserve.quantize.build import QuantizeSettings, build_bundle
from morphserve.quantize.bundle import open_bundle
from morphserve.quantize.calibration import Part, draw_windows
from morphserve.quantize.checkpoint import Checkpoint, open_checkpoint
from morphserve.quantize.manifest import Variant


@pytest.fixture
def checkpoint(tiny_model: Callable[[str], Path]) -> Checkpoint:
    return open_checkpoint(str(tiny_model("llama")))


@pytest.fixture
def model(checkpoint: Checkpoint, tiny_bundle: Callable[[str], Path]) -> Model:
    return Model(checkpoint, open_bundle(str(tiny_bundle("llama")), checkpoint))


def tokens(n: int, length: int) -> torch.Tensor:
    return torch.randint(0, 256, (n, length), generator=torch.Generator().manual_seed(3))


def int4(*layers: int) -> Mix:
    return mix_of(layers, 3)


@torch.inference_mode()
def test_the_demo_models_perplexity_is_that_of_transformers_and_int4_costs_little(
    tmp_path: Path,
) -> None:
    from transformers import AutoModelForCausalLM

    checkpoint = open_checkpoint("demo")
    build_bundle(checkpoint, tmp_path, QuantizeSettings("rtn", 64))
    bundle = open_bundle(str(tmp_path), checkpoint)
    windows = draw_windows(checkpoint, None, Part.CALIBRATION, 4, 256)
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32)
    loss = theirs(windows.tokens, labels=windows.tokens).loss
    full = perplexity(checkpoint, None, [], windows.tokens)
    assert full == pytest.approx(float(loss.exp()), rel=1e-4)
    int4 = perplexity(checkpoint, bundle, range(12), windows.tokens)
    assert int4 == pytest.approx(full, rel=0.03)
    assert int4 != full


def test_quality_of_mixes_does_not_depend_on_their_company_or_on_batches(model: Model) -> None:
    windows = tokens(24, 100)  # two batches
    mixes = [int4(), int4(2), int4(0, 2), int4(1), int4(0)]
    together = measure(model, windows, mixes)
    for mix in mixes:
        alone = measure(model, windows, [mix])[mix]
        assert together[mix].perplexity == pytest.approx(alone.perplexity, rel=1e-6)
        assert together[mix].divergence == pytest.approx(alone.divergence, rel=1e-4, abs=1e-9)
    halves = [
        measure(model, part, mixes)[mixes[2]].divergence for part in torch.split(windows, [14, 10])
    ]
    expected = (14 * halves[0] + 10 * halves[1]) / 24
    assert together[mixes[2]].divergence == pytest.approx(expected, rel=1e-4)


def test_full_precision_diverges_from_itself_by_nothing(model: Model) -> None:
    full, some = int4(), int4(1)
    quality = measure(model, tokens(2, 64), [full, some])
    assert quality[full].divergence == 0
    assert quality[some].divergence > 1e-4


@torch.inference_mode()
def test_a_run_that_changes_equals_one_that_starts_so(model: Model) -> None:
    windows = tokens(2, 48)
    run = Run(model, windows)
    for mix in (int4(1), int4(0, 1), int4(0, 1, 2), int4(2), int4()):
        run.change(mix)
        fresh = Run(model, windows)
        fresh.change(mix)
        torch.testing.assert_close(run.logits(), fresh.logits())
    trial = run.behind_with(1, Variant.INT4)
    torch.testing.assert_close(run.entering(3), Run(model, windows).entering(3))
    run.change(int4(1))
    torch.testing.assert_close(run.entering(3), trial)


def test_int4_layers_need_a_bundle(checkpoint: Checkpoint) -> None:
    with pytest.raises(ConfigError, match="need a bundle"):
        perplexity(checkpoint, None, [0], tokens(1, 16))


def test_layers_that_do_not_fit_in_float32_are_converted_at_each_use(
    checkpoint: Checkpoint, tiny_bundle: Callable[[str], Path]
) -> None:
    bundle = open_bundle(str(tiny_bundle("llama")), checkpoint)
    windows, mixes = tokens(2, 32), [int4(), int4(0), int4(1, 2)]
    layer = Model(checkpoint, bundle).weights(0, Variant.FULL)
    size = 4 * sum(w.numel() for w in (layer.qkv, layer.o, layer.gate_up, layer.down))
    kept = []
    for bound in (0, 3 * size, 6 * size):
        model = Model(checkpoint, bundle, float32_bytes=bound)
        assert measure(model, windows, mixes) == measure(Model(checkpoint, bundle), windows, mixes)
        pairs = [(i, variant) for i in range(3) for variant in (Variant.FULL, Variant.INT4)]
        kept.append(sum(model.weights(*pair) is model.weights(*pair) for pair in pairs))
    assert kept == [0, 3, 6]


@torch.inference_mode()
def test_compact_logits_have_the_lengths_and_angles_of_the_logits(model: Model) -> None:
    x = torch.randn((2, 5, 64), generator=torch.Generator().manual_seed(4))
    compact, logits = model.compact_logits(x).double(), model.logits(x).double()
    assert compact.shape[-1] < logits.shape[-1]
    for a, b in ((0, 0), (0, 1)):
        torch.testing.assert_close(
            torch.linalg.vecdot(compact[a], compact[b]),
            torch.linalg.vecdot(logits[a], logits[b]),
            rtol=1e-5,
            atol=1e-3,
        )
