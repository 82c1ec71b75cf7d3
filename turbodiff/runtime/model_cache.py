"""Models kept between jobs: a second job on the same model reads no weights, and each sits where its plan says.

A network of the cache lives in host memory, mapped from its file; a `with` brings it to the device and takes it off
again. It stays on the device only where the plan shows room for everything at once.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, cast

import torch
from torch import nn

from turbodiff.gpu.host_memory import host_memory
from turbodiff.models import image_encoder, text_encoder
from turbodiff.models.linear import int8_layers, int8_mode
from turbodiff.models.parallel import SequenceParallel
from turbodiff.models.text_encoder import TextEncoder
from turbodiff.models.tiny_vae import TinyDecoder
from turbodiff.models.vae import Vae, make_vae
from turbodiff.models.wan_dit import WanConfig, WanDiT
from turbodiff.plan.candidates import network_files
from turbodiff.prompt.tokens import Tokenizer
from turbodiff.runtime import half_vae, loras, offload, text
from turbodiff.runtime.device import Device
from turbodiff.runtime.shared_blocks import SharedBlocks
from turbodiff.runtime.step_graph import StepGraphs
from turbodiff.runtime.text import TextRows
from turbodiff.spec.errors import FileError
from turbodiff.spec.events import Notice
from turbodiff.spec.experts import Expert
from turbodiff.spec.models import FoundFile, ModelSpec
from turbodiff.spec.numbers import GIB, gib
from turbodiff.spec.plan import Plan
from turbodiff.spec.request import Request
from turbodiff.spec.shapes import LIGHT_VAE_DIM
from turbodiff.weights import locate
from turbodiff.weights.converted import ConvertedCopy
from turbodiff.weights.copies import copy_of
from turbodiff.weights.detect import Checkpoint, Part, open_checkpoint
from turbodiff.weights.load import load_into

NetworkComponent = Literal["dit", "dit_high", "dit_low", "vae", "text_encoder", "image_encoder", "preview_vae"]


PARTS_IN_WORDS: Mapping[Part, str] = {
    "dit": "model", "vae": "VAE", "text_encoder": "text encoder", "image_encoder": "picture encoder",
    "tiny_vae": "VAE for previews",
}  # fmt: skip

HALF = " float16"  # at the end of a VAE's key

log = logging.getLogger("turbodiff.worker")


class PlacedDit(NamedTuple):
    """A transformer on the device: `blocks` are there or come one after the other, see offload.dit_on_device."""

    dit: WanDiT
    blocks: offload.BlockStream
    lora_notes: tuple[Notice, ...]  # what a person should know about the LoRAs on it


def _progress_logger(what: str, total_bytes: int) -> Callable[[int], None]:
    """A function that logs `what` with the bytes done, at most once a second, and once when all of them are."""
    start_s, next_s, done_bytes = time.monotonic(), 1.0, 0
    unit, name = (GIB, "GiB") if total_bytes >= GIB else (1 << 20, "MiB")
    log.info("%s %s", what, gib(total_bytes))

    def told(more_bytes: int) -> None:
        nonlocal next_s, done_bytes
        if done_bytes == total_bytes:  # a parameter made of several, or bytes that are no tensor's
            return
        done_bytes = min(total_bytes, done_bytes + more_bytes)
        elapsed_s = time.monotonic() - start_s
        if elapsed_s >= next_s or done_bytes == total_bytes:
            next_s = elapsed_s + 1
            log.info("%s %.1f/%.1f %s %.1f s", what, done_bytes / unit, total_bytes / unit, name, elapsed_s)

    return told


class ModelCache:
    """The models of one worker. `open` says what the next job needs; the rest is loaded when it is first asked for."""

    def __init__(self, device: Device) -> None:
        self.device, self.graphs = device, StepGraphs(device)
        self._kept: dict[str, object] = {}
        self.files: dict[str, FoundFile] = {}  # component -> its file, of the open model
        self._int8 = self._on_disk = False
        self.weights_bytes = 0  # most that networks took on the device since `reset_peak`
        self.budget_bytes: int | None = None  # of the device as of the last `make_room`; None: as planned
        self.spec: ModelSpec

    def open(self, request: Request, *, on_disk: bool = False) -> None:
        """Find the files of a request's model; drop what belongs to other models.

        The networks are those that the plan is about; plain weights are quantised at load where INT8 is asked for.

        Args:
            on_disk: what is made of files goes into a copy on disk and is mapped from there.

        Raises:
            FileError: files are missing; lists all of them.
        """
        inventory, self.spec, self._int8 = locate.inventory(), request.spec, request.quant_linear == "on"
        self._on_disk = on_disk
        self.files = locate.resolve_files(self.spec.name, inventory)
        self.files |= {file.component: file for file in network_files(request, inventory)}
        if small := inventory.of(self.spec.name, "preview_vae"):
            self.files["preview_vae"] = small
        wanted = {self._key(file) for file in self.files.values()}
        wanted |= {self._lora_key(expert, request) for expert in self.spec.experts}
        wanted |= {self._key(file) + HALF for file in self.files.values() if file.component == "vae"}
        self._kept = {key: value for key, value in self._kept.items() if key in wanted}
        self.graphs.drop_all_but(self._networks())
        offload.free_cached(self.device.torch_device, page_locked=True)

    def make_room(self, plan: Plan, budget_bytes: int | None = None, but: nn.Module | None = None) -> int:
        """Take what stayed on the device off it, unless the plan has room for everything; returns the bytes that left.

        Args:
            budget_bytes: what a job may use now, where that is known; nothing stays beyond it from now on.
            but: a network at work.
        """
        self.budget_bytes = budget_bytes
        if not self.has_room(plan):
            self.graphs.drop_all_but()
        return 0 if self._all_fit(plan) else self.leave_device(but)

    def has_room(self, plan: Plan, more_bytes: int = 0) -> bool:
        """Whether everything fits at once, with the graphs of steps and so much more."""
        return self._all_fit(plan, self.graphs.bytes + more_bytes)

    def leave_device(self, but: nn.Module | None = None) -> int:
        """Take every network off the device, `but` one at work; returns the bytes that left, those of graphs too, none
        of which outlives it."""
        left_bytes = self.graphs.drop_all_but()
        if self.device.is_cuda:
            left_bytes += offload.to_host(self._networks(), self.device.torch_device, but)
        return left_bytes

    def reset_peak(self) -> None:
        """Start measuring a new phase."""
        self.graphs.reset_peak()
        self.weights_bytes = 0

    def _record_weights(self, more_bytes: int = 0) -> None:
        """Note what networks take on the device now, with `more_bytes` that the cache does not keep."""
        if self.device.is_cuda:
            self.weights_bytes = max(self.weights_bytes, offload.bytes_away(self._networks()) + more_bytes)

    def _networks(self) -> list[nn.Module]:
        kept = [value.network if isinstance(value, loras.LoraModel) else value for value in self._kept.values()]
        return [network for network in kept if isinstance(network, nn.Module)]

    def encoder_key(self, plan: Plan) -> str:
        """What text rows depend on beside the words: the encoder's file, and its bits where they are fewer."""
        bits = plan.levers.text_dtype
        return self._key(self.files["text_encoder"]) + ("" if bits == "bf16" else f" {bits}")

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the model."""
        key = self._key(self.files["tokenizer"])
        if key not in self._kept:
            self._kept[key] = locate.open_tokenizer(self.files["tokenizer"])
        return cast("Tokenizer", self._kept[key])

    def _spare_host_memory(self, plan: Plan) -> None:
        """Let go of an encoder that was converted where host memory is too short to keep it through what follows; one
        that is mapped costs nothing."""
        file = self.files["text_encoder"]
        need_bytes = max(phase.host_ram_bytes for phase in plan.phases if phase.name != "text_encode")
        if (
            file.converted
            and not self._on_disk
            and host_memory().available_bytes < need_bytes
            and self._kept.pop(self._key(file), None)
        ):
            offload.free_cached(self.device.torch_device)

    @contextmanager
    def text_encoder(self, plan: Plan) -> Iterator[Callable[[str], TextRows]]:
        """A function from clean text to its rows, while the encoder sits where the plan says."""
        encoder, tokenizer = cast("TextEncoder", self.get_or_load("text_encoder")), self.tokenizer()
        text_len, device = self.spec.text_encoder.text_len, self.device.torch_device
        with text.encoder_on_device(encoder, plan.levers, device, stay=self._all_fit(plan)) as ids_device:
            self._record_weights()

            def read(words: str) -> TextRows:
                ids = torch.tensor([[token.id for token in tokenizer.tokens(words, text_len)]], device=ids_device)
                rows = text_encoder.encode(encoder, ids, torch.ones_like(ids), text_len=ids.shape[1])
                return TextRows.padded(rows[0].cpu(), text_len)

            yield read
        self._spare_host_memory(plan)

    @contextmanager
    def on_device(self, component: Literal["vae", "image_encoder"], plan: Plan) -> Iterator[nn.Module]:
        """A network that is on the device whole."""
        half = component == "vae" and self._half_vae(plan)
        network = self.get_or_load(component, torch.float16 if half else None)
        with offload.on_device(network, self.device.torch_device, stay=self._all_fit(plan)):
            self._record_weights()
            yield network

    def preview_vae(self) -> Vae | TinyDecoder | None:
        """The VAE for a preview, in host memory: a small one where there is one, which takes nothing of a card; else on
        a CPU the VAE itself. None elsewhere."""
        if "preview_vae" in self.files:
            try:
                return cast("Vae | TinyDecoder", self.get_or_load("preview_vae"))
            except (FileError, OSError):  # gone or changed meanwhile: no reason to lose a job
                del self.files["preview_vae"]
        return None if self.device.is_cuda else self.get_or_load("vae")

    @contextmanager
    def dit(self, expert: Expert, plan: Plan, parallel: SequenceParallel | None = None) -> Iterator[PlacedDit]:
        """The transformer of an expert on the device, with the LoRAs of the request on; its blocks may be spread over
        the processes that share the clip."""
        self._spare_host_memory(plan)
        if plan.levers.made_experts == "dropped":
            others = [other for other in self.spec.experts if other is not expert]
            gone = {self._key(self.files[other.component]) for other in others}
            gone |= {self._lora_key(other, plan.request) for other in others}
            self._kept = {key: value for key, value in self._kept.items() if key not in gone}
            self.graphs.drop_all_but(self._networks())
            offload.free_cached(self.device.torch_device, page_locked=True)
        dit, notes = cast("WanDiT", self.get_or_load(expert.component)), tuple[Notice, ...]()
        if wanted := loras.loras_for(plan.request, expert):
            key = self._lora_key(expert, plan.request)
            if key not in self._kept:
                self._kept[key] = loras.apply_loras(dit, wanted, expert)
            dit, notes = cast("tuple[WanDiT, tuple[Notice, ...]]", self._kept[key])
        stay, keep = self._all_fit(plan), not self.spec.two_experts  # host memory has room for one expert's copies
        stream, on_cards = None, plan.levers.blocks_shared
        if parallel is not None and on_cards is not None:
            stream = partial(SharedBlocks, on_cards=on_cards, parallel=parallel)
        how = {"stay": stay, "keep": keep, "give_way": self.device.is_cuda}
        with offload.dit_on_device(dit, self.device.torch_device, plan.levers, **how, stream=stream) as blocks:
            self._record_weights(blocks.beside_bytes)
            yield PlacedDit(dit, blocks, notes)

    def _all_fit(self, plan: Plan, more_bytes: int = 0) -> bool:
        """Whether everything fits at once, and so much more: then nothing has to leave the device between phases."""
        weights_bytes = sum(phase.weights_bytes for phase in plan.phases)
        work_bytes = max(phase.peak_bytes - phase.weights_bytes for phase in plan.phases)
        room_bytes = plan.budget_bytes if self.budget_bytes is None else min(plan.budget_bytes, self.budget_bytes)
        return plan.levers.experts == "resident" and weights_bytes + work_bytes + more_bytes <= room_bytes

    def _half_vae(self, plan: Plan) -> bool:
        """Whether the VAE runs in float16: where it is safe on this card; cards that share a clip send each other its
        features, and stay with one dtype."""
        if plan.levers.cards > 1:
            return False
        wide = partial(self._load, "vae", torch.float32)
        return half_vae.usable(self._key(self.files["vae"]), self.device.torch_device, wide)

    def forbid_half_vae(self) -> None:
        """Let the VAE of the open model run in float16 no more on such a card."""
        key = self._key(self.files["vae"])
        half_vae.forbid(key, self.device.torch_device)
        self._kept.pop(key + HALF, None)

    def get_or_load(self, component: NetworkComponent, dtype: torch.dtype | None = None) -> nn.Module:
        """A network of the open model in host memory; its file is read the first time only.

        The blocks of a transformer are INT8 where the request asked for it. `dtype`: another than the device's.
        """
        key = self._key(self.files[component]) + (HALF if dtype == torch.float16 else "")
        if key not in self._kept:
            self._kept[key] = self._load(component, dtype or self.device.dtype)
        return cast("nn.Module", self._kept[key])

    def _load(self, component: NetworkComponent, dtype: torch.dtype) -> nn.Module:
        """A network read from its file."""
        file, preview = self.files[component], component == "preview_vae"
        part = cast("Part", component if component in PARTS_IN_WORDS else "dit")
        checkpoint = open_checkpoint(file.path, None if preview else part)
        if preview:
            part, dtype = checkpoint.component, torch.float32  # it runs on the CPU
        with torch.device("meta"):
            if part == "text_encoder":
                module: nn.Module = text_encoder.make_text_encoder(self.spec.text_encoder)
            elif part == "vae":
                module = make_vae(**self.spec.vae.model_dump() | ({"base_dim": LIGHT_VAE_DIM} if preview else {}))
            elif part == "tiny_vae":
                module = TinyDecoder()
            elif part == "image_encoder" and self.spec.image_encoder:
                module = image_encoder.make_image_encoder(self.spec.image_encoder)
            else:
                module = WanDiT(dit_config(self.spec, sla=checkpoint.sla, quant_linear=checkpoint.quant))
        become = int8_layers(module) if self._int8 and part == "dit" else {}
        told = _progress_logger(f"Loading {self.spec.display_name} {PARTS_IN_WORDS[part]}...", file.bytes)
        with self._copy(file, checkpoint, module, become) as copy:
            load_into(module, checkpoint, dtype=dtype, become=become, told=told, copy=copy)
        told(file.bytes)
        return module

    def _copy(
        self, file: FoundFile, checkpoint: Checkpoint, module: nn.Module, become: Mapping[str, object]
    ) -> AbstractContextManager[ConvertedCopy | None]:
        """The copy on disk of a transformer or text encoder that is made of its file, where the plan says so."""
        if not self._on_disk or checkpoint.component not in ("dit", "text_encoder") or not (file.converted or become):
            return nullcontext()
        root, dtype, int8 = locate.download_root(), self.device.dtype, f" int8 {int8_mode()}" if become else ""
        copy = copy_of(root, Path(file.path), checkpoint.header.files, f"{dtype}{int8}")
        most_bytes = sum(dtype.itemsize * value.numel() for value in module.state_dict().values())
        return ConvertedCopy(copy, root, most_bytes)

    def _key(self, file: FoundFile) -> str:
        """Path, modification time and INT8 mode: a file that was replaced under its name is another model."""
        int8 = f" int8 {int8_mode()}" if self._int8 and file.component.startswith("dit") else ""
        int8 += " on disk" if self._on_disk and (file.converted or int8) else ""
        inside = " tokenizer" if file.component == "tokenizer" else ""  # it may lie in the encoder's file
        return f"{file.path} {Path(file.path).stat().st_mtime_ns}{int8}{inside}"

    def _lora_key(self, expert: Expert, request: Request) -> str:
        """The key of an expert with its LoRAs on; without any it is the expert's own."""
        parts = [self._key(self.files[expert.component])]
        for lora in loras.loras_for(request, expert):
            files = (Path(lora.path), Path(lora.path).with_name("adapter_config.json"))
            changed = [path.stat().st_mtime_ns if path.exists() else 0 for path in files]
            parts.append(f"{lora.path}@{lora.strength:g}@{changed}")
        return " ".join(parts)


def dit_config(spec: ModelSpec, *, sla: bool = False, quant_linear: bool = False) -> WanConfig:
    """Sizes from the model's facts; whether SLA and INT8 are there is a file's to say."""
    facts = spec.dit.model_dump()
    return WanConfig(**facts, text_dim=spec.text_encoder.dim, sla=sla, quant_linear=quant_linear)
