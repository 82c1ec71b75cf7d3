"""Writes the bundle: original Wan and UMT5 parameter names, standard latent constants folded in, safetensors."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import UMT5EncoderModel

from scripts.train_demo import store
from scripts.train_demo.vae import Z_DIM
from turbodiff.models.vae_modules import LATENTS_MEAN, LATENTS_STD
from turbodiff.spec.files import atomic_write
from turbodiff.weights.quantize import quantize


def fold_latent_constants(weights: dict[str, Tensor], mean: Tensor, std: Tensor) -> dict[str, Tensor]:
    """VAE weights whose latents, normalised by Wan's constants, are the standardised latents of training.

    Encoder: raw r becomes M + S (r - mean) / std. Decoder: it was trained on standardised latents, so y becomes
    (y - M) / S before conv2. `mean` and `std` [16] are those of the raw latents.
    """
    out = {name: value.clone() for name, value in weights.items()}
    wan_mean, wan_std = torch.tensor(LATENTS_MEAN), torch.tensor(LATENTS_STD)
    scale = wan_std / std
    out["conv1.weight"][:Z_DIM] *= scale.view(-1, 1, 1, 1, 1)
    out["conv1.bias"][:Z_DIM] = wan_mean + (out["conv1.bias"][:Z_DIM] - mean) * scale
    out["conv1.weight"][Z_DIM:] = 0
    out["conv1.bias"][Z_DIM:] = -6.0  # log variance: nothing reads it, and a sampler of it would hardly move
    inner = out["conv2.weight"][:, :, 0, 0, 0]
    out["conv2.bias"] -= inner @ (wan_mean / wan_std)
    out["conv2.weight"] /= wan_std.view(1, -1, 1, 1, 1)
    return out


def umt5_weights(encoder: UMT5EncoderModel) -> dict[str, Tensor]:
    """The encoder under the original UMT5 names of Wan's file."""
    state = encoder.state_dict()
    out = {"token_embedding.weight": state["shared.weight"], "norm.weight": state["encoder.final_layer_norm.weight"]}
    for i in range(encoder.config.num_layers):
        old, new = f"encoder.block.{i}.layer.", f"blocks.{i}."
        for letter in "qkvo":
            out[f"{new}attn.{letter}.weight"] = state[f"{old}0.SelfAttention.{letter}.weight"]
        out[f"{new}pos_embedding.embedding.weight"] = state[f"{old}0.SelfAttention.relative_attention_bias.weight"]
        out[f"{new}norm1.weight"] = state[f"{old}0.layer_norm.weight"]
        out[f"{new}norm2.weight"] = state[f"{old}1.layer_norm.weight"]
        out[f"{new}ffn.gate.0.weight"] = state[f"{old}1.DenseReluDense.wi_0.weight"]
        out[f"{new}ffn.fc1.weight"] = state[f"{old}1.DenseReluDense.wi_1.weight"]
        out[f"{new}ffn.fc2.weight"] = state[f"{old}1.DenseReluDense.wo.weight"]
    return out


def write(path: Path, weights: dict[str, Tensor], dtype: torch.dtype, metadata: dict[str, str] | None = None) -> None:
    """One safetensors file in `dtype`, renamed into place when it is whole."""
    stored = {name: value.detach().cpu().to(dtype).contiguous() for name, value in weights.items()}
    with atomic_write(path) as temporary:
        save_file(stored, temporary, metadata)
        temporary.chmod(0o644)


def export_text(folder: Path, bundle: Path, encoder: UMT5EncoderModel) -> None:
    """umt5.safetensors and spiece.model."""
    write(bundle / "umt5.safetensors", umt5_weights(encoder), torch.bfloat16)
    shutil.copyfile(folder / "spiece.model", bundle / "spiece.model")


def export_vae(folder: Path, bundle: Path) -> None:
    """vae.safetensors from the checkpoint and the measured latent statistics."""
    state, statistics = store.load(folder / "vae.pt"), store.load(folder / "latent_statistics.pt")
    assert state is not None and statistics is not None, "train the VAE and measure its latents first"
    folded = fold_latent_constants(state["model"], statistics["mean"], statistics["std"])
    write(bundle / "vae.safetensors", folded, torch.float16)


def export_dit(weights: dict[str, Tensor], bundle: Path, name: str = "dit_t2v.safetensors") -> None:
    """The averaged weights, bfloat16, TurboDiffusion's names."""
    write(bundle / name, weights, torch.bfloat16)


def export_expert(weights: dict[str, Tensor], bundle: Path, expert: str) -> None:
    """dit_i2v_high.safetensors or dit_i2v_low.safetensors in the -quant layout: half the bytes, for two of them."""
    plain = bundle / f".dit_i2v_{expert}.plain.safetensors"
    write(plain, weights, torch.bfloat16)
    whole = quantize(plain, bundle / f".dit_i2v_{expert}.quant.safetensors")
    whole.chmod(0o644)
    whole.replace(bundle / f"dit_i2v_{expert}.safetensors")
    plain.unlink()
