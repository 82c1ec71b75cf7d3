"""The device that this worker computes on, and the dtype it computes in."""

import platform
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from turbodiff.spec.errors import RequestError


@dataclass(frozen=True)
class Device:
    """A torch device, its name for people, and the compute dtype: bfloat16 on a GPU, float32 on a CPU."""

    torch_device: torch.device
    name: str
    dtype: torch.dtype

    @classmethod
    def pick(cls, wish: str = "auto") -> "Device":
        """The device asked for; "auto" is the first visible GPU, else the CPU.

        Raises:
            RequestError: field `device`: torch has no such device here.
        """
        known = ["auto", "cpu"]
        if torch.cuda.is_available():
            known += ["cuda", *(f"cuda:{n}" for n in range(torch.cuda.device_count()))]
        if wish not in known:
            options = {"got": wish, "expected": " or ".join(known), "try_instead": "turbodiff doctor"}
            raise RequestError("torch has no such device here", code="no_such_device", field="device", **options)
        if wish == "cpu" or (wish == "auto" and not torch.cuda.is_available()):
            return cls(torch.device("cpu"), platform.processor() or platform.machine(), torch.float32)
        device = torch.device("cuda:0" if wish == "auto" else wish)
        return cls(device, torch.cuda.get_device_name(device), torch.bfloat16)

    @property
    def is_cuda(self) -> bool:
        """Whether this is a GPU."""
        return self.torch_device.type == "cuda"

    @property
    def arch(self) -> str:
        """ "sm_90" and so on, or "cpu"."""
        if not self.is_cuda:
            return "cpu"
        major, minor = torch.cuda.get_device_capability(self.torch_device)
        return f"sm_{major}{minor}"

    def reset_peak(self) -> None:
        """Start measuring a new peak."""
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats(self.torch_device)

    def peak_bytes(self) -> int:
        """Most bytes that tensors held at once since `reset_peak`; on a CPU the resident bytes of this process now."""
        if self.is_cuda:
            return torch.cuda.max_memory_allocated(self.torch_device)
        return psutil.Process().memory_info().rss

    def reserved_bytes(self) -> int | None:
        """Most bytes that torch's allocator held from the driver since `reset_peak`; None on a CPU."""
        return torch.cuda.max_memory_reserved(self.torch_device) if self.is_cuda else None

    def available_bytes(self) -> int | None:
        """Bytes of the device that this process has or could have, beside its CUDA context; None on a CPU."""
        if not self.is_cuda:
            return None
        free_bytes, _ = torch.cuda.mem_get_info(self.torch_device)
        return free_bytes + self.held_bytes()

    def held_bytes(self) -> int:
        """Bytes that torch's allocator holds now; 0 on a CPU."""
        return torch.cuda.memory_reserved(self.torch_device) if self.is_cuda else 0

    def facts(self) -> dict[str, Any]:
        """What a worker's hello and a clip's sidecar say about where it ran."""
        return {
            "device": str(self.torch_device),
            "device_name": self.name,
            "arch": self.arch,
            "torch": torch.__version__,
            "cuda": torch.version.cuda or "",
            "cudnn": torch.backends.cudnn.version() or 0 if self.is_cuda else 0,
        }
