"""What phases really take on this device, with made-up weights: memory does not depend on their values.

    python -m turbodiff.memory_lab.measure < plans.jsonl > rows.jsonl

A process of its own for `turbodiff calibrate`; scripts/bench_guard.py uses the same functions. One plan a line comes
in, one row per phase goes out.
"""

import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from turbodiff.models import text_encoder, vae
from turbodiff.models.attention import AttentionPlan
from turbodiff.models.wan_dit import WanDiT
from turbodiff.plan.calibration import work_bytes
from turbodiff.runtime import offload, text
from turbodiff.runtime.device import Device
from turbodiff.runtime.embeddings import TextRows
from turbodiff.runtime.model_cache import dit_config
from turbodiff.runtime.network import Network
from turbodiff.spec.models import ModelSpec
from turbodiff.spec.plan import Phase, Plan
from turbodiff.spec.shapes import CONDITION_CHANNELS, VAE_TILE

STEPS = 2  # the first also warms up


class MadeUp:
    """The networks of one model in host memory, every weight a small constant, made when first asked for."""

    def __init__(self, spec: ModelSpec, device: Device) -> None:
        self.spec, self.device = spec, device
        self._made: dict[str, nn.Module] = {}

    def dit(self, int8: bool) -> nn.Module:
        """One expert; two of them look alike and would fill the host."""
        name, other = (f"dit int8={value}" for value in (int8, not int8))
        self._made.pop(other, None)
        config = dit_config(self.spec, sla=self.spec.turbo, quant_linear=int8)
        return self._keep(name, lambda: WanDiT(config))

    def text(self) -> nn.Module:
        """The text encoder."""
        return self._keep("text", lambda: text_encoder.make_text_encoder(self.spec.text_encoder))

    def vae(self) -> nn.Module:
        """The VAE."""
        facts = self.spec.vae
        return self._keep("vae", lambda: vae.make_vae(facts.base_dim, facts.z_dim, facts.dim_mult))

    def _keep(self, name: str, make: Callable[[], nn.Module]) -> nn.Module:
        if name not in self._made:
            with torch.device("meta"):
                module = make()
            self._made[name] = constant(module, self.device)
        return self._made[name]


def constant(module: nn.Module, device: Device) -> nn.Module:
    """The module in host memory (on a meta device: nowhere) with constants; scales and integers keep their dtype."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):  # while it is on meta, for nothing
        if tensor.is_floating_point() and not name.endswith(".scale"):
            tensor.data = tensor.data.to(device.dtype)
    if device.torch_device.type != "meta":
        module = module.to_empty(device="cpu")
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data.fill_(1 if tensor.dtype == torch.int8 else 0.01)
    return module.eval().requires_grad_(False)


def rows_of(made: MadeUp, plan: Plan) -> Iterator[dict[str, Any]]:
    """What each phase of a plan took that has networks: name, planned, measured, reserved and weights bytes, seconds.

    `oom` instead of the figures where it ran out.
    """
    for phase in plan.phases:
        run = RUNS.get(phase.name.removesuffix("_high").removesuffix("_low"))
        if run is not None:
            yield _row(run, made, plan, phase)


def _row(run: Callable[[MadeUp, Plan], float], made: MadeUp, plan: Plan, phase: Phase) -> dict[str, Any]:
    device, start_s = made.device, time.perf_counter()
    gc.collect()
    offload.free_cached(device.torch_device)
    device.reset_peak()
    work = work_bytes(plan, phase)
    row: dict[str, Any] = {"name": phase.name, "planned_bytes": phase.weights_bytes + work, "planned_work_bytes": work}
    try:
        with torch.inference_mode():
            step_s = run(made, plan)
    except torch.OutOfMemoryError as error:
        return row | {"oom": str(error)[:200]}
    peak = device.peak_bytes()
    row |= {"measured_bytes": peak, "weights_bytes": phase.weights_bytes, "reserved_bytes": device.reserved_bytes()}
    row |= {"seconds": time.perf_counter() - start_s, "step_s": step_s}
    return row | {"error": row["planned_bytes"] / max(1, peak) - 1}


def run_text(made: MadeUp, plan: Plan) -> float:
    """A full prompt; seconds."""
    facts, start_s, levers = made.spec.text_encoder, time.perf_counter(), plan.levers
    if made.device.torch_device.type == "meta":  # nothing can leave that device
        levers = levers.model_copy(update={"text": "resident"})
    with text.seated(made.text(), levers, made.device.torch_device) as where:
        ids = torch.zeros(1, facts.text_len, dtype=torch.long, device=where)
        text_encoder.encode(made.text(), ids, torch.ones_like(ids), facts.text_len)
        settle(made.device)
    return time.perf_counter() - start_s


def run_denoise(made: MadeUp, plan: Plan) -> float:
    """Two evaluations of one expert, with the state of the sampler beside it; seconds of the second."""
    request, facts, device = plan.request, made.spec.text_encoder, made.device.torch_device
    dit = made.dit(request.quant_linear == "on")
    network = Network(dit, device, AttentionPlan(request.attention, request.topk), plan.levers)
    latent = request.shape.latent
    state = [torch.zeros(1, *latent, dtype=torch.float64, device=device) for _ in range(3)]
    condition = torch.zeros(1, CONDITION_CHANNELS, *latent[1:]) if request.kind == "i2v" else None
    start_s = 0.0
    with network.placed(stay=False):
        network.begin(TextRows(torch.zeros(1, facts.text_len, facts.dim, dtype=made.device.dtype), 8), condition)
        for _ in range(STEPS):
            settle(made.device)
            start_s = time.perf_counter()
            network(state[0].float(), torch.full((1, 1), 900.0, device=device))
        settle(made.device)
        return time.perf_counter() - start_s


def run_decode(made: MadeUp, plan: Plan) -> float:
    """Latents to frames, whole or in tiles; seconds."""
    start_s = time.perf_counter()
    with offload.placed(made.vae(), made.device.torch_device) as module:
        latents = torch.zeros(1, *plan.request.shape.latent, device=made.device.torch_device)
        for chunk in vae.decode_stream(module, latents, tile=_tile(plan)):
            _to_host(vae.frames_to_uint8(chunk))
    return time.perf_counter() - start_s


def run_encode(made: MadeUp, plan: Plan) -> float:
    """A picture and empty frames to the condition; seconds."""
    start_s = time.perf_counter()
    with offload.placed(made.vae(), made.device.torch_device) as module:
        frames = torch.zeros(1, 3, *plan.request.shape, device=made.device.torch_device, dtype=made.device.dtype)
        vae.encode(module, frames, tile=_tile(plan))
        settle(made.device)
    return time.perf_counter() - start_s


RUNS = {"text_encode": run_text, "denoise": run_denoise, "vae_decode": run_decode, "image_encode": run_encode}


def settle(device: Device) -> None:
    """Wait for the device."""
    if device.is_cuda:
        torch.cuda.synchronize(device.torch_device)


def _tile(plan: Plan) -> int | None:
    return VAE_TILE if plan.levers.vae == "tiled" else None


def _to_host(frames: Tensor) -> None:
    if not frames.is_meta:
        frames.cpu()


def main() -> int:
    """Measure every plan on stdin."""
    device, made = Device.pick(), None
    for line in sys.stdin:
        plan = Plan.model_validate_json(line)
        if made is None or made.spec != plan.request.spec:
            made = MadeUp(plan.request.spec, device)
        for row in rows_of(made, plan):
            sys.stdout.write(json.dumps(row) + "\n")
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
