"""How torch's allocator works in our workers: expandable segments where they work, else fixed segments.

What a person set in PYTORCH_ALLOC_CONF (or in its older name) is never touched. Expandable segments need CUDA's virtual
memory management, which fails under WSL2 before driver R615 (pytorch issue 192330), on Jetson ("operation not
supported", unsloth issue 1446) and on virtual GPUs (openxla issue 49252). Fixed segments lose more to blocks of unlike
size, much less where large blocks are never split; the plan counts each (plan/allocator_slack.py).
"""

import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

from turbodiff.plan.hardware import Allocator, GpuFacts

VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the second is the name before torch 2.9
EXPANDABLE = "expandable_segments:True"
MAX_SPLIT_MIB = 32  # of a fixed segment, beyond which it is only used whole; torch takes none below 20
LIMIT = "max_split_size_mb"
FIXED = f"expandable_segments:False,{LIMIT}:{MAX_SPLIT_MIB}"
WSL_DRIVER = 615  # the first major version with which they work under WSL2
TEGRA_FILES = ("/etc/nv_tegra_release", "/sys/module/tegra_fuse")


def is_wsl() -> bool:
    """Whether this is Linux inside Windows."""
    return "microsoft" in platform.uname().release.lower()


def is_tegra() -> bool:
    """Whether this is a Jetson: NVIDIA's own files, or a kernel built for it."""
    return platform.uname().release.endswith("-tegra") or any(Path(file).exists() for file in TEGRA_FILES)


def allocator_mode(
    gpus: Sequence[GpuFacts],
    driver: str | None,
    *,
    wsl: bool | None = None,
    tegra: bool | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Allocator:
    """How the allocator works, or will work in a worker that is started with `allocator_settings`.

    What was measured on a card (`vmm_works`) goes before what is known of its kind. One worker may see all of `gpus`:
    the first that cannot decides.
    """
    if own := user_setting(environment):
        chosen = own.lower().replace(" ", "").split(",")
        limits = [part.partition(":")[2] for part in chosen if part.startswith(LIMIT)]
        limited = any(limit.isdecimal() and int(limit) <= MAX_SPLIT_MIB for limit in limits)
        return "expandable" if EXPANDABLE.lower() in chosen else "limited" if limited else "native"
    measured = {gpu.vmm_works for gpu in gpus} - {None}
    if measured:
        return "limited" if False in measured else "expandable"
    major = (driver or "").partition(".")[0]
    old = not major.isdecimal() or int(major) < WSL_DRIVER
    if (is_wsl() if wsl is None else wsl) and old:
        return "limited"
    fails = (is_tegra() if tegra is None else tegra) or any(gpu.vgpu for gpu in gpus)
    return "limited" if fails else "expandable"


def user_setting(environment: Mapping[str, str] = os.environ) -> str:
    """What a person set for the allocator; "" where nothing is."""
    return next((environment[name] for name in VARIABLES if environment.get(name, "").strip()), "")


def allocator_settings(mode: Allocator, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables that put a new process into that mode, from which it reads its mode too; none where a person chose."""
    if user_setting(environment):
        return {}
    return dict.fromkeys(VARIABLES, EXPANDABLE if mode == "expandable" else FIXED)
