"""The short cuts of training are exact: one zero row for hundreds, folded latent constants, the fast VAE."""

import math
from pathlib import Path

import pytest
import torch

from scripts.train_demo.dataset import ROWS, TEXT_LEN, context_bias
from scripts.train_demo.export import WAN_MEAN, WAN_STD, fold_latent_constants
from scripts.train_demo.sample import times
from scripts.train_demo.vae import WanVAE
from turbodiff.models.wan_dit import WanConfig, WanDiT


def test_one_weighted_zero_row_equals_all_the_zero_rows() -> None:
    torch.manual_seed(0)
    model = WanDiT(WanConfig(dim=128, ffn_dim=128, num_heads=1, num_layers=1, text_dim=16)).eval()
    latents, clock, count = torch.randn(1, 16, 2, 4, 4), torch.tensor([[700.0]]), 9
    full, short = torch.zeros(1, TEXT_LEN, 16), torch.zeros(1, ROWS + 1, 16)
    full[:, :count] = short[:, :count] = torch.randn(count, 16)
    with torch.no_grad():
        long_way = model(latents, clock, full)
        short_cut = model(latents, clock, short, context_bias=context_bias(torch.tensor([count])))
    assert (long_way - short_cut).abs().max() < 1e-5


def test_folded_vae_gives_and_takes_wan_latents() -> None:
    torch.manual_seed(1)
    plain, folded = WanVAE(4), WanVAE(4)
    mean, std = torch.randn(16), torch.rand(16) + 0.5
    folded.load_state_dict(fold_latent_constants(plain.state_dict(), mean, std))
    wan_mean, wan_std = (torch.tensor(c).view(16, 1, 1) for c in (WAN_MEAN, WAN_STD))
    video = torch.randn(1, 5, 3, 32, 32)
    with torch.no_grad():
        standard = (plain.encode(video) - mean.view(16, 1, 1)) / std.view(16, 1, 1)
        assert ((folded.encode(video) - wan_mean) / wan_std - standard).abs().max() < 1e-4
        assert (folded.decode(standard * wan_std + wan_mean) - plain.decode(standard)).abs().max() < 1e-4


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_times_are_those_of_the_rcm_schedule(steps: int) -> None:
    expected = [80 / 81, 0.9337810614, 0.8528953948, 0.6089790492][:steps] + [0.0]
    assert all(math.isclose(a, b, abs_tol=1e-9) for a, b in zip(times(steps), expected, strict=True))


def test_the_fast_vae_is_the_published_vae() -> None:
    from safetensors.torch import load_file

    files = sorted(Path(__file__).parent.parent.rglob("vae.safetensors"))
    if not files:
        pytest.skip("no reference tensors here")
    tensors = load_file(files[0])
    vae = WanVAE(4)
    vae.load_state_dict({k[8:]: v for k, v in tensors.items() if k.startswith("weights.")})
    wan_mean, wan_std = (torch.tensor(c).view(16, 1, 1) for c in (WAN_MEAN, WAN_STD))
    with torch.no_grad():
        latents = (vae.encode(tensors["inputs.video"].transpose(1, 2)) - wan_mean) / wan_std
        video = vae.decode(tensors["inputs.latents"].transpose(1, 2) * wan_std + wan_mean)
    assert (latents.transpose(1, 2) - tensors["outputs.latents"]).abs().max() < 1e-3
    assert (video.clamp(-1, 1).transpose(1, 2) - tensors["outputs.video"].clamp(-1, 1)).abs().max() < 1e-3
