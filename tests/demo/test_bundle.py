"""The bundled files are what the model card says they are."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from scripts.train_demo.captions import held_out_captions
from scripts.train_demo.render import random_clip
from scripts.train_demo.train_dit import CONFIG
from scripts.train_demo.train_i2v import I2V_CONFIG
from scripts.train_demo.train_vae import to_video
from scripts.train_demo.vae import WanVAE
from turbodiff.models.vae_modules import LATENTS_MEAN, LATENTS_STD
from turbodiff.models.wan_dit import WanDiT

BUNDLE = Path(__file__).resolve().parents[2] / "turbodiff" / "demo"
MB = 1_000_000


def test_the_bundle_is_small() -> None:
    sizes = [file.stat().st_size for file in BUNDLE.iterdir() if file.is_file()]
    assert max(sizes) < 16 * MB
    assert sum(sizes) <= 40 * MB


def test_the_dit_has_the_turbo_layout_and_no_broken_number() -> None:
    weights = load_file(BUNDLE / "dit_t2v.safetensors")
    with torch.device("meta"):
        expected = WanDiT(CONFIG).state_dict()
    assert {k: v.shape for k, v in weights.items()} == {k: v.shape for k, v in expected.items()}
    assert {v.dtype for v in weights.values()} == {torch.bfloat16}
    assert all(v.isfinite().all() for v in weights.values())


@pytest.mark.parametrize("expert", ["high", "low"])
def test_an_expert_of_image_to_video_has_the_quant_layout(expert: str) -> None:
    weights = load_file(BUNDLE / f"dit_i2v_{expert}.safetensors")
    with torch.device("meta"):
        expected = WanDiT(replace(I2V_CONFIG, quant_linear=True)).state_dict()
    assert {k: v.shape for k, v in weights.items()} == {k: v.shape for k, v in expected.items()}
    assert all(v.isfinite().all() for v in weights.values() if v.is_floating_point())


def test_umt5_has_the_original_names_and_the_tokenizer_fits() -> None:
    with safe_open(BUNDLE / "umt5.safetensors", "pt") as file:
        names = set(file.keys())
        vocab = file.get_slice("token_embedding.weight").get_shape()[0]
    processor = sentencepiece.SentencePieceProcessor(model_file=str(BUNDLE / "spiece.model"))
    assert {"norm.weight", "blocks.0.attn.q.weight", "blocks.0.pos_embedding.embedding.weight"} <= names
    assert processor.vocab_size() <= vocab
    assert (processor.pad_id(), processor.eos_id(), processor.unk_id()) == (0, 1, 2)


@pytest.mark.parametrize("prompt", ["", "ein blaues Quadrat", "Ж 🙂 \u200b", "红色" * 300])
def test_any_text_has_tokens_within_the_vocabulary(prompt: str) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(BUNDLE / "spiece.model"))
    ids = processor.encode(prompt)
    assert all(0 <= i < processor.vocab_size() for i in ids)
    assert 2 not in ids


def test_the_vae_gives_back_unseen_clips_and_its_latents_are_standard() -> None:
    vae = WanVAE()
    vae.load_state_dict({k: v.float() for k, v in load_file(BUNDLE / "vae.safetensors").items()})
    mean, std = (torch.tensor(c).view(16, 1, 1) for c in (LATENTS_MEAN, LATENTS_STD))
    rng, captions = np.random.default_rng(21), held_out_captions()
    video = to_video(np.stack([random_clip(captions[i], rng)[:9] for i in (3, 40)]))
    with torch.no_grad():
        latents = vae.encode(video)
        back = vae.decode(latents).clamp(-1, 1)
    standard = (latents - mean) / std
    psnr = 10 * torch.log10(4 / (back - video).square().mean())
    assert psnr >= 29
    assert standard.mean().abs() < 0.4
    assert 0.6 < standard.std() < 1.6
