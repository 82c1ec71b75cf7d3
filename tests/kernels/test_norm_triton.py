"""Each fused norm equals its reference: odd lengths, odd widths, batch 2, views."""

import pytest
import torch
from turbodiff_kernels.norm import kernel, reference

from tests.kernels.conftest import LENGTHS, randn, relative_l2

EPS = 1e-6
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3}
ROWS = [(length, dtype) for length in LENGTHS for dtype in TOLERANCE if length < 500 or dtype == torch.float16]


def modulation(batch: int, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    shift, scale, _ = randn(batch, 3, channels, seed=5).split(1, dim=1)
    return shift, scale


@pytest.mark.parametrize(("length", "dtype"), ROWS)
def test_norm_modulate_equals_its_reference(length, dtype):
    x = randn(2 if length < 100 else 1, length, 96, dtype=dtype)
    shift, scale = modulation(x.shape[0], 96)
    got = kernel.norm_modulate(x, shift, scale, EPS)
    assert got.dtype == dtype
    assert relative_l2(got, reference.norm_modulate(x, shift, scale, EPS)) < TOLERANCE[dtype]


def test_norm_modulate_reads_a_chunk_of_a_batch_without_a_copy():
    x = randn(2, 65, 128)
    part = x[:, 17:50]
    shift, scale = modulation(2, 128)
    got = kernel.norm_modulate(part, shift, scale, EPS)
    assert relative_l2(got, reference.norm_modulate(part, shift, scale, EPS)) < 1e-6


def test_a_modulation_shared_by_the_batch_is_broadcast():
    x = randn(2, 5, 64)
    shift, scale = modulation(1, 64)
    assert relative_l2(kernel.norm_modulate(x, shift, scale, EPS), reference.norm_modulate(x, shift, scale, EPS)) < 1e-6


def test_a_mean_of_many_deviations_costs_no_digit_that_16_bits_hold():
    """Mean and variance come from one reduction: the variance is a difference of large numbers here."""
    x = randn(1, 5, 1536, dtype=torch.float16) + 50
    shift, scale = modulation(1, 1536)
    expected = reference.norm_modulate(x, shift, scale, EPS)
    assert relative_l2(kernel.norm_modulate(x, shift, scale, EPS), expected) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("length", [1, 31, 32, 33, 70])
def test_every_token_of_a_group_is_normed_and_quantised(length):
    x = randn(2, length, 96)
    shift, scale = modulation(2, 96)
    got, expected = (m.norm_modulate_quantize(x, shift, scale, EPS) for m in (kernel, reference))
    assert (got[0].int() - expected[0].int()).abs().max() <= 1 and got[0].ne(expected[0]).float().mean() < 1e-3
    assert relative_l2(got[1], expected[1]) < 1e-6


def test_quantised_norm_is_the_norm_within_half_a_step():
    x = randn(2, 65, 96, dtype=torch.float16)
    shift, scale = modulation(2, 96)
    got, step = kernel.norm_modulate_quantize(x, shift, scale, EPS)
    expected = reference.norm_modulate(x.float(), shift, scale, EPS)
    assert got.dtype == torch.int8
    assert (got * step[..., None] - expected).abs().le(step[..., None] * 0.5001).all()
    assert got.abs().amax(-1).eq(127).all()


@pytest.mark.parametrize("channels", [64, 96, 1536])
def test_layer_norm_equals_its_reference(channels):
    x, weight, bias = randn(2, 3, channels), randn(channels, seed=1), randn(channels, seed=2)
    assert relative_l2(kernel.layer_norm(x, weight, bias, EPS), reference.layer_norm(x, weight, bias, EPS)) < 1e-6


@pytest.mark.parametrize(("length", "dtype"), ROWS)
def test_rms_norm_rope_equals_its_reference(length, dtype):
    heads, half = 3, 32
    x, weight = randn(2 if length < 100 else 1, length, heads * half * 2, dtype=dtype), randn(heads * half * 2, seed=1)
    angles = randn(length, half, seed=2)
    expected = reference.rms_norm_rope(x, weight, angles.cos(), angles.sin(), EPS)
    kernel.rms_norm_rope_(x, weight, angles.cos(), angles.sin(), EPS)
    assert relative_l2(x, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize(("length", "dtype"), ROWS)
def test_norm_and_rope_hand_out_the_sums_of_what_they_wrote(length, dtype):
    heads, half = 3, 32
    packed, weight = randn(2 if length < 100 else 1, length, 3 * heads * half * 2, dtype=dtype), randn(192, seed=1)
    x = packed[..., 192:384]  # q, k or v of one projection
    angles = randn(length, half, seed=2)
    args = (weight, angles.cos(), angles.sin(), EPS)
    expected = x.clone()
    expected_sums = reference.rms_norm_rope_sum_(expected, *args)
    expected_factor = reference.rms_factor(x, EPS)
    factor, sums_only = kernel.rope_statistics(x, *args)
    alone = kernel.rms_factor(x, EPS)
    sums = kernel.rms_norm_rope_sum_(x, *args)
    assert relative_l2(x, expected) < TOLERANCE[dtype]
    assert sums.shape == (len(x), reference.groups(length), 192) == expected_sums.shape
    assert relative_l2(sums, expected_sums) < TOLERANCE[dtype]
    assert relative_l2(sums, sums_only) < 1e-6, "the same sums, without writing"
    assert relative_l2(factor, expected_factor) < 1e-6
    assert relative_l2(alone, expected_factor) < 1e-6


@pytest.mark.parametrize("length", LENGTHS)
def test_block_means_come_from_the_sums(length):
    x = randn(2, length, 64)
    sums = torch.nn.functional.pad(x, (0, 0, 0, -length % 128)).unflatten(1, (-1, reference.GROUP)).sum(2)
    for block in (64, 128):
        expected = torch.stack([part.mean(1) for part in x.split(block, dim=1)], dim=1)
        assert relative_l2(reference.block_means(sums.clone(), block, length), expected) < 1e-6


def test_rms_norm_overwrites_one_third_of_a_packed_projection_only():
    packed, weight = randn(2, 7, 3 * 192), randn(192, seed=1)
    before = packed.clone()
    middle = packed[..., 192:384]
    expected = reference.rms_norm(middle, weight, EPS)
    kernel.rms_norm_(middle, weight, EPS)
    assert relative_l2(middle, expected) < 1e-6
    assert torch.equal(packed[..., :192], before[..., :192])
    assert torch.equal(packed[..., 384:], before[..., 384:])


@pytest.mark.parametrize("channels", [96, 1536])
def test_gated_residual_is_added_in_place(channels):
    x, y, gate = randn(2, 65, channels), randn(2, 65, channels, seed=1), randn(2, 1, channels, seed=2)
    expected = x + y * gate
    kernel.residual_add_(x, y, gate)
    assert relative_l2(x, expected) < 1e-6


@pytest.mark.parametrize("channels", [6, 96, 192])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_sum_channel_norm_and_silu_are_written_between_other_channels(channels, dtype):
    x, y = (randn(1, channels, 5, 7, dtype=dtype, seed=i).to(memory_format=torch.channels_last) for i in range(2))
    gamma, bias = randn(channels, seed=1), randn(channels, seed=2)
    for more in ((None, None), (None, bias), (y, bias)):
        found = []
        for module in (kernel, reference):
            total, wide = x.clone(), torch.full((1, 5, 7, 3 * channels), torch.nan, dtype=dtype).movedim(-1, 1)
            module.rms_norm_silu_(wide[:, channels : 2 * channels], total, gamma, *more)
            found.append((wide, total))
        (got, got_sum), (expected, expected_sum) = found
        assert torch.equal(got.isnan(), expected.isnan()) and got.isnan().sum() == 2 * x.numel()
        assert relative_l2(got.nan_to_num(), expected.nan_to_num()) < TOLERANCE[dtype]
        assert relative_l2(got_sum, expected_sum) < TOLERANCE[dtype]
        assert torch.equal(got_sum, x) is (more[0] is None)


def test_a_row_whose_deviation_is_lost_in_its_mean_stays_small():
    """It came out 1,000 times too large: of mean and square nothing was left but eps."""
    x = torch.full((1, 1, 1536), 4096.0)
    x[..., :8] = 4112.0
    none = torch.zeros(1, 1, 1536)
    assert kernel.norm_modulate(x.half(), none, none, 1e-6).abs().max() < 20


def test_int8_rows_of_a_token_that_is_no_number_have_no_number_as_their_scale():
    x, none = torch.ones(1, 3, 384, dtype=torch.float16), torch.zeros(1, 1, 384)
    x[0, 1, 7] = float("nan")
    assert kernel.norm_modulate_quantize(x, none, none, 1e-6)[1].isnan().tolist() == [[False, True, False]]
