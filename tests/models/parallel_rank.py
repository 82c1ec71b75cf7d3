"""One of several processes that share networks: runs every case, and the first tells how far it is from one process.

python -m tests.models.parallel_rank RANK RANKS STORE
"""

import json
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from turbodiff_kernels.quant import quantize_tokens

from tests.models.test_wan_dit import PICTURE, changed, random_model
from turbodiff.models import parallel
from turbodiff.models.attention import AttentionPlan
from turbodiff.models.linear import int8_blocks
from turbodiff.models.parallel import SequenceParallel
from turbodiff.models.vae import Vae, decode, decode_stream, encode, make_vae
from turbodiff.models.wan_dit import WanConfig, WanDiT

WIDE = WanConfig(dim=384, ffn_dim=512, num_heads=6, num_layers=2, text_dim=48, sla=True)
PICTURES = changed(PICTURE, dim=384, num_heads=6, sla=True)
HEAD_DIM = 64
GRID = (5, 14, 26)  # 455 tokens: three tiles and 71 tokens more
OTHER_ROWS = (100, 160)
KINDS = ("dense", "sage", "sla", "sagesla")
Case = tuple[WanDiT, AttentionPlan, SequenceParallel, tuple[int, int, int], int]


class InRows(TorchFunctionMode):
    """Has linear layers take so many rows at once, which changes nothing but rounding."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not torch.nn.functional.linear or args[0].ndim < 2:
            return func(*args, **(kwargs or {}))
        parts = [func(part, *args[1:], **(kwargs or {})) for part in args[0].split(self.rows, dim=-2)]
        return torch.cat(parts, dim=-2)


class RoundedByRows(TorchFunctionMode):
    """Has linear layers round otherwise for another number of rows, as GPUs do and some CPUs: the sums of two pieces of
    the columns, cut by that number."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not torch.nn.functional.linear or args[0].ndim < 2:
            return func(*args, **(kwargs or {}))
        x, weight, *bias = args
        cut = x.shape[-1] * (1 + x.shape[-2] % 7) // 8
        first = func(x[..., :cut], weight[:, :cut])
        return first + func(x[..., cut:], weight[:, cut:], *bias, **(kwargs or {}))


class RestartedRope(SequenceParallel):
    """Wrong on purpose: every rank counts its positions from 0."""

    def share(self, x, dim=0):
        part = super().share(x, dim)
        return x[: len(part)] if dim == 0 else part


def velocity(case: Case, shared: bool) -> torch.Tensor:
    """Of one forward pass with prompt weights and, where the network has them, a condition and a picture."""
    model, plan, ranks, grid, batch = case
    draw = torch.Generator().manual_seed(0)
    config, dtype = model.config, model.dtype
    latents, text = torch.randn(batch, 16, *grid, generator=draw), torch.randn(batch, 24, 48, generator=draw)
    condition = torch.randn(batch, 20, *grid, generator=draw) if config.in_dim == 36 else None
    picture = torch.randn(batch, 9, config.image_dim, generator=draw).to(dtype) if config.image_dim else None
    bias = torch.randn(batch, 1, 1, 24, generator=draw)
    times = torch.linspace(987.5, 400, batch)[:, None]
    x, inputs = model.prepare(
        latents, times, model.embed_text(text), condition, model.embed_picture(picture), attention=plan,
        context_bias=bias, parallel=ranks if shared else None,
    )  # fmt: skip
    for index, block in enumerate(model.blocks):
        x = block(x, inputs, index, 2)
    return model.finish(x, inputs)


def distance(case: Case) -> float:
    """Largest difference of the shared pass from that of one process, which the first makes; 0.0 means every bit."""
    got = velocity(case, True)
    if case[2].rank:
        return 0.0
    expected = velocity(case, False)
    return 0.0 if torch.equal(got, expected) else float((got - expected).abs().max())


def relative(case: Case) -> float:
    got = velocity(case, True)
    return apart(got, velocity(case, False)) if case[2].rank == 0 else 0.0


def apart(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def in_rows(model: WanDiT, plan: AttentionPlan) -> float:
    """How far one process is from itself, at most, where its linear layers take so many rows at once, not all."""
    case = (model, plan, SequenceParallel(0, 1), GRID, 1)
    expected, found = velocity(case, False), []
    for rows in OTHER_ROWS:
        with InRows(rows):  # inside, so that other modes see those rows
            found.append(apart(velocity(case, False), expected))
    return max(found)


def rounded_by_rows(measure: Callable[[], float]) -> float:
    with RoundedByRows():
        return measure()


def cases(ranks: SequenceParallel) -> dict[str, Callable[[], float]]:
    """What is measured, by name."""
    plain = random_model(WIDE)
    for block in plain.blocks:
        torch.nn.init.normal_(block.self_attn.proj_l.weight, std=0.1)
    tiles, tokens = (int8_blocks(random_model(WIDE), mode) for mode in ("tiles", "tokens"))
    pictures = random_model(PICTURES)
    conditioned = int8_blocks(random_model(changed(WIDE, in_dim=36)), mode="tiles")
    narrow = random_model(WIDE).bfloat16()
    plans = {kind: AttentionPlan(kind, 0.4) for kind in KINDS}
    every, rounded = {}, ranks.exchanging("int8")
    for kind, plan in plans.items():
        every[kind] = lambda plan=plan: distance((plain, plan, ranks, GRID, 1))
        every[f"{kind} int8 exchange"] = lambda plan=plan: relative((plain, plan, rounded, GRID, 1))
        every[f"{kind} bf16"] = lambda plan=plan: relative((narrow, plan, ranks, GRID, 1))
        if ranks.rank == 0:  # of one process alone
            every[f"{kind} bf16 rounding"] = lambda plan=plan: rounding(narrow, plan)
        every[f"{kind} bf16 in rows"] = lambda plan=plan: in_rows(narrow, plan) if ranks.rank == 0 else 0.0
    for name in ("dense bf16", "dense bf16 in rows", "sagesla bf16", "sagesla bf16 in rows"):
        every[f"{name}, rounded by rows"] = partial(rounded_by_rows, every[name])
    dense, sagesla = plans["dense"], plans["sagesla"]
    grouped = SequenceParallel(ranks.rank, ranks.ranks, head_groups=2)
    for kind, plan in plans.items():
        every[f"{kind} groups of heads"] = lambda plan=plan: distance((plain, plan, grouped, GRID, 1))
    every["int8 tiles"] = lambda: distance((tiles, sagesla, ranks, GRID, 1))
    every["int8 tokens"] = lambda: distance((tokens, sagesla, ranks, GRID, 1))
    every["picture"] = lambda: distance((pictures, plans["sla"], ranks, GRID, 1))
    every["condition, int8 tiles"] = lambda: distance((conditioned, sagesla, ranks, GRID, 1))
    every["batch of two"] = lambda: distance((plain, plans["sla"], ranks, (5, 10, 26), 2))
    restarted = RestartedRope(ranks.rank, ranks.ranks)
    every["control: rope from 0 on every rank"] = lambda: distance((plain, dense, restarted, GRID, 1))

    def off_tiles() -> float:
        aligned = parallel.token_shares
        parallel.token_shares = lambda n, k: [n // k + (rank < n % k) for rank in range(k)]
        try:
            return distance((tiles, dense, ranks, GRID, 1))
        finally:
            parallel.token_shares = aligned

    every["control: shares off tiles"] = off_tiles
    loud = with_a_loud_head(random_model(WIDE))
    every["int8 exchange beside a loud head"] = lambda: relative((loud, dense, rounded, GRID, 1))

    def scale_per_token() -> float:
        by_head = parallel._to_int8
        parallel._to_int8 = to_int8_by_token
        try:
            return relative((loud, dense, rounded, GRID, 1))
        finally:
            parallel._to_int8 = by_head

    every["too coarse: int8 exchange with a scale per token"] = scale_per_token
    torch.manual_seed(0)
    vae = make_vae(8) if ranks.ranks == 2 else None  # once is enough
    for name in ("decode", "decode in tiles", "encode", "encode in tiles") if vae else ():
        every[name] = partial(strips, vae, ranks, name.startswith("decode"), 12 if "tiles" in name else None)
    return every


def with_a_loud_head(model: WanDiT) -> WanDiT:
    """The same network but for rounding: the first head's values are 100 times as large, and count a hundredth."""
    with torch.no_grad():
        for block in model.blocks:
            block.self_attn.v.weight[:HEAD_DIM] *= 100
            block.self_attn.v.bias[:HEAD_DIM] *= 100
            block.self_attn.o.weight[:, :HEAD_DIM] /= 100
    return model


def to_int8_by_token(x: torch.Tensor) -> torch.Tensor:
    """What travels, with one scale for all heads of a token."""
    values, scale = quantize_tokens(x.flatten(-2).flatten(0, -2))
    scales = scale[:, None, None].expand(-1, x.shape[-2], 1).contiguous().view(torch.int8)
    return torch.cat((values.unflatten(-1, x.shape[-2:]), scales), dim=-1).unflatten(0, x.shape[:-2])


def strips(vae: Vae, ranks: SequenceParallel, decodes: bool, tile: int | None) -> float:
    """Largest difference between a picture's columns in strips, one a rank, and all of them on one."""
    width = 48  # of 384 pixels
    z = torch.randn(1, 16, 2, 10, width, generator=torch.Generator().manual_seed(5))
    whole = decode(vae, z, tile=tile)
    if decodes:
        chunks = decode_stream(vae, z, tile=tile, columns=ranks.columns(width))
        frames = [ranks.collect_frames(chunk.movedim(1, -1), width) for chunk in chunks]
        return 0.0 if ranks.rank else float((torch.cat(frames, dim=1) - whole.movedim(1, -1)).abs().max())
    return float((encode(vae, whole, tile=tile, parallel=ranks) - encode(vae, whole, tile=tile)).abs().max())


def rounding(narrow: WanDiT, plan: AttentionPlan) -> float:
    """How far one process in 16 bits is from the same weights in 32: what bf16 itself costs."""
    alone = SequenceParallel(0, 1)
    wide = random_model(WIDE)
    wide.load_state_dict(narrow.state_dict())
    got, expected = (velocity((model, plan, alone, GRID, 1), False) for model in (narrow, wide))
    return apart(got, expected)


@torch.inference_mode()
def main(rank: int, ranks: int, path: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(path, ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=300))
    found = {name: measure() for name, measure in cases(SequenceParallel(rank, ranks)).items()}
    if rank == 0:
        sys.stdout.write(json.dumps(found) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
