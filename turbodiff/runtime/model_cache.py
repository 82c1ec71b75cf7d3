"""Models kept between jobs: a second job on the same model reads no weights, and each sits where its plan says.

A network on the shelf lives in host memory, mapped from its file; a `with` brings it to the device and takes it off
again. It stays on the device only where the plan shows room for everything at once.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from turbodiff.models import text_encoder
from turbodiff.models.attention import AttentionPlan, resolve_attention
from turbodiff.models.linear import int8_blocks, int8_mode
from turbodiff.models.vae import make_vae
from turbodiff.models.wan_dit import WanConfig, WanDiT
from turbodiff.prompt.tokens import Tokenizer
from turbodiff.runtime import loras, offload, text
from turbodiff.runtime.device import Device
from turbodiff.runtime.embeddings import TextRows, pad_rows
from turbodiff.runtime.network import Network
from turbodiff.spec.inventory import FoundFile, Inventory
from turbodiff.spec.models import ModelSpec
from turbodiff.spec.plan import Plan
from turbodiff.spec.request import Request
from turbodiff.spec.shapes import table_size
from turbodiff.weights import locate
from turbodiff.weights.detect import open_checkpoint
from turbodiff.weights.load import load_into

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

COMPONENT_OF = {"single": "dit", "high": "dit_high", "low": "dit_low"}


class ModelCache:
    """The models of one worker. `open` says what the next job needs; the rest is loaded when it is first asked for."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._kept: dict[str, Any] = {}
        self._used: dict[str, FoundFile] = {}
        self._int8 = False
        self.weights_bytes = 0  # most that networks took on the device since `reset_peak`
        self.spec: ModelSpec

    def open(self, request: Request) -> None:
        """Find the files of a request's model; drop what belongs to other models.

        Raises:
            FileError: files are missing; lists all of them.
        """
        inventory = locate.inventory()
        self.spec = request.spec
        self._used = locate.resolve_files(
            self.spec.name, inventory, quant=_quant_of(request, inventory), resolution=trained_at(request)
        )
        self._int8 = request.quant_linear == "on"
        wanted = {self._key(file) for file in self._used.values()}
        wanted |= {self._worn_key(expert, request) for expert in self.spec.experts}
        for key in [key for key in self._kept if key not in wanted]:
            del self._kept[key]
        offload.free_cached(self.device.torch_device)
        offload.free_host_cached(self.device.torch_device)

    def make_room(self, plan: Plan) -> None:
        """Take what an earlier job left on the device off it, unless the plan has room for everything."""
        if self.device.is_cuda and not self._roomy(plan):
            offload.to_host(self._networks(), self.device.torch_device)

    def reset_peak(self) -> None:
        """Start measuring a new phase."""
        self.device.reset_peak()
        self.weights_bytes = 0

    def _weigh(self, *more: nn.Module) -> None:
        """Note what networks take on the device now; `more` are those that the shelf does not keep."""
        if self.device.is_cuda:
            here = offload.bytes_on([*self._networks(), *more], self.device.torch_device)
            self.weights_bytes = max(self.weights_bytes, here)

    def _networks(self) -> list[nn.Module]:
        kept = [value.network if isinstance(value, loras.LoraModel) else value for value in self._kept.values()]
        return [network for network in kept if isinstance(network, nn.Module)]

    def facts(self) -> dict[str, Any]:
        """What a clip's sidecar says about where and from what it was made."""
        weights = {name: Path(file.path).name for name, file in self._used.items()}
        return {**self.device.facts(), "weights": weights}

    def text_identity(self, plan: Plan) -> str:
        """What text rows depend on beside the words: the encoder's file, and its bits where they are fewer."""
        bits = plan.levers.text_dtype
        return self._key(self._used["text_encoder"]) + ("" if bits == "bf16" else f" {bits}")

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the model."""
        return self._keep("tokenizer", lambda file: Tokenizer(Path(file.path)))

    @contextmanager
    def text_encoder(self, plan: Plan) -> Iterator[Callable[[str], TextRows]]:
        """A function from clean text to its rows, while the encoder sits where the plan says."""
        encoder, tokenizer = self._keep("text_encoder", self._load_text_encoder), self.tokenizer()
        text_len = self.spec.text_encoder.text_len
        with text.seated(encoder, plan.levers, self.device.torch_device, stay=self._roomy(plan)) as device:
            self._weigh()

            def read(words: str) -> TextRows:
                ids = torch.tensor([tokenizer.ids(words, text_len)], device=device)
                rows = text_encoder.encode(encoder, ids, torch.ones_like(ids), text_len=ids.shape[1])
                return pad_rows(rows[0].cpu(), text_len)

            yield read

    @contextmanager
    def vae(self, plan: Plan) -> "Iterator[AutoencoderKLWan]":
        """The VAE on the device."""
        vae = self._keep("vae", self._load_vae)
        with offload.placed(vae, self.device.torch_device, stay=self._roomy(plan)):
            self._weigh()
            yield vae

    def vae_at_hand(self) -> "AutoencoderKLWan | None":
        """The VAE for a preview, where it costs nothing beside the denoiser: on a CPU."""
        return None if self.device.is_cuda else self._keep("vae", self._load_vae)

    @contextmanager
    def network(self, expert: str, plan: Plan) -> Iterator[Network]:
        """One expert, where the plan says."""
        request = plan.request
        network = Network(
            self._dit(expert, request),
            self.device.torch_device,
            AttentionPlan(resolve_attention(request.attention, self.device.torch_device).kind, request.topk),
            plan.levers,
        )
        with network.placed(stay=self._roomy(plan), alone=not self.spec.two_experts):
            self._weigh(*network.passing)
            yield network

    def _dit(self, expert: str, request: Request) -> WanDiT:
        """The transformer of an expert, with the LoRAs of the request on."""
        dit = self._keep(COMPONENT_OF[expert], self._load_dit)
        wanted = loras.loras_for(request, expert)
        if not wanted:
            return dit
        key = self._worn_key(expert, request)
        if key not in self._kept:
            self._kept[key] = loras.wear(dit, wanted, expert)
        return self._kept[key].network

    def lora_notes(self, expert: str, request: Request) -> tuple[str, ...]:
        """What a person should know about the LoRAs that an expert wears."""
        worn = self._kept.get(self._worn_key(expert, request))
        return worn.notes if isinstance(worn, loras.LoraModel) else ()

    def _worn_key(self, expert: str, request: Request) -> str:
        """The key of an expert with its LoRAs on; without any it is the expert's own."""
        return (
            f"{self._key(self._used[COMPONENT_OF[expert]])} {loras.lora_key(loras.loras_for(request, expert))}".strip()
        )

    def _roomy(self, plan: Plan) -> bool:
        """Whether everything fits at once, so that nothing has to leave the device between phases."""
        weights_bytes = sum(phase.weights_bytes for phase in plan.phases)
        work_bytes = max(phase.peak_bytes - phase.weights_bytes for phase in plan.phases)
        return plan.levers.experts == "resident" and weights_bytes + work_bytes <= plan.budget_bytes

    def _keep(self, component: str, load: Callable[[FoundFile], Any]) -> Any:
        file = self._used[component]
        key = self._key(file)
        if key not in self._kept:
            self._kept[key] = load(file)
        return self._kept[key]

    def _key(self, file: FoundFile) -> str:
        """A file, its moment and what becomes of it: another file of the same name is another model."""
        int8 = f" int8 {int8_mode()}" if self._int8 and file.component.startswith("dit") else ""
        return f"{file.path} {Path(file.path).stat().st_mtime_ns}{int8}"

    def _load_dit(self, file: FoundFile) -> WanDiT:
        checkpoint = open_checkpoint(Path(file.path), "dit")
        with torch.device("meta"):
            module = WanDiT(dit_config(self.spec, sla=checkpoint.sla, quant_linear=checkpoint.quant))
        dit = load_into(module, checkpoint, dtype=self.device.dtype).module
        return int8_blocks(dit) if self._int8 else dit

    def _load_vae(self, file: FoundFile) -> nn.Module:
        facts = self.spec.vae
        with torch.device("meta"):
            module = make_vae(facts.base_dim, facts.z_dim, facts.dim_mult, facts.num_res_blocks)
        return load_into(module, Path(file.path), dtype=self.device.dtype, component="vae").module

    def _load_text_encoder(self, file: FoundFile) -> nn.Module:
        with torch.device("meta"):
            module = text_encoder.make_text_encoder(self.spec.text_encoder)
        return load_into(module, Path(file.path), dtype=self.device.dtype, component="text_encoder").module


def dit_config(spec: ModelSpec, *, sla: bool = False, quant_linear: bool = False) -> WanConfig:
    """Sizes from the model's facts; whether SLA and INT8 are there is a file's to say."""
    facts = spec.dit
    return WanConfig(
        dim=facts.dim,
        ffn_dim=facts.ffn_dim,
        num_heads=facts.num_heads,
        num_layers=facts.num_layers,
        in_dim=facts.in_dim,
        out_dim=facts.out_dim,
        text_dim=spec.text_encoder.dim,
        freq_dim=facts.freq_dim,
        eps=facts.eps,
        sla=sla,
        quant_linear=quant_linear,
    )


def trained_at(request: Request) -> str:
    """Which of the published checkpoints a size asks for: a named size its own, any other the nearest by area."""
    if request.resolution in request.spec.limits.trained_resolutions:
        return request.resolution
    area = math.log(request.width * request.height)
    named = {name: math.log(math.prod(table_size(name, "16:9"))) for name in ("480p", "720p")}
    return min(named, key=lambda name: abs(named[name] - area))


def _quant_of(request: Request, inventory: Inventory) -> bool | None:
    """Which of two files to take: INT8 where that was asked for and is there; plain weights are quantised at load."""
    component = COMPONENT_OF[request.spec.experts[0]]
    wish = request.quant_linear == "on"
    return wish if inventory.of(request.spec.name, component, wish) else None
