"""The maths of training: one zero row for hundreds, folded latent constants, the fast VAE, the consistency tangent."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from scripts.train_demo import distill, store
from scripts.train_demo.dataset import ROWS, SENTENCES, TEXT_LEN, context_bias
from scripts.train_demo.export import fold_latent_constants
from scripts.train_demo.sample import times
from scripts.train_demo.train_dit import CONFIG, batch, first_weights
from scripts.train_demo.train_i2v import BOUNDARY, ELSEWHERE, SCHEDULE, expert_times, task
from scripts.train_demo.vae import WanVAE
from turbodiff.models.vae_modules import LATENTS_MEAN, LATENTS_STD
from turbodiff.models.wan_dit import WanConfig, WanDiT
from turbodiff.sampling.samplers import timesteps as schedule


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
    wan_mean, wan_std = (torch.tensor(c).view(16, 1, 1) for c in (LATENTS_MEAN, LATENTS_STD))
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
    wan_mean, wan_std = (torch.tensor(c).view(16, 1, 1) for c in (LATENTS_MEAN, LATENTS_STD))
    with torch.no_grad():
        latents = (vae.encode(tensors["inputs.video"].transpose(1, 2)) - wan_mean) / wan_std
        video = vae.decode(tensors["inputs.latents"].transpose(1, 2) * wan_std + wan_mean)
    assert (latents.transpose(1, 2) - tensors["outputs.latents"]).abs().max() < 1e-3
    assert (video.clamp(-1, 1).transpose(1, 2) - tensors["outputs.video"].clamp(-1, 1)).abs().max() < 1e-3


def test_the_tangent_of_a_network_that_is_known_is_the_formula() -> None:
    torch.manual_seed(2)
    noisy, teacher, t = torch.randn(3, 16, 1, 2, 2), torch.randn(3, 16, 1, 2, 2), torch.tensor([0.9, 0.6, 0.3])

    def student(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x.square() + 3 * t.view(-1, 1, 1, 1, 1) * torch.ones_like(x)

    now, g = distill.tangent(student, noisy, t, teacher, ramp=1.0)
    change = teacher - now - t.view(-1, 1, 1, 1, 1) * (2 * noisy * teacher + 3)
    size = change.square().mean((1, 2, 3, 4), keepdim=True).sqrt()
    assert (g - change / (size + distill.NORM_FLOOR)).abs().max() < 1e-4


def test_a_straight_path_asks_for_no_change() -> None:
    torch.manual_seed(3)
    clip, noise, t = torch.randn(2, 16, 1, 2, 2), torch.randn(2, 16, 1, 2, 2), torch.tensor([0.9, 0.5])
    s = t.view(-1, 1, 1, 1, 1)
    _, g = distill.tangent(lambda x, t: noise - clip + 0 * x, (1 - s) * clip + s * noise, t, noise - clip, ramp=1.0)
    assert g.abs().max() < 1e-5


@pytest.mark.parametrize("high", [True, False])
def test_an_expert_learns_its_own_side_of_the_boundary(high: bool) -> None:
    torch.manual_seed(4)
    t = expert_times(4000, high)
    assert ((t >= BOUNDARY) == high).float().mean() > 1 - ELSEWHERE
    assert ((t >= 0) & (t <= SCHEDULE[0])).all()


def test_times_of_image_to_video_are_those_of_its_schedule() -> None:
    assert torch.allclose(torch.tensor(SCHEDULE, dtype=torch.float64), schedule("sde", 4, 200.0)[:4])


def test_an_expert_begins_as_text_to_video_that_does_not_see_the_picture(tmp_path: Path) -> None:
    torch.manual_seed(5)
    plain = WanDiT(CONFIG)
    with torch.no_grad():
        plain.head.head.weight.normal_()
    store.save(tmp_path / "dit.pt", {"average": plain.state_dict()})
    expert = first_weights(tmp_path, task("high"), {})
    latents, clock, rows = torch.randn(1, 16, 2, 4, 4), torch.tensor([[900.0]]), torch.randn(1, 6, 128)
    with torch.no_grad():
        alone = plain(latents, clock, rows)
        told = expert(latents, clock, rows, torch.randn(1, 20, 2, 4, 4))
    assert (alone - told).abs().max() < 1e-5


def test_half_of_the_clips_of_a_batch_are_told_their_last_picture() -> None:
    rows, size = torch.zeros(SENTENCES, 41, 4), 64
    words = {"rows": rows, "counts": torch.ones(SENTENCES), "empty": rows[:1], "empty_count": torch.ones(1)}
    cached = SimpleNamespace(
        z=torch.randn(1, 16, 5, 2, 2), caption=torch.zeros(1, dtype=torch.long),
        pictures=torch.zeros(1, 16, 5, 2, 2), ends=torch.ones(1, 16, 1, 2, 2),
    )  # fmt: skip
    condition = batch(cached, words, size).condition
    told = condition[:, 3, -1, 0, 0] == 1
    assert 16 < told.sum() < 48
    assert torch.equal(condition[:, 4:, -1].mean((1, 2, 3)), told.float())
    assert (condition[:, :4, 0] == 1).all() and not condition[:, :4, 1:-1].any()
