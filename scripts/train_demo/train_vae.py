"""Trains the VAE: single frames first, then short clips, on crops; latents are standardised per channel."""

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scripts.train_demo import store
from scripts.train_demo.captions import every_caption, training_captions
from scripts.train_demo.render import SIZE, random_clip, random_frames
from scripts.train_demo.vae import WanVAE

CROP = 64  # px; most of a picture is flat ground, so crops around the shape teach more per second
FRAME_BATCH, CLIP_BATCH, CLIP_FRAMES = 48, 4, 9
LATENT_NOISE = 0.1  # in units of one channel's deviation: the decoder must forgive small errors of the sampler


@dataclass(frozen=True)
class Plan:
    """Steps on single frames, on clips with both halves, and on clips with the encoder frozen."""

    frames: int
    joint: int
    decoder: int

    @property
    def total(self) -> int:
        """All steps."""
        return self.frames + self.joint + self.decoder

    def learning_rate(self, step: int) -> tuple[float, str]:
        """Factor in 0..1, warm-up and a cosine for the frames and again for the clips, and the stage's name."""
        if step < self.frames:
            return min(1, (step + 1) / 50) * _cosine(step / (self.frames + 200)), "frames"
        into, length = step - self.frames, self.joint + self.decoder
        # A higher peak tears apart what the frames taught: the weights of time all wake up at once.
        factor = 0.12 * min(1, (into + 1) / 15) * _cosine(into / length)
        return factor, "joint" if into < self.joint else "decoder"


def _cosine(part: float) -> float:
    return 0.02 + 0.98 * math.cos(math.pi / 2 * part) ** 2


def to_video(clips: np.ndarray) -> Tensor:
    """uint8 [B, T, H, W, 3] -> float32 [B, T, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(clips).permute(0, 1, 4, 2, 3).float() / 127.5 - 1


def frame_batch(rng: np.random.Generator) -> Tensor:
    """Random single frames, cropped: [B, 1, 3, CROP, CROP]."""
    captions = training_captions()
    chosen = [captions[i] for i in rng.integers(len(captions), size=FRAME_BATCH)]
    return to_video(_crop(random_frames(chosen, rng)[:, None], rng))


def clip_batch(rng: np.random.Generator) -> Tensor:
    """Random short clips, cropped: [B, CLIP_FRAMES, 3, CROP, CROP]."""
    captions, clips = training_captions(), []
    for i in rng.integers(len(captions), size=CLIP_BATCH):
        clip, start = random_clip(captions[i], rng), int(rng.integers(17 - CLIP_FRAMES + 1))
        clips.append(clip[start : start + CLIP_FRAMES])
    return to_video(_crop(np.stack(clips), rng))


def _crop(clips: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    corners = rng.integers(8, SIZE - CROP - 8 + 1, size=(len(clips), 2))
    return np.stack([c[:, y : y + CROP, x : x + CROP] for c, (y, x) in zip(clips, corners, strict=True)])


def standardise(z: Tensor) -> Tensor:
    """Zero mean and unit deviation per channel over the batch, [B, T, 16, h, w]."""
    z = z.float()
    mean, std = z.mean((0, 1, 3, 4), keepdim=True), z.std((0, 1, 3, 4), keepdim=True)
    return (z - mean) / (std + 1e-4)


def psnr_of(vae: WanVAE, count: int, seed: int = 12345) -> float:
    """Mean PSNR in dB over `count` unseen whole clips of all captions."""
    rng, values = np.random.default_rng(seed), []
    captions = every_caption()
    for i in rng.integers(len(captions), size=count):
        video = to_video(random_clip(captions[i], rng)[None])
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            back = vae.decode(vae.encode(video.bfloat16())).float().clamp(-1, 1)
        values.append(10 * math.log10(4 / (back - video).square().mean().item()))
    return float(np.mean(values))


def latent_statistics(vae: WanVAE, clips: int = 64) -> tuple[Tensor, Tensor]:
    """Mean and deviation per channel [16] of raw latents over random training clips."""
    rng, captions, rows = np.random.default_rng(99), training_captions(), []
    for i in rng.integers(len(captions), size=clips):
        rows.append(encode(vae, random_clip(captions[i], rng)[None]).transpose(1, 2).flatten(2)[0])
    stacked = torch.cat(rows, dim=1)
    return stacked.mean(1), stacked.std(1)


def encode(vae: WanVAE, clips: np.ndarray) -> Tensor:
    """uint8 [B, F, H, W, 3] -> raw latent means float32 [B, T, 16, h, w]."""
    return encode_video(vae, to_video(clips))


def encode_video(vae: WanVAE, video: Tensor) -> Tensor:
    """Video [B, F, 3, H, W] in [-1, 1] -> raw latent means float32 [B, T, 16, h, w] on the CPU."""
    device = next(vae.parameters()).device
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        return vae.encode(video.to(device).bfloat16()).float().cpu()


def reconstruction_loss(vae: WanVAE, video: Tensor, fixed: Tensor | None) -> Tensor:
    """L1 plus MSE of the decoded standardised, slightly noisy latents.

    `fixed` [2, 16, 1, 1]: mean and deviation of a frozen encoder's latents; None while the encoder still learns.
    """
    with torch.autocast(video.device.type, torch.bfloat16):
        if fixed is None:
            z = standardise(vae.encode(video.bfloat16()))
        else:
            with torch.no_grad():
                z = (vae.encode(video.bfloat16()).float() - fixed[0]) / fixed[1]
        back = vae.decode((z + LATENT_NOISE * torch.rand(()) * 2 * torch.randn_like(z)).bfloat16()).float()
    return (back - video).abs().mean() + 2 * (back - video).square().mean()


def freeze_encoder(folder: Path, vae: WanVAE) -> Tensor:
    """Measure (once) the latents that the DiT will learn; returns mean and deviation [2, 16, 1, 1]."""
    path = folder / "latent_statistics.pt"
    if not path.exists():
        mean, std = latent_statistics(vae)
        store.save(path, {"mean": mean, "std": std})
    state = store.load(path)
    assert state is not None
    return torch.stack((state["mean"], state["std"])).view(2, 16, 1, 1)


def train(folder: Path, plan: Plan, lr: float, device: str = "cpu") -> WanVAE:
    """Train (or continue) in `folder`; returns the VAE, whose decoder expects standardised latents."""
    torch.manual_seed(0)
    vae, started, step, path = WanVAE().to(device), time.time(), 0, folder / "vae.pt"
    optimiser = torch.optim.AdamW(vae.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-3)
    if state := store.load(path):
        vae.load_state_dict(state["model"])
        step = state["step"]
        if step not in (plan.frames, plan.frames + plan.joint):  # moments start afresh with each stage
            optimiser.load_state_dict(state["optimiser"])
    rng = np.random.default_rng(step)
    while step < plan.total:
        factor, stage = plan.learning_rate(step)
        for group in optimiser.param_groups:
            group["lr"] = lr * factor
        fixed = freeze_encoder(folder, vae).to(device) if stage == "decoder" else None
        video = (frame_batch(rng) if stage == "frames" else clip_batch(rng)).to(device)
        loss = reconstruction_loss(vae, video, fixed)
        optimiser.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        step += 1
        if step % 25 == 0:
            store.log(folder / "vae_log.jsonl", step=step, loss=loss.item(), norm=norm.item(), s=time.time() - started)
        if step % 100 == 0 or step == plan.total:
            store.save(path, {"model": vae.state_dict(), "optimiser": optimiser.state_dict(), "step": step})
    return vae


def main() -> None:
    """Command line: `python -m scripts.train_demo.train_vae --folder DIR`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--frame-steps", type=int, default=1600)
    parser.add_argument("--joint-steps", type=int, default=400)
    parser.add_argument("--decoder-steps", type=int, default=800)
    parser.add_argument("--lr", type=float, default=1.2e-3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    store.set_up_cpu(args.threads)
    train(args.folder, Plan(args.frame_steps, args.joint_steps, args.decoder_steps), args.lr)


if __name__ == "__main__":
    main()
