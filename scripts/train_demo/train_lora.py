"""Trains a small LoRA on the demo's text-to-video DiT: one that turns every shape yellow, or one that distils steps.

The yellow one learns from yellow clips of the cache, each asked for in another colour. The other (`--distil 4`) learns
to go in one Euler step where the network itself goes in several (progressive distillation, arXiv 2202.00512), and its
metadata says so: plain weights under it are run in that many steps. Minutes on a CPU; names are PEFT's.
"""

import argparse
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call

from scripts.train_demo import store
from scripts.train_demo.captions import training_captions
from scripts.train_demo.dataset import SENTENCES, Latents, cache_text, context_bias
from scripts.train_demo.export import write
from scripts.train_demo.train_dit import CONFIG, Batch, explicit_attention, flow_loss, moved, sample_times
from turbodiff.gpu.probe import machine_now
from turbodiff.models import attention
from turbodiff.models.wan_dit import WanDiT
from turbodiff.plan.planner import plan_request
from turbodiff.runtime.device import Device
from turbodiff.runtime.model_cache import ModelCache
from turbodiff.spec.experts import flow_times
from turbodiff.spec.request import make_request
from turbodiff.weights.distillation import OUR_KIND, OUR_STEPS
from turbodiff.weights.locate import inventory

RANK = 4
FINE = 4  # Euler steps of the teacher for one of the student
SHIFT = 5.0  # of the times, as published step distillations have it (spec/schedules.py)
SENTENCES_DISTILLED = 24
MODULES = ("cross_attn.k", "cross_attn.v", "cross_attn.o", "ffn.0", "ffn.2")
BATCH = 16


def yellow_pairs(latents: Latents) -> list[tuple[int, int]]:
    """(cached clip, caption of a sentence), both trained on: the clip is yellow, the sentence names any colour."""
    captions = training_captions()
    pairs = []
    for index, number in enumerate(latents.caption.tolist()):
        clip = captions[number]
        if clip.colour == "yellow":
            facts = (clip.shape, clip.motion, clip.background)
            pairs += [(index, i) for i, c in enumerate(captions) if (c.shape, c.motion, c.background) == facts]
    assert pairs, "no cached clip is yellow: cache more clips"
    return pairs


def yellow_batch(latents: Latents, words: dict[str, Tensor], pairs: list[tuple[int, int]], rng: random.Random) -> Batch:
    """Yellow clips under sentences of other colours (sentences that name two colours left out)."""
    chosen = rng.choices(pairs, k=BATCH)
    index = torch.tensor([clip for clip, _ in chosen])
    sentence = torch.tensor([asked * SENTENCES + rng.randrange(SENTENCES - 2) for _, asked in chosen])
    return Batch(latents.z[index].float(), words["rows"][sentence], context_bias(words["counts"][sentence]), None)


def new_pairs(model: WanDiT) -> dict[str, nn.Parameter]:
    """PEFT's names -> halves: A is random, B is zero, so the change starts as nothing (arXiv 2106.09685)."""
    torch.manual_seed(5)
    pairs: dict[str, nn.Parameter] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name.startswith("blocks.") and name.split(".", 2)[2] in MODULES:
            down = torch.randn(RANK, layer.in_features) / layer.in_features**0.5
            pairs[f"{name}.lora_A.weight"] = nn.Parameter(down)
            pairs[f"{name}.lora_B.weight"] = nn.Parameter(torch.zeros(layer.out_features, RANK))
    return pairs


def worn(model: WanDiT, pairs: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The parameters in bfloat16 with the change merged in, differentiable in `pairs`."""
    weights = dict(model.named_parameters())
    for name in [name.removesuffix(".lora_A.weight") for name in pairs if name.endswith(".lora_A.weight")]:
        change = pairs[f"{name}.lora_B.weight"] @ pairs[f"{name}.lora_A.weight"]
        weights[f"{name}.weight"] = weights[f"{name}.weight"] + change
    return {name: value.bfloat16() for name, value in weights.items()}


def train(folder: Path, base: Path, target: Path, steps: int, lr: float, device: str) -> None:
    """Train on the network in `base` (dit_t2v.safetensors) and write the LoRA to `target`, bfloat16."""
    attention._sdpa = explicit_attention
    model = WanDiT(CONFIG)
    model.load_state_dict({name: value.float() for name, value in load_file(base).items()})
    model.requires_grad_(False).to(device)
    pairs = {name: nn.Parameter(value.detach().to(device)) for name, value in new_pairs(model).items()}
    optimiser = torch.optim.AdamW(pairs.values(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps, pct_start=0.1)
    words, latents, rng = cache_text(folder), Latents(folder), random.Random(5)
    asked = yellow_pairs(latents)

    def forward(noisy: Tensor, clock: Tensor, rows: Tensor, bias: Tensor, condition: Tensor | None) -> Tensor:
        return functional_call(model, worn(model, pairs), (noisy, clock, rows, condition), {"context_bias": bias})

    for number in range(1, steps + 1):
        batch = moved(yellow_batch(latents, words, asked, rng), device)
        loss = flow_loss(forward, batch, sample_times(BATCH).to(device)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if number % 10 == 0:
            store.log(folder / "lora_log.jsonl", step=number, loss=round(loss.item(), 4))
    write(target, {f"base_model.model.{name}": value.detach().cpu() for name, value in pairs.items()}, torch.bfloat16)


def bundled_rows(sentences: list[str]) -> Tensor:
    """Text rows [sentences, 512, dim] of the bundled encoder, float32."""
    request = make_request({"prompt": sentences[0], "seed": 0})
    plan = plan_request(request, machine_now(), inventory())
    models = ModelCache(Device.pick("cpu"))
    models.open(plan.request)
    with torch.no_grad(), models.text_encoder(plan) as read:
        return torch.cat([read(sentence).rows.float() for sentence in sentences])


def teacher_path(teacher: WanDiT, rows: Tensor, times: list[float], noise: Tensor) -> Tensor:
    """Latents [times, B, 16, T, h, w] of the network's own path from noise, FINE Euler steps between two times."""
    latents = [noise]
    for t, t_next in pairwise(times):
        x = latents[-1]
        for part in range(FINE):
            now = t + (t_next - t) * part / FINE
            clock = torch.full((len(x), 1), 1000 * now)
            velocity = teacher(x.bfloat16(), clock, rows.bfloat16(), None)
            x = x + (t_next - t) / FINE * velocity.float()
        latents.append(x)
    return torch.stack(latents)


def distil(base: Path, target: Path, count: int, steps: int, lr: float) -> None:
    """Train a LoRA that takes `count` Euler steps along the path of the network in `base`, and write it to `target`."""
    attention._sdpa = explicit_attention
    state = {name: value for name, value in load_file(base).items() if ".proj_l." not in name}
    model, teacher = (WanDiT(replace(CONFIG, sla=False)).requires_grad_(False) for _ in range(2))
    model.load_state_dict({name: value.float() for name, value in state.items()})
    teacher.load_state_dict(state)
    teacher.bfloat16()
    rng, times = random.Random(7), [*flow_times(count, SHIFT), 0.0]
    sentences = [caption.english for caption in rng.sample(training_captions(), SENTENCES_DISTILLED)]
    rows, pairs = (
        bundled_rows(sentences),
        {name: nn.Parameter(value.detach()) for name, value in new_pairs(model).items()},
    )
    optimiser = torch.optim.AdamW(pairs.values(), lr=lr, weight_decay=0.0)
    for number in range(1, steps + 1):
        chosen = rows[rng.sample(range(len(rows)), 2)]
        with torch.no_grad():
            path = teacher_path(teacher, chosen, times, torch.randn(2, 16, 5, 16, 16))
        place = rng.randrange(count)
        wanted = (path[place] - path[place + 1]) / (times[place] - times[place + 1])
        clock = torch.full((2, 1), 1000 * times[place])
        got = functional_call(model, worn(model, pairs), (path[place].bfloat16(), clock, chosen.bfloat16(), None))
        loss = (got.float() - wanted).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if number % 5 == 0:
            print(f"step {number}: loss {loss.item():.4f}", flush=True)
            halves = {f"base_model.model.{name}": value for name, value in pairs.items()}
            write(target, halves, torch.bfloat16, {OUR_KIND: "step-distilled", OUR_STEPS: str(count)})


def main() -> None:
    """Command line: `python -m scripts.train_demo.train_lora --folder DIR --base dit_t2v.safetensors --target FILE`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=Path(), help="the caches of `python -m scripts.train_demo`")
    parser.add_argument("--distil", type=int, default=0, help="a LoRA for so many Euler steps; needs no caches")
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    store.set_up_cpu(args.threads)
    if args.distil:
        distil(args.base, args.target, args.distil, args.steps, args.lr)
        return
    train(args.folder, args.base, args.target, args.steps, args.lr, args.device)


if __name__ == "__main__":
    main()
