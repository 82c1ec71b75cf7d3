"""The two INT8 modes of a transformer: what each is, and how far they are from the weights and from each other."""

import pytest
import torch
from turbodiff_kernels.quant.reference import dequantize_tiles

from turbodiff.models.linear import (
    INT8_VARIABLE,
    Int8Linear,
    Int8Rows,
    Linear,
    fast_int8_,
    int8_blocks,
    int8_mode,
    quantize_blocks,
    to_fast_int8,
    to_int8,
)
from turbodiff.models.wan_dit import CrossAttentionCache, WanConfig, WanDiT
from turbodiff.spec.errors import RequestError

SMALL = WanConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=2, text_dim=48)


@pytest.fixture(autouse=True)
def no_gradients():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def small_model() -> WanDiT:
    torch.manual_seed(1)
    return WanDiT(SMALL).requires_grad_(False)


def velocity(model: WanDiT) -> torch.Tensor:
    draw = torch.Generator().manual_seed(2)
    latents, text = torch.randn(1, 16, 3, 8, 10, generator=draw), torch.randn(1, 24, 48, generator=draw)
    return model(latents, torch.tensor([[700.0]]), text)


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def test_a_layer_is_within_two_percent_of_its_weight_in_both_modes_and_from_both_sources():
    """Normal numbers: a step is 1/127 of the largest of its tile or row, so rounding adds about one percent."""
    layer, x = Linear(640, 384), torch.randn(1, 200, 640)
    want = layer(x)
    tiled = to_int8(layer)(x)
    assert relative(tiled, want) < 0.02
    assert relative(to_fast_int8(layer)(x), want) < 0.02
    from_tiles = to_fast_int8(to_int8(layer))
    assert not from_tiles.tiled
    assert relative(from_tiles(x), want) < 0.02
    assert 0 < relative(from_tiles(x), tiled) < 0.02


def test_tiles_become_rows_with_half_a_step_of_rounding():
    layer = to_int8(Linear(300, 200))
    before = dequantize_tiles(layer.int8_weight, layer.scale)
    fast = to_fast_int8(layer)
    error = (fast.int8_weight * fast.scale[:, None] - before).abs()
    assert fast.scale.shape == (200,)
    assert error.le(fast.scale[:, None] * 0.5001).all()


@pytest.mark.parametrize("source", ["weights", "tiles"])
def test_a_model_in_the_fast_mode_agrees_with_the_tiles(source):
    plain, tiled = velocity(small_model()), velocity(quantize_blocks(small_model()))
    model = fast_int8_(small_model() if source == "weights" else quantize_blocks(small_model()))
    layers = [module for module in model.blocks.modules() if isinstance(module, Linear | Int8Linear)]
    assert len(layers) == 20
    assert all(isinstance(layer, Int8Linear) and not layer.tiled for layer in layers)
    fast = velocity(model)
    assert relative(fast, tiled) < 0.02
    assert relative(fast, plain) < 0.02


@pytest.mark.parametrize("source", ["weights", "tiles"])
def test_the_mode_is_the_environments_to_choose(source, monkeypatch):
    def model():
        return small_model() if source == "weights" else quantize_blocks(small_model())

    for mode, tiled in ((None, True), ("tiles", True), ("tokens", False)):
        monkeypatch.delenv(INT8_VARIABLE, raising=False)
        if mode:
            monkeypatch.setenv(INT8_VARIABLE, mode)
        layers = [layer for layer in int8_blocks(model()).blocks.modules() if isinstance(layer, Int8Linear)]
        assert len(layers) == 20 and all(layer.tiled == tiled for layer in layers)
    monkeypatch.setenv(INT8_VARIABLE, "fast")
    with pytest.raises(RequestError) as told:
        int8_mode()
    assert (told.value.code, told.value.got, told.value.expected) == ("bad_int8_mode", "fast", "tiles | tokens")


def test_wide_rows_of_the_fast_mode_come_in_parts_and_are_the_same(monkeypatch):
    layer = to_fast_int8(Linear(64, 128))
    rows = layer.take(torch.randn(1, 300, 64))
    whole = layer.gelu(rows)
    monkeypatch.setattr("turbodiff.models.linear.PART_TOKENS", 128)
    parts = layer.gelu(rows)
    assert torch.equal(parts.values, whole.values) and torch.equal(parts.scale, whole.scale)


def test_tokens_are_quantised_once_for_q_k_and_v():
    for layer in (to_int8(Linear(256, 128)), to_fast_int8(Linear(256, 128))):
        x, shift, scale = torch.randn(1, 130, 256), torch.randn(1, 1, 256), torch.randn(1, 1, 256)
        taken = layer.take_modulated(x, shift, scale, 1e-6)
        assert isinstance(taken, Int8Rows)
        normed = torch.nn.functional.layer_norm(x, (256,), eps=1e-6) * (1 + scale) + shift
        assert relative(layer(taken), layer(normed)) < 1e-3


@pytest.mark.parametrize("convert", [to_int8, to_fast_int8])
def test_the_fused_passes_are_the_separate_ones(convert):
    first, second = convert(Linear(128, 256)), convert(Linear(256, 128))
    x, y, gate = torch.randn(2, 70, 128), torch.randn(2, 70, 128), torch.randn(2, 1, 128)
    hidden = torch.nn.functional.gelu(first(y), approximate="tanh")
    want, plain = x + gate * second(hidden), x + second(hidden)
    got = x.clone()
    assert second.add_to(got, first.gelu(first.take(y)), gate) is got
    assert relative(got, want) < 1e-6
    assert relative(second.add_to(x.clone(), hidden), plain) < 1e-6


@pytest.mark.parametrize("change", [lambda model: model, quantize_blocks])
def test_a_kept_text_gives_the_same_velocity_and_is_read_once(change):
    model = change(small_model())
    latents, context = torch.randn(1, 16, 3, 8, 10), model.embed_text(torch.randn(1, 24, 48))
    kept, made = CrossAttentionCache(context), []
    for block in model.blocks:
        block.cross_attn.k.register_forward_hook(lambda *_: made.append(1))
    for time in (900.0, 400.0):
        times = model.embed_time(torch.tensor([[time]]))
        results = []
        for text, given in ((kept, times), (context, None)):
            x, inputs = model.prepare(latents, torch.tensor([[time]]), text, time=given)
            for block in model.blocks:
                x = block(x, inputs)
            results.append(model.finish(x, inputs))
        assert torch.equal(*results)
    assert len(made) == 2 * 1 + 2 * 2, "two blocks: once for the kept text, at both times for the other"
