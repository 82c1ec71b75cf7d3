"""How fast processes of a group send to each other, as one of them sees it."""

import time

import torch
import torch.distributed as dist

from turbodiff.runtime.device import Device

REPEATS = 5


def link_rate(device: Device, ranks: int, n_bytes: int) -> float:
    """Bytes that one process sends a second to the others: the best of some all-to-alls of so many bytes among all of
    them, each of which calls this."""
    outgoing = torch.zeros(-(-n_bytes // ranks) * ranks, dtype=torch.uint8, device=device.torch_device)
    incoming, best_s = torch.empty_like(outgoing), float("inf")
    for _ in range(REPEATS):
        dist.barrier()
        start_s = time.perf_counter()
        dist.all_to_all_single(incoming, outgoing)
        if device.is_cuda:
            torch.cuda.synchronize(device.torch_device)
        best_s = min(best_s, time.perf_counter() - start_s)
    return len(outgoing) * (ranks - 1) / ranks / best_s
