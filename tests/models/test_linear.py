"""The two INT8 modes of a transformer: what each is, and how far they are from the weights and from each other."""

from functools import partial

import pytest
import torch
from torch import nn
from turbodiff_kernels.quant.reference import TILE, dequantize_tiles

from turbodiff.memory_lab.dry_run import Ledger
from turbodiff.models import linear
from turbodiff.models.linear import (
    INT8_VARIABLE,
    Int8Linear,
    Int8Rows,
    Linear,
    feed_forward_,
    int8_blocks,
    int8_mode,
    linear_float32,
    linear_gelu,
    norm_modulate,
    residual_add_,
    to_int8,
)
from turbodiff.models.wan_dit import CrossAttentionCache, WanConfig, WanDiT
from turbodiff.spec.errors import RequestError
from turbodiff.spec.shapes import INT8_TILE

SMALL = WanConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=2, text_dim=48)


to_tiles, to_rows = partial(to_int8, mode="tiles"), partial(to_int8, mode="tokens")
tiles_blocks, rows_blocks = partial(int8_blocks, mode="tiles"), partial(int8_blocks, mode="tokens")


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
    tiled = to_tiles(layer)(x)
    assert relative(tiled, want) < 0.02
    assert relative(to_rows(layer)(x), want) < 0.02
    from_tiles = to_rows(to_tiles(layer))
    assert not from_tiles.tiled
    assert relative(from_tiles(x), want) < 0.02
    assert 0 < relative(from_tiles(x), tiled) < 0.02


def test_tiles_become_rows_with_half_a_step_of_rounding():
    layer = to_tiles(Linear(300, 200))
    before = dequantize_tiles(layer.int8_weight, layer.scale)
    fast = to_rows(layer)
    error = (fast.int8_weight * fast.scale[:, None] - before).abs()
    assert fast.scale.shape == (200,)
    assert error.le(fast.scale[:, None] * 0.5001).all()


@pytest.mark.parametrize("source", ["weights", "tiles"])
def test_a_model_in_the_fast_mode_agrees_with_the_tiles(source):
    plain, tiled = velocity(small_model()), velocity(tiles_blocks(small_model()))
    model = rows_blocks(small_model() if source == "weights" else tiles_blocks(small_model()))
    layers = [module for module in model.blocks.modules() if isinstance(module, Linear | Int8Linear)]
    assert len(layers) == 20
    assert all(isinstance(layer, Int8Linear) and not layer.tiled for layer in layers)
    fast = velocity(model)
    assert relative(fast, tiled) < 0.02
    assert relative(fast, plain) < 0.02


@pytest.mark.parametrize("source", ["weights", "tiles"])
def test_the_mode_is_the_environments_to_choose(source, monkeypatch):
    def model():
        return small_model() if source == "weights" else tiles_blocks(small_model())

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
    layer = to_rows(Linear(64, 128))
    rows = layer.quantize_input(torch.randn(1, 300, 64))
    whole = linear_gelu(rows, layer)
    monkeypatch.setattr("turbodiff.models.linear.INT8_PART_TOKENS", 128)
    parts = linear_gelu(rows, layer)
    assert torch.equal(parts.values, whole.values) and torch.equal(parts.scale, whole.scale)


def test_the_plan_counts_with_the_tile_of_the_kernels():
    """The kernels import nothing of ours and the plan nothing of theirs: the number stands twice."""
    assert TILE == INT8_TILE


def test_tokens_are_quantised_once_for_q_k_and_v():
    for layer in (to_tiles(Linear(256, 128)), to_rows(Linear(256, 128))):
        x, shift, scale = torch.randn(1, 130, 256), torch.randn(1, 1, 256), torch.randn(1, 1, 256)
        taken = norm_modulate(x, shift, scale, 1e-6, layer)
        assert isinstance(taken, Int8Rows)
        normed = torch.nn.functional.layer_norm(x, (256,), eps=1e-6) * (1 + scale) + shift
        assert relative(layer(taken), layer(normed)) < 1e-3


@pytest.mark.parametrize("convert", [to_tiles, to_rows])
def test_the_fused_passes_are_the_separate_ones(convert):
    first, second = convert(Linear(128, 256)), convert(Linear(256, 128))
    x, y, gate = torch.randn(2, 70, 128), torch.randn(2, 70, 128), torch.randn(2, 1, 128)
    hidden = torch.nn.functional.gelu(first(y), approximate="tanh")
    want, plain = x + gate * second(hidden), x + second(hidden)
    got = x.clone()
    assert residual_add_(got, second, linear_gelu(y, first), gate) is got
    assert relative(got, want) < 1e-6
    assert relative(residual_add_(x.clone(), second, hidden), plain) < 1e-6


@pytest.mark.parametrize("columns", [1 << 20, 40])
def test_hidden_values_made_by_columns_are_those_made_at_once(columns, monkeypatch):
    monkeypatch.setattr(linear, "HIDDEN_COLUMNS", columns)
    first, second = Linear(64, 96), Linear(96, 64)
    x, shift, scale, gate = torch.randn(2, 70, 64), *(torch.randn(2, 1, 64) for _ in range(3))
    y = torch.nn.functional.layer_norm(x, (64,), eps=1e-6) * (1 + scale) + shift
    expected = x + gate * second(torch.nn.functional.gelu(first(y), approximate="tanh"))
    got = x.clone()
    assert feed_forward_(got, shift, scale, gate, 1e-6, first, second) is got
    assert relative(got, expected) < 1e-6
    with torch.enable_grad():
        assert relative(feed_forward_(x, shift, scale, gate, 1e-6, first, second), expected) < 1e-6


@pytest.mark.parametrize("change", [lambda model: model, tiles_blocks])
def test_a_kept_text_gives_the_same_velocity_and_is_read_once(change):
    model = change(small_model())
    latents, context = torch.randn(1, 16, 3, 8, 10), model.embed_text(torch.randn(1, 24, 48))
    kept, anew, made = CrossAttentionCache(context), CrossAttentionCache(context, keep=False), []
    for block in model.blocks:
        block.cross_attn.k.register_forward_hook(lambda *_: made.append(1))
    for time in (900.0, 400.0):
        times = model.embed_time(torch.tensor([[time]]))
        results = []
        for text, given in ((kept, times), (anew, times), (context, None)):
            x, inputs = model.prepare(latents, torch.tensor([[time]]), text, time=given)
            for index, block in enumerate(model.blocks):
                x = block(x, inputs, index)
            results.append(model.finish(x, inputs))
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert not anew.keys_values
    assert len(made) == 2 * 1 + 2 * 2 + 2 * 2, "two blocks: once for the kept text, at both times for the others"


def test_the_time_projection_of_14b_is_never_whole_in_float32():
    """629 MB a step, beside everything else that a card holds."""
    ledger = Ledger("meta")
    with torch.device("meta"), torch.inference_mode():
        layer, x = nn.Linear(5120, 6 * 5120).to(torch.bfloat16), torch.empty(1, 5120)
        for tensor in (layer.weight, layer.bias, x):
            ledger.see(tensor)
        before = ledger.live_bytes
        with ledger:
            assert linear_float32(layer, x).shape == (1, 6 * 5120)
    assert ledger.peak_bytes - before < 70 * 2**20


def test_parts_of_a_time_projection_are_the_whole(monkeypatch):
    monkeypatch.setattr(linear, "FLOAT32_ELEMENTS", 7 * 64)
    layer, x = nn.Linear(64, 384).to(torch.bfloat16), torch.randn(2, 3, 64)
    expected = torch.nn.functional.linear(x, layer.weight.float(), layer.bias.float())
    torch.testing.assert_close(linear_float32(layer, x), expected, rtol=1e-6, atol=1e-6)
