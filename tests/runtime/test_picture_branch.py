"""Picture to video with CLIP, as Wan2.1 I2V-14B: against diffusers' own pipeline, and from files to a clip."""

import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from turbodiff_kernels.quant import dequantize_tiles

from scripts.bench_pipeline import diffusers_vae
from tests.test_tiny import EventList, attempt
from tests.weights import tiny
from turbodiff.models.image_encoder import MEAN, STD, make_image_encoder
from turbodiff.models.linear import Int8Linear
from turbodiff.models.wan_dit import WanDiT
from turbodiff.runtime.device import Device
from turbodiff.runtime.loras import apply_loras
from turbodiff.runtime.model_cache import ModelCache, dit_config
from turbodiff.runtime.pipeline import encode_text, generate, make_latents
from turbodiff.sampling.conditioning import Noise
from turbodiff.spec.experts import Expert
from turbodiff.spec.models import configs_folder, find_model
from turbodiff.spec.request import Lora
from turbodiff.weights import keymaps, locate

MODEL = """
name = "clipped"
display_name = "Clipped"
kind = "i2v"
turbo = false
about = "Wan2.1 I2V-14B at toy size"

[dit]
dim = 128
ffn_dim = 256
num_heads = 2
num_layers = 2
in_dim = 36
image_dim = 32

[image_encoder]
dim = 32
dim_ffn = 48
num_heads = 2
num_layers = 3
patch = 16
image_side = 128
"""
FILES = """
[[files]]
component = "dit"
names = ["dit.safetensors"]

[[files]]
component = "image_encoder"
names = ["clip.safetensors"]
"""
FIELDS = {"model": "clipped", "sampler": "unipc", "steps": 3, "num_frames": 5, "guidance": 3.0, "shift": 3.0}


@pytest.fixture
def states(tmp_path, monkeypatch):
    """Files of a model "clipped" with the demo's VAE and text encoder; the numbers of its two networks in our names."""
    configs, folder = tmp_path / "configs", tmp_path / "weights"
    shutil.copytree(configs_folder(), configs)
    demo = (configs / "models" / "demo-i2v.toml").read_text()
    rest = demo[demo.index("[text_encoder]") : demo.index("[[files]]")] + FILES
    (configs / "models" / "clipped.toml").write_text(MODEL + rest + demo[demo.index('[[files]]\ncomponent = "vae"') :])
    monkeypatch.setenv("TURBODIFF_CONFIGS", str(configs))
    monkeypatch.setenv(locate.ROOTS_VARIABLE, str(folder))
    folder.mkdir()
    spec = find_model("clipped")
    torch.manual_seed(0)
    dit, clip = WanDiT(dit_config(spec)).state_dict(), make_image_encoder(spec.image_encoder).state_dict()
    clip = {name: value + 0.2 * torch.randn(value.shape) for name, value in clip.items()}
    tiny.save_safetensors(tiny.wan(dit), folder / "dit.safetensors")
    tiny.save_safetensors(tiny.prefixed(clip, "vision_model."), folder / "clip.safetensors")
    pixels = np.random.default_rng(0).integers(0, 255, (128, 128, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "start.png")
    return dit, clip


def running(tmp_path, models=None, **fields):
    fields = {**FIELDS, "image": str(tmp_path / "start.png"), **fields}
    return attempt(tmp_path, models or ModelCache(Device.pick("cpu")), EventList(), **fields)


def theirs(states, models):
    """diffusers' pipeline over the same weights."""
    from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline, WanTransformer3DModel
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    spec, (dit, clip) = models.spec, states
    facts, eyes = spec.dit, spec.image_encoder
    transformer = WanTransformer3DModel(
        num_attention_heads=facts.num_heads, attention_head_dim=facts.head_dim, in_channels=36,
        text_dim=spec.text_encoder.dim, ffn_dim=facts.ffn_dim, num_layers=facts.num_layers, cross_attn_norm=True,
        image_dim=facts.image_dim, added_kv_proj_dim=facts.dim,
    ).eval()  # fmt: skip
    transformer.load_state_dict(tiny.diffusers(dit))
    config = CLIPVisionConfig(
        hidden_size=eyes.dim, intermediate_size=eyes.dim_ffn, num_hidden_layers=eyes.num_layers,
        num_attention_heads=eyes.num_heads, patch_size=eyes.patch, image_size=eyes.image_side, hidden_act="gelu",
    )  # fmt: skip
    encoder = CLIPVisionModel(config).eval()
    encoder.load_state_dict(clip, strict=False)
    processor = CLIPImageProcessor(do_resize=False, do_center_crop=False, image_mean=MEAN, image_std=STD)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return WanImageToVideoPipeline(
        tokenizer=None, text_encoder=None, vae=diffusers_vae(models.get_or_load("vae")), scheduler=scheduler,
        image_processor=processor, image_encoder=encoder, transformer=transformer,
    )  # fmt: skip


def test_the_latents_are_those_of_diffusers_pipeline(states, tmp_path):
    ours = running(tmp_path)
    models, request = ours.models, ours.request
    models.open(request)
    latents = make_latents(ours)
    positive, negative = encode_text(ours)
    pipe = theirs(states, models)
    pipe.set_progress_bar_config(disable=True)
    want = pipe(
        Image.open(tmp_path / "start.png"), prompt_embeds=positive.rows, negative_prompt_embeds=negative.rows,
        height=128, width=128, num_frames=5, num_inference_steps=3, guidance_scale=3.0, output_type="latent",
        latents=Noise(request.seed, (1, *request.shape.latent))(),
    ).frames  # fmt: skip
    assert (latents - want).abs().max() < 1e-4 * want.abs().max()


def test_a_clip_is_made_and_its_picture_phase_is_in_the_plan(states, tmp_path):
    job = running(tmp_path, steps=1)
    result = generate(job)
    started = [event.name for event in job.send.of("phase") if event.state == "start"]
    assert started == ["text_encode", "image_embed", "image_encode", "denoise", "vae_decode", "write"]
    assert started == [phase.name for phase in job.plan.phases] and result.frames == 5
    planned = {phase.name: phase.weights_bytes for phase in job.plan.phases}["image_embed"]
    assert planned == sum(value.numel() * 4 for value in states[1].values())


def test_the_picture_reaches_the_video_through_clip_too(states, tmp_path, monkeypatch):
    job = running(tmp_path, steps=1)
    job.models.open(job.request)
    seen = make_latents(job)
    monkeypatch.setattr("turbodiff.runtime.pipeline.picture_features", lambda *given: torch.zeros(1, 65, 32))
    assert not torch.allclose(seen, make_latents(job), atol=1e-3)


def original(clip):
    """The whole CLIP as Wan2.1 ships it: q, k and v in one tensor, a text half beside the visual one."""
    back = tiny.inverse(keymaps.names_from("image_encoder", "wan"))
    named = {keymaps.rename(name, back): value for name, value in clip.items()}
    for name in [name for name in named if ".attn.to_q." in name]:
        parts = [named.pop(name.replace("to_q", f"to_{part}")) for part in "qkv"]
        named[name.replace("to_q", "to_qkv")] = torch.cat(parts)
    named["cls_embedding"], named["pos_embedding"] = named["cls_embedding"].view(1, 1, -1), named["pos_embedding"][None]
    whole = tiny.prefixed(named | {"head": torch.zeros(32, 16)}, "visual.")
    return whole | {"textual.token_embedding.weight": torch.zeros(8, 4), "log_scale": torch.zeros(())}


LAYOUTS = {
    "transformers": (dict, tiny.save_safetensors, "model.safetensors", "transformers"),
    "comfy": (
        lambda clip: tiny.prefixed(clip, "vision_model.") | {"visual_projection.weight": torch.zeros(16, 32)},
        tiny.save_safetensors, "clip_vision_h.safetensors", "transformers",
    ),
    "wan": (
        original, tiny.save_pth, "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth", "wan"
    ),
    "kijai": (
        lambda clip: {name: value.half() for name, value in original(clip).items() if name.startswith("visual.")},
        tiny.save_safetensors, "open-clip-xlm-roberta-large-vit-huge-14_visual_fp16.safetensors", "wan",
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_picture_encoder_loads_from_every_layout(states, tmp_path, layout):
    change, save, name, told = LAYOUTS[layout]
    folder = Path(locate.model_roots()[0])
    (folder / "clip.safetensors").unlink()
    save(change(states[1]), folder / name)
    models = ModelCache(Device.pick("cpu"))
    models.open(running(tmp_path, models).request)
    loaded = models.get_or_load("image_encoder")
    assert models.files["image_encoder"].layout == told and Path(models.files["image_encoder"].path).name == name
    for key, value in loaded.state_dict().items():
        meant = states[1][key].half().float() if layout == "kijai" else states[1][key]
        assert torch.equal(value, meant), key


def test_another_clip_is_named(states, tmp_path):
    folder = Path(locate.model_roots()[0])
    wide = {name: torch.cat((value, value)) if name.endswith(".bias") else value for name, value in states[1].items()}
    tiny.save_safetensors(tiny.prefixed(wide, "vision_model."), folder / "clip_vit_l.safetensors")
    (one,) = [one for one in locate.inventory().passed_over if one.path.endswith("clip_vit_l.safetensors")]
    assert (one.code, one.got[:22]) == ("no_model", "a CLIP picture encoder")


def test_int8_gguf_and_loras_reach_the_branch_for_a_picture(states, tmp_path):
    """Of each kind of file, what `k_img` holds; and a LoRA in diffusers' names on both kinds of weights."""
    (dit, _), models, folder = states, ModelCache(Device.pick("cpu")), Path(locate.model_roots()[0])
    name, meant = "blocks.1.cross_attn.k_img", dit["blocks.1.cross_attn.k_img.weight"]
    models.open(running(tmp_path, models, quant_linear="on").request)
    int8 = models.get_or_load("dit")
    layer = int8.get_submodule(name)
    assert isinstance(layer, Int8Linear) and not isinstance(int8.img_emb.proj[1], Int8Linear)
    assert (dequantize_tiles(layer.int8_weight, layer.scale) - meant).abs().max() < 0.02 * meant.abs().max()
    models.open(running(tmp_path, models).request)
    plain = models.get_or_load("dit")
    assert torch.equal(plain.get_submodule(name).weight, meant)

    pairs = {"blocks.1.attn2.add_k_proj": (128, 128), "condition_embedder.image_embedder.ff.net.0.proj": (32, 32)}
    lora = {}
    for at, (rows, columns) in pairs.items():
        lora |= {
            f"transformer.{at}.lora_B.weight": torch.randn(rows, 4),
            f"transformer.{at}.lora_A.weight": torch.randn(4, columns),
        }
    tiny.save_safetensors(lora, tmp_path / "a.safetensors")
    on = [Lora(path=str(tmp_path / "a.safetensors"), strength=0.5)]
    up, down = (lora[f"transformer.blocks.1.attn2.add_k_proj.lora_{half}.weight"] for half in "BA")
    changed, notes = apply_loras(plain, on, Expert.SINGLE)
    assert not notes and torch.allclose(changed.get_submodule(name).weight, meant + 0.5 * up @ down, atol=1e-5)
    assert not torch.equal(changed.img_emb.proj[1].weight, plain.img_emb.proj[1].weight)
    changed, notes = apply_loras(int8, on, Expert.SINGLE)
    branch = changed.get_submodule(name)
    assert not notes and torch.allclose(branch.up @ branch.down, 0.5 * up @ down, atol=1e-5)

    (folder / "dit.safetensors").unlink()
    if find_spec("gguf"):
        tiny.save_gguf(tiny.wan(dit), folder / "wan2.1-i2v-14b-480p-Q8_0.gguf")
        models.open(running(tmp_path, models).request)
        loaded = models.get_or_load("dit").get_submodule(name).weight
        assert models.files["dit"].layout == "wan-gguf" and (loaded - meant).abs().max() < 0.01 * meant.abs().max()
