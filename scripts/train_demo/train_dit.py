"""Trains a DiT by flow matching on cached latents, mostly at the four times of the rCM schedule.

A `Task` says which: the text-to-video network here, the two experts of image to video in `train_i2v`.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from scripts.train_demo import store, text
from scripts.train_demo.dataset import SENTENCES, Latents, cache_text, context_bias
from scripts.train_demo.sample import times
from turbodiff.models import attention
from turbodiff.models.attention import DENSE, AttentionPlan
from turbodiff.models.wan_dit import WanConfig, WanDiT
from turbodiff.sampling.conditioning import image_condition

CONFIG = WanConfig(dim=256, ffn_dim=1024, num_heads=2, num_layers=6, text_dim=text.DIM, sla=True)
SLA = AttentionPlan("sla", topk=0.5)
SLA_SHARE = 0.25  # of the steps of the cool-down, so that proj_l is trained and dense attention is not forgotten
SCHEDULE_WEIGHTS = torch.tensor([0.15, 0.29, 0.28, 0.28])
BATCH = 32
END_SHARE = 0.5  # of the clips that start from a picture, those that end with one, too
Forward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]
SAVE_EVERY = 100  # steps


@dataclass(frozen=True)
class Settings:
    """How to train: when to stop, peak rate, share of the steps that cools down, threads, whether to compile, where."""

    steps: int
    lr: float
    cooldown: float = 0.35
    threads: int = 1
    compiled: bool = False
    device: str = "cpu"


@dataclass(frozen=True)
class Task:
    """What a network learns: the name of its files, its sizes, the times it sees, whether it sees a picture.

    `start`: the checkpoint in the folder whose averaged weights it begins with; "" begins with nothing.
    """

    name: str
    config: WanConfig
    draw_times: Callable[[int], Tensor]
    schedule: tuple[float, ...]
    pictures: bool = False
    start: str = ""


class Batch(NamedTuple):
    """Latents [B, 16, T, h, w], text rows, logit bias, and the picture's condition [B, 20, T, h, w] or None."""

    z: Tensor
    rows: Tensor
    bias: Tensor
    condition: Tensor | None


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


T2V = Task("dit", CONFIG, sample_times, tuple(times(4)[:4]))


def batch(latents: Latents, words: dict[str, Tensor], size: int) -> Batch:
    """A random sentence for each of `size` clips; 4 % are empty prompts. Where pictures are told, half of them are told
    the last one, too."""
    index = torch.randint(len(latents.z), (size,))
    sentence = latents.caption[index] * SENTENCES + torch.randint(SENTENCES, (size,))
    rows, counts = words["rows"][sentence], words["counts"][sentence]
    silent = torch.rand(size) < 0.04
    rows = torch.where(silent[:, None, None], words["empty"], rows)
    counts = torch.where(silent, words["empty_count"], counts)
    condition = None
    if latents.pictures is not None:
        first, end = latents.pictures[index].float(), latents.ends[index].float()
        both = image_condition(torch.cat((first[:, :, :-1], end), dim=2), last=True)
        with_end = torch.rand(size, 1, 1, 1, 1) < END_SHARE
        condition = torch.where(with_end, both, image_condition(first))
    return Batch(latents.z[index].float(), rows, context_bias(counts), condition)


def moved(parts: Batch, device: str) -> Batch:
    """The batch on the device that trains."""
    return Batch(*(part if part is None else part.to(device) for part in parts))


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


def first_weights(folder: Path, task: Task, words: dict[str, Tensor]) -> WanDiT:
    """A fresh network, or one that begins as another; input channels that the other lacks begin as zeros."""
    if not task.start:
        return new_model(words["rows"], words["counts"])
    state = store.load(folder / f"{task.start}.pt")
    assert state is not None, f"{task.start}.pt does not exist"
    weights, model = dict(state["average"]), WanDiT(task.config)
    patch = weights["patch_embedding.weight"]  # columns in (c, t, h, w) order: new channels come last
    missing = model.patch_embedding.in_features - patch.shape[1]
    weights["patch_embedding.weight"] = F.pad(patch, (0, missing))
    model.load_state_dict(weights)
    return model


class Trainer:
    """Model, averaged model, optimisers and step, saved together."""

    def __init__(self, folder: Path, lr: float, task: Task = T2V, device: str = "cpu") -> None:
        self.folder, self.path, self.lr, self.device = folder, folder / f"{task.name}.pt", lr, device
        self.words, self.latents = cache_text(folder), Latents(folder, task.pictures)
        state = store.load(self.path)
        self.model = WanDiT(task.config) if state else first_weights(folder, task, self.words)
        if state:
            self.model.load_state_dict(state["model"])
        self.model.to(device)
        self.average = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        self.optimisers, self.step = optimisers(self.model, lr), 0
        if state:
            self.average = {name: value.to(device) for name, value in state["average"].items()}
            for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
                optimiser.load_state_dict(saved)
            self.step = state["step"]

    def batch(self, size: int) -> Batch:
        """A random batch on the device."""
        return moved(batch(self.latents, self.words, size), self.device)

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
    """A function (noisy latents, timesteps, text rows, logit bias, condition) -> velocity of `model` in bfloat16."""

    def forward(noisy: Tensor, clock: Tensor, rows: Tensor, bias: Tensor, condition: Tensor | None) -> Tensor:
        options = {"context_bias": bias, "attention": plan}
        return functional_call(model, half_parameters(model), (noisy, clock, rows, condition), options)

    attention._sdpa = explicit_attention  # the same function, faster to train on a CPU; this process only
    if not compiled:
        return forward
    torch._inductor.config.cpp.dynamic_threads = True  # else the thread count of the first call is baked in
    return torch.compile(forward, dynamic=False)


def flow_loss(forward: Forward, parts: Batch, t: Tensor) -> Tensor:
    """Squared error of the velocity at times t [B], per sample [B]."""
    noise = torch.randn_like(parts.z)
    s = t.view(-1, 1, 1, 1, 1)
    noisy = ((1 - s) * parts.z + s * noise).bfloat16()
    condition = None if parts.condition is None else parts.condition.bfloat16()
    velocity = forward(noisy, t[:, None] * 1000, parts.rows.bfloat16(), parts.bias, condition)
    return (velocity - (noise - parts.z)).square().mean((1, 2, 3, 4))


def train(folder: Path, settings: Settings, task: Task = T2V) -> dict[str, Tensor]:
    """Train (or continue) until `settings.steps`; returns the averaged weights.

    A file `folder/two_threads` makes it two threads from the next checkpoint on.
    """
    trainer, steps = Trainer(folder, settings.lr, task, settings.device), settings.steps
    recent: list[tuple[Tensor, Tensor]] = []
    dense = make_forward(trainer.model, settings.compiled)
    sparse = make_forward(trainer.model, settings.compiled, SLA)
    torch.manual_seed(trainer.step)
    while trainer.step < steps:
        parts, t = trainer.batch(BATCH), task.draw_times(BATCH).to(settings.device)
        cooling = steps - trainer.step < settings.cooldown * steps
        losses = flow_loss(sparse if cooling and torch.rand(()) < SLA_SHARE else dense, parts, t)
        losses.mean().backward()
        norm = trainer.update(learning_rate(trainer.step, steps, settings.cooldown), decay=0.998)
        recent.append((losses.detach(), t))
        if trainer.step % 20 == 0:
            write_log(folder / f"{task.name}_log.jsonl", trainer, task, recent, norm)
            recent = []
        if trainer.step % SAVE_EVERY == 0 or trainer.step == steps:
            trainer.save()
            trainer.latents.refresh()
            torch.set_num_threads(2 if (folder / "two_threads").exists() else settings.threads)
    return trainer.average


def write_log(path: Path, trainer: Trainer, task: Task, recent: list[tuple[Tensor, Tensor]], norm: float) -> None:
    """Mean loss of the recent steps, overall and at the times of the schedule."""
    loss, t = torch.cat([r[0] for r in recent]), torch.cat([r[1] for r in recent])
    parts = {f"t{w:.2f}": round(loss[(t - w).abs() < 1e-4].mean().item(), 4) for w in task.schedule}
    mean = round(loss.mean().item(), 4)
    store.log(path, step=trainer.step, loss=mean, norm=round(norm, 3), **parts, clips=len(trainer.latents.z))


def command_line(steps: int, lr: float, cooldown: float) -> argparse.ArgumentParser:
    """The flags of every trainer of a DiT, with its own defaults."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--start", default="", help="checkpoint in the folder to begin with, without .pt")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--cooldown", type=float, default=cooldown)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true")
    return parser


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings of parsed flags."""
    return Settings(args.steps, args.lr, args.cooldown, args.threads, args.compile, args.device)


def main() -> None:
    """Command line: `python -m scripts.train_demo.train_dit --folder DIR`."""
    args = command_line(4000, 2e-3, 0.35).parse_args()
    store.set_up_cpu(args.threads)
    train(args.folder, settings_of(args), replace(T2V, start=args.start))


if __name__ == "__main__":
    main()
