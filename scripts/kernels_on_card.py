"""The loops of attention on this card, for scripts/first_gpu_minutes: their numbers, and their time beside the model's.

Two clips, short and odd lengths: what the self-check does not run. Times are those of each launch of the attention of
Wan 14B at 480p; the model's (scripts/step_model.py) come from what the compiler makes of the very same launches.
"""

import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import ceil
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from turbodiff_kernels import backend, selfcheck  # noqa: E402
from turbodiff_kernels.sage import kernel as sage  # noqa: E402
from turbodiff_kernels.sage import reference as sage_reference  # noqa: E402
from turbodiff_kernels.selfcheck import Inputs  # noqa: E402
from turbodiff_kernels.sla import kernel as sla  # noqa: E402
from turbodiff_kernels.sla import reference as sla_reference  # noqa: E402

from scripts import kernel_launches, step_model  # noqa: E402
from scripts.kernel_launches import Measured  # noqa: E402
from scripts.step_model import Card, Shape  # noqa: E402

BATCHES, LENGTHS = (1, 2), (1, 63, 330, 517)
INTERPRETED_BOUND = 0.1  # FP8 in Triton's interpreter loses a carry when it rounds
SHAPE, TOPK = step_model.SHAPES["14B 480p"], 0.1
DRY_CARD = "H200"


def numbers(device: torch.device) -> dict[str, object]:
    """How far each loop is from the reference, relative L2 by clips x tokens; a CPU is taken for a Hopper card."""
    on_card = device.type == "cuda"
    capability = backend.arch(device) if on_card else backend.HOPPER
    make = Inputs(device, torch.bfloat16 if on_card else torch.float16)
    hopper = selfcheck.HOPPER if not on_card or kernel_launches.has_hopper_loop(capability) else ()
    loops: dict[str, dict[str, float]] = {}
    with mock.patch.object(sage, "arch", lambda _: capability), torch.no_grad():
        for name in ("sage", "sagesla", *hopper):
            loops[name] = {f"{b}x{n}": distance(name, make, b, n) for b in BATCHES for n in LENGTHS}
    bound = selfcheck.CHECKS["sage"].bound if on_card else INTERPRETED_BOUND
    wrong = [f"{name} {at}" for name, found in loops.items() for at, off in found.items() if not off <= bound]
    return {"loops": loops, "bound": bound, "wrong": wrong}


def distance(name: str, make: Inputs, batch: int, length: int) -> float:
    """Of a loop from its reference. All blocks are kept, in any order: which ones would hang by a rounding."""
    q, k, v = (make.randn(batch, length, 2, 128, seed=seed) for seed in range(3))
    k += make.randn(2, 128, seed=3)
    proj = make.randn(128, 128, seed=4) / 11, make.randn(128, seed=5) / 64  # small beside what the loop makes
    kind, hopper = selfcheck.HOPPER.get(name, name), name in selfcheck.HOPPER
    if kind == "sage":
        got, expected = sage.sage_attention(q, k, v, hopper=hopper), sage_reference.sage_attention(q, k, v)
    else:
        got = sla.sla_attention(q, k, v, *proj, 1.0, True, hopper=hopper)
        expected = sla_reference.sla_attention(q, k, v, *proj, 1.0, True)
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def beside_the_model(device: torch.device, shape: Shape = SHAPE) -> dict[str, object]:
    """Milliseconds of each launch, measured on a GPU, and by the model where it knows the card or one like it."""
    on_card = device.type == "cuda"
    capability = backend.arch(device) if on_card else step_model.CARDS[DRY_CARD].arch
    name = card_name(torch.cuda.get_device_name(device) if on_card else DRY_CARD, capability)
    measured_ms: dict[str, float] = {}

    def run(launch: str, call: Callable[[], object]) -> None:
        if launch not in measured_ms:
            measured_ms[launch] = selfcheck.milliseconds(call)
        call()

    calls = attention(capability, Inputs(device if on_card else torch.device("meta"), torch.bfloat16), shape)
    with torch.no_grad(), backend.current(device):
        launches = kernel_launches.record_calls(capability, calls, run if on_card else None).values()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = list(pool.map(partial(kernel_launches.measure, capability=capability), launches))
    card = step_model.CARDS.get(name)
    rows = {
        row.name: {
            "measured_ms": measured_ms.get(row.name),
            "model_ms": model_ms(row, card, shape) if card and not row.error else None,
            "spilled_bytes": row.spilled_bytes, "error": row.error[-200:],
        }
        for row in compiled
    }  # fmt: skip
    return {"model_of": name, "launches": rows}


def attention(capability: int, make: Inputs, shape: Shape) -> dict[str, Callable[[], object]]:
    """The attention of one clip by every loop that an architecture has, under the names of `kernel_launches.calls`."""
    q, k, v = (t.unflatten(-1, (shape.heads, 128)) for t in tokens(make, shape.tokens, 3 * shape.dim).chunk(3, dim=-1))
    proj = make.randn(128, 128, seed=4) / 11, make.randn(128, seed=5)
    loops = (False, True) if kernel_launches.has_hopper_loop(capability) else (False,)
    calls: dict[str, Callable[[], object]] = {}
    for hopper in loops:
        calls[f"{'hopper ' * hopper}sage"] = partial(sage.sage_attention, q, k, v, hopper=hopper)
        calls[f"{'hopper ' * hopper}sagesla"] = partial(sla.sla_attention, q, k, v, *proj, TOPK, True, hopper=hopper)
    return calls


def tokens(make: Inputs, length: int, channels: int) -> Tensor:
    """Normal numbers [1, length, channels], made where they are needed: zeros would run faster than clips do."""
    return torch.randn(1, length, channels, device=make.device, dtype=make.dtype)


def card_name(name: str, capability: int) -> str:
    """Which card of the model a card is, by its name ("NVIDIA H200"), else one of its architecture, else ""."""
    words = name.replace("-", " ").split()
    alike = [own for own, card in step_model.CARDS.items() if card.arch == capability]
    return next((own for own in alike if own in words), alike[0] if alike else "")


def model_ms(row: Measured, card: Card, shape: Shape) -> float:
    """What the model says of a launch: of an attention loop by its matrix instructions, of a pass by its bytes."""
    if "attend" in row.name:
        blocks = ceil(shape.tokens / 64)
        kept = max(1, int(TOPK * blocks)) if "sla:" in row.name else blocks
        return step_model.attention_ms(row, card, shape.heads, shape.tokens, kept)
    return row.traffic_bytes / card.copy_tb_s / 1e9 / step_model.copy_share(row, card)
