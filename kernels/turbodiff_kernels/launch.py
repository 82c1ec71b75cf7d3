"""What the launches of all kernels share: the card's architecture, warps for a width, exact rounding on the device."""

import torch
import triton
import triton.language as tl


def arch(device: torch.device) -> int:
    """Compute capability as a number: 90 for an H100. A CPU counts as 80: what every supported card can do."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def block_warps(block: int) -> int:
    """Warps for one program that holds `block` values: at most 32 float32 registers of them per thread."""
    return min(16, max(1, block // 1024))


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """Triton's name of a dtype that tokens may have."""
    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]


@triton.jit
def round_half_even(x):
    """Nearest integer, ties to even, of |x| < 2^22 in float32: adding 1.5 * 2^23 pushes the fraction out.

    Launch with `enable_fp_fusion=False` where `x` is a product that must be rounded before.
    """
    return (x + 12582912.0) - 12582912.0
