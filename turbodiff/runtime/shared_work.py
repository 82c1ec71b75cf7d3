"""What a follower does of a clip: the networks' shares that the first rank asks for, see runtime/ranks.py."""

import queue
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from turbodiff.models import vae as vae_driver
from turbodiff.models.attention import AttentionPlan
from turbodiff.models.parallel import SequenceParallel
from turbodiff.plan.hardware import CONTEXT_BYTES
from turbodiff.runtime import offload
from turbodiff.runtime.denoise import Network
from turbodiff.runtime.device import Device
from turbodiff.runtime.link_rate import link_rate
from turbodiff.runtime.model_cache import ModelCache
from turbodiff.runtime.text import TextRows
from turbodiff.sampling.conditioning import picture_video
from turbodiff.spec.plan import Plan

Command = dict[str, Any]  # a line of JSON, see `Ranks.tell`


@torch.inference_mode()
def follow(models: ModelCache, parallel: SequenceParallel, commands: "queue.SimpleQueue[Command]") -> None:
    """Do every command in turn."""
    following: Command | None = None
    while True:
        command = following or commands.get()
        if command["do"] == "link_rate":
            link_rate(models.device, parallel.ranks, command["n_bytes"])
            continue
        tensors = [receive(facts, models.device) for facts in command["tensors"]]
        plan = Plan.model_validate(command["plan"])
        cap_allocator(models.device, plan, parallel.rank)
        models.open(plan.request, on_disk=plan.levers.converted == "on_disk")
        if command["do"] == "denoise":
            following = denoise(models, parallel, commands, plan, command, tensors)
        else:
            (given,), following = tensors, None
            assert given is not None
            {"encode": encode, "decode": decode}[command["do"]](models, parallel, plan, given)


def cap_allocator(device: Device, plan: Plan, rank: int) -> None:
    """Stop torch's allocator at what this rank's card has for the clip, as the first rank's stops at what its card has;
    "Run anyway" may take what it needs."""
    share = plan.shares[rank] if rank < len(plan.shares) else None
    budget_bytes, peak_bytes = (share.budget_bytes, share.peak_bytes) if share else (plan.budget_bytes, plan.peak_bytes)
    room_bytes = max(budget_bytes, peak_bytes if plan.band == "no" else 0)
    offload.cap_allocator(device.torch_device, room_bytes - CONTEXT_BYTES)


def denoise(
    models: ModelCache, parallel: SequenceParallel, commands: "queue.SimpleQueue[Command]", plan: Plan,
    command: Command, tensors: list[Tensor | None],
) -> Command:  # fmt: skip
    """Evaluate one expert as often as the first rank says, each time at the latents and the timestep that it sends;
    returns the command that is another."""
    rows, bias, against, against_bias, condition, features = tensors
    assert rows is not None
    text = TextRows(rows, rows.shape[1], bias)
    negative = None if against is None else TextRows(against, against.shape[1], against_bias)
    (expert,) = [one for one in plan.request.spec.experts if one == command["expert"]]
    attention = AttentionPlan(command["attention"], plan.request.topk)
    parallel = parallel.exchanging(plan.levers.exchange)
    with models.dit(expert, plan, parallel) as placed:
        network = Network(
            placed, models.device.torch_device, text, condition, negative, command["guidance"], attention, plan.levers,
            features, parallel=parallel,
        )  # fmt: skip
        while (following := commands.get())["do"] == "evaluate":
            latents, timesteps = (receive(facts, models.device) for facts in following["tensors"])
            assert latents is not None and timesteps is not None
            network(latents, timesteps)
    return following


def encode(models: ModelCache, parallel: SequenceParallel, plan: Plan, picture: Tensor) -> None:
    """Latents of this rank's strip of the picture and of the frames after it, to all ranks; a second picture is the
    last frame."""
    with models.on_device("vae", plan) as vae:
        video = picture_video(picture[:1], plan.request.num_frames, picture[1:] if len(picture) > 1 else None)
        vae_driver.encode(vae, video, tile=plan.levers.tile, parallel=parallel)


def decode(models: ModelCache, parallel: SequenceParallel, plan: Plan, latents: Tensor) -> None:
    """This rank's strip of every frame, to the first rank."""
    width = latents.shape[-1]
    with models.on_device("vae", plan) as vae:
        for chunk in vae_driver.decode_stream(vae, latents, tile=plan.levers.tile, columns=parallel.columns(width)):
            parallel.collect_frames(vae_driver.frames_to_uint8(chunk), width)


def receive(facts: tuple[list[int], str] | None, device: Device) -> Tensor | None:
    """A tensor of that shape and dtype from the first rank."""
    if facts is None:
        return None
    shape, dtype = facts
    tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=device.torch_device)
    dist.broadcast(tensor, 0)
    return tensor
