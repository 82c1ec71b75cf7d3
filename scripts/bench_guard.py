"""Does the plan keep its word? The whole pipeline with made-up weights on a card cut down to 8, 12, 16, 24 and 32 GiB.

    scripts/bench_guard.py                                  every model and budget that this card allows
    scripts/bench_guard.py --model wan2.1-14b --gib 12 16
    scripts/bench_guard.py --smoke                          the demo once, on any device, to see that the script runs

For each model and budget: plan, cap torch's allocator at the budget, run every phase with the plan's levers, and
compare the measured peak of each phase with the planned one. An out-of-memory where the plan said "fits" is a failure.
Weights are constants (memory does not depend on their values) and steps are two. Run it alone on the card; results are
kept, dated, under scripts/results/.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from turbodiff.gpu.probe import machine_now  # noqa: E402
from turbodiff.models import text_encoder, vae  # noqa: E402
from turbodiff.models.attention import AttentionPlan  # noqa: E402
from turbodiff.models.wan_dit import WanConfig, WanDiT  # noqa: E402
from turbodiff.plan.machine import Machine, pretend  # noqa: E402
from turbodiff.plan.planner import make_plan  # noqa: E402
from turbodiff.plan.vae_memory import TILE  # noqa: E402
from turbodiff.runtime import residency, text  # noqa: E402
from turbodiff.runtime.device import Device  # noqa: E402
from turbodiff.runtime.embeddings import TextRows  # noqa: E402
from turbodiff.runtime.network import Network  # noqa: E402
from turbodiff.spec.errors import DoesNotFitError  # noqa: E402
from turbodiff.spec.inventory import Inventory  # noqa: E402
from turbodiff.spec.models import ModelSpec  # noqa: E402
from turbodiff.spec.numbers import GIB  # noqa: E402
from turbodiff.spec.plan import Plan  # noqa: E402
from turbodiff.spec.request import Request, make_request  # noqa: E402

MODELS = ("wan2.1-1.3b", "wan2.1-14b", "wan2.2-a14b")
BUDGETS_GIB = (8, 12, 16, 24, 32)
CLOSE = 0.10
STEPS = 2


def main() -> int:
    """Run what the flags ask for; 1 if any plan broke its word."""
    flags = arguments()
    device = Device.pick()
    if not device.is_cuda and not flags.smoke:
        print("no CUDA device: nothing to measure (see --smoke)")
        return 0
    machine, rows = machine_now(), []
    for model in ("demo",) if flags.smoke else flags.model:
        networks = Networks(make_request_for(model).spec, device)
        for gib in (4.0,) if flags.smoke else flags.gib:
            rows += one_budget(networks, gib, machine)
            show(rows[-1])
    keep(rows, device)
    return int(any(not row["kept"] for row in rows))


def arguments() -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=MODELS)
    parser.add_argument("--gib", nargs="+", type=float, default=BUDGETS_GIB)
    parser.add_argument("--smoke", action="store_true")
    return parser.parse_args()


def make_request_for(model: str) -> Request:
    """The dearest request of a model, at two steps."""
    picture = {"image": "cat.jpg"} if "2.2" in model else {}
    return make_request({"prompt": "a cat chases a butterfly", "model": model, "steps": STEPS, **picture})


class Networks:
    """The networks of one model in host memory, with constant weights, made when first asked for."""

    def __init__(self, spec: ModelSpec, device: Device) -> None:
        self.spec, self.device = spec, device
        self._made: dict[Any, nn.Module] = {}

    def dit(self, int8: bool, expert: str) -> WanDiT:
        """One expert."""
        facts = self.spec.dit
        config = WanConfig(
            facts.dim, facts.ffn_dim, facts.num_heads, facts.num_layers, facts.in_dim,
            text_dim=self.spec.text_encoder.dim, sla=True, quant_linear=int8,
        )  # fmt: skip
        return self._keep(("dit", int8, expert), lambda: WanDiT(config))

    def text(self) -> nn.Module:
        """The text encoder."""
        return self._keep("text", lambda: text_encoder.make_text_encoder(self.spec.text_encoder))

    def vae(self) -> nn.Module:
        """The VAE."""
        facts = self.spec.vae
        return self._keep("vae", lambda: vae.make_vae(facts.base_dim, facts.z_dim, facts.dim_mult))

    def _keep(self, key: Any, make: Callable[[], nn.Module]) -> nn.Module:
        if key not in self._made:
            if isinstance(key, tuple):  # one expert at a time: two of them would fill the host
                self._made = {kept: module for kept, module in self._made.items() if not isinstance(kept, tuple)}
            with torch.device("meta"):
                module = make()
            self._made[key] = constant(module, self.device.dtype)
        return self._made[key]


def constant(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module in host memory, every weight a small constant, scales and integers in their own dtype."""
    module = module.to_empty(device="cpu")
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        is_scale = name.endswith(".scale")
        tensor.data = tensor.data.to(dtype) if tensor.is_floating_point() and not is_scale else tensor.data
        tensor.data.fill_(1 if tensor.dtype == torch.int8 else 0.01)
    return module.eval().requires_grad_(False)


def one_budget(networks: Networks, gib: float, machine: Machine) -> list[dict[str, Any]]:
    """Plan and run one model on a card of `gib` GiB; one row."""
    row: dict[str, Any] = {"model": networks.spec.name, "gib": gib, "kept": True, "phases": []}
    try:
        plan = make_plan(make_request_for(networks.spec.name), pretend(machine, gib), Inventory())
    except DoesNotFitError as error:
        return [row | {"plan": str(error)}]
    row |= {"plan": describe(plan), "band": plan.band}
    residency.cap(networks.device.torch_device, plan.budget_bytes)
    for phase in plan.phases:
        run = RUNS.get(phase.name.split("_high")[0].split("_low")[0])
        if run is not None:
            row["phases"].append(measured(run, networks, plan, phase.name))
    row["kept"] = all("oom" not in phase for phase in row["phases"])
    row["close"] = all(abs(phase.get("error", 1)) <= CLOSE for phase in row["phases"])
    return [row]


def describe(plan: Plan) -> str:
    """One line of what runs."""
    request, levers = plan.request, plan.levers
    size = f"{request.width}x{request.height}x{request.num_frames}"
    blocks = f"{levers.experts}{f' {levers.blocks_resident}' if levers.experts == 'streamed' else ''}"
    return f"{request.model} {size} int8 {request.quant_linear} text {levers.text} blocks {blocks} vae {levers.vae}"


def measured(run: Callable[..., None], networks: Networks, plan: Plan, name: str) -> dict[str, Any]:
    """Planned and measured bytes of one phase, without context and scratch, and its seconds."""
    device = networks.device
    planned = next(phase for phase in plan.phases if phase.name == name)
    gc.collect()
    residency.free_cached(device.torch_device)
    device.reset_peak()
    start_s = time.perf_counter()
    row: dict[str, Any] = {"name": name, "planned_bytes": planned.weights_bytes + planned.activations_bytes}
    try:
        with torch.inference_mode():
            run(networks, plan, name)
    except torch.OutOfMemoryError as error:
        return row | {"oom": str(error)[:200]}
    if device.is_cuda:
        torch.cuda.synchronize()
    peak = device.peak_bytes()
    reserved = torch.cuda.max_memory_reserved() if device.is_cuda else 0
    row |= {"seconds": time.perf_counter() - start_s, "measured_bytes": peak, "reserved_bytes": reserved}
    return row | {"error": row["planned_bytes"] / peak - 1}


def run_text(networks: Networks, plan: Plan, name: str) -> None:
    """A full prompt of 512 tokens."""
    facts = networks.spec.text_encoder
    with text.seated(networks.text(), plan.levers, networks.device.torch_device) as where:
        ids = torch.zeros(1, facts.text_len, dtype=torch.long, device=where)
        text_encoder.encode(networks.text(), ids, torch.ones_like(ids), facts.text_len)


def run_denoise(networks: Networks, plan: Plan, name: str) -> None:
    """Two evaluations of one expert, with the state of the sampler beside it."""
    request, facts, device = plan.request, networks.spec.text_encoder, networks.device.torch_device
    dit = networks.dit(request.quant_linear == "on", name)
    network = Network(dit, device, AttentionPlan(request.attention, request.topk), plan.levers)
    latent = request.shape.latent
    state = [torch.zeros(1, *latent, dtype=torch.float64, device=device) for _ in range(3)]
    condition = torch.zeros(1, 20, *latent[1:]) if request.kind == "i2v" else None
    with network.placed(stay=False):
        network.begin(TextRows(torch.zeros(1, facts.text_len, facts.dim), 8), condition)
        for _ in range(STEPS):
            network(state[0].float(), torch.full((1, 1), 900.0, device=device))


def run_decode(networks: Networks, plan: Plan, name: str) -> None:
    """Latents to frames, whole or in tiles."""
    device, tile = networks.device.torch_device, TILE if plan.levers.vae == "tiled" else None
    with residency.placed(networks.vae(), device) as module:
        latents = torch.zeros(1, *plan.request.shape.latent, device=device)
        for chunk in vae.decode_stream(module, latents, tile=tile):
            vae.frames_to_uint8(chunk).cpu()


def run_encode(networks: Networks, plan: Plan, name: str) -> None:
    """A picture and empty frames to the condition."""
    device, tile = networks.device.torch_device, TILE if plan.levers.vae == "tiled" else None
    with residency.placed(networks.vae(), device) as module:
        vae.encode(module, torch.zeros(1, 3, *plan.request.shape, device=device), tile=tile)


RUNS = {"text_encode": run_text, "denoise": run_denoise, "vae_decode": run_decode, "image_encode": run_encode}


def show(row: dict[str, Any]) -> None:
    """One budget as lines."""
    print(f"{row['model']} on {row['gib']:g} GiB: {row['plan']}{'' if row['kept'] else '   OUT OF MEMORY'}")
    for phase in row["phases"]:
        if "oom" in phase:
            print(f"  {phase['name']:13} planned {phase['planned_bytes'] / GIB:6.2f} GiB   OOM: {phase['oom']}")
            continue
        print(
            f"  {phase['name']:13} planned {phase['planned_bytes'] / GIB:6.2f} GiB  measured "
            f"{phase['measured_bytes'] / GIB:6.2f}  reserved {phase['reserved_bytes'] / GIB:6.2f}  "
            f"{phase['error']:+.1%}  {phase['seconds']:.1f} s"
        )


def keep(rows: list[dict[str, Any]], device: Device) -> None:
    """Write the results of a card beside the script; a run without a card leaves nothing."""
    if not device.is_cuda:
        return
    now = datetime.now(UTC)
    path = ROOT / "scripts" / "results" / f"guard_{now:%Y%m%d_%H%M%S}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"at": now.isoformat(), **device.facts(), "rows": rows}, indent=1))
    print(f"kept in {path.relative_to(ROOT)}")


if __name__ == "__main__":
    sys.exit(main())
