"""One of several processes that spread a network's blocks over themselves: runs every case, and the first tells how far
its velocity is from that of one process, whose blocks are all its own.

python -m tests.runtime.blocks_rank RANK RANKS STORE
"""

import json
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

from tests.models.test_wan_dit import random_model
from turbodiff.models.attention import AttentionPlan
from turbodiff.models.linear import int8_blocks
from turbodiff.models.parallel import SequenceParallel
from turbodiff.models.wan_dit import WanConfig, WanDiT
from turbodiff.runtime.denoise import Network
from turbodiff.runtime.model_cache import PlacedDit
from turbodiff.runtime.offload import dit_on_device, share_parameters, tensors_of
from turbodiff.runtime.shared_blocks import SharedBlocks
from turbodiff.runtime.text import TextRows
from turbodiff.spec.plan import Levers

CPU = torch.device("cpu")
BLOCKS = 7
CONFIG = WanConfig(dim=384, ffn_dim=512, num_heads=6, num_layers=BLOCKS, text_dim=48, sla=True)
GRID = (3, 14, 26)
SPREAD = ((0, BLOCKS), (0, 3), (0, 0), (2, 3), (BLOCKS - 2, 2), (BLOCKS - 1, 0))  # on every card, on one of them


def velocities(dit: WanDiT, levers: Levers, parallel: SequenceParallel | None, on_cards: int | None) -> torch.Tensor:
    """Of two evaluations, so that slots are filled anew."""
    draw = torch.Generator().manual_seed(0)
    latents, text = torch.randn(1, 16, *GRID, generator=draw), torch.randn(1, 24, 48, generator=draw)
    stream = None if on_cards is None else partial(SharedBlocks, on_cards=on_cards, parallel=parallel)
    with dit_on_device(dit, CPU, levers, stream=stream) as blocks:
        network = Network(
            PlacedDit(dit, blocks, ()), CPU, TextRows(text, 24), attention=AttentionPlan("sla", 0.4), parallel=parallel
        )
        return torch.stack([network(latents, torch.full((1, 1), t)) for t in (900.0, 500.0)])


def spoiled(dit: WanDiT, wrong: Callable[[int], bool]) -> WanDiT:
    """The same network, some of whose blocks are not what they should be."""
    copy = share_parameters(dit)
    for index, block in enumerate(copy.blocks):
        for tensor in tensors_of(block) if wrong(index) else ():
            tensor.data = torch.full_like(tensor, 3)
    return copy


def distance(dit: WanDiT, parallel: SequenceParallel, resident: int, on_cards: int, own: bool) -> float:
    """From one process. A block that is another's is wrong here, unless it stays; with `own` it is one of its own."""
    expected = velocities(dit, Levers(), None, None)

    def wrong(index: int) -> bool:
        mine = (index - resident) % parallel.ranks == parallel.rank
        return index >= resident and mine == own

    levers = Levers(experts="streamed", blocks_resident=resident)
    got = velocities(spoiled(dit, wrong), levers, parallel, on_cards)
    return 0.0 if torch.equal(got, expected) else float((got - expected).norm() / expected.norm())


def cases(parallel: SequenceParallel) -> dict[str, Callable[[], float]]:
    plain = random_model(CONFIG)
    every = {"plain": plain, "int8": int8_blocks(random_model(CONFIG), mode="tiles")}
    found = {
        f"{name} {resident} {on_cards}": partial(distance, dit, parallel, resident, on_cards, own=False)
        for name, dit in every.items()
        for resident, on_cards in (SPREAD if name == "plain" else SPREAD[1:4:2])
    }
    return found | {"control: its own blocks are wrong": partial(distance, plain, parallel, 0, 3, own=True)}


@torch.inference_mode()
def main(rank: int, ranks: int, path: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    limit = timedelta(seconds=300)
    dist.init_process_group("gloo", store=dist.FileStore(path, ranks), rank=rank, world_size=ranks, timeout=limit)
    parallel = SequenceParallel(rank, ranks, weights=dist.new_group(timeout=limit))
    found = {name: measure() for name, measure in cases(parallel).items()}
    if rank == 0:
        sys.stdout.write(json.dumps(found) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
