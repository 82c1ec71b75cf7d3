"""What a file that is none of ours is, in words: from names of its tensors, from its sizes, from its first bytes."""

from collections.abc import Mapping

# Files of other networks: (a piece of some key, what it is), the telling ones first
OTHERS = (
    ("lora_", "a LoRA: use it with --lora"), (".hada_w1", "a LoRA: use it with --lora"),
    (".lokr_w", "a LoRA: use it with --lora"),
    ("vace", "Wan VACE"),
    ("casual_audio_encoder", "Wan-S2V"), ("audio_injector", "Wan-S2V"),
    ("audio_proj", "MultiTalk or InfiniteTalk"), ("audio_cross_attn", "MultiTalk or InfiniteTalk"),
    ("face_adapter", "Wan-Animate"), ("motion_encoder", "Wan-Animate"),
    ("control_adapter", "Wan Fun-Control (camera)"), ("ref_conv", "Wan Fun-Control (reference)"),
    ("recam", "ReCamMaster"), ("cam_encoder", "ReCamMaster"),
    ("to_gate_compress", "FastWan with the gates of its sparse attention"),
    ("fps_projection", "SkyReels-V2 (diffusion forcing)"), ("fps_embedding", "SkyReels-V2 (diffusion forcing)"),
    ("dwpose_embedding", "UniAnimate"), ("randomref_embedding", "UniAnimate"),
    ("emb_pos", "Wan2.1 FLF2V (first and last picture)"),
    ("controlnet", "a ControlNet"), ("control_blocks", "a ControlNet"),
    ("downsamples.0.downsamples", "the VAE of Wan2.2 TI2V-5B"), ("avg_shortcut", "the VAE of Wan2.2 TI2V-5B"),
    ("visual.transformer.resblocks", "a CLIP picture encoder (open-clip)"),
    ("vision_model.encoder.layers", "a CLIP picture encoder"), ("text_model.encoder", "a CLIP text encoder"),
    ("audio", "an audio network"),
    ("double_blocks", "a FLUX or Hunyuan network"), ("joint_blocks", "a Stable Diffusion 3 network"),
    ("input_blocks", "a Stable Diffusion network"), ("down_blocks", "a U-Net or VAE of another model"),
    ("transformer_blocks", "another diffusion transformer"), ("model.layers.", "a language model"),
    ("blk.", "a language model"), ("decoder.1.conv", "a small decoder for previews (TAEHV)"),
    ("upsamplers", "a VAE of another model"), ("optimizer", "the state of a training"),
)  # fmt: skip
# Sizes of relatives: (component, the numbers that tell, what it is)
FAMILY: tuple[tuple[str, Mapping[str, int], str], ...] = (
    ("dit", {"dim": 3072, "in_dim": 48}, "Wan2.2 TI2V-5B"),
    ("dit", {"in_dim": 32}, "Wan Fun-Control"),
    ("dit", {"in_dim": 48}, "Wan Fun-Control"),
    ("dit", {"in_dim": 52}, "Wan2.2 Fun-Control"),
    ("dit", {"dim": 1536, "in_dim": 36}, "Wan2.1 Fun-InP 1.3B"),
    ("image_encoder", {}, "a CLIP picture encoder of another size: Wan2.1 image to video needs ViT-H/14"),
    ("vae", {"z_dim": 48}, "the VAE of Wan2.2 TI2V-5B"),
    ("vae", {"z_dim": 16}, "a smaller VAE for Wan (LightVAE)"),
    ("text_encoder", {"vocab": 32128}, "T5 of FLUX and Stable Diffusion 3: Wan needs UMT5"),
)
# What files that are no weights begin with, in lower case and without spaces
NOT_WEIGHTS = (
    (b"version https://git-lfs", "a Git LFS pointer"),
    (b"<!doctype", "a web page"), (b"<html", "a web page"), (b"<?xml", "a web page"),
    (b"{", "a JSON text"), (b"rar!", "a RAR archive"), (b"7z\xbc\xaf", "a 7z archive"), (b"\x1f\x8b", "a gzip archive"),
    (b"\x89png", "a picture"), (b"%pdf", "a PDF"),
    *((bytes((0x80, protocol)), "a bare pickle (torch's format before 1.6)") for protocol in range(2, 6)),
)  # fmt: skip


def other_kind(names: object) -> str:
    """What a file with keys such as `names` is, or "" where its keys do not tell."""
    text = str(names)
    return next((what for piece, what in OTHERS if piece in text), "")


def family_of(component: str, numbers: Mapping[str, int]) -> str:
    """Which relative of our models has these sizes, or ""."""
    fits = (what for part, told, what in FAMILY if part == component and told.items() <= numbers.items())
    return next(fits, "")
