"""Trains the text-to-video DiT by flow matching on cached latents, mostly at the four times of the rCM schedule."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call

from scripts.train_demo import store, text
from scripts.train_demo.dataset import SENTENCES, Latents, cache_text, context_bias
from scripts.train_demo.sample import times
from turbodiff.models import attention
from turbodiff.models.attention import DENSE, AttentionPlan
from turbodiff.models.wan_dit import WanConfig, WanDiT

CONFIG = WanConfig(dim=256, ffn_dim=1024, num_heads=2, num_layers=6, text_dim=text.DIM, sla=True)
SLA = AttentionPlan("sla", topk=0.5)
SLA_SHARE = 0.25  # of the steps of the cool-down, so that proj_l is trained and dense attention is not forgotten
SCHEDULE_WEIGHTS = torch.tensor([0.15, 0.29, 0.28, 0.28])
BATCH = 32
Forward = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
SAVE_EVERY = 100  # steps


def new_model(rows: Tensor, counts: Tensor) -> WanDiT:
    """A fresh DiT that listens to the prompt from the first step.

    The 480 or so zero rows would drown two dozen prompt rows, so queries and keys start with a shared direction that
    the mean prompt row has and the zero row has not; everything here is only a starting point.
    """
    torch.manual_seed(2)
    model = WanDiT(CONFIG)
    with torch.no_grad():
        for layer in (model.text_embedding[0], model.text_embedding[2], model.time_projection[1]):
            layer.bias.zero_()
        model.time_projection[1].weight.mul_(0.1)
        prompt = rows[:512].float()[torch.arange(rows.shape[1])[None] < counts[:512, None]]
        model.text_embedding[0].weight.mul_(3)
        model.text_embedding[2].weight.mul_(3)
        mean = model.text_embedding(prompt).mean(0)
        for block in model.blocks:
            block.modulation[:, [2, 5]] = 0.3
            direction = torch.randn(CONFIG.dim)
            cross = block.cross_attn
            cross.q.bias.copy_(direction)
            cross.k.bias.zero_()
            cross.v.bias.zero_()
            cross.k.weight.add_(torch.outer(direction, mean) / mean.dot(mean))
        model.head.head.weight.zero_()
        model.head.head.bias.zero_()
    return model


def sample_times(count: int) -> Tensor:
    """Times [B]: half exactly on the 4-step schedule, a sixth uniform in the noisy half, the rest logit-normal.

    The first time of the schedule, where nothing but the mean clip can be known, comes less often than the others.
    """
    schedule = torch.tensor(times(4)[:4])
    pick = torch.rand(count)
    t = torch.sigmoid(0.4 + 1.2 * torch.randn(count))
    t = torch.where(pick < 0.65, 0.5 + 0.497 * torch.rand(count), t)
    return torch.where(pick < 0.5, schedule[torch.multinomial(SCHEDULE_WEIGHTS, count, replacement=True)], t)


def batch(latents: Latents, words: dict[str, Tensor], size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents [B, 16, T, h, w], text rows and logit bias of a random sentence for each; 4 % are empty prompts."""
    index = torch.randint(len(latents.z), (size,))
    sentence = latents.caption[index] * SENTENCES + torch.randint(SENTENCES, (size,))
    rows, counts = words["rows"][sentence], words["counts"][sentence]
    silent = torch.rand(size) < 0.04
    rows = torch.where(silent[:, None, None], words["empty"], rows)
    counts = torch.where(silent, words["empty_count"], counts)
    return latents.z[index].float(), rows, context_bias(counts)


def half_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The parameters in bfloat16, differentiable: training sees the numerics that inference has."""
    return {name: p.bfloat16() for name, p in model.named_parameters()}


def learning_rate(step: int, steps: int, cooldown: float) -> float:
    """Factor in 0..1: warm-up, constant, and a straight cool-down over the last share of the steps."""
    return min(1.0, (step + 1) / 100, max(0.0, (steps - step) / max(1.0, cooldown * steps)))


def optimisers(model: WanDiT, lr: float) -> list[torch.optim.Optimizer]:
    """Muon (arXiv 2502.16982) for the matrices of the blocks, AdamW for the rest."""
    matrices = [
        p
        for n, p in model.named_parameters()
        if n.startswith("blocks.") and n.endswith("weight") and p.ndim == 2 and "proj_l" not in n
    ]
    known = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in known]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw", ns_steps=4),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


class Trainer:
    """Model, averaged model, optimisers and step, saved together."""

    def __init__(self, folder: Path, lr: float, name: str = "dit.pt") -> None:
        self.folder, self.path, self.lr = folder, folder / name, lr
        self.words, self.latents = cache_text(folder), Latents(folder)
        self.model = new_model(self.words["rows"], self.words["counts"])
        self.average = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        self.optimisers, self.step = optimisers(self.model, lr), 0
        if state := store.load(self.path):
            self.model.load_state_dict(state["model"])
            self.average = state["average"]
            for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
                optimiser.load_state_dict(saved)
            self.step = state["step"]

    def save(self) -> None:
        """Write everything needed to go on."""
        optimisers = [optimiser.state_dict() for optimiser in self.optimisers]
        state = {"model": self.model.state_dict(), "average": self.average, "optimisers": optimisers, "step": self.step}
        store.save(self.path, state)

    def update(self, factor: float, decay: float) -> float:
        """One optimiser step from the gradients that are there; returns their norm."""
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = self.lr * factor
            optimiser.step()
            optimiser.zero_grad()
        self.step += 1
        decay = min(decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                self.average[name].lerp_(p, 1 - decay)
        return norm.item()


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Attention [B, L, H, D] with the scores written out: on a CPU its backward is 3x faster than the fused one."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    scores = scores.float() if bias is None else scores.float() + bias
    return (scores.softmax(-1).to(q.dtype) @ v).transpose(1, 2)


def make_forward(model: WanDiT, compiled: bool, plan: AttentionPlan = DENSE) -> Forward:
    """A function (noisy latents, timesteps, text rows, logit bias) -> velocity of `model` run in bfloat16."""

    def forward(noisy: Tensor, clock: Tensor, rows: Tensor, bias: Tensor) -> Tensor:
        options = {"context_bias": bias, "attention": plan}
        return functional_call(model, half_parameters(model), (noisy, clock, rows), options)

    attention._sdpa = explicit_attention  # the same function, faster to train on a CPU; this process only
    if not compiled:
        return forward
    torch._inductor.config.cpp.dynamic_threads = True  # else the thread count of the first call is baked in
    return torch.compile(forward, dynamic=False)


def flow_loss(forward: Forward, z: Tensor, rows: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Squared error of the velocity per sample [B], and the times [B]."""
    t, noise = sample_times(len(z)), torch.randn_like(z)
    s = t.view(-1, 1, 1, 1, 1)
    noisy = ((1 - s) * z + s * noise).bfloat16()
    velocity = forward(noisy, t[:, None] * 1000, rows.bfloat16(), bias)
    return (velocity - (noise - z)).square().mean((1, 2, 3, 4)), t


@dataclass(frozen=True)
class Settings:
    """How to train: when to stop, peak rate, share of the steps that cools down, threads, whether to compile."""

    steps: int
    lr: float
    cooldown: float
    threads: int
    compiled: bool


def train(folder: Path, settings: Settings) -> dict[str, Tensor]:
    """Train (or continue) until `settings.steps`; returns the averaged weights.

    A file `folder/two_threads` makes it two threads from the next checkpoint on.
    """
    trainer, steps, recent = Trainer(folder, settings.lr), settings.steps, []
    dense = make_forward(trainer.model, settings.compiled)
    sparse = make_forward(trainer.model, settings.compiled, SLA)
    torch.manual_seed(trainer.step)
    while trainer.step < steps:
        z, rows, bias = batch(trainer.latents, trainer.words, BATCH)
        cooling = steps - trainer.step < settings.cooldown * steps
        losses, t = flow_loss(sparse if cooling and torch.rand(()) < SLA_SHARE else dense, z, rows, bias)
        losses.mean().backward()
        norm = trainer.update(learning_rate(trainer.step, steps, settings.cooldown), decay=0.998)
        recent.append((losses.detach(), t))
        if trainer.step % 20 == 0:
            write_log(folder / "dit_log.jsonl", trainer, recent, norm)
            recent = []
        if trainer.step % SAVE_EVERY == 0 or trainer.step == steps:
            trainer.save()
            trainer.latents.refresh()
            torch.set_num_threads(2 if (folder / "two_threads").exists() else settings.threads)
    return trainer.average


def write_log(path: Path, trainer: Trainer, recent: list[tuple[Tensor, Tensor]], norm: float) -> None:
    """Mean loss of the recent steps, overall and at the four times of the schedule."""
    loss, t = torch.cat([r[0] for r in recent]), torch.cat([r[1] for r in recent])
    parts = {f"t{w:.2f}": round(loss[(t - w).abs() < 1e-4].mean().item(), 4) for w in times(4)[:4]}
    mean = round(loss.mean().item(), 4)
    store.log(path, step=trainer.step, loss=mean, norm=round(norm, 3), **parts, clips=len(trainer.latents.z))


def main() -> None:
    """Command line: `python -m scripts.train_demo.train_dit --folder DIR`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--cooldown", type=float, default=0.35)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    store.set_up_cpu(args.threads)
    train(args.folder, Settings(args.steps, args.lr, args.cooldown, args.threads, args.compile))


if __name__ == "__main__":
    main()
