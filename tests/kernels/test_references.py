"""The references say what the operations are; these are the facts that pin them down."""

import pytest
import torch
import torch.nn.functional as F
from turbodiff_kernels import backend, gemm, norm, quant
from turbodiff_kernels.quant.reference import dequantize_tiles
from turbodiff_kernels.sage import reference as sage
from turbodiff_kernels.sla import reference as sla

from tests.goldens.test_goldens import block_map


@pytest.fixture(autouse=True)
def no_gradients():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def dense(q, k, v):
    return F.scaled_dot_product_attention(*(t.float().transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def relative(got, want):
    return ((got.float() - want.float()).norm() / want.float().norm()).item()


def test_largest_value_saturates_at_127_and_its_negative_reaches_minus_128():
    x = torch.zeros(128, 256)
    x[3, 5], x[3, 6], x[4, 7] = 2.0, -2.0, 2.5 * 2 / 128
    x8, scale = quant.quantize_tiles(x)
    assert (x8[3, 5], x8[3, 6], x8[4, 7]) == (127, -128, 2), "2.5 rounds half to even"
    assert scale.tolist() == [[2 / 128, pytest.approx(1e-8 / 128)]]
    assert not x8[:, 128:].any()


@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (200, 257), (130, 64)])
def test_any_shape_comes_back_within_one_step(shape):
    x = torch.randn(shape)
    x8, scale = quant.quantize_tiles(x)
    assert x8.shape == x.shape and scale.shape == (quant.tiles(shape[0]), quant.tiles(shape[1]))
    assert (dequantize_tiles(x8, scale) - x).abs().max() <= scale.max() * 1.001


@pytest.mark.parametrize("rows", [1, 200, 5000])
def test_int8_product_is_the_sum_over_tiles(rows):
    a, b = (
        torch.randint(-128, 128, (rows, 300), dtype=torch.int8),
        torch.randint(-128, 128, (130, 300), dtype=torch.int8),
    )
    a_scale, b_scale = torch.rand(quant.tiles(rows), 3), torch.rand(2, 3)
    want = torch.zeros(rows, 130, dtype=torch.float64)
    for block in range(3):
        part = slice(128 * block, 128 * block + 128)
        product = (a[:, part].long() @ b[:, part].long().T).double()
        scale = torch.outer(
            a_scale[:, block].repeat_interleave(128)[:rows], b_scale[:, block].repeat_interleave(128)[:130]
        )
        want += product * scale
    got = gemm.int8_linear(a, a_scale, b, b_scale, None, torch.float32)
    assert relative(got, want) < 1e-6


@pytest.mark.parametrize("length", [64, 130, 640])
@pytest.mark.parametrize("int8", [False, True])
def test_keeping_every_block_without_linear_branch_is_dense_attention(length, int8):
    q, k, v = torch.randn(3, 2, length, 3, 64)
    out = sla.sla_attention(q, k, v, torch.zeros(64, 64), torch.zeros(64), 1.0, int8=int8)
    assert relative(out, dense(q, k, v)) < (0.02 if int8 else 1e-5)


def test_sparse_branch_is_dense_attention_masked_to_the_kept_blocks():
    q, k, v = torch.randn(3, 1, 330, 2, 64)
    kept = block_map(q, k, 0.5).bool()
    mask = kept.repeat_interleave(128, 2).repeat_interleave(64, 3)[:, :, :330, :330]
    want = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), attn_mask=mask).transpose(1, 2)
    out = sla.sla_attention(q, k, v, torch.zeros(64, 64), torch.zeros(64), 0.5)
    assert relative(out, want) < 1e-5


def test_linear_branch_of_equal_keys_is_the_mean_value():
    q, v = torch.randn(2, 1, 200, 2, 64)
    k = torch.randn(64).expand(1, 200, 2, 64)
    with_branch = sla.sla_attention(q, k, v, torch.eye(64), torch.zeros(64), 0.5)
    without = sla.sla_attention(q, k, v, torch.zeros(64, 64), torch.zeros(64), 0.5)
    assert torch.allclose(with_branch - without, v.mean(1, keepdim=True).expand_as(v), atol=1e-3)


@pytest.mark.parametrize(("length", "topk", "count"), [(200, 0.1, 1), (640, 0.15, 1), (640, 0.5, 5), (32760, 0.1, 51)])
def test_kept_blocks_are_a_floor_and_never_none(length, topk, count):
    q, k = torch.randn(2, 1, length, 1, 64)
    kept = block_map(q, k, topk)
    assert kept.shape == (1, 1, -(-length // 128), -(-length // 64))
    assert (kept.sum(-1) == count).all()


def test_kept_blocks_are_the_likeliest():
    q, k = torch.randn(2, 1, 640, 1, 64) * 0.1
    k[:, 192:256] += q.mean(1, keepdim=True) * 50
    assert (block_map(q, k, 0.1)[..., 3] == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sage_is_close_to_dense_even_when_keys_share_an_offset(dtype):
    q, k, v = torch.randn(3, 1, 500, 2, 128)
    k = k + 20 * torch.randn(128)
    q, k, v = (t.to(dtype) for t in (q, k, v))
    out = sage.sage_attention(q, k, v)
    assert out.dtype == dtype and relative(out, dense(q, k, v)) < 0.04


def test_rows_share_a_scale_per_block_and_head():
    x = torch.randn(1, 150, 2, 64)
    x8, scale = sage.quantize_rows(x, 64)
    assert x8.shape == x.shape and scale.shape == (1, 3, 2)
    assert torch.allclose(scale[0, 2, 1], x[0, 128:, 1].abs().max() / 127 + 1e-7)
    assert x8.abs().max() == 127


def test_norms_are_those_of_torch():
    x, weight, bias = torch.randn(2, 5, 96), torch.randn(96), torch.randn(96)
    shift, scale = torch.randn(2, 2, 1, 96)
    normed = F.layer_norm(x, (96,), eps=1e-6)
    assert torch.allclose(norm.norm_modulate(x, shift, scale, 1e-6), normed * (1 + scale) + shift, atol=1e-6)
    assert torch.allclose(norm.layer_norm(x, weight, bias, 1e-6), normed * weight + bias, atol=1e-6)
    want = F.rms_norm(x, (96,), weight, 1e-6)
    assert torch.allclose(norm.rms_norm_(x, weight, 1e-6), want, atol=1e-6)
    assert torch.allclose(x, want, atol=1e-6), "without gradients the tokens are normed in place"


def test_rope_turns_interleaved_pairs():
    x = torch.randn(1, 7, 2 * 64)
    angles = torch.randn(7, 32)
    turned = (
        torch.view_as_complex(F.rms_norm(x, (128,), eps=1e-6).view(1, 7, 2, 32, 2)) * torch.exp(1j * angles)[:, None]
    )
    got = norm.rms_norm_rope_(x, torch.ones(128), angles.cos(), angles.sin(), 1e-6)
    assert torch.allclose(got, torch.view_as_real(turned).flatten(2), atol=1e-5)


def test_shapes_on_the_meta_device_are_the_real_ones():
    q, gain = torch.randn(1, 200, 2, 64), torch.zeros(64)
    x8, scale = quant.quantize_tiles(torch.randn(200, 256))
    calls = [
        lambda m: quant.quantize_tiles(m(q[0, :, 0])),
        lambda m: gemm.int8_linear(m(x8), m(scale), m(x8), m(scale), None, torch.bfloat16),
        lambda m: norm.layer_norm(m(q[0]), m(gain), m(gain), 1e-6),
    ]
    for call in calls:
        real, fake = call(lambda t: t), call(lambda t: t.to("meta"))
        for a, b in zip(*((out,) if torch.is_tensor(out) else out for out in (real, fake)), strict=True):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def test_a_cpu_runs_the_reference_unless_told(monkeypatch):
    monkeypatch.delenv("TURBODIFF_KERNELS", raising=False)
    assert backend.kernel_module("sla", torch.device("cpu")) is None
    monkeypatch.setenv("TURBODIFF_KERNELS", "fastest")
    with pytest.raises(ValueError, match="expected auto, reference or triton"):
        backend.kernel_module("sla", torch.device("cpu"))
