"""Dense, INT8, FP8 and sparse-linear attention equal their references: odd lengths, tail blocks, batch 2, views."""

import pytest
import torch
from turbodiff_kernels.norm import reference as reference_norm
from turbodiff_kernels.norm.reference import groups
from turbodiff_kernels.sage import kernel as sage
from turbodiff_kernels.sage import reference as sage_reference
from turbodiff_kernels.sage import rows
from turbodiff_kernels.sla import kernel as sla
from turbodiff_kernels.sla import reference as sla_reference

from tests.kernels.conftest import LENGTHS, randn, relative_l2

INT8_APART = 1e-3  # of kernel and reference, where both go through INT8


def qkv(length: int, batch: int = 1, heads: int = 1, dim: int = 64, dtype: torch.dtype = torch.float32):
    """Queries, keys that have a mean, values: three views of one packed projection, as a Wan block makes them."""
    packed = randn(batch, length, 3 * heads * dim, dtype=dtype)
    q, k, v = (t.unflatten(-1, (heads, dim)) for t in packed.chunk(3, dim=-1))
    return q, k.add_(2 * randn(1, 1, heads, dim, seed=1, dtype=dtype)), v


def projection(dim: int = 64, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return randn(dim, dim, seed=2, dtype=dtype) / dim**0.5, randn(dim, seed=3, dtype=dtype)


@pytest.mark.parametrize("capability", [80, 90], ids=["one block", "two blocks an iteration"])
@pytest.mark.parametrize("length", LENGTHS)
def test_dense_attention_equals_sdpa(length, capability, monkeypatch):
    monkeypatch.setattr(sage, "arch", lambda device: capability)
    q, k, v = qkv(length)
    expected = torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
    assert relative_l2(sage.attend(q, k, v), expected.transpose(1, 2)) < 2e-6


@pytest.mark.parametrize("length", LENGTHS)
def test_sage_equals_its_reference(length):
    q, k, v = qkv(length)
    # a card fuses (OFFSET + sum) * scale - level; the interpreter rounds the product: half a unit of the INT32 sum. One
    # element of k that falls a step beside (see below) is 3.7e-4 at 517 tokens; INT8 itself costs 1.3e-2 there.
    assert relative_l2(sage.sage_attention(q, k, v), sage_reference.sage_attention(q, k, v)) < INT8_APART


@pytest.mark.parametrize("dim", [64, 128])
def test_sage_reads_a_packed_projection_of_two_clips_in_float16(dim):
    q, k, v = qkv(130, batch=2, heads=3, dim=dim, dtype=torch.float16)
    got = sage.sage_attention(q, k, v)
    assert got.dtype == torch.float16
    assert relative_l2(got, sage_reference.sage_attention(q, k, v)) < 2e-3


@pytest.mark.parametrize("block", [64, 128])
def test_rows_are_quantised_as_the_reference_does_but_for_ties(block):
    _, k, _ = qkv(130, batch=2, heads=2)
    smooth = k - k.mean(dim=1, keepdim=True)
    got, means = rows.quantize_pool(k, k.mean(dim=1), block, int8=True)
    expected, scale = sage_reference.quantize_rows(smooth, block)
    # one reciprocal a block instead of a division an element: where x / scale is half a step, it may fall either way
    assert (got.rows.int() - expected.int()).abs().max() <= 1
    assert got.rows.ne(expected).float().mean() < 1e-4
    assert torch.equal(got.scale.transpose(1, 2), scale)
    assert relative_l2(means, sla_reference._block_means(smooth, block)) < 1e-5


@pytest.mark.parametrize(
    ("int8", "capability"), [(False, 80), (False, 90), (True, 80)], ids=["sla", "pairs", "sagesla"]
)
@pytest.mark.parametrize("length", LENGTHS)
def test_sparse_linear_attention_equals_its_reference(length, int8, capability, monkeypatch):
    monkeypatch.setattr(sage, "arch", lambda device: capability)
    q, k, v = qkv(length)
    args = (q, k, v, *projection(), 0.35, int8)
    bound = INT8_APART if int8 else 1e-5
    assert relative_l2(sla.sla_attention(*args), sla_reference.sla_attention(*args)) < bound


@pytest.mark.parametrize("share", [0.01, 0.2, 0.3, 1.0], ids=["one", "two", "three", "all ten"])
def test_an_odd_number_of_kept_blocks_has_a_partner_without_keys(share, monkeypatch):
    monkeypatch.setattr(sage, "arch", lambda device: 90)
    args = (*qkv(630), *projection(), share, False)
    assert relative_l2(sla.sla_attention(*args), sla_reference.sla_attention(*args)) < 1e-5


@pytest.mark.parametrize("int8", [False, True], ids=["sla", "sagesla"])
def test_sparse_linear_attention_of_two_clips_in_float16(int8):
    q, k, v = qkv(200, batch=2, heads=2, dim=128, dtype=torch.float16)
    args = (q, k, v, *projection(128, torch.float16), 0.5, int8)
    assert relative_l2(sla.sla_attention(*args), sla_reference.sla_attention(*args)) < 4e-3


def normed(length: int, batch: int = 1, heads: int = 2, dim: int = 64, dtype: torch.dtype = torch.float32) -> list:
    """Projections before their norm, as views of one packed projection; the norms' weights; angles; eps."""
    packed = randn(batch, length, 3 * heads * dim, dtype=dtype)
    q, k, v = packed.chunk(3, dim=-1)
    k.add_(2 * randn(1, 1, heads * dim, seed=1, dtype=dtype))  # rotation keeps little of a common mean
    weights = [1 + randn(heads * dim, seed=seed) / 4 for seed in (4, 5)]
    angles = randn(length, dim // 2, seed=6) / 8
    return [q, k, v, *weights, angles.cos(), angles.sin(), 1e-6]


def copies(args: list) -> list:
    """q and k may be overwritten: each contender gets its own packed projection."""
    packed = torch.cat(args[:3], dim=-1)
    return [*packed.chunk(3, dim=-1), *args[3:]]


@pytest.mark.parametrize("length", LENGTHS)
def test_sage_norms_and_rotates_while_it_quantises(length):
    args = normed(length, heads=1)
    got = sage.normed_sage_attention_(*copies(args))
    assert relative_l2(got, sage_reference.normed_sage_attention_(*copies(args))) < 2e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("smooth", [False, True], ids=["queries", "keys"])
def test_pairs_of_16_bits_are_the_numbers_they_were(smooth, dtype):
    """Norm, rotation and INT8 of 16-bit tokens and of the same tokens in float32: bit for bit."""
    args = normed(130, batch=2)
    x, weight, cos, sin = args[1].to(dtype).unflatten(-1, (2, 64)), args[4], *args[5:7]
    norm = rows.NormRope(reference_norm.rms_factor(x.flatten(2), 1e-6), weight, cos, sin)
    mean, block = (randn(2, 128), 64) if smooth else (None, 128)
    got, expected = (rows.quantize(t, mean, block, norm) for t in (x, x.float()))
    assert torch.equal(got.rows, expected.rows) and torch.equal(got.scale, expected.scale)


@pytest.mark.parametrize("kind", ["sage", "sla", "sagesla"])
@pytest.mark.parametrize("dim", [64, 128])
def test_normed_attention_of_two_clips_reads_a_packed_projection_in_float16(kind, dim):
    args = normed(130, batch=2, heads=2, dim=dim, dtype=torch.float16)
    if kind == "sage":
        got, expected = (m.normed_sage_attention_(*copies(args)) for m in (sage, sage_reference))
    else:
        more = (*projection(dim, torch.float16), 0.4, kind == "sagesla")
        got, expected = (m.normed_sla_attention_(*copies(args), *more) for m in (sla, sla_reference))
    assert got.dtype == torch.float16 and got.shape == (2, 130, 2 * dim)
    assert relative_l2(got, expected) < 4e-3


@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize("kind", ["sage", "sla", "sagesla"])
def test_a_result_in_the_place_of_q_has_the_bits_of_one_that_is_not(kind, capability, monkeypatch):
    """A view of a packed projection has no room for the result and for FP8 values; projections of their own have."""
    monkeypatch.setattr(sage, "arch", lambda device: capability)
    args = normed(130, batch=2, heads=1, dtype=torch.float16)
    more = () if kind == "sage" else (*projection(64, torch.float16), 0.4, kind == "sagesla")
    call = sage.normed_sage_attention_ if kind == "sage" else sla.normed_sla_attention_
    views, own = copies(args), [*(t.contiguous() for t in copies(args)[:3]), *args[3:]]
    expected, got = call(*views, *more), call(*own, *more)
    assert got is own[0] and expected is views[0]
    assert torch.equal(got, expected) and torch.equal(own[2], args[2]), "v stays"


@pytest.mark.parametrize("int8", [False, True], ids=["sla", "sagesla"])
@pytest.mark.parametrize("length", LENGTHS)
def test_sparse_linear_attention_pools_while_it_norms_and_rotates(length, int8):
    args = [*normed(length, heads=1), *projection(), 0.35, int8]
    got, expected = (m.normed_sla_attention_(*copies(args)) for m in (sla, sla_reference))
    assert relative_l2(got, expected) < (2e-4 if int8 else 1e-5)


def test_the_smallest_share_still_keeps_one_block():
    q, k, v = qkv(130)
    args = (q, k, v, *projection(), 0.0, False)
    assert relative_l2(sla.sla_attention(*args), sla_reference.sla_attention(*args)) < 1e-5


def test_all_blocks_and_no_projection_are_dense_attention():
    q, k, v = qkv(130)
    nothing = torch.zeros(64, 64), torch.zeros(64)
    assert relative_l2(sla.sla_attention(q, k, v, *nothing, 1.0, False), sage.attend(q, k, v)) < 2e-6


@pytest.mark.parametrize("length", LENGTHS)
def test_values_are_rounded_to_fp8_channels_first(length):
    _, _, v = qkv(length, batch=2, heads=2)
    got, scale = sage.quantize_values(v, sage.largest_values(v), half=False), v.abs().amax(dim=1) / 448
    assert got.shape == (2, 2, 64, -(-length // 64) * 64), "whole key blocks, so that the loop needs no mask"
    assert got[..., :length].float().abs().amax(-1).eq(448).all(), "the largest value of a channel is FP8's largest"
    assert got[..., length:].float().eq(0).all()
    expected = (v.permute(0, 2, 3, 1) / scale[..., None]).to(torch.float8_e4m3fn).float()
    got = got[..., :length].float()
    # the interpreter loses the carry where rounding up changes the exponent, and ties below 2^-6 (triton 3.7)
    assert (got.eq(expected) | got.eq(expected / 2) | (got - expected).abs().le(2**-9)).all()
    assert got.eq(expected).float().mean() > 0.9


def test_values_in_fours_are_the_same_values():
    _, _, v = qkv(130, heads=2)
    plain, fours = (sage.quantize_values(v, sage.largest_values(v), half=True, fours=fours) for fours in (False, True))
    order = [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]
    at = torch.arange(plain.shape[-1]).view(-1, 16)[:, order].flatten()
    assert torch.equal(fours.float(), plain.float()[..., at])


@pytest.mark.parametrize(
    ("capability", "bound"), [(100, 1e-5), (90, 1e-5), (89, 1e-3)], ids=["in order", "float32 sums", "float16 sums"]
)
@pytest.mark.parametrize("sparse", [False, True], ids=["sage", "sagesla"])
def test_fp8_scales_cancel_to_the_last_digit(sparse, capability, bound, monkeypatch):
    """Where FP8 rounds nothing (equal keys, values that are powers of two) the mean value comes out exactly, or as
    exactly as float16 holds sums of 64."""
    monkeypatch.setattr(sage, "arch", lambda device: capability)
    q, k, v = qkv(192, heads=2)
    k = torch.zeros_like(k)
    v = 448 * 2.0 ** randn(*v.shape, seed=4).abs().mul(-3).clamp(-6, 0).floor()
    v[:, 0] = 448
    nothing = torch.zeros(64, 64), torch.zeros(64)
    got = sla.sla_attention(q, k, v, *nothing, 1.0, True) if sparse else sage.sage_attention(q, k, v)
    assert relative_l2(got, v.mean(dim=1, keepdim=True).expand_as(v)) < bound


def test_sums_in_float16_do_not_overflow_where_all_values_are_the_largest(monkeypatch):
    monkeypatch.setattr(sage, "arch", lambda device: 120)
    q, k, v = qkv(192)
    got = sage.sage_attention(q, torch.zeros_like(k), torch.full_like(v, 3e4))
    assert relative_l2(got, torch.full_like(v, 3e4)) < 2e-3


@pytest.mark.parametrize("capability", [90, 89], ids=["float32 sums", "float16 sums"])
@pytest.mark.parametrize("sparse", [False, True], ids=["sage", "sagesla"])
def test_fp8_values_stay_within_their_rounding(sparse, capability, monkeypatch):
    monkeypatch.setattr(sage, "arch", lambda device: capability)
    q, k, v = qkv(130, batch=2, heads=2)
    if sparse:
        args = (q, k, v, *projection(), 0.5, True)
        got, expected = sla.sla_attention(*args), sla_reference.sla_attention(*args)
    else:
        got, expected = sage.sage_attention(q, k, v), sage_reference.sage_attention(q, k, v)
    assert 1e-3 < relative_l2(got, expected) < 0.1  # twice what it is with the carry that the interpreter loses


@pytest.fixture
def one_block(monkeypatch):
    """Hopper's plain loop with one block an iteration: FP8 weights depend on the peak at which a block is met."""
    plain = sage.settings(90, int8=True, linear=False)
    monkeypatch.setattr(sage, "settings", lambda *_, **__: plain._replace(pair=False))


@pytest.mark.parametrize("sparse", [False, True], ids=["sage", "sagesla"])
@pytest.mark.parametrize("length", [*LENGTHS, 330])
def test_the_loop_of_hopper_gives_what_the_plain_one_gives(length, sparse, one_block):
    args = qkv(length, batch=2, heads=2)
    if sparse:
        made = [sla.sla_attention(*args, *projection(), 0.35, True, hopper=hopper) for hopper in (True, False)]
    else:
        made = [sage.sage_attention(*args, hopper=hopper) for hopper in (True, False)]
    assert relative_l2(*made) < 1e-5


@pytest.mark.parametrize("sparse", [False, True], ids=["sage", "sagesla"])
def test_the_loop_of_hopper_leaves_its_result_where_the_queries_were(sparse, one_block):
    made = []
    for hopper in (True, False):
        q, k, v, *rest = (t.contiguous() if isinstance(t, torch.Tensor) else t for t in normed(330))
        if sparse:
            made.append(sla.normed_sla_attention_(q, k, v, *rest, *projection(), 0.5, True, hopper=hopper))
        else:
            made.append(sage.normed_sage_attention_(q, k, v, *rest, hopper=hopper))
        assert made[-1].data_ptr() == q.data_ptr()
    assert relative_l2(*made) < 1e-5


@pytest.mark.parametrize("length", LENGTHS)
def test_block_means_are_made_of_the_sums_of_sixteen_tokens(length):
    x = randn(2, length, 128)
    smooth = (x - x.mean(dim=1, keepdim=True)).unflatten(-1, (2, 64))
    sums = torch.nn.functional.pad(x, (0, 0, 0, groups(length) * 16 - length)).unflatten(1, (-1, 16)).sum(2)
    got, smoothed = sla.pool(sums, None, 128, x, 64), sla.pool(sums, sums.sum(1), 64, x, 64)
    assert relative_l2(got, sla_reference._block_means(x.unflatten(-1, (2, 64)), 128)) < 1e-6
    assert (smoothed - sla_reference._block_means(smooth, 64)).abs().max() < 1e-6


@pytest.mark.parametrize("capability", [80, 89], ids=["values in 16 bits", "values in FP8"])
@pytest.mark.parametrize("length", [1, 63, 517])
def test_the_linear_branch_is_folded_over_all_tokens(length, capability, monkeypatch):
    monkeypatch.setattr(sage, "arch", lambda device: capability)
    monkeypatch.setattr(sla, "PROGRAMS", 12)
    q, k, v = qkv(length, batch=2, heads=2)
    weight, bias = projection()
    got = sla.linear_branch(q, k, v, weight, bias, int8=True)
    phi = k.softmax(-1)
    state = torch.einsum("blhd,blhe,fe->bhdf", phi, v, weight) / length
    assert relative_l2(got.state, state) < 1e-5
    assert relative_l2(got.total, phi.mean(1)) < 1e-5
    assert got.peaks is None if capability == 80 else torch.equal(got.peaks, sage.largest_values(v))
