"""The reference against torch's own attention and against hand-made pages."""

import pytest
import torch
import torch.nn.functional as F
from kernel_batches import random_weight

from morphserve.runtime.kernels import AttentionShape, BatchMeta, Kernels, QKNorm
from morphserve.runtime.kernels.reference import ReferenceKernels, dequantise, split_pages

SHAPE = AttentionShape(num_heads=4, num_kv_heads=2, head_dim=8, block_tokens=4, norm_eps=1e-6)
KERNELS: Kernels = ReferenceKernels()


def _meta(length: int, pages: list[int]) -> BatchMeta:
    """A prefill of one sequence of `length` tokens into `pages`."""
    positions = torch.arange(length, dtype=torch.int32)
    table = torch.tensor(pages, dtype=torch.int32)
    return BatchMeta(
        positions=positions,
        token_page=table[(positions // SHAPE.block_tokens).long()],
        token_slot=positions % SHAPE.block_tokens,
        query_start=torch.tensor([0, length], dtype=torch.int32),
        context_len=torch.tensor([length], dtype=torch.int32),
        block_table=table[None],
    )


def test_prefill_over_scattered_pages_equals_dense_causal_attention() -> None:
    torch.manual_seed(0)
    length, pages = 10, [5, 1, 3]
    qkv = torch.randn(length, (4 + 2 * 2) * 8)
    no_turn = torch.cat([torch.ones(length, 4), torch.zeros(length, 4)], dim=1)
    cache = torch.full((6, 2 * 2 * 8 * 4), torch.nan)
    meta = _meta(length, pages)
    q = KERNELS.rope_write_kv(qkv, cache, meta, SHAPE, no_turn, None)
    out = KERNELS.attention(q, cache, meta, SHAPE)
    dense_q, dense_k, dense_v = qkv.view(length, 8, 8).transpose(0, 1).split([4, 2, 2])
    wanted = F.scaled_dot_product_attention(
        dense_q, dense_k.repeat_interleave(2, 0), dense_v.repeat_interleave(2, 0), is_causal=True
    )
    torch.testing.assert_close(out, wanted.transpose(0, 1).reshape(length, -1))


def test_rotation_turns_each_pair_by_its_angle() -> None:
    torch.manual_seed(1)
    qkv = torch.randn(3, 64)
    angle = torch.rand(3, 4)
    cache = torch.zeros(1, 2 * 2 * 8 * 4)
    cos_sin = torch.cat([angle.cos(), angle.sin()], dim=1)
    q = KERNELS.rope_write_kv(qkv, cache, _meta(3, [0]), SHAPE, cos_sin, None)
    pairs = torch.complex(*qkv.view(3, 8, 8).chunk(2, dim=-1)) * torch.polar(
        torch.ones(3, 1, 4), angle[:, None]
    )
    turned = torch.cat([pairs.real, pairs.imag], dim=-1)
    torch.testing.assert_close(q, turned[:, :4])
    k_pages, v_pages = split_pages(cache, SHAPE)
    torch.testing.assert_close(k_pages[0, :, :, :3].permute(2, 0, 1), turned[:, 4:6])
    torch.testing.assert_close(v_pages[0, :, :3].transpose(0, 1), qkv.view(3, 8, 8)[:, 6:])


def test_query_and_key_norms_come_before_the_rotation() -> None:
    torch.manual_seed(2)
    qkv, angle = torch.randn(2, 64), torch.rand(2, 4)
    norm = QKNorm(q=torch.rand(8), k=torch.rand(8))
    cos_sin = torch.cat([angle.cos(), angle.sin()], dim=1)
    cache, meta = torch.zeros(1, 2 * 2 * 8 * 4), _meta(2, [0])
    q = KERNELS.rope_write_kv(qkv, cache, meta, SHAPE, cos_sin, norm)
    heads = qkv.view(2, 8, 8).clone()
    heads[:, :4] = F.rms_norm(heads[:, :4], (8,), norm.q, SHAPE.norm_eps)
    heads[:, 4:6] = F.rms_norm(heads[:, 4:6], (8,), norm.k, SHAPE.norm_eps)
    other = torch.zeros_like(cache)
    plain = KERNELS.rope_write_kv(heads.view(2, 64), other, meta, SHAPE, cos_sin, None)
    torch.testing.assert_close(q, plain)
    torch.testing.assert_close(cache, other)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [False, True])
def test_a_packed_weight_dequantises_to_codes_less_zero_times_scale(bits: int, zeros: bool) -> None:
    weight = random_weight(6, 64, 32, bits, zeros)
    zero = 1 << bits - 1 if weight.zeros is None else weight.zeros.float().repeat_interleave(32, 1)
    wanted = (weight.codes.float() - zero) * weight.scales.float().repeat_interleave(32, 1)
    packed = KERNELS.pack_quantized(weight)
    assert packed.codes.shape == (6, 64 * bits // 8)
    assert torch.equal(dequantise(packed), wanted)


def test_residual_is_updated_in_place() -> None:
    x, residual, weight = torch.randn(3, 16), torch.randn(3, 16), torch.rand(16)
    total = x + residual
    normed = KERNELS.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(residual, total)
    torch.testing.assert_close(normed, F.rms_norm(total, (16,), weight, 1e-5))
