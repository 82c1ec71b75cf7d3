"""A process that shares a clip with a worker: it does on its card what the first rank tells it.

    python -m turbodiff.runtime.follower RANK RANKS STORE PARENT

See runtime/ranks.py. It ends with its parent: PR_SET_PDEATHSIG reaches it even where it is stopped.
"""

import ctypes
import json
import os
import queue
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from torch import Tensor

from turbodiff.models import vae as vae_driver
from turbodiff.models.attention import AttentionPlan
from turbodiff.models.parallel import SequenceParallel
from turbodiff.runtime.denoise import Network
from turbodiff.runtime.device import Device
from turbodiff.runtime.model_cache import ModelCache
from turbodiff.runtime.ranks import join, made_of
from turbodiff.runtime.text import TextRows
from turbodiff.spec.plan import Plan

BEAT_S = 1.0
PR_SET_PDEATHSIG = 1  # linux/prctl.h

Command = dict[str, Any]  # a line of JSON


def main(rank: int, ranks: int, store: Path, parent: int) -> None:
    """Join the group, then do what lines on standard input say, until they end."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        return
    threading.Thread(target=beat, daemon=True).start()
    commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
    threading.Thread(target=read, args=(sys.stdin.buffer, commands), daemon=True).start()
    device = Device.pick()
    torch.set_flush_denormal(True)  # as the worker: the same numbers
    say(made_of(device))
    join(device, store, rank, ranks)
    follow(ModelCache(device), SequenceParallel(rank, ranks), commands)


def say(word: dict[str, str]) -> None:
    """One line to the first rank."""
    os.write(1, json.dumps(word).encode() + b"\n")


def beat() -> None:
    """An empty word every second, until nobody reads any more."""
    while True:
        try:
            say({})
        except OSError:
            os._exit(1)
        time.sleep(BEAT_S)


def read(stream: BinaryIO, commands: "queue.SimpleQueue[Command]") -> None:
    """Commands into the queue; the end of them is the end of this process, whatever it is doing."""
    for line in stream:
        commands.put(json.loads(line))
    os._exit(0)


@torch.inference_mode()
def follow(models: ModelCache, parallel: SequenceParallel, commands: "queue.SimpleQueue[Command]") -> None:
    """Do every command in turn."""
    following: Command | None = None
    while True:
        command = following or commands.get()
        tensors = [receive(facts, models.device) for facts in command["tensors"]]
        plan = Plan.model_validate(command["plan"])
        models.open(plan.request)
        if command["do"] == "denoise":
            following = denoise(models, parallel, commands, plan, command, tensors)
        else:
            (latents,), following = tensors, None
            assert latents is not None
            decode(models, parallel, plan, latents)


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
    with models.dit(expert, plan) as placed:
        network = Network(
            placed, models.device.torch_device, text, condition, negative, command["guidance"], attention, plan.levers,
            features, parallel=parallel,
        )  # fmt: skip
        while (following := commands.get())["do"] == "evaluate":
            latents, timesteps = (receive(facts, models.device) for facts in following["tensors"])
            assert latents is not None and timesteps is not None
            network(latents, timesteps)
    return following


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


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
    except Exception as error:  # the outermost frame: the first rank must hear of it
        say({"error": f"{type(error).__name__}: {error}"[:2000]})
        raise
