"""The dense forward pass computes what transformers computes."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from morphserve.quantize import dense
from morphserve.quantize.bundle import open_bundle
from morphserve.quantize.checkpoint import Checkpoint, open_checkpoint
from morphserve.quantize.rounding import dequantize


def dense_logits(checkpoint: Checkpoint, tokens: Tensor) -> Tensor:
    arch = checkpoint.architecture
    static = checkpoint.static()
    cos_sin = dense.rotation(arch, tokens.shape[1])
    x = dense.embed(static, tokens)
    for i in range(arch.num_layers):
        x = dense.decoder_layer(x, dense.to_float32(checkpoint.layer(i)), arch, cos_sin)
    return dense.logits(x, static, arch)


@torch.inference_mode()
def test_logits_are_those_of_transformers(family: str, tiny_model: Callable[[str], Path]) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_model(family)
    tokens = torch.randint(0, 256, (2, 100), generator=torch.Generator().manual_seed(1))
    expected = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
    assert expected.std() > 0.5  # or the tolerance would mean nothing
    actual = dense_logits(open_checkpoint(str(folder)), tokens)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_an_int4_layer_stands_for_its_dequantised_weights(
    family: str, tiny_model: Callable[[str], Path], tiny_bundle: Callable[[str], Path]
) -> None:
    checkpoint = open_checkpoint(str(tiny_model(family)))
    int4 = open_bundle(str(tiny_bundle(family)), checkpoint).layer(1)
    full = checkpoint.layer(1)
    layer = dense.quantized_to_float32(int4)
    assert torch.equal(layer.gate_up, dequantize(int4.gate_up))
    assert layer.qkv.shape == full.qkv.shape
    assert 0.01 < (layer.qkv - full.qkv).norm() / full.qkv.norm() < 0.12
    assert torch.equal(layer.norms.post_attention, full.norms.post_attention)
    for ours, theirs in ((layer.biases.qkv, full.biases.qkv), (layer.norms.q, full.norms.q)):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert torch.equal(ours, theirs)
