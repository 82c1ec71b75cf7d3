"""What a card sends a second in an all-to-all among several: one process of the measurement.

    python -m turbodiff.memory_lab.link RANK RANKS STORE

Each process uses the first card that it sees, NCCL between cards, gloo between CPUs; they meet through the file STORE.
The first prints {"bytes_s": ...} on standard output.
"""

import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from turbodiff.runtime.device import Device
from turbodiff.runtime.ranks import join

BYTES = 64 << 20  # of one all-to-all, about what 14B sends in a block
REPEATS = 5


def main(rank: int, ranks: int, store: Path) -> float:
    """Bytes that one process sends a second to the others: the best of some all-to-alls."""
    device = Device.pick()
    if device.is_cuda:
        torch.cuda.set_device(device.torch_device)
    join(device, store, rank, ranks)
    outgoing = torch.zeros(BYTES // ranks * ranks, dtype=torch.uint8, device=device.torch_device)
    incoming, best_s = torch.empty_like(outgoing), float("inf")
    for _ in range(REPEATS):
        dist.barrier()
        start_s = time.perf_counter()
        dist.all_to_all_single(incoming, outgoing)
        if device.is_cuda:
            torch.cuda.synchronize(device.torch_device)
        best_s = min(best_s, time.perf_counter() - start_s)
    dist.destroy_process_group()
    return len(outgoing) * (ranks - 1) / ranks / best_s


if __name__ == "__main__":
    bytes_s = main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    if sys.argv[1] == "0":
        sys.stdout.write(json.dumps({"bytes_s": bytes_s}) + "\n")
