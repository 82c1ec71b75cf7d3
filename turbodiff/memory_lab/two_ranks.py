"""Two processes that share a small network on one device against one process: what the arithmetic there makes of it.

    python -m turbodiff.memory_lab.two_ranks

The last line is JSON: per kind of attention the largest difference of the velocity and its largest value. NCCL refuses
one card to two processes ("Duplicate GPU detected"), so gloo sends what lies in host memory: this is about shares of
tokens and heads through the kernels of a card, and about no link.
"""

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from turbodiff.models.attention import AttentionPlan
from turbodiff.models.linear import int8_blocks
from turbodiff.models.parallel import SequenceParallel, _Exchange
from turbodiff.models.wan_dit import WanConfig, WanDiT
from turbodiff.runtime import offload
from turbodiff.runtime.device import Device
from turbodiff.spec.attention import AttentionKind

RANKS = 2
CONFIG = WanConfig(dim=512, ffn_dim=1024, num_heads=4, num_layers=2, text_dim=64, sla=True)
GRID = (5, 14, 26)  # 455 tokens: three tiles and 71 tokens more
CPU = torch.device("cpu")
KINDS: tuple[AttentionKind, ...] = ("dense", "sage", "sla", "sagesla")


@dataclass(frozen=True)
class ThroughHost(SequenceParallel):
    """A place among processes on one card, from which gloo sends nothing."""

    device: torch.device = CPU

    def _send(self, parts: Sequence[Tensor], counts: Sequence[int]) -> _Exchange:
        exchange = super()._send([part.cpu() for part in parts], counts)
        exchange.work.wait()
        return replace(exchange, incoming=offload.to_device(exchange.incoming, self.device))


def velocity(network: WanDiT, kind: AttentionKind, device: torch.device, parallel: SequenceParallel | None) -> Tensor:
    """Of one forward pass, float32 [1, 16, T, H, W], on the CPU."""
    draw = torch.Generator().manual_seed(0)
    latents, rows = torch.randn(1, 16, *GRID, generator=draw), torch.randn(1, 24, CONFIG.text_dim, generator=draw)
    text = network.embed_text(offload.to_device(rows, device).to(network.dtype))
    given = offload.to_device(latents, device), torch.full((1, 1), 900.0, device=device), text
    x, inputs = network.prepare(*given, attention=AttentionPlan(kind, 0.4), parallel=parallel)
    for index, block in enumerate(network.blocks):
        x = block(x, inputs, index, 1)
    return network.finish(x, inputs).float().cpu()


def differences(parallel: SequenceParallel, device: Device) -> dict[str, dict[str, float]]:
    """Largest difference from one process, and largest value, of every kind of attention and of INT8 linears."""
    torch.manual_seed(1)
    plain = WanDiT(CONFIG).requires_grad_(False).to(device.dtype)
    cases: list[tuple[str, WanDiT, AttentionKind]] = [(kind, plain, kind) for kind in KINDS]
    cases.append(("int8", int8_blocks(WanDiT(CONFIG).requires_grad_(False).to(device.dtype)), "sagesla"))
    found = {}
    for name, network, kind in cases:
        with offload.on_device(network, device.torch_device):
            alone, shared = (velocity(network, kind, device.torch_device, where) for where in (None, parallel))
        found[name] = {"difference": float((alone - shared).abs().max()), "largest": float(alone.abs().max())}
    return found


@torch.inference_mode()
def run_rank(rank: int, folder: str) -> None:
    """One of the processes; the first leaves what it found in the folder."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    device = Device.pick()
    meeting = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=meeting, rank=rank, world_size=RANKS)
    found = differences(ThroughHost(rank, RANKS, device=device.torch_device), device)
    if rank == 0:
        Path(folder, "found").write_text(json.dumps({**found, "device": device.name}), "utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="turbodiff-two-ranks-") as own:
        torch.multiprocessing.spawn(run_rank, args=(own,), nprocs=RANKS)  # type: ignore[attr-defined,no-untyped-call]
        sys.stdout.write(Path(own, "found").read_text("utf-8") + "\n")
