#!/usr/bin/env python
"""What several cards gain on one clip: a prediction by model and size, and the rate of an all-to-all on this machine.

    scripts/bench_parallel.py --link-gb-s 40 --seconds 24      # predicted, from a given rate and one card's seconds
    scripts/bench_parallel.py --measure 2                      # the rate among 2 processes: NCCL on GPUs, else gloo

The table is a prediction (turbodiff/plan/shared_clip.py), whatever the rate came from.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from turbodiff.plan.links import possible_ranks
from turbodiff.plan.shared_clip import INT8_BYTES, shared
from turbodiff.spec.models import find_model
from turbodiff.spec.numbers import GB

MODELS = ("wan2.1-1.3b", "wan2.1-14b", "wan2.2-t2v-a14b")
SIZES = {"480p": (32760, 104), "720p": (75600, 160)}  # tokens of 81 frames, width in latent pixels
BYTES = 64 << 20  # of one all-to-all, about what 14B sends in a block
REPEATS = 5


def table(link_bytes_s: float, denoise_s: float, vae_s: float, serial_s: float, steps: int) -> None:
    """Print seconds, efficiency and when clips side by side are better, for every number of cards that divides."""
    say = sys.stdout.write
    say(
        f"predicted, {link_bytes_s / GB:g} GB/s a card, denoise {denoise_s:g} s, VAE {vae_s:g} s, rest {serial_s:g} s\n"
    )
    say(f"{'model':18}{'size':6}{'cards':>6}{'exchange':>10}{'GB/pass':>9}{'s':>8}{'x':>6}{'eff.':>6}  side by side\n")
    for name in MODELS:
        dit = find_model(name).dit
        for size, (tokens, width) in SIZES.items():
            for ranks in reversed(possible_ranks(dit.num_heads, tokens, 8)):
                for word, element_bytes in (("bf16", 2), ("int8", INT8_BYTES)):
                    got = shared(
                        dit, tokens, ranks, split_s=denoise_s, strips_s=vae_s, width=width, serial_s=serial_s,
                        forwards=steps, link_bytes_s=link_bytes_s, element_bytes=element_bytes,
                    )  # fmt: skip
                    offered = "" if got.helps else "  not offered"
                    say(
                        f"{name:18}{size:6}{ranks:6}{word:>10}{got.sent_bytes / GB:9.1f}{got.seconds:8.1f}"
                        f"{got.speedup:6.2f}{got.efficiency:6.2f}  {got.side_by_side:.2f} clips{offered}\n"
                    )


def measure(ranks: int) -> float:
    """Bytes that one process sends a second in an all-to-all among so many of this machine."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--store", f"{folder}/store", "--measure", str(ranks), "--rank"]
        others = [subprocess.Popen([*command, str(rank)]) for rank in range(1, ranks)]
        try:
            return exchange(0, ranks, Path(folder) / "store")
        finally:
            for other in others:
                other.wait(60)


def exchange(rank: int, ranks: int, store: Path) -> float:
    """One process of `measure`; each uses the card of its rank where there are as many."""
    import torch
    import torch.distributed as dist

    from turbodiff.runtime.device import Device
    from turbodiff.runtime.ranks import join

    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = Device.pick(f"cuda:{rank}" if cards >= ranks else "cpu")
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


def main() -> None:
    """Measure where it was asked for, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", type=int, metavar="PROCESSES", help="measure the rate among so many processes")
    parser.add_argument("--link-gb-s", type=float, default=40.0, help="one card's rate in an all-to-all")
    parser.add_argument("--seconds", type=float, default=24.0, help="of the transformer on one card")
    parser.add_argument("--vae-seconds", type=float, default=6.0)
    parser.add_argument("--rest-seconds", type=float, default=1.5)
    parser.add_argument("--steps", type=int, default=4, help="forward passes")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        exchange(args.rank, args.measure, args.store)
        return
    link_bytes_s = measure(args.measure) if args.measure else args.link_gb_s * GB
    table(link_bytes_s, args.seconds, args.vae_seconds, args.rest_seconds, args.steps)


if __name__ == "__main__":
    main()
