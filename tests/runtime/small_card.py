"""A small card without a card: host memory, counted by a ledger with a cap, in the place of a GPU's."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from turbodiff.memory_lab.dry_run import GRAIN_BYTES, Ledger
from turbodiff.models.vae import make_vae
from turbodiff.plan.hardware import GpuFacts, Machine
from turbodiff.runtime import offload
from turbodiff.runtime.device import Device
from turbodiff.runtime.model_cache import ModelCache
from turbodiff.spec.models import configs_folder
from turbodiff.spec.numbers import GIB


def card(total_bytes: int) -> Machine:
    """A machine whose card gives a job every byte it has: no CUDA context, no reserve.

    The torch of those days made 3-D convolutions out of 2-D ones, as a CPU does.
    """
    gpu = GpuFacts(
        name="a card of the tests", total_bytes=total_bytes, free_bytes=total_bytes, context_bytes=0, reserve_bytes=0
    )
    return Machine(gpus=(gpu,), gpu_state="ok", ram_available_bytes=32 * GIB, torch="2.9.0", cudnn="9.10.2")


class CardLedger(Ledger):
    """A ledger to which networks in host memory are not on the card, until they are brought there.

    `sound`: whether a process could go on after its out-of-memory; if not it is the driver's, not the allocator's.
    """

    sound = True

    def _take(self, size: int) -> None:
        try:
            super()._take(size)
        except torch.OutOfMemoryError as error:
            if self.sound:
                raise
            raise RuntimeError("CUDA driver error: out of memory") from error

    def ignore(self, module: nn.Module) -> set[torch.UntypedStorage]:
        """A network in host memory: neither its weights nor views of them count. Returns their storages."""
        storages = {tensor.untyped_storage() for tensor in (*module.parameters(), *module.buffers())}
        self._known.update(storages)
        return storages

    @contextmanager
    def holding(self, *modules: nn.Module) -> Iterator[None]:
        """Count networks inside the block only, as if they were brought to the card and taken off again.

        Raises:
            torch.OutOfMemoryError: the cap is reached.
        """
        storages = [storage for module in modules for storage in self.ignore(module)]
        size = sum(-(-storage.nbytes() // GRAIN_BYTES) * GRAIN_BYTES for storage in storages)
        self._take(size)
        try:
            yield
        finally:
            self.live_bytes -= size


@dataclass(frozen=True)
class Counted(Device):
    """A device whose peak is the ledger's; `shown` is what it says a job could have, None: it cannot be asked."""

    ledger: Ledger
    shown: Callable[[], int | None] = lambda: None

    def reset_peak(self) -> None:
        self.ledger.reset_peak()

    def peak_bytes(self) -> int:
        return self.ledger.peak_bytes

    def available_bytes(self) -> int | None:
        return self.shown()


def write_toy(folder: Path, base_dim: int) -> None:
    """The model `toy`: the demo with random weights in a VAE of another width, and any size.

    The narrower the VAE, the less the decode binds. Writes configs/ for $TURBODIFF_CONFIGS, models/ for
    $TURBODIFF_MODELS.
    """
    shutil.copytree(configs_folder(), folder / "configs")
    facts = (folder / "configs" / "models" / "demo.toml").read_text("utf-8")
    for old, new in {
        'name = "demo"': 'name = "toy"', 'display_name = "Demo"': 'display_name = "Toy"', "turbodiff-demo": "a-toy",
        "bundled = true": "bundled = false", "base_dim = 16": f"base_dim = {base_dim}",
        "free_size = false": "free_size = true",
    }.items():  # fmt: skip
        assert old in facts
        facts = facts.replace(old, new)
    (folder / "configs" / "models" / "toy.toml").write_text(facts, "utf-8")
    (folder / "models").mkdir()
    torch.manual_seed(0)
    state = {name: value.contiguous() for name, value in make_vae(base_dim).state_dict().items()}
    save_file(state, folder / "models" / "toy_vae.safetensors")


class CardCache(ModelCache):
    """The model cache of a worker on the small card: weights count while they are placed; nothing is ever at hand."""

    def __init__(self) -> None:
        super().__init__(Device(torch.device("cpu"), "a card of the tests", torch.bfloat16))
        self.ledger = CardLedger("cpu")

    def insert(
        self, cap_bytes: int | None, shown: Callable[[], int | None] = lambda: None, *, sound: bool = True
    ) -> CardLedger:
        """Put a card of that size in; a context manager."""
        self.ledger = CardLedger("cpu", cap_bytes)
        self.ledger.sound = sound
        for kept in self._kept.values():
            if isinstance(kept, nn.Module):
                self.ledger.ignore(kept)
        self.device = Counted(self.device.torch_device, self.device.name, self.device.dtype, self.ledger, shown)
        return self.ledger

    def warm(self, request) -> None:
        """Load everything into host memory, which is not the card's."""
        self.open(request)
        for component in ("text_encoder", "vae", "dit"):
            with offload.on_device(self.get_or_load(component), self.device.torch_device):
                pass

    def preview_vae(self) -> None:
        return None

    @contextmanager
    def text_encoder(self, plan) -> Iterator:
        encoder = self.get_or_load("text_encoder")
        layers = list(encoder.encoder.block)
        parts = {"resident": [encoder], "streamed": layers[:2]}.get(plan.levers.text, [])
        with self.ledger.holding(*parts), super().text_encoder(plan) as read:
            yield read

    @contextmanager
    def on_device(self, component, plan) -> Iterator:
        with super().on_device(component, plan) as network, self.ledger.holding(network):
            yield network

    @contextmanager
    def dit(self, expert, plan) -> Iterator:
        dit = self.get_or_load(expert.component)
        rest = [child for name, child in dit.named_children() if name != "blocks"]
        here: list[nn.Module] = [*rest, *dit.blocks[: plan.levers.blocks_resident]]
        with (
            self.ledger.holding(*(here if plan.levers.experts == "streamed" else [dit])),
            super().dit(expert, plan) as placed,
        ):
            yield placed
