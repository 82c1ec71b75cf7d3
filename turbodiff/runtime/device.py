"""The device that this process computes on, and the dtype it computes in.

    python -m turbodiff.runtime.device

prints what torch, the device and the optional kernels say on this machine, as one JSON line. The asker runs it as a
process of its own, so that a broken driver or a hanging import never stops it.
"""

import importlib.metadata
import json
import platform
import sys
from dataclasses import dataclass

import psutil
import torch

from turbodiff.plan.hardware import OLDEST_FUSED
from turbodiff.spec.errors import RequestError

OPTIONAL = {"SageAttention": "sageattention", "SpargeAttn": "spas_sage_attn", "flash-attn": "flash_attn"}


@dataclass(frozen=True)
class Device:
    """A torch device, its name for people, and the compute dtype: bfloat16 on a GPU, float32 on a CPU."""

    torch_device: torch.device
    name: str
    dtype: torch.dtype

    @classmethod
    def pick(cls, wish: str = "auto") -> "Device":
        """The device asked for; "auto" is the first visible GPU from sm_80 on, else the CPU.

        Raises:
            RequestError: field `device`: torch has no such device here, or it is too old to compute in bf16.
        """
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        usable = [n for n in range(count) if torch.cuda.get_device_capability(n) >= OLDEST_FUSED]
        known = ["auto", "cpu", *(["cuda"] if count else ()), *(f"cuda:{n}" for n in range(count))]
        if wish not in known:
            options = {"got": wish, "expected": " or ".join(known), "try_instead": "turbodiff doctor"}
            raise RequestError("torch has no such device here", code="no_such_device", field="device", **options)
        if wish == "cpu" or (wish == "auto" and not usable):
            return cls(torch.device("cpu"), platform.processor() or platform.machine(), torch.float32)
        device = torch.device(f"cuda:{usable[0]}" if wish == "auto" else wish)
        if (device.index or 0) not in usable:
            major, minor = torch.cuda.get_device_capability(device)
            raise RequestError(
                "this card cannot compute in bf16", code="card_too_old", field="device",
                got=f"{wish}, sm_{major}{minor}", expected="sm_80 or newer: RTX 30 series, A100",
                try_instead="--device cpu, or another card",
            )  # fmt: skip
        return cls(device, torch.cuda.get_device_name(device), torch.bfloat16)

    @property
    def is_cuda(self) -> bool:
        """Whether this is a GPU."""
        return self.torch_device.type == "cuda"

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

    def facts(self) -> dict[str, str | int]:
        """What a worker's hello and a clip's sidecar say about where it ran; `arch` is "sm_90" and so on, or "cpu"."""
        capability = torch.cuda.get_device_capability(self.torch_device) if self.is_cuda else None
        return {
            "device": str(self.torch_device),
            "device_name": self.name,
            "arch": f"sm_{capability[0]}{capability[1]}" if capability else "cpu",
            "torch": torch.__version__,
            "cuda": torch.version.cuda or "",
            "cudnn": torch.backends.cudnn.version() or 0 if self.is_cuda else 0,  # type: ignore[no-untyped-call]
        }


def installed(distribution: str) -> str:
    """Version of a distribution, or ""."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def report() -> dict[str, object]:
    """Versions, the device, its kernels and why, optional attention libraries, and whether a small conv3d works.

    `conv3d` is "ok" or an error (cuDNN's libraries may not belong together, pytorch issue 188892).
    """
    from turbodiff_kernels import backend

    device, conv3d = Device.pick(), "ok"
    try:
        x = torch.ones(1, 4, 3, 8, 8, device=device.torch_device, dtype=device.dtype)
        torch.nn.functional.conv3d(x, torch.ones(4, 4, 3, 3, 3, device=device.torch_device, dtype=device.dtype))
    except RuntimeError as error:
        conv3d = str(error).splitlines()[0]
    kernels = [backend.expected(op, device.torch_device) for op in backend.OPS]
    return {
        **device.facts(),
        "capability": list(torch.cuda.get_device_capability()) if device.is_cuda else None,
        "conv3d": conv3d,
        "kernels": [(kernel.op, kernel.runs, kernel.why) for kernel in kernels],
        "kernel_reasons": [(kernel.op, kernel.runs, kernel.key, dict(kernel.words)) for kernel in kernels],
        "triton": installed("triton"),
        "diffusers": installed("diffusers"),
        "transformers": installed("transformers"),
        "optional": {name: installed(package) for name, package in OPTIONAL.items()},
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(report()) + "\n")
