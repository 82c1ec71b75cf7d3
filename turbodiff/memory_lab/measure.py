"""What phases really take on this device, with dummy weights: memory does not depend on their values.

    python -m turbodiff.memory_lab.measure < plans.jsonl > rows.jsonl

A process of its own for `turbodiff calibrate`; scripts/bench_guard.py uses the same functions. One plan a line comes
in, one row per phase goes out.
"""

import json
import sys
import time
from collections.abc import Iterator
from typing import Literal, cast

import torch
from torch import nn

from turbodiff.models import image_encoder, text_encoder, vae
from turbodiff.models.attention import AttentionPlan
from turbodiff.models.wan_dit import WanDiT
from turbodiff.plan.calibration import work_bytes
from turbodiff.runtime import offload, text
from turbodiff.runtime.denoise import Network
from turbodiff.runtime.device import Device
from turbodiff.runtime.model_cache import PlacedDit, dit_config
from turbodiff.runtime.text import TextRows
from turbodiff.spec.attention import AttentionKind
from turbodiff.spec.models import ModelSpec
from turbodiff.spec.plan import Plan
from turbodiff.spec.shapes import CONDITION_CHANNELS

STEPS = 2  # the first also warms up
Row = dict[str, str | int | float | None]


class DummyModels:
    """The networks of one model in host memory (on a meta device: nowhere), every weight a small constant."""

    def __init__(self, spec: ModelSpec, device: Device) -> None:
        self.spec, self.device = spec, device
        self._made: dict[str, nn.Module] = {}

    def get_or_make(self, name: Literal["dit", "int8 dit", "text_encoder", "image_encoder", "vae"]) -> nn.Module:
        """A network; of the transformers one is kept at a time, since two of them would fill the host."""
        if name in self._made:
            return self._made[name]
        with torch.device("meta"):
            if name == "text_encoder":
                module: nn.Module = text_encoder.make_text_encoder(self.spec.text_encoder)
            elif name == "vae":
                module = vae.make_vae(**self.spec.vae.model_dump())
            elif name == "image_encoder" and self.spec.image_encoder:
                module = image_encoder.make_image_encoder(self.spec.image_encoder)
            else:
                self._made = {other: made for other, made in self._made.items() if "dit" not in other}
                module = WanDiT(dit_config(self.spec, sla=self.spec.turbo, quant_linear=name == "int8 dit"))
        for parameter, tensor in (*module.named_parameters(), *module.named_buffers()):  # while it is on meta
            if tensor.is_floating_point() and not parameter.endswith(".scale"):
                tensor.data = tensor.data.to(self.device.dtype)
        if self.device.torch_device.type != "meta":
            module = module.to_empty(device="cpu")
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.data.fill_(1 if tensor.dtype == torch.int8 else 0.01)
        self._made[name] = module.eval().requires_grad_(False)
        return module


def rows_of(models: DummyModels, plan: Plan) -> Iterator[Row]:
    """What each phase of a plan took that has networks: name, planned, measured, reserved and weights bytes, seconds.

    `oom` instead of the figures where it ran out.
    """
    device = models.device
    for phase in plan.phases:
        if phase.name == "write":
            continue
        start_s, work = time.perf_counter(), work_bytes(plan, phase)
        planned_bytes = phase.weights_bytes + work
        row: Row = {"name": phase.name, "planned_bytes": planned_bytes, "planned_work_bytes": work}
        row["slack_bytes"] = phase.slack_bytes
        offload.free_cached(device.torch_device)
        device.reset_peak()
        try:
            with torch.inference_mode():
                step_s = run_phase(models, plan, phase.name)
        except torch.OutOfMemoryError as error:
            yield row | {"oom": str(error)[:200]}
            continue
        peak_bytes = device.peak_bytes()
        yield row | {
            "measured_bytes": peak_bytes,
            "weights_bytes": phase.weights_bytes,
            "reserved_bytes": device.reserved_bytes(),
            "seconds": time.perf_counter() - start_s,
            "step_s": step_s,
            "error": planned_bytes / max(1, peak_bytes) - 1,
        }


def run_phase(models: DummyModels, plan: Plan, name: str) -> float:
    """Run a phase as the pipeline does; its seconds, of denoising those of the second of two steps.

    Text: a full prompt. Picture: empty frames. Denoising: one expert, with the state of the sampler beside it.
    """
    request, levers, spec = plan.request, plan.levers, models.spec
    device, start_s = models.device.torch_device, time.perf_counter()
    facts, latent = spec.text_encoder, request.shape.latent
    if name == "text_encode":
        if device.type == "meta":  # nothing can leave that device
            levers = levers.model_copy(update={"text": "resident"})
        encoder = cast("text_encoder.TextEncoder", models.get_or_make("text_encoder"))
        with text.encoder_on_device(encoder, levers, device) as ids_device:
            ids = torch.zeros(1, facts.text_len, dtype=torch.long, device=ids_device)
            text_encoder.encode(encoder, ids, torch.ones_like(ids), facts.text_len)
            synchronize(device)
    elif name == "image_embed" and (clip := spec.image_encoder):
        picture = torch.zeros(1, 3, request.height, request.width, device=device)
        with offload.on_device(models.get_or_make("image_encoder"), device):
            image_encoder.picture_features(models.get_or_make("image_encoder"), picture, clip)
            synchronize(device)
    elif name == "vae_decode":
        with offload.on_device(models.get_or_make("vae"), device):
            latents = torch.zeros(1, *latent, device=device)
            for chunk in vae.decode_stream(models.get_or_make("vae"), latents, tile=levers.tile):
                frames = vae.frames_to_uint8(chunk)
                frames if frames.is_meta else frames.cpu()
    elif name == "image_encode":
        with offload.on_device(models.get_or_make("vae"), device):
            frames = torch.zeros(1, 3, *request.shape, device=device, dtype=models.device.dtype)
            vae.encode(models.get_or_make("vae"), frames, tile=levers.tile)
            synchronize(device)
    else:
        dit = cast("WanDiT", models.get_or_make("int8 dit" if request.quant_linear == "on" else "dit"))
        state = [torch.zeros(1, *latent, dtype=torch.float64, device=device) for _ in range(3)]
        condition = torch.zeros(1, CONDITION_CHANNELS, *latent[1:]) if request.kind == "i2v" else None
        prompt = TextRows(torch.zeros(1, facts.text_len, facts.dim, dtype=models.device.dtype), 8)
        attention = AttentionPlan(cast("AttentionKind", request.attention), request.topk)
        with offload.dit_on_device(dit, device, levers) as blocks:
            placed = PlacedDit(dit, blocks, ())
            clip = spec.image_encoder
            features = torch.zeros(1, clip.tokens, clip.dim, dtype=models.device.dtype) if clip else None
            network = Network(placed, device, prompt, condition, attention=attention, levers=levers, features=features)
            for _ in range(STEPS):
                synchronize(device)
                start_s = time.perf_counter()
                network(state[0].float(), torch.full((1, 1), 900.0, device=device))
            synchronize(device)
    return time.perf_counter() - start_s


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> int:
    """Measure every plan on stdin."""
    device, models = Device.pick(), None
    for line in sys.stdin:
        plan = Plan.model_validate_json(line)
        if models is None or models.spec != plan.request.spec:
            models = DummyModels(plan.request.spec, device)
        for row in rows_of(models, plan):
            sys.stdout.write(json.dumps(row) + "\n")
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
