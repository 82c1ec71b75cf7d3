"""Ours, diffusers' and, where installed, `turbodiffusion`'s and `sageattention`'s parts on the same tensors, as ratios.

    scripts/bench_peers.py              on the GPU Wan 1.3B at 480p, 81 frames; on a CPU four blocks at 240p, 17 frames
    scripts/bench_peers.py --only step --dtype bfloat16 --device cpu
    scripts/bench_peers.py --json       one JSON object a line and nothing else

All contenders of a job take turns in one process, so a machine that others use delays all alike: a ratio is the median
of the ratios of the rounds, time over diffusers' time, below 1 is faster. --toy runs all of it at toy size.
"""

import argparse
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from scripts import bench_pipeline, bench_timing  # noqa: E402
from turbodiff.models.attention import attention  # noqa: E402
from turbodiff.models.linear import Linear, to_int8  # noqa: E402

PARTS = ("step", "block", "attention", "linear", "vae")
PEERS = ("diffusers", "turbodiffusion", "sageattention")
CPU_BLOCKS, CPU_LATENT = 4, (5, 30, 52)
TOPK = bench_pipeline.TOPK
Contenders = dict[str, Callable[[], object]]


def missing() -> list[str]:
    """The peers that are not installed."""
    return [name for name in PEERS if importlib.util.find_spec(name) is None]


class Bench(bench_pipeline.Bench):
    """The jobs; the first contender of each is the yardstick."""

    def __init__(self, scale: bench_pipeline.Scale, device: torch.device, dtype: torch.dtype) -> None:
        found = importlib.util.find_spec("turbodiffusion")
        folders = list(found.submodule_search_locations or ()) if found else []
        super().__init__(scale, device, folders[0] if folders else None)
        self.dtype, self.cuda = dtype, device.type == "cuda"

    def step(self) -> Contenders:
        """One step of the denoiser; the sparse kinds and INT8 on a GPU only, where they are kernels."""
        calls = dict(self.dit().contenders)
        return calls if self.cuda else {name: calls[name] for name in ("diffusers", "turbodiff dense")}

    def block(self) -> Contenders:
        """One transformer block with the same weights, dense attention."""
        config, (frames, rows, columns) = self.scale.dit, self.scale.latent
        model = self.made(lambda: bench_pipeline.WanDiT(bench_pipeline.WanConfig(**{**vars(config), "num_layers": 1})))
        theirs = cast(Any, bench_pipeline._diffusers_dit(model))
        latents = self.randn(1, 16, frames, rows, columns)
        text = self.randn(1, 512, config.dim).to(self.dtype)
        cached = bench_pipeline.CrossAttentionCache(text)
        x, inputs = model.prepare(latents, torch.full((1, 1), 700.0, device=self.device), cached)
        rope, modulation = theirs.rope(latents), inputs.modulation.to(self.dtype)
        return {
            "diffusers": lambda: theirs.blocks[0](x, text, modulation, rope),
            "turbodiff": lambda: model.blocks[0](x.clone(), inputs, 0),
        }

    def attention(self) -> Contenders:
        """Self-attention of the clip: torch's, which diffusers calls, and each kind of ours through its operator."""
        from turbodiff_kernels.sage import sage_attention
        from turbodiff_kernels.sla import sla_attention

        config, (frames, rows, columns) = self.scale.dit, self.scale.latent
        tokens = frames * rows * columns // 4
        packed = self.randn(1, tokens, 3 * config.dim).to(self.dtype)
        q, k, v = (t.unflatten(-1, (config.num_heads, -1)) for t in packed.chunk(3, dim=-1))
        weight, bias = (self.randn(*shape).to(self.dtype) for shape in ((config.head_dim,) * 2, (config.head_dim,)))
        calls: Contenders = {
            "diffusers": lambda: F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))),
            "turbodiff dense": partial(attention, q, k, v),
            "turbodiff sage": partial(sage_attention, q, k, v),
            "turbodiff sla": partial(sla_attention, q, k, v, weight, bias, TOPK, int8=False),
            "turbodiff sagesla": partial(sla_attention, q, k, v, weight, bias, TOPK, int8=True),
        }
        if importlib.util.find_spec("sageattention"):
            calls["sageattention"] = partial(_sageattention, q, k, v)
        if self.turbodiffusion:
            from scripts.bench_kernels import _turbodiffusion

            calls |= _turbodiffusion(self.turbodiffusion, [q, k, v], weight, bias)
        return calls

    def linear(self) -> Contenders:
        """The feed-forward's first layer: 16 or 32 bits, and INT8 with the tokens quantised in the measured time."""
        config, (frames, rows, columns) = self.scale.dit, self.scale.latent
        x = self.randn(1, frames * rows * columns // 4, config.dim).to(self.dtype)
        layer = self.made(lambda: Linear(config.dim, config.ffn_dim))
        tiles, tokens = (to_int8(layer, mode) for mode in ("tiles", "tokens"))
        calls: Contenders = {
            "diffusers": partial(F.linear, x, layer.weight, layer.bias),
            "turbodiff tiles": partial(tiles, x),
            "turbodiff tokens": partial(tokens, x),
        }
        if self.turbodiffusion:
            calls["turbodiffusion"] = partial(
                _turbodiffusion_linear, self.turbodiffusion, x, *tiles.weights[:2], layer.bias
            )
        return calls

    def decode(self) -> Contenders:
        """Latents to frames."""
        return dict(self.vae().contenders)


def _sageattention(q: Tensor, k: Tensor, v: Tensor) -> object:
    from sageattention import sageattn  # type: ignore[import-not-found]

    return sageattn(q, k, v, tensor_layout="NHD", is_causal=False)


def _turbodiffusion_linear(path: str, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Its INT8 product with our tiles, which are its own format."""
    sys.path.insert(0, path)
    from ops.core import int8_linear  # type: ignore[import-not-found]

    return cast(Tensor, int8_linear(x, weight, scale)) + bias


def measure(calls: Contenders, clock: bench_timing.Clock, rounds: int) -> list[dict[str, object]]:
    """Of each contender milliseconds, their ratio to the first one's, and the error of one that cannot run here."""
    errors, able = dict[str, str](), dict[str, Callable[[], object]]()
    for name, run in calls.items():
        try:
            run()
            able[name] = run
        except Exception as error:  # noqa: BLE001 - a peer may lack its extension or not know this card
            errors[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    turns = [{name: clock.time(run) for name, run in able.items()} for _ in range(rounds)]
    yardstick = next(iter(calls))
    rows = list[dict[str, object]]()
    for name in calls:
        if name in errors:
            rows.append({"name": name, "error": errors[name]})
            continue
        row: dict[str, object] = {"name": name, "ms": round(statistics.median(turn[name] for turn in turns), 3)}
        if yardstick in able:
            row["ratio"] = round(statistics.median(turn[name] / turn[yardstick] for turn in turns), 3)
        rows.append(row)
    return rows


def scale_of(options: argparse.Namespace, device: torch.device) -> bench_pipeline.Scale:
    """Sizes: as the flags say, on a CPU few blocks and a small clip."""
    if options.toy:
        return bench_pipeline.TINY
    small = device.type == "cpu"
    asked = argparse.Namespace(dry=False, model=options.model, size="480p", blocks=options.blocks)
    asked.blocks = asked.blocks or (CPU_BLOCKS if small else None)
    scale = bench_pipeline.scale_of(asked)
    return scale._replace(name=f"{options.model} 240p", latent=CPU_LATENT) if small else scale


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, action="append")
    parser.add_argument("--model", choices=bench_pipeline.MODELS, default="1.3b")
    parser.add_argument("--blocks", type=int, help="of a step; all on a GPU, four on a CPU")
    parser.add_argument("--device", choices=("cuda", "cpu"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    scale, clock = scale_of(options, device), bench_timing.Clock(device)
    about = {"missing": missing(), "scale": scale.name, "dtype": str(dtype), **bench_timing.machine()}
    print(json.dumps(about) if options.json else f"{scale.name} on {device}, {dtype}; not installed: "
          f"{', '.join(missing()) or 'none'}", flush=True)  # fmt: skip
    with torch.inference_mode():
        bench = Bench(scale, device, dtype)
        for part, calls in jobs(bench, options.only or PARTS):
            rows = measure(calls, clock, options.rounds)
            print(json.dumps({"part": part, "contenders": rows}) if options.json else table(part, rows), flush=True)
    return 0


def jobs(bench: Bench, parts: tuple[str, ...]) -> Iterator[tuple[str, Contenders]]:
    """The parts asked for; a network is gone before the next one is made."""
    for part in parts:
        yield part, getattr(bench, "decode" if part == "vae" else part)()


def table(part: str, rows: list[dict[str, object]]) -> str:
    """A job's rows as lines."""
    lines = [part]
    for row in rows:
        said = row.get("error") or f"{row['ms']:12.2f} ms  {row.get('ratio', '-')}x"
        lines.append(f"  {row['name']:<26} {said}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
