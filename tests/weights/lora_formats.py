"""Every published form of a Wan LoRA as a small file: names and dtypes as published, shapes reduced to a tiny DiT.

A row makes the tensors, the metadata and the config beside the file; `scale` is what the change must be, times B @ A.
Sources: musubi-tuner, kohya, ComfyUI, Kijai and LightX2V files on the hub; PEFT and diffusers' save_lora_weights;
diffusion-pipe, ai-toolkit, SimpleTuner, DiffSynth-Studio, LyCORIS as their code names things. `lora_formats.md` lists
them with what comes of each.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.weights import tiny
from turbodiff.weights import keymaps

RANK, ALPHA = 4, 16.0
LAYERS = ("blocks.0.self_attn.q", "blocks.1.cross_attn.v", "blocks.0.ffn.0", "blocks.1.ffn.2")
THEIRS = tiny.inverse(keymaps.names_from("dit", "diffusers"))
Halves = Mapping[str, tuple[Tensor, Tensor]]  # layer -> A [rank, in], B [out, rank]


def named(
    prefix: str = "", style: str = "wan", down: str = "lora_A.weight", up: str = "lora_B.weight", **alpha: object
):
    """A writer of pairs: a prefix, a dialect ("wan", "diffusers", "flat"), the endings, and an alpha of some dtype."""

    def write(halves: Halves) -> dict[str, Tensor]:
        state = {}
        for layer, (a, b) in halves.items():
            name = THEIRS[layer] if style.startswith("diffusers") else layer
            flat = {"half-flat": name.replace("blocks.", "blocks_", 1)}.get(style, name.replace(".", "_"))
            name = prefix + (flat if style.endswith("flat") else name)
            state |= {f"{name}.{down}": a.clone(), f"{name}.{up}": b.clone()}
            if "alpha" in alpha:
                state[f"{name}.alpha"] = torch.as_tensor(alpha["alpha"]).clone()
        return state

    return write


KOHYA = {"down": "lora_down.weight", "up": "lora_up.weight"}


@dataclass(frozen=True)
class Form:
    """One published form."""

    source: str
    write: Callable[[Halves], dict[str, Tensor]]
    scale: float = ALPHA / RANK
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, object] | None = None


def flat_metadata(**more: object) -> dict[str, str]:
    """SimpleTuner: the config's keys flat in the metadata."""
    told = {"r": RANK, "lora_alpha": ALPHA, **more}
    return {f"transformer.{key}": str(value) for key, value in told.items()}


def embedded(**more: object) -> dict[str, str]:
    """diffusers: the same as one JSON."""
    told = {"r": RANK, "lora_alpha": ALPHA, "use_rslora": False, "alpha_pattern": {}, "rank_pattern": {}, **more}
    return {"format": "pt", "lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in told.items()})}


def peft_config(**more: object) -> dict[str, object]:
    """adapter_config.json."""
    return {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "use_dora": False, **more}


def config_under(key: str, *above: str, **told: object) -> dict[str, str]:
    """A config as JSON under some key of the metadata, inside of mappings with the names `above`."""
    config: object = {"r": RANK, "lora_alpha": ALPHA, "init_lora_weights": True, **told} if "rank" not in told else told
    for name in reversed(above):
        config = {name: config, "steps": 100}
    return {"format": "pt", key: json.dumps(config)}


diffusers = named("transformer.", "diffusers")
peft = named("base_model.model.")
FORMS = {
    "comfy": Form(
        "ComfyUI, Kijai, lightx2v: diffusion_model., lora_down", named("diffusion_model.", **KOHYA, alpha=ALPHA)
    ),
    "comfy-peft": Form("ai-toolkit, diffusion-pipe: diffusion_model., lora_A", named("diffusion_model."), 1.0),
    "diffusion-pipe": Form(
        "diffusion-pipe: adapter_config.json beside", named("diffusion_model."), config=peft_config()
    ),
    "kohya": Form("musubi-tuner: lora_unet_", named("lora_unet_", "flat", **KOHYA, alpha=ALPHA)),
    "kohya-half": Form(
        "WanVideoWrapper 869: lora_unet_blocks_29.self_attn.q", named("lora_unet_", "half-flat", **KOHYA, alpha=ALPHA)
    ),
    "kohya-double": Form("Kijai, extracted: lora_unet__", named("lora_unet__", "flat", **KOHYA, alpha=ALPHA)),
    "kohya-diffusers": Form(
        "lora_transformer_, diffusers' layers", named("lora_transformer_", "diffusers-flat", **KOHYA, alpha=ALPHA)
    ),
    "kohya-metadata": Form(
        "ss_network_alpha alone",
        named("lora_unet_", "flat", **KOHYA),
        metadata={"ss_network_alpha": "16.0", "ss_network_dim": "4"},
    ),
    "lycoris": Form("LyCORIS LoCon: lycoris_", named("lycoris_", "flat", **KOHYA, alpha=ALPHA)),
    "diffusers": Form("diffusers before 0.34: no alpha", diffusers, 1.0),
    "diffusers-metadata": Form("diffusers: lora_adapter_metadata", diffusers, metadata=embedded()),
    "diffusers-rslora": Form("diffusers: use_rslora", diffusers, ALPHA / 2, embedded(use_rslora=True)),
    "diffusers-pattern": Form(
        "diffusers: alpha_pattern of all",
        diffusers,
        2.0,
        embedded(alpha_pattern={"to_q": 8, "to_v": 8, "ffn.net.0.proj": 8, "ffn.net.2": 8}),
    ),
    "simpletuner": Form("SimpleTuner: flat keys", diffusers, metadata=flat_metadata()),
    "simpletuner-rslora": Form(
        "SimpleTuner: flat, rsLoRA as text", diffusers, ALPHA / 2, flat_metadata(use_rslora="True")
    ),
    "old-diffusers": Form(
        "diffusers 0.2x: lora.down", named("transformer.", "diffusers", "lora.down.weight", "lora.up.weight"), 1.0
    ),
    "peft": Form("PEFT: adapter_config.json", peft, config=peft_config()),
    "peft-rslora": Form("PEFT: rsLoRA", peft, ALPHA / 2, config=peft_config(use_rslora=True)),
    "peft-expression": Form(
        "PEFT: alpha_pattern with an expression", peft, 2.0, config=peft_config(alpha_pattern={r"blocks\.\d+\..*": 8})
    ),
    "peft-adapter": Form(
        "PEFT's state_dict: .default",
        named("base_model.model.", "wan", "lora_A.default.weight", "lora_B.default.weight"),
        1.0,
    ),
    "peft-adapter-0": Form(
        "diffusers' state_dict: .default_0",
        named("transformer.", "diffusers", "lora_A.default_0.weight", "lora_B.default_0.weight"),
        1.0,
    ),
    "diffsynth": Form(
        "DiffSynth-Studio: bare, .default", named("", "wan", "lora_A.default.weight", "lora_B.default.weight"), 1.0
    ),
    "diffsynth-pipe": Form(
        "DiffSynth-Studio: pipe.dit.", named("pipe.dit.", "wan", "lora_A.default.weight", "lora_B.default.weight"), 1.0
    ),
    "compiled": Form("torch.compile: _orig_mod.", named("_orig_mod."), 1.0),
    "own-name": Form("an adapter's own name before the layer", named("ghibli-style.model."), 1.0),
    "finetrainers": Form("finetrainers: lora_config", diffusers, metadata=config_under("lora_config")),
    "finetrainers-rslora": Form(
        "a config of any name: rsLoRA", diffusers, ALPHA / 2, config_under("peft_config", use_rslora=True)
    ),
    "config-inside": Form(
        "a config inside of a trainer's", named("diffusion_model."), metadata=config_under("cfg", "network", "default")
    ),
    "config-rank": Form(
        "rank and alpha as JSON", named("diffusion_model."), metadata=config_under("lora_config", rank=4, alpha=16)
    ),
    "config-of-text": Form(
        "the text encoder's config beside the DiT's",
        diffusers,
        metadata={
            "a": json.dumps({"text_encoder.lora_alpha": 1, "text_encoder.r": 4, "transformer.lora_alpha": 16}),
            "ss_tag_frequency": json.dumps({"10_cat": {"alpha": 3, "r": 2}}),
            "workflow": json.dumps({"1": {"class_type": "Train", "inputs": {"rank": 64, "alpha": 1}}}),
        },
    ),
    "configs-agree": Form(
        "three configs that agree",
        peft,
        metadata=config_under("lora_config") | {"alpha": "16", "rank": "4"},
        config=peft_config(),
    ),
    "begun-eva": Form("PEFT: EVA leaves the base alone", peft, config=peft_config(init_lora_weights="eva")),
    "converted-back": Form("PEFT: PiSSA converted to LoRA", peft, config=peft_config(init_lora_weights=True)),
    "kohya-resized": Form(
        "kohya's resize: Dynamic in the metadata",
        named("lora_unet_", "flat", **KOHYA, alpha=ALPHA),
        metadata={"ss_network_alpha": "Dynamic", "ss_network_dim": "Dynamic"},
    ),
    "alpha-before-rslora": Form(
        "LyCORIS: alpha holds the root of rsLoRA already",
        named("lycoris_", "flat", **KOHYA, alpha=ALPHA),
        metadata={"use_rslora": "True", "lora_alpha": "8"},
    ),
    "sglang": Form(
        "alpha alone in the metadata (lightx2v)", named("diffusion_model."), metadata={"alpha": "16", "rank": "4"}
    ),
    "lora-alpha": Form("lora_alpha alone in the metadata", named("diffusion_model."), metadata={"lora_alpha": "16"}),
    "alpha-int64": Form("alpha int64", named("diffusion_model.", **KOHYA, alpha=torch.tensor(16))),
    "alpha-int32": Form("alpha int32", named("diffusion_model.", **KOHYA, alpha=torch.tensor(16, dtype=torch.int32))),
    "alpha-uint8": Form("alpha uint8", named("diffusion_model.", **KOHYA, alpha=torch.tensor(16, dtype=torch.uint8))),
    "alpha-bf16": Form(
        "alpha bfloat16", named("diffusion_model.", **KOHYA, alpha=torch.tensor(16, dtype=torch.bfloat16))
    ),
    "alpha-vector": Form("alpha of one axis", named("diffusion_model.", **KOHYA, alpha=torch.tensor([16.0]))),
    "alpha-per-rank": Form(
        "the same alpha for each rank", named("diffusion_model.", **KOHYA, alpha=torch.full((4,), 16.0))
    ),
    "alpha-zero": Form("alpha 0", named("diffusion_model.", **KOHYA, alpha=0.0), 0.0),
    "alpha-wins": Form(
        "the tensor before the metadata", named("diffusion_model.", **KOHYA, alpha=8.0), 2.0, {"ss_network_alpha": "1"}
    ),
}


def halves() -> dict[str, tuple[Tensor, Tensor]]:
    """The same A and B each time."""
    generator, config = torch.Generator().manual_seed(0), tiny.CONFIG
    wide = {"ffn.0": (config.ffn_dim, config.dim), "ffn.2": (config.dim, config.ffn_dim)}
    made = {}
    for layer in LAYERS:
        out, width = wide.get(layer[-5:], (config.dim, config.dim))
        a = torch.randn(RANK, width, generator=generator) / math.sqrt(width)
        made[layer] = (a, torch.randn(out, RANK, generator=generator) / 8)
    return made
