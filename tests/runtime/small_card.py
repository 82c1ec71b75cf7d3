"""A small card without a card: host memory, counted by a ledger with a cap, in the place of a GPU's."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from turbodiff.memory_lab.dry_run import Ledger
from turbodiff.models.vae import make_vae
from turbodiff.plan.hardware import GpuFacts, Machine
from turbodiff.runtime.device import Device
from turbodiff.runtime.model_cache import ModelCache
from turbodiff.spec.models import configs_folder
from turbodiff.spec.numbers import GIB

CARD = torch.device("cpu", 0)  # another device than "cpu" to torch, so that moving there copies


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
    `before`: called with the number of each allocation before it is made, as a neighbour would come.
    """

    sound = True

    def __init__(self, device_type: str | None = None, cap_bytes: int | None = None) -> None:
        super().__init__(device_type, cap_bytes)
        self.before: Callable[[int], None] = lambda number: None

    def take(self, size: int) -> int:
        self.before(self._numbers + 1)
        try:
            return super().take(size)
        except torch.OutOfMemoryError as error:
            if self.sound:
                raise
            raise RuntimeError("CUDA driver error: out of memory") from error

    def ignore(self, module: nn.Module) -> None:
        """A network in host memory: neither its weights nor views of them count."""
        hosts = [vars(tensor).get("host_data", tensor) for tensor in tensors_of(module)]  # `.data` would be counted
        self._known.update(host.untyped_storage() for host in hosts)


def tensors_of(module: nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers."""
    return [*module.parameters(), *module.buffers()]


@dataclass(frozen=True)
class Counted(Device):
    """A device whose figures are the ledger's; `shown` is what it says a job could have, None: it cannot be asked."""

    ledger: Ledger
    shown: Callable[[], int | None] = lambda: None

    @property
    def is_cuda(self) -> bool:
        return True

    def reset_peak(self) -> None:
        self.ledger.reset_peak()

    def peak_bytes(self) -> int:
        return self.ledger.peak_bytes

    def reserved_bytes(self) -> int | None:
        return None

    def available_bytes(self) -> int | None:
        return self.shown()

    def held_bytes(self) -> int:
        return self.ledger.live_bytes

    def facts(self) -> dict[str, str | int]:
        return {"device": str(self.torch_device), "device_name": self.name, "arch": "cpu", "torch": torch.__version__}


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
    """The model cache of a worker on the small card. What is moved to `CARD` is copied, and the copies count."""

    def __init__(self) -> None:
        super().__init__(Device(CARD, "a card of the tests", torch.bfloat16))
        self.ledger = CardLedger("cpu")

    def insert(
        self, cap_bytes: int | None, shown: Callable[[], int | None] = lambda: None, *, sound: bool = True
    ) -> CardLedger:
        """Put an empty card of that size in; a context manager."""
        self.leave_device()
        self.ledger = CardLedger("cpu", cap_bytes)
        self.ledger.sound = sound
        for network in self._networks():
            self.ledger.ignore(network)
        self.device = Counted(self.device.torch_device, self.device.name, self.device.dtype, self.ledger, shown)
        return self.ledger

    def warm(self, request) -> None:
        """Load everything into host memory, which is not the card's."""
        self.open(request)
        for component in ("text_encoder", "vae", "dit"):
            self.get_or_load(component)
