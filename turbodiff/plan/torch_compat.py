"""Which torch belongs on this machine, and which builds have a trap.

Facts: torch 2.9 and 2.10 with cuDNN < 9.15 compute half-precision conv3d, the VAE, on a path of 3 to 17 times the
memory (pytorch issues 166643, 177406); CUDA 13 builds need driver 580; sm_120 cards need CUDA 12.8; `weights_only`
had a known bypass before torch 2.10, so there a .pth is read only after our own reader accepts it.
"""

from dataclasses import dataclass

CUDA13_DRIVER = 580
FIXED_CUDNN = 91500
OLD_DRIVER_TORCH = "2.8.0"
NEW_TORCH = "2.11"
PYTORCH_INDEX = "https://download.pytorch.org/whl"


@dataclass(frozen=True)
class TorchAdvice:
    """The pip line for this machine, and warnings about the torch that is installed (keys with English sentences)."""

    pip_line: str
    warnings: tuple[tuple[str, str], ...] = ()


def release(version: str) -> tuple[int, int]:
    """(2, 13) of "2.13.0+cpu"."""
    major, minor = version.split("+")[0].split(".")[:2]
    return int(major), int(minor)


def conv3d_is_broken(torch_version: str, cudnn: int) -> bool:
    """Whether half-precision conv3d takes many times its memory on this build; `cudnn` as torch gives it, 0 if none."""
    return (2, 9) <= release(torch_version) < (2, 11) and 0 < cudnn < FIXED_CUDNN


def cudnn_number(version: str | None) -> int:
    """ "9.10.2.21" as torch counts it, 91002; 0 when unknown."""
    parts = [int(part) for part in (version or "0").split(".")[:3] if part.isdecimal()]
    major, minor, patch = (*parts, 0, 0)[:3]
    return major * 10_000 + minor * 100 + patch


def pip_line(driver: str | None) -> str:
    """The one line that installs the right torch; torchvision is not needed."""
    if driver is None:
        return f"pip install torch --index-url {PYTORCH_INDEX}/cpu"
    if int(driver.split(".")[0]) < CUDA13_DRIVER:
        return f"pip install torch=={OLD_DRIVER_TORCH} --index-url {PYTORCH_INDEX}/cu128"
    return f'pip install "torch>={NEW_TORCH}"'


def advise(
    torch_version: str,
    cuda: str = "",
    cudnn: int = 0,
    driver: str | None = None,
    capability: tuple[int, int] | None = None,
) -> TorchAdvice:
    """What to say about a torch on a machine; cuda as "12.8" or "", driver as "580.82", capability as (12, 0)."""
    line, warnings = pip_line(driver), []
    if conv3d_is_broken(torch_version, cudnn):
        trap = f"torch {torch_version} with cuDNN {cudnn} multiplies the VAE's memory; install: {line}"
        warnings.append(("conv3d_trap", trap))
    if release(torch_version) < (2, 11):
        trick = f"torch {torch_version} can be tricked by a hostile .pth: only files that our reader accepts load"
        warnings.append(("pth_care", trick))
    if driver is not None and not cuda:
        warnings.append(("cpu_build", f"this machine has an NVIDIA driver but a CPU build of torch; install: {line}"))
    if capability and capability >= (12, 0) and cuda and release(cuda) < (12, 8):
        warnings.append(("sm120_cuda", f"this card needs CUDA 12.8 or newer, torch brings {cuda}; install: {line}"))
    return TorchAdvice(line, tuple(warnings))
