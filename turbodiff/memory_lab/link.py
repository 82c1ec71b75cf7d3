"""What a card sends a second in an all-to-all among several: one process of the measurement.

    python -m turbodiff.memory_lab.link RANK RANKS STORE

Each process uses the first card that it sees, NCCL between cards, gloo between CPUs; they meet through the file STORE.
The first prints {"bytes_s": ...} on standard output.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from turbodiff.runtime.device import Device
from turbodiff.runtime.link_rate import link_rate
from turbodiff.runtime.ranks import join

BYTES = 64 << 20  # of one all-to-all, about what 14B sends in a block


def main(rank: int, ranks: int, store: Path) -> float:
    """Bytes that one process sends a second to the others."""
    device = Device.pick()
    if device.is_cuda:
        torch.cuda.set_device(device.torch_device)
    join(device, store, rank, ranks)
    bytes_s = link_rate(device, ranks, BYTES)
    dist.destroy_process_group()
    return bytes_s


if __name__ == "__main__":
    bytes_s = main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    if sys.argv[1] == "0":
        sys.stdout.write(json.dumps({"bytes_s": bytes_s}) + "\n")
