"""The transformer: the published names and shapes, the numbers of diffusers, and what the runtime relies on."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.weights.tiny import inverse
from turbodiff.models.attention import AttentionPlan, attention, rope_tables
from turbodiff.models.linear import Int8Linear
from turbodiff.models.patches import patchify, unpatchify
from turbodiff.models.wan_dit import WanConfig, WanDiT
from turbodiff.spec.errors import RequestError
from turbodiff.weights.keymaps import names_from, rename

PUBLISHED = {
    "1.3B": (WanConfig(1536, 8960, 12, 30), 885, 1185, 1_419_492_160),
    "14B": (WanConfig(5120, 13824, 40, 40), 1175, 1575, 14_289_152_064),
    "A14B": (WanConfig(5120, 13824, 40, 40, in_dim=36), 1175, 1575, 14_289_561_664),
    # 16,394,878,784 without proj_l: 2 bytes each, 2 more for the patch embedding, which is float32 there, and a header
    # are the 32,791,377,504 bytes of wan2.1_i2v_480p_14B_fp16.safetensors
    "I2V-14B": (WanConfig(5120, 13824, 40, 40, in_dim=36, image_dim=1280), 1383, 1863, 16_395_539_264),
}
SMALL = WanConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=2, text_dim=48)
PICTURE = WanConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=2, text_dim=48, in_dim=36, image_dim=80)


def changed(config: WanConfig, **fields) -> WanConfig:
    return WanConfig(**{**vars(config), **fields})


def published_shapes(config: WanConfig) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of TurboDiffusion's files (research: its own model classes on the meta device)."""
    d, f, head = config.dim, config.ffn_dim, config.head_dim
    linears = {"patch_embedding": (d, config.in_dim * 4), "text_embedding.0": (d, config.text_dim)}
    linears |= {"text_embedding.2": (d, d), "time_embedding.0": (d, 256), "time_embedding.2": (d, d)}
    linears |= {"time_projection.1": (6 * d, d), "head.head": (64, d)}
    shapes = {"head.modulation": (1, 2, d)}
    for i in range(config.num_layers):
        block = f"blocks.{i}."
        inner = {f"{kind}.{name}": (d, d) for kind in ("self_attn", "cross_attn") for name in "qkvo"}
        inner |= {"ffn.0": (f, d), "ffn.2": (d, f)}
        if config.image_dim:
            inner |= {"cross_attn.k_img": (d, d), "cross_attn.v_img": (d, d)}
            shapes[f"{block}cross_attn.norm_k_img.weight"] = (d,)
        for name, (rows, columns) in inner.items():
            if config.quant_linear:
                shapes[f"{block}{name}.int8_weight"] = (rows, columns)
                shapes[f"{block}{name}.scale"] = (math.ceil(rows / 128), math.ceil(columns / 128))
                shapes[f"{block}{name}.bias"] = (rows,)
            else:
                linears[block + name] = (rows, columns)
        linears[f"{block}self_attn.attn_op.local_attn.proj_l"] = (head, head)
        shapes[f"{block}modulation"] = (1, 6, d)
        shapes |= {f"{block}norm3.{leaf}": (d,) for leaf in ("weight", "bias")}
        shapes |= {f"{block}{kind}.norm_{x}.weight": (d,) for kind in ("self_attn", "cross_attn") for x in "qk"}
    if width := config.image_dim:
        linears |= {"img_emb.proj.1": (width, width), "img_emb.proj.3": (d, width)}
        shapes |= {f"img_emb.proj.0.{leaf}": (width,) for leaf in ("weight", "bias")}
        shapes |= {f"img_emb.proj.4.{leaf}": (d,) for leaf in ("weight", "bias")}
    for name, (rows, columns) in linears.items():
        shapes |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
    return shapes


@pytest.mark.parametrize("quant", [False, True], ids=["plain", "quant"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_keys_and_shapes_are_the_published_ones(name, quant):
    config, plain_keys, quant_keys, parameters = PUBLISHED[name]
    config = changed(config, sla=True, quant_linear=quant)
    with torch.device("meta"):
        state = WanDiT(config).state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == published_shapes(config)
    assert len(state) == (quant_keys if quant else plain_keys)
    if not quant:
        assert sum(value.numel() for value in state.values()) == parameters


def inputs_for(config: WanConfig, *, batch=2, grid=(3, 8, 10), rows=24) -> tuple:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    timesteps = torch.linspace(987.5, 400, batch)[:, None]
    condition = draw(batch, 20, *grid) if config.in_dim == 36 else None
    picture = draw(batch, 257, config.image_dim) if config.image_dim else None
    return draw(batch, 16, *grid), timesteps, draw(batch, rows, config.text_dim), condition, picture


def random_model(config: WanConfig) -> WanDiT:
    torch.manual_seed(1)
    return WanDiT(config).requires_grad_(False)


@pytest.mark.parametrize("config", [SMALL, changed(SMALL, in_dim=36), changed(SMALL, num_heads=4), PICTURE])
def test_equals_diffusers_on_shared_weights(config):
    from diffusers import WanTransformer3DModel

    model = random_model(config)
    theirs = WanTransformer3DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        in_channels=config.in_dim,
        text_dim=config.text_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
        cross_attn_norm=True,
        image_dim=config.image_dim or None,
        added_kv_proj_dim=config.dim if config.image_dim else None,
    ).eval()
    table = inverse(names_from("dit", "diffusers"))
    state = {rename(name, table): value for name, value in model.state_dict().items()}
    state["patch_embedding.weight"] = state["patch_embedding.weight"].view_as(theirs.patch_embedding.weight)
    theirs.load_state_dict(state)
    rows = 512 if config.image_dim else 24  # they cut the picture's rows off after 512 of text
    latents, timesteps, text, condition, picture = inputs_for(config, rows=rows)
    x = latents if condition is None else torch.cat((latents, condition), dim=1)
    with torch.no_grad():
        want = theirs(x, timesteps.flatten(), text, picture).sample
        assert (model(latents, timesteps, text, condition, picture) - want).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["dense", "sage", "sla", "sagesla"])
def test_with_and_without_gradients_agree(kind):
    model, args = random_model(changed(SMALL, sla=True)), inputs_for(SMALL)
    plan = AttentionPlan(kind, 0.5)
    kept = [None if value is None else value.clone() for value in args]
    with torch.no_grad():
        fast = model(*args, attention=plan, ffn_chunks=2)
    assert torch.allclose(fast, model(*args, attention=plan), atol=1e-5)
    assert all(a is b or torch.equal(a, b) for a, b in zip(args, kept, strict=True)), "inputs were overwritten"


@pytest.mark.parametrize("config", [SMALL, PICTURE], ids=["text", "picture"])
def test_every_parameter_learns_under_bf16_autocast(config):
    model = WanDiT(config)
    with torch.autocast("cpu", torch.bfloat16):
        velocity = model(*inputs_for(config))
        velocity.square().mean().backward()
    assert velocity.dtype == torch.float32
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_blocks_may_be_walked_one_by_one():
    model, (latents, timesteps, text, *_) = random_model(SMALL), inputs_for(SMALL)
    with torch.no_grad():
        rope = rope_tables(3, 4, 5, SMALL.head_dim)
        x, inputs = model.prepare(latents, timesteps, model.embed_text(text), rope=rope)
        for index, block in enumerate(model.blocks):
            x = block(x, inputs, index)
        assert torch.equal(model.finish(x, inputs), model(latents, timesteps, text))


def test_a_bf16_model_sees_bf16_timesteps():
    model, (latents, _, text, *_) = random_model(SMALL).bfloat16(), inputs_for(SMALL, batch=1)
    with torch.no_grad():
        exact, rounded, other = (model(latents, torch.tensor([[t]]), text) for t in (987.6543, 988.0, 984.0))
    assert torch.equal(exact, rounded) and not torch.equal(exact, other)


def test_dense_ignores_the_linear_branch_and_full_sla_without_it_is_dense():
    model, args = random_model(changed(SMALL, sla=True)), inputs_for(SMALL)
    with torch.no_grad():
        dense = model(*args)
        assert torch.allclose(model(*args, attention=AttentionPlan("sla", 1.0)), dense, atol=1e-4)
        for block in model.blocks:
            block.self_attn.proj_l.bias.fill_(1.0)
        assert torch.equal(model(*args), dense)
        assert not torch.allclose(model(*args, attention=AttentionPlan("sla", 1.0)), dense, atol=1e-2)


@pytest.mark.parametrize("kind", ["sla", "sagesla"])
def test_sparse_attention_on_weights_without_its_projections_is_one_clear_error(kind):
    model, args = random_model(SMALL), inputs_for(SMALL)
    with torch.no_grad(), pytest.raises(RequestError, match="not trained for sparse-linear attention") as told:
        model(*args, attention=AttentionPlan(kind))
    assert (told.value.code, told.value.field, told.value.got) == ("attention_needs_projections", "attention", kind)


def test_weight_two_is_the_same_as_saying_the_word_twice():
    q, k, v = torch.randn(3, 1, 6, 2, 64)
    twice = attention(q, torch.cat((k, k[:, 2:3]), 1), torch.cat((v, v[:, 2:3]), 1))
    bias = torch.zeros(1, 1, 1, 6)
    bias[..., 2] = math.log(2)
    assert torch.allclose(attention(q, k, v, bias), twice, atol=1e-6)


def test_prompt_weights_reach_the_video():
    model, args = random_model(SMALL), inputs_for(SMALL)
    with torch.no_grad():
        plain, zero = model(*args), model(*args, context_bias=torch.zeros(2, 1, 1, 24))
        heavy = model(*args, context_bias=torch.full((2, 1, 1, 24), 0.5).index_fill_(3, torch.tensor([0]), 1.0))
    assert torch.allclose(plain, zero, atol=1e-5) and not torch.allclose(plain, heavy, atol=1e-5)


@pytest.mark.parametrize("config", [SMALL, PICTURE], ids=["text", "picture"])
def test_an_int8_model_stays_close_to_its_weights(config):
    from turbodiff_kernels.quant import quantize_tiles

    model, quant = random_model(config), random_model(changed(config, quant_linear=True))
    state = model.state_dict()
    for name, layer in quant.named_modules():
        if isinstance(layer, Int8Linear):
            state[f"{name}.int8_weight"], state[f"{name}.scale"] = quantize_tiles(state.pop(f"{name}.weight"))
    quant.load_state_dict(state)
    args = inputs_for(config)
    with torch.no_grad():
        want, got = model(*args), quant(*args)
    assert 0 < (got - want).norm() / want.norm() < 0.03


@pytest.mark.parametrize("kind", ["dense", "sage", "sla", "sagesla"])
def test_a_dry_run_never_sees_the_score_matrix(kind):
    config = changed(SMALL, sla=True)
    with torch.device("meta"):
        model = WanDiT(config).bfloat16()
        args = torch.empty(1, 16, 9, 64, 64), torch.empty(1, 1), torch.empty(1, 512, 48)
    tokens = 9 * 32 * 32
    with torch.no_grad(), LargestTensor() as seen:
        velocity = model(*args, attention=AttentionPlan(kind))
    assert velocity.shape == args[0].shape and velocity.dtype == torch.float32
    assert seen.elements <= tokens * config.ffn_dim < tokens**2


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


def test_patches_come_back_where_they_were():
    x = torch.randn(2, 16, 3, 8, 10)
    tokens = patchify(x)
    assert tokens.shape == (2, 3 * 4 * 5, 64)
    by_patch_then_channel = tokens.unflatten(2, (16, 4)).transpose(2, 3).flatten(2)
    assert torch.equal(unpatchify(by_patch_then_channel, (3, 4, 5)), x)


def test_rope_splits_a_head_by_formula():
    for head_dim, channels in ((128, (44, 42, 42)), (64, (24, 20, 20))):
        turned = [
            2 * int((rope_tables(*grid, head_dim)[1][1] != 0).sum()) for grid in ((2, 1, 1), (1, 2, 1), (1, 1, 2))
        ]
        assert tuple(turned) == channels, "one step along an axis turns its own channels only"


def test_rope_starts_unrotated_and_turns_fastest_first():
    cos, sin = rope_tables(2, 3, 4, 128)
    assert cos.shape == sin.shape == (24, 64)
    assert (cos[0] == 1).all() and (sin[0] == 0).all()
    assert math.isclose(sin[1, 22 + 21], math.sin(1), rel_tol=1e-6)  # one column to the right, its first frequency
    assert math.isclose(sin[4, 22], math.sin(1), rel_tol=1e-6)  # one row down
    assert math.isclose(sin[12, 0], math.sin(1), rel_tol=1e-6)  # one frame later
