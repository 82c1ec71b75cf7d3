"""Distils the text-to-video DiT for few steps: continuous-time consistency (sCM, arXiv 2410.11081; rCM, 2510.08431).

With the student's velocity F, its clean estimate is f(x, t) = x - t F(x, t). Along the teacher's path dx/dt = v, f must
not change: 0 = df/dt = v - F - t dF/dt. dF/dt = (dF/dx) v + @F/@t: the first term is an exact Jacobian-vector product;
the second a difference over a few steps of the bfloat16 clock, whose waves no derivative could follow.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.func import functional_call, jvp

from scripts.train_demo import store
from scripts.train_demo.train_dit import (
    DENSE,
    SLA,
    SLA_SHARE,
    T2V,
    Batch,
    Settings,
    Trainer,
    explicit_attention,
    half_parameters,
    learning_rate,
    write_log,
)
from turbodiff.models import attention
from turbodiff.models.attention import AttentionPlan
from turbodiff.models.wan_dit import WanDiT

BATCH = 12  # clips: a consistency step costs about three times a flow-matching one
CLOCK = 4 / 1000  # resolution of a bfloat16 timestep between 512 and 1024
SCHEDULE = tuple(round(t / CLOCK) * CLOCK for t in T2V.schedule)
STUDENT = replace(T2V, name="distilled", start="dit", schedule=SCHEDULE)
TIME_STEP = 8 * CLOCK
WARM_UP = 100  # steps in which the second-order part of the tangent grows in (sCM)
NORM_FLOOR = 0.1  # c of the normalised tangent g / (|g| + c), sCM
Velocity = Callable[[Tensor, Tensor], Tensor]  # (noisy latents, times [B]) -> velocity


def network(model: WanDiT, parts: Batch, plan: AttentionPlan = DENSE) -> Velocity:
    """The bfloat16 model with the batch's text, as a function of latents and times."""
    weights, options = half_parameters(model), {"context_bias": parts.bias, "attention": plan}

    def velocity(noisy: Tensor, t: Tensor) -> Tensor:
        arguments = (noisy.bfloat16(), t[:, None] * 1000, parts.rows.bfloat16())
        return functional_call(model, weights, arguments, options)

    return velocity


def tangent(student: Velocity, noisy: Tensor, t: Tensor, teacher: Tensor, ramp: float) -> tuple[Tensor, Tensor]:
    """F [B, 16, T, h, w], and df/dt of each sample, normalised; `ramp` 0..1 weighs the part with dF/dt in it.

    The weights of the student must not ask for gradients; the teacher's velocity is that of the same latents.
    """
    now, along = jvp(lambda x: student(x, t), (noisy,), (teacher,))
    change = along + (now - student(noisy, t - TIME_STEP)) / TIME_STEP
    g = teacher - now - ramp * t.view(-1, 1, 1, 1, 1) * change
    size = g.square().mean((1, 2, 3, 4), keepdim=True).sqrt()
    return now, g / (size + NORM_FLOOR)


def draw_times(count: int) -> Tensor:
    """Times [B]: half those of the 4-step schedule, half uniform; none so small that the difference leaves [0, 1]."""
    own = torch.tensor(SCHEDULE)[torch.randint(len(SCHEDULE), (count,))]
    anywhere = 2 * TIME_STEP + (SCHEDULE[0] - 2 * TIME_STEP) * torch.rand(count)
    t = torch.where(torch.rand(count) < 0.5, own, anywhere)
    return (t / CLOCK).round() * CLOCK


def step(trainer: Trainer, teacher: WanDiT, frozen: WanDiT, ramp: float, plan: AttentionPlan) -> tuple[Tensor, Tensor]:
    """Gradients of one batch; returns the size of the change asked for, per sample, and the times."""
    parts, t = trainer.batch(BATCH), draw_times(BATCH).to(trainer.device)
    s, noise = t.view(-1, 1, 1, 1, 1), torch.randn_like(parts.z)
    noisy = (1 - s) * parts.z + s * noise
    target = network(teacher, parts)(noisy, t).detach()
    now, g = tangent(network(frozen, parts), noisy, t, target, ramp)
    loss = (network(trainer.model, parts, plan)(noisy, t) - (now + g).detach()).square().mean((1, 2, 3, 4))
    loss.mean().backward()
    return (target - now).square().mean((1, 2, 3, 4)).detach(), t


def frozen_copy(folder: Path, device: str) -> WanDiT:
    """The averaged weights that the student starts from, without gradients."""
    state = store.load(folder / f"{STUDENT.start}.pt")
    assert state is not None, f"{STUDENT.start}.pt does not exist"
    model = WanDiT(STUDENT.config)
    model.load_state_dict(state["average"])
    return model.requires_grad_(False).to(device)


def distil(folder: Path, settings: Settings) -> dict[str, Tensor]:
    """Distil (or continue) until `settings.steps`; returns the averaged weights of the student."""
    attention._sdpa = explicit_attention  # the fused one has no forward derivative
    trainer, steps = Trainer(folder, settings.lr, STUDENT, settings.device), settings.steps
    teacher, frozen = frozen_copy(folder, settings.device), frozen_copy(folder, settings.device)
    torch.manual_seed(trainer.step)
    recent: list[tuple[Tensor, Tensor]] = []
    while trainer.step < steps:
        frozen.load_state_dict(trainer.model.state_dict())
        plan = SLA if torch.rand(()) < SLA_SHARE else DENSE
        recent.append(step(trainer, teacher, frozen, min(1.0, trainer.step / WARM_UP), plan))
        norm = trainer.update(learning_rate(trainer.step, steps, settings.cooldown), decay=0.99)
        assert math.isfinite(norm), "the distillation diverged"
        if trainer.step % 20 == 0:
            write_log(folder / f"{STUDENT.name}_log.jsonl", trainer, STUDENT, recent, norm)
            recent = []
        if trainer.step % 50 == 0 or trainer.step == steps:
            trainer.save()
    return trainer.average


def main() -> None:
    """Command line: `python -m scripts.train_demo.distill --folder DIR`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--cooldown", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    store.set_up_cpu(args.threads)
    distil(args.folder, Settings(args.steps, args.lr, args.cooldown, args.threads, device=args.device))


if __name__ == "__main__":
    main()
