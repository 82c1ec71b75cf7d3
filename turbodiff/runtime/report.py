"""What torch, the GPU and the optional kernels say on this machine, as one JSON line.

    python -m turbodiff.runtime.report

A process of its own, so that a broken driver or a hanging import never stops the asker.
"""

import importlib.metadata
import json
import sys
from typing import Any

OPTIONAL = {"SageAttention": "sageattention", "SpargeAttn": "spas_sage_attn", "flash-attn": "flash_attn"}


def installed(distribution: str) -> str:
    """Version of a distribution, or ""."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def report() -> dict[str, Any]:
    """Versions, the device, its kernels and why, whether a small conv3d works, optional attention libraries."""
    import torch
    from turbodiff_kernels import backend

    from turbodiff.runtime.device import Device

    device = Device.pick()
    kernels = [backend.expected(op, device.torch_device) for op in backend.OPS]
    return {
        **device.facts(),
        "capability": list(torch.cuda.get_device_capability()) if device.is_cuda else None,
        "conv3d": _try_conv3d(device.torch_device, device.dtype),
        "kernels": [(kernel.op, kernel.runs, kernel.why) for kernel in kernels],
        "kernel_reasons": [(kernel.op, kernel.runs, kernel.key, dict(kernel.words)) for kernel in kernels],
        "triton": installed("triton"),
        "diffusers": installed("diffusers"),
        "transformers": installed("transformers"),
        "optional": {name: installed(package) for name, package in OPTIONAL.items()},
    }


def _try_conv3d(device: Any, dtype: Any) -> str:
    """ "ok", or the error of a 3x3x3 convolution (cuDNN's libraries may not belong together, pytorch issue 188892)."""
    import torch

    try:
        x = torch.ones(1, 4, 3, 8, 8, device=device, dtype=dtype)
        torch.nn.functional.conv3d(x, torch.ones(4, 4, 3, 3, 3, device=device, dtype=dtype))
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return "ok"


if __name__ == "__main__":
    sys.stdout.write(json.dumps(report()) + "\n")
