"""What a machine has and what a job may use of it. Facts only; None means unknown and is never read as 0 or as free."""

import json
import tomllib
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from turbodiff.plan.cards import Facts, capability_of
from turbodiff.spec.errors import FileError
from turbodiff.spec.files import open_file
from turbodiff.spec.models import Frozen
from turbodiff.spec.numbers import GIB, MIB

CONTEXT_BYTES = 600 * MIB  # a CUDA context with its modules and cuBLAS, 0.5-0.8 GiB on the cards that were measured
WORKSPACE_BYTES = 100 * MIB  # cuBLAS and cuDNN scratch outside our tensors
RESERVE_BYTES = {"headless": 512 * MIB, "display": 800 * MIB, "wsl": 1 * GIB}  # others use 400 to 1024 MiB
HOST_RESERVE_BYTES = 1 * GIB

MAX_MACHINE_BYTES = 1 << 20  # of a machine file

OLDEST_FUSED = (8, 0)  # capability from which our Triton kernels run: INT8 products with INT32 sums, bfloat16

GpuState = Literal["ok", "none", "mismatch", "lost", "hang", "error"]
Allocator = Literal["expandable", "limited", "native"]  # of torch, see plan/allocator_slack.py
KernelName = Literal["norm", "quant", "gemm", "sage", "sla", "sagesla"]


class Kernels(Frozen):
    """Per operation of `turbodiff_kernels`: whether its Triton kernel runs. False: its reference does, because the
    self-check found a difference, Triton is missing, or TURBODIFF_KERNELS (`wish`) says so. None: not known yet."""

    norm: bool | None = None
    quant: bool | None = None
    gemm: bool | None = None
    sage: bool | None = None
    sla: bool | None = None
    sagesla: bool | None = None
    wish: Literal["auto", "reference", "triton"] = "auto"


ALL_REFERENCE = Kernels(norm=False, quant=False, gemm=False, sage=False, sla=False, sagesla=False)


class GpuFacts(Frozen):
    """One card, or one MIG slice of a card, as CUDA will number it.

    Args:
        index: N of "cuda:N" under the current CUDA_VISIBLE_DEVICES.
        total_bytes / free_bytes / used_bytes: as NVML says, None where it does not.
        reclaimable_bytes: what our own worker holds, its CUDA context included; free again when the next job starts.
        context_bytes: a measured CUDA context, None for CONTEXT_BYTES.
        reserve_bytes: left alone for others, None for RESERVE_BYTES.
        pcie_bytes_s: page-locked host memory to device, None for the default of the card's class.
        pcie_to_host_bytes_s: device to page-locked host memory, None for the same as `pcie_bytes_s`.
        pageable_bytes_s: host memory that is not page-locked to device, None for half of `pcie_bytes_s`.
        sm_count, clock_mhz: streaming multiprocessors (of the slice) and their highest clock.
        memory_bus_bits, memory_clock_mhz: width and highest clock of the card's memory, as NVML gives them.
        worker_ram_bytes: of the host, held by our worker on this card, None: `Machine.ram_reclaimable_bytes` is its.
        memory_bytes_s: bandwidth of the card's memory.
        link_bytes_s: what it sends a second in an all-to-all with its likes here, for each number of cards that it was
            measured among; None for that of its kind (plan/links.py).
        block_rate, decode_rate: how fast a transformer block, and the decoder, are over what plan/cards.toml says.
        vmm_works: whether CUDA's virtual memory management, so expandable segments, was seen to work or to fail.
        vgpu: a virtual GPU of a hypervisor.
        kernels: of this card, None for those of the machine.
        measured: names of the fields that were measured on such a card here (`turbodiff calibrate --quick`), under this
            driver and torch; measured_on: the day, "2026-11-29".
    """

    index: int = 0
    name: str = "unknown card"
    uuid: str = ""
    mig: bool = False
    total_bytes: int | None = None
    free_bytes: int | None = None
    used_bytes: int | None = None
    reclaimable_bytes: int = 0
    worker_ram_bytes: int | None = None
    capability: tuple[int, int] | None = None
    display: bool | None = None
    utilisation: float | None = None
    power_w: float | None = None
    temperature_c: float | None = None
    context_bytes: int | None = None
    reserve_bytes: int | None = None
    pcie_bytes_s: float | None = None
    pcie_to_host_bytes_s: float | None = None
    pageable_bytes_s: float | None = None
    sm_count: int | None = None
    clock_mhz: float | None = None
    memory_bus_bits: int | None = None
    memory_clock_mhz: float | None = None
    memory_bytes_s: float | None = None
    link_bytes_s: tuple[tuple[int, float], ...] | None = None
    block_rate: float | None = None
    decode_rate: float | None = None
    vmm_works: bool | None = None
    vgpu: bool | None = None
    kernels: Kernels | None = None
    measured: tuple[str, ...] = ()
    measured_on: str = ""

    @property
    def cuda_context_bytes(self) -> int:
        """Bytes of a CUDA context here: part of every budget, and none of torch's allocator."""
        return CONTEXT_BYTES if self.context_bytes is None else self.context_bytes

    @property
    def facts(self) -> Facts:
        """What is known of the kind of card beside its name."""
        return Facts(
            self.known_capability, self.total_bytes, self.mig, self.sm_count, self.clock_mhz, self.memory_bus_bits,
            self.memory_clock_mhz,
        )  # fmt: skip

    @property
    def known_capability(self) -> tuple[int, int] | None:
        """Compute capability, by the name where the driver does not say; None for a card that nobody knows."""
        return self.capability or capability_of(self.name)

    @property
    def too_old(self) -> bool:
        """Below sm_80: no bf16 tensor cores, no kernels of ours, no cuDNN convolution in bf16."""
        return self.known_capability is not None and self.known_capability < OLDEST_FUSED

    @property
    def plausible_free_bytes(self) -> int | None:
        """Free memory if it can be believed: 0 free while nothing is used is a bogus reading, not a full card."""
        if self.free_bytes == 0 and (self.used_bytes or 0) < (self.total_bytes or 0):
            return None if self.used_bytes is None else (self.total_bytes or 0) - self.used_bytes
        return self.free_bytes


class Machine(Frozen):
    """One machine at one moment. `gpu_state` says why `gpus` is empty; `pretended` makes every model of configs/
    count as present (a pretended card or a machine file is for planning, not for running).

    Args:
        gpu_reason, gpu_error: why no card can be used, as a key of plan/reasons.toml, and what it got.
        kernels: which fused kernels run here; what is unknown counts as fused on a card that can (`runs_fused`).
        allocator: how torch's allocator works here, None: not known, planned as expandable segments.
        pinned_limit_bytes: what may be page-locked in all, None: no limit known.
        unified_memory: device and host use one memory (GB10, Jetson): a job's two needs are drawn from one pool.
        tegra: a Jetson.
        bitsandbytes: whether that library is installed, which holds a text encoder in int8 or NF4 on a card; None, not
            known, promises nothing.
    """

    gpus: tuple[GpuFacts, ...] = ()
    gpu_state: GpuState = "none"
    gpu_reason: str = ""
    gpu_error: str = ""
    ram_total_bytes: int | None = None
    ram_available_bytes: int | None = None
    ram_reclaimable_bytes: int = 0
    cpu_count: int | None = None
    driver: str | None = None
    torch: str | None = None
    cudnn: str | None = None
    wsl: bool = False
    tegra: bool = False
    unified_memory: bool = False
    pinned_limit_bytes: int | None = None
    allocator: Allocator | None = None
    kernels: Kernels = Kernels()
    bitsandbytes: bool | None = None
    pretended: bool = False

    @property
    def host_budget_bytes(self) -> int | None:
        """Bytes of host memory that a job may use, None when unknown."""
        return self.host_budget_with(None)

    def host_budget_with(self, gpu: GpuFacts | None) -> int | None:
        """Bytes of host memory that a job on a card may use, None when unknown: what the worker of another card holds
        is not free for it."""
        if self.ram_available_bytes is None:
            return None
        own_bytes = None if gpu is None else gpu.worker_ram_bytes
        own_bytes = self.ram_reclaimable_bytes if own_bytes is None else own_bytes
        return max(0, self.ram_available_bytes + own_bytes - HOST_RESERVE_BYTES)

    def runs_fused(self, gpu: GpuFacts | None, kernel: KernelName) -> bool:
        """Whether a fused kernel runs on a card (None: the CPU, where references run). What is not known yet counts as
        yes from sm_80 on, where every kernel was built for, and on a card of unknown capability."""
        if gpu is None or gpu.too_old:
            return False
        return getattr(gpu.kernels or self.kernels, kernel) is not False

    def reserved_bytes(self, gpu: GpuFacts) -> int:
        """Memory of a card that is left alone for the desktop and for other programs' growth."""
        if gpu.reserve_bytes is not None:
            return gpu.reserve_bytes
        return RESERVE_BYTES["wsl" if self.wsl else "display" if gpu.display else "headless"]

    def card_budget_bytes(self, gpu: GpuFacts) -> int:
        """Bytes that a job may use on a card: what is free or becomes free, less a reserve for others.

        Our own worker's memory, its context included, counts as free: the plan's peak carries the context once.
        """
        total = gpu.total_bytes
        if total is None:
            return self.host_budget_bytes or 8 * GIB
        free = gpu.plausible_free_bytes
        available = total if free is None else min(free + gpu.reclaimable_bytes, total)
        return available - self.reserved_bytes(gpu)

    @property
    def usable_gpus(self) -> tuple[GpuFacts, ...]:
        """The cards that our networks run on: those from sm_80 on."""
        return tuple([gpu for gpu in self.gpus if not gpu.too_old])

    @property
    def largest_budget_bytes(self) -> int:
        """Bytes that a job may use on the freest card, 0 without one."""
        return max((self.card_budget_bytes(gpu) for gpu in self.usable_gpus), default=0)


def sharing_cards(machine: Machine) -> tuple[GpuFacts, ...]:
    """The cards that may share a clip, the freest first: the most of one kind. Slices and a card that shares its memory
    with the host do not."""
    kinds: dict[str, list[GpuFacts]] = {}
    for gpu in () if machine.unified_memory else machine.usable_gpus:
        if not gpu.mig:
            kinds.setdefault(gpu.name, []).append(gpu)
    most = max(kinds.values(), key=len, default=[])
    return tuple(sorted(most, key=lambda gpu: (-machine.card_budget_bytes(gpu), gpu.index)))


def pretend(machine: Machine, vram_gib: float) -> Machine:
    """The same machine with one card of `vram_gib` GiB, all of it free; a real card keeps its name and speed."""
    total = round(vram_gib * GIB)
    known = machine.gpus[0] if machine.gpus else GpuFacts(name=f"pretended card of {vram_gib:g} GiB")
    card = known.model_copy(
        update={"total_bytes": total, "free_bytes": total, "used_bytes": 0, "reclaimable_bytes": 0, "index": 0}
    )
    return machine.model_copy(
        update={"gpus": (card,), "gpu_state": "ok", "gpu_reason": "", "gpu_error": "", "pretended": True}
    )


def only(machine: Machine, device: str) -> Machine:
    """The machine with the card of a device ("cuda:1") alone: all of them for "auto", none for "cpu"."""
    if device == "auto":
        return machine
    gpus = tuple(gpu for gpu in machine.gpus if device in (f"cuda:{gpu.index}", "cuda" if gpu.index == 0 else ""))
    return machine.model_copy(update={"gpus": gpus, "gpu_state": "ok" if gpus else "none"})


def read_machine(path: Path) -> Machine:
    """A machine file, TOML or JSON, with Machine's field names; its sizes may be GiB (`total_gib = 12`).

    Raises:
        FileError: missing, no file, not TOML or JSON, or an unknown key.
    """

    def in_bytes(fields: dict[str, object]) -> dict[str, object]:
        """`x_gib = 12` as `x_bytes`, everything else as it is."""
        sizes = {key: value for key, value in fields.items() if key.endswith("_gib")}
        rest = {key: value for key, value in fields.items() if key not in sizes}
        return rest | {key.removesuffix("_gib") + "_bytes": round(float(str(sizes[key])) * GIB) for key in sizes}

    try:
        with open_file(path) as file:
            text = file.read(MAX_MACHINE_BYTES).decode("utf-8")
        raw = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
        cards = [{"index": index, **in_bytes(card)} for index, card in enumerate(raw.get("gpus", ()))]
        for card in cards:
            card.setdefault("free_bytes", card.get("total_bytes"))
        found = {"gpu_state": "ok" if cards else "none", **in_bytes(raw), "gpus": cards, "pretended": True}
        return Machine.model_validate(found)
    except OSError as error:
        got = error.strerror or error
        raise FileError("cannot read the machine file", code="machine_file", field=str(path), got=got) from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise FileError(first["msg"], code="machine_key", field=f"{path.name}: {key}", got=first.get("input")) from None
    except (ValueError, AttributeError, TypeError) as error:
        raise FileError("not TOML or JSON", code="machine_syntax", field=path.name, got=error) from None
