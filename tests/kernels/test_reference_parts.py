"""References work on parts of their input: the same numbers to the bit, and little memory beside the result."""

import pytest
import torch
from turbodiff_kernels.gemm import reference as gemm
from turbodiff_kernels.norm import reference as norm
from turbodiff_kernels.quant import reference as quant
from turbodiff_kernels.sage import reference as sage
from turbodiff_kernels.sla import reference as sla

from tests.plan.kernel_bytes import beside

TOKENS, HEADS, HEAD_DIM, WIDE = 600, 6, 32, 512
WIDTH = HEADS * HEAD_DIM


@pytest.fixture(autouse=True)
def no_gradients():
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def inputs(dtype, tokens=TOKENS, width=WIDTH, wide=WIDE, heads=HEADS):
    """Arguments of every reference that has parts, by its name; tensors anew at each call."""
    x = torch.randn(2, tokens, width, dtype=dtype)
    qkv = [torch.randn(1, tokens, width, dtype=dtype) for _ in range(3)]
    gain, gate = torch.randn(width), torch.randn(2, 1, width)
    angle = torch.randn(tokens, width // heads // 2)
    norms = (gain, gain, angle.cos(), angle.sin(), 1e-6)
    proj = torch.randn(width // heads, width // heads, dtype=dtype), torch.randn(width // heads, dtype=dtype)
    a, a_scale = quant.quantize_tiles(x.flatten(0, 1))
    b, b_scale = quant.quantize_tiles(torch.randn(wide, width))
    back = quant.quantize_tiles(torch.randn(2 * tokens, wide)), quant.quantize_tiles(torch.randn(width, wide))
    bias = torch.randn(wide)
    return {
        "norm_modulate": (norm.norm_modulate, (x, gate, gate, 1e-6)),
        "norm_modulate_quantize": (norm.norm_modulate_quantize, (x, gate, gate, 1e-6)),
        "layer_norm": (norm.layer_norm, (x, gain, gain, 1e-6)),
        "rms_norm_": (norm.rms_norm_, (x.clone(), gain, 1e-6)),
        "rms_norm_rope_": (norm.rms_norm_rope_, (x.clone(), gain, angle.cos(), angle.sin(), 1e-6)),
        "rms_norm_silu_": (
            norm.rms_norm_silu_,
            (*(x[:1].clone().view(1, 12, 4, -1) for _ in range(2)), gain[:12], None, gain[-12:]),
        ),
        "quantize_tiles": (quant.quantize_tiles, (x.flatten(0, 1),)),
        "quantize_tokens": (quant.quantize_tokens, (x.flatten(0, 1),)),
        "int8_linear": (gemm.int8_linear, (a, a_scale, b, b_scale, bias, dtype)),
        "int8_linear_quantize": (gemm.int8_linear_quantize, (a, a_scale, b, b_scale, bias, dtype, True)),
        "int8_linear_add_": (gemm.int8_linear_add_, (x.clone(), gate, *back[0], *back[1], None)),
        "sage": (sage.normed_sage_attention_, (*(t.clone() for t in qkv), *norms)),
        "sla": (sla.normed_sla_attention_, (*(t.clone() for t in qkv), *norms, *proj, 0.2)),
        "sagesla": (sla.normed_sla_attention_, (*(t.clone() for t in qkv), *norms, *proj, 0.2, True)),
    }


NAMES = sorted(inputs(torch.float32, 128))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_parts_change_no_bit(name, dtype, monkeypatch):
    def run():
        torch.manual_seed(1)
        call, args = inputs(dtype)[name]
        found = call(*args)
        return found if isinstance(found, tuple) else (found,)

    for module, setting, value in ((quant, "PART_ELEMENTS", 1 << 40), (norm, "PART_ELEMENTS", 1 << 40)):
        monkeypatch.setattr(module, setting, value)
    monkeypatch.setattr(sage, "HEADS", 1000)
    monkeypatch.setattr(gemm, "ROW_TILES", 1000)
    whole = run()
    for module in (quant, norm):
        monkeypatch.setattr(module, "PART_ELEMENTS", 1)
    monkeypatch.setattr(sage, "HEADS", 2)
    monkeypatch.setattr(gemm, "ROW_TILES", 1)
    for part, one in zip(run(), whole, strict=True):
        # matrix products of fewer rows or heads may add in another order, by one rounding
        exact = not name.startswith(("int8_linear", "sage", "sla"))
        assert torch.equal(part, one) if exact else torch.allclose(part.float(), one.float(), rtol=1e-2, atol=2e-2)


@pytest.mark.parametrize("name", NAMES)
def test_a_fallback_at_real_size_costs_at_most_about_two_streams(name):
    """14B at 720p: what a reference holds beside its arguments and its result, in copies of the stream."""
    with torch.device("meta"):
        call, args = inputs(torch.bfloat16, 32_760, 5120, 13_824, 40)[name]
        stream = 2 * 2 * 32_760 * 5120  # two samples
        if name in ("sage", "sla", "sagesla"):
            stream //= 2
        held = beside(call, args, name)
    assert held <= 2.2 * stream, held / stream
