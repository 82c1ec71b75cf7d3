"""INT8 quantisation and products equal their references: odd sizes, both scale layouts, every epilogue."""

import math

import pytest
import torch
from turbodiff_kernels.gemm import kernel, reference
from turbodiff_kernels.quant import kernel as quant_kernel
from turbodiff_kernels.quant import reference as quant_reference

from tests.kernels.conftest import DEVICE, LENGTHS, randn, relative_l2


def operands(rows: int, columns: int, inner: int, tiled: bool) -> tuple[torch.Tensor, ...]:
    """INT8 activations and weights with their scales."""
    quantize = quant_reference.quantize_tiles if tiled else quant_reference.quantize_tokens
    a, b = randn(rows, inner), randn(columns, inner, seed=1) / inner**0.5
    return *quantize(a), *quantize(b)


@pytest.mark.parametrize("rows", LENGTHS)
def test_tiles_are_quantised_bit_by_bit_as_the_reference_does(rows):
    x = randn(rows, 200, dtype=torch.float16) * 3
    x[0, 0], x[0, 1] = 40, -40
    for got, expected in zip(quant_kernel.quantize_tiles(x), quant_reference.quantize_tiles(x), strict=True):
        assert torch.equal(got, expected)


def test_the_positive_extreme_saturates_and_a_zero_tile_has_the_smallest_scale():
    x = torch.zeros(130, 128)
    x[0, :2] = torch.tensor([5.0, -5.0])
    got, scale = quant_kernel.quantize_tiles(x)
    assert got[0, :2].tolist() == [127, -128]
    assert got[1:].eq(0).all()
    assert scale[1].item() == pytest.approx(1e-8 / 128)


@pytest.mark.parametrize("columns", [1, 96, 1000])
def test_tokens_are_quantised_bit_by_bit_also_from_a_view(columns):
    x = randn(65, columns + 5)[:, :columns]
    for got, expected in zip(quant_kernel.quantize_tokens(x), quant_reference.quantize_tokens(x), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("columns", [1536, 1800, 8960])
def test_wide_bfloat16_tokens_are_quantised_bit_by_bit(columns):
    """They become float32 by their bits, which is right in the interpreter too; one warp, two and eight."""
    x = randn(2, columns).bfloat16()
    for got, expected in zip(quant_kernel.quantize_tokens(x), quant_reference.quantize_tokens(x), strict=True):
        assert torch.equal(got, expected)


def test_tokens_are_quantised_into_rows_of_a_larger_result():
    x, values, scale = randn(65, 1000), torch.full((200, 1000), 99, dtype=torch.int8), torch.full((200,), 7.0)
    quant_kernel.quantize_tokens_into_(values[100:165], scale[100:165], x)
    expected, step = quant_reference.quantize_tokens(x)
    assert torch.equal(values[100:165], expected) and torch.equal(scale[100:165], step)
    assert values[:100].eq(99).all() and values[165:].eq(99).all() and scale[165:].eq(7).all()


@pytest.mark.parametrize("tiled", [True, False], ids=["tiles", "tokens"])
@pytest.mark.parametrize("rows", LENGTHS)
def test_the_product_equals_its_reference(rows, tiled):
    a, a_scale, b, b_scale = operands(rows, 136, 192 if rows < 500 else 128, tiled)
    got = kernel.int8_linear(a, a_scale, b, b_scale, None, torch.float32)
    assert relative_l2(got, reference.int8_linear(a, a_scale, b, b_scale, None, torch.float32)) < 2e-6


@pytest.mark.parametrize("tiled", [True, False], ids=["tiles", "tokens"])
@pytest.mark.parametrize("gelu", [True, False], ids=["gelu", "plain"])
def test_bias_and_gelu_round_where_separate_passes_would(gelu, tiled):
    matrices, bias = operands(65, 72, 256, tiled), randn(72, seed=3)
    got = kernel.int8_linear(*matrices, bias, torch.float16, gelu)
    expected = reference.int8_linear(*matrices, bias, torch.float16, gelu)
    assert got.dtype == torch.float16
    assert relative_l2(got, expected) < 2e-4  # one rounding in float16 here and there


@pytest.mark.parametrize("tiled", [True, False], ids=["tiles", "tokens"])
def test_gelu_has_every_digit_of_its_constants(tiled):
    """Products that are exact, so that only GELU is left: 0.0447 for 0.044715 would be off by 7e-6."""
    a, a_scale = torch.arange(-127, 128, dtype=torch.int8)[:, None], torch.ones(2, 1) if tiled else torch.ones(255)
    b, b_scale = torch.ones(1, 1, dtype=torch.int8), torch.full((1, 1) if tiled else (1,), 1 / 32)
    got = kernel.int8_linear(*(t.to(DEVICE) for t in (a, a_scale, b, b_scale)), None, torch.float32, True)
    x = torch.arange(-127, 128, dtype=torch.float64)[:, None] / 32
    expected = 0.5 * x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))
    assert (got.cpu() - expected).abs().max() < 1.5e-6


def test_gelu_neither_overflows_nor_loses_its_tails():
    a, scale = quant_reference.quantize_tokens(torch.tensor([[1.0], [-1.0]]))
    b, b_scale = quant_reference.quantize_tokens(torch.tensor([[300.0], [1.0]]))
    got = kernel.int8_linear(a, scale, b, b_scale, None, torch.float32, True)
    assert torch.allclose(got, reference.int8_linear(a, scale, b, b_scale, None, torch.float32, True), atol=1e-5)


def test_quantised_output_is_within_one_step_of_quantising_afterwards():
    matrices, bias = operands(127, 200, 128, True), randn(200, seed=3)
    got, step = kernel.int8_linear_quantize(*matrices, bias, torch.float16, True)
    expected, expected_step = reference.int8_linear_quantize(*matrices, bias, torch.float16, True)
    assert relative_l2(step, expected_step) < 1e-3
    assert (got.int() - expected.int()).abs().max() <= 1
    assert (got != expected).float().mean() < 0.01


@pytest.mark.parametrize("tiled", [True, False], ids=["tiles", "tokens"])
def test_a_gated_product_is_added_to_a_strided_residual_of_two_clips(tiled):
    batch, length, columns = 2, 63, 72
    whole = randn(batch, length + 9, columns, seed=4)
    got, expected = whole.clone(), whole.clone()
    gate, bias = randn(batch, 1, columns, seed=5), randn(columns, seed=3)
    matrices = operands(batch * length, columns, 128, tiled)
    kernel.int8_linear_add_(got[:, 4:-5], gate, *matrices, bias)
    reference.int8_linear_add_(expected[:, 4:-5], gate, *matrices, bias)
    assert relative_l2(got, expected) < 2e-6


@pytest.mark.parametrize("quantize", [quant_kernel.quantize_tiles, quant_kernel.quantize_tokens])
def test_what_is_no_number_makes_its_scale_none(quantize):
    """A tile's NaN became an integer like others, and a clip that went wrong seemed to be right."""
    x = randn(130, 128, dtype=torch.float16).to(DEVICE)
    x[5, 3] = float("nan")
    scale = quantize(x)[1].flatten()
    assert scale.isnan().tolist() == [number == (5 if len(scale) == 130 else 0) for number in range(len(scale))]
