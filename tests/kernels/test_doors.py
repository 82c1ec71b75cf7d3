"""Both implementations are behind every door, and a dry run sees the shapes of the real one."""

import pytest
import torch
from turbodiff_kernels import gemm, norm, quant, sage, sla
from turbodiff_kernels.quant.reference import quantize_tiles, quantize_tokens

from tests.kernels.conftest import DEVICE, randn, relative_l2

EPS = 1e-6


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def token_inputs() -> dict[str, torch.Tensor]:
    shift, scale = randn(2, 2, 96, seed=1).split(1, dim=1)
    return {"x": randn(2, 9, 96), "shift": shift, "scale": scale}


def matrices(quantize) -> list[torch.Tensor]:
    return [*quantize(randn(18, 64)), *quantize(randn(96, 64, seed=1)), randn(96, seed=2)]


def projections() -> dict[str, torch.Tensor]:
    angles = randn(70, 32, seed=6)
    names = dict(zip("qkv", randn(2, 70, 3 * 128).chunk(3, dim=-1), strict=True))
    more = [
        randn(128, seed=4),
        randn(128, seed=5),
        angles.cos(),
        angles.sin(),
        randn(64, 64, seed=2),
        randn(64, seed=3),
    ]
    return names | dict(zip(["q_weight", "k_weight", "cos", "sin", "weight", "bias"], more, strict=True))


def normed_sla(q, k, v, q_weight, k_weight, cos, sin, weight, bias, int8=False):
    norms = (q_weight, k_weight, cos, sin, EPS)
    return sla.normed_sla_attention_(q.clone(), k.clone(), v, *norms, weight, bias, 0.5, int8=int8)


CALLS = {
    "normed_sage_attention_": (
        lambda q, k, v, *args: sage.normed_sage_attention_(q.clone(), k.clone(), v, *args[:4], EPS),
        projections,
    ),
    "normed_sla_attention_": (normed_sla, projections),
    "normed_sla_attention_ int8": (lambda *args: normed_sla(*args, int8=True), projections),
    "norm_modulate": (lambda x, shift, scale: norm.norm_modulate(x, shift, scale, EPS), token_inputs),
    "norm_modulate_quantize": (lambda x, shift, scale: norm.norm_modulate_quantize(x, shift, scale, EPS), token_inputs),
    "residual_add_": (lambda x, shift, scale: norm.residual_add_(x.clone(), x, shift), token_inputs),
    "rms_norm_": (lambda x, shift, scale: norm.rms_norm_(x.clone(), shift[0, 0], EPS), token_inputs),
    "rms_norm_silu_": (
        lambda x, gamma: norm.rms_norm_silu_(torch.empty_like(x), x.clone(), gamma, x, gamma),
        lambda: {"x": randn(1, 5, 7, 96).movedim(-1, 1), "gamma": randn(96)},
    ),
    "quantize_tokens": (quant.quantize_tokens, lambda: {"x": randn(9, 96)}),
    "quantize_tiles": (quant.quantize_tiles, lambda: {"x": randn(9, 200)}),
    "int8_linear tiles": (
        lambda *args: gemm.int8_linear(*args, torch.float16, True),
        lambda: dict(enumerate(matrices(quantize_tiles))),
    ),
    "int8_linear tokens": (
        lambda *args: gemm.int8_linear(*args, torch.float32),
        lambda: dict(enumerate(matrices(quantize_tokens))),
    ),
    "int8_linear_quantize": (
        lambda *args: gemm.int8_linear_quantize(*args, torch.float32, True),
        lambda: dict(enumerate(matrices(quantize_tiles))),
    ),
    "int8_linear_add_": (
        lambda x, gate, *args: gemm.int8_linear_add_(x.clone(), gate, *args),
        lambda: dict(enumerate([randn(2, 9, 96, seed=3), randn(2, 1, 96, seed=4), *matrices(quantize_tokens)])),
    ),
}


def run(name: str, device: str = DEVICE) -> list[torch.Tensor]:
    call, inputs = CALLS[name]
    result = call(*(t.to(device) for t in inputs().values()))
    return list(result) if isinstance(result, tuple) else [result]


@pytest.mark.parametrize("name", CALLS)
def test_the_door_leads_to_either_implementation(name, monkeypatch):
    monkeypatch.setenv("TURBODIFF_KERNELS", "reference")
    expected = run(name)
    monkeypatch.setenv("TURBODIFF_KERNELS", "triton")
    for got, want in zip(run(name), expected, strict=True):
        assert got.dtype == want.dtype
        assert relative_l2(got, want) < 1e-3


@pytest.mark.parametrize("name", CALLS)
def test_a_dry_run_sees_the_real_shapes(name):
    for real, dry in zip(run(name), run(name, "meta"), strict=True):
        assert (real.shape, real.dtype, real.stride()) == (dry.shape, dry.dtype, dry.stride())


def test_with_gradients_the_differentiable_reference_runs():
    with torch.enable_grad():
        x = randn(1, 3, 96).requires_grad_()
        norm.residual_add_(x, x, torch.ones(1, 1, 96)).sum().backward()
    assert x.grad.eq(2).all()
