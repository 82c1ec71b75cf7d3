"""One NVML sample a line, as JSON, from a process of its own: driver calls can hang, and this one may be killed.

Run by path (`python -P sample.py [--watch SECONDS]`), so it imports nothing of turbodiff. Every value that NVML does
not give is null; a call that fails never hides the others. NVML numbers cards in PCI order. Standard output is for
samples alone: what pynvml or the driver's library print there goes to standard error.
"""

import ctypes
import json
import os
import resource
import stat
import sys
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

MEMORY_INFO_V2 = 0x02000028  # sizeof(nvmlMemory_v2_t) | 2 << 24; v2 keeps the driver's own reserve apart
NOT_AVAILABLE = (1 << 64) - 1  # NVML_VALUE_NOT_AVAILABLE
# bytes a second of one lane, by PCIe generation (PCI-SIG), and the share of them that copies reach: 22-26 GB/s of the
# 31.5 of generation 4 x16 in NVIDIA's bandwidthTest
LANE_BYTES_S = {1: 0.25e9, 2: 0.5e9, 3: 0.985e9, 4: 1.969e9, 5: 3.938e9, 6: 7.563e9}
LINK_SHARE = 0.75
HALF_SMS = ((7, 0), (7, 2), (7, 5), (8, 0), (6, 0))  # 64 cores an SM, all others from Pascal on 128
MOST_WORDS_BYTES = 1 << 20  # of what libraries print; more is refused (RLIMIT_FSIZE), and ends nothing
T = TypeVar("T")


def main() -> None:
    """Print one sample, or one every `--watch` seconds until the parent goes away."""
    pause_s = float(sys.argv[2]) if sys.argv[1:2] == ["--watch"] else 0.0
    parent, output = os.getppid(), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    words_are_a_file = stat.S_ISREG(os.fstat(2).st_mode)
    if words_are_a_file:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        limit = MOST_WORDS_BYTES if hard == resource.RLIM_INFINITY else min(MOST_WORDS_BYTES, hard)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    while True:
        try:
            found = sample()
        except Exception as error:  # noqa: BLE001  another or an older pynvml may raise anything; the reason is told
            module = getattr(sys.modules.get("pynvml"), "__file__", None) or "pynvml"
            found = _failed("error", "gpu_pynvml", f"{module}: {type(error).__name__}: {error}")
        output.write(f"\n{json.dumps(found)}\n")  # a line of its own, also behind half a line of somebody else's
        output.flush()
        if not pause_s or os.getppid() != parent:
            return
        if words_are_a_file:  # only the words of the sample that ends it are of use
            os.ftruncate(2, 0)
            os.lseek(2, 0, os.SEEK_SET)
        time.sleep(pause_s)


def sample() -> dict[str, object]:
    """Everything NVML says now; `state` is ok, none, mismatch, lost or error, `reason` a key of plan/reasons.toml."""
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError as error:  # of dlopen(3), which has no number: one that is here and cannot be loaded is an error
        absent = "No such file" in str(error)
        return _failed("none", "gpu_no_library", error) if absent else _failed("error", "gpu_bad_library", error)
    import pynvml  # late: it is large, and useless without the library

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return _failed(*_state_of(error), error)
    try:
        cards = [card for index in range(pynvml.nvmlDeviceGetCount()) for card in _cards(index)]
        driver = _ask(pynvml.nvmlSystemGetDriverVersion)
        lost = bool(cards) and all(card["state"] == "lost" for card in cards)
        state, reason, words = ("lost", "gpu_lost", "NVML_ERROR_GPU_IS_LOST") if lost else ("ok", "", "")
        return {"state": state, "reason": reason, "error": words, "driver": driver, "cards": cards}
    except pynvml.NVMLError as error:
        return _failed(*_state_of(error), error)
    finally:
        _ask(pynvml.nvmlShutdown)


def _failed(state: str, reason: str, error: object) -> dict[str, object]:
    return {"state": state, "reason": reason, "error": str(error), "driver": None, "cards": []}


def _state_of(error: Exception) -> tuple[str, str]:
    """State and reason. A mismatched driver needs a reboot, a lost GPU a reset; without a driver there is no card."""
    import pynvml

    words = {
        pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: ("mismatch", "gpu_mismatch"),
        pynvml.NVML_ERROR_GPU_IS_LOST: ("lost", "gpu_lost"),
        pynvml.NVML_ERROR_DRIVER_NOT_LOADED: ("none", "gpu_no_driver"),
        pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: ("none", "gpu_no_library"),
        pynvml.NVML_ERROR_NO_PERMISSION: ("error", "gpu_no_permission"),
    }
    return words.get(getattr(error, "value", 0), ("error", "gpu_nvml"))


def _ask(call: Callable[..., T], *args: object) -> T | None:
    """What a call answers, or None: one value that a driver lacks must not cost the others."""
    import pynvml

    try:
        return call(*args)
    except (pynvml.NVMLError, UnicodeDecodeError, ValueError, OSError):
        return None


def _cards(index: int) -> Iterator[dict[str, object]]:
    """The card at `index`, or each of its MIG slices: with MIG on, CUDA sees the slices only."""
    import pynvml

    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    except pynvml.NVMLError as error:
        yield {
            "state": _state_of(error)[0],
            "nvml_index": index,
            "name": f"card {index}",
            "uuid": "",
            "processes": None,
        }
        return
    mode = _ask(pynvml.nvmlDeviceGetMigMode, handle)
    if not mode or mode[0] != pynvml.NVML_DEVICE_MIG_ENABLE:
        yield _card(handle, index, mig=False, parent="")
        return
    parent = _ask(pynvml.nvmlDeviceGetUUID, handle) or ""
    for number in range(_ask(pynvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0):
        part = _ask(pynvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, number)
        if part is not None:
            yield _card(part, index, mig=True, parent=parent)


def _card(handle: object, index: int, *, mig: bool, parent: str) -> dict[str, object]:
    """Everything about one card or slice.

    Memory: a GPU that shares the host's memory answers 0 or nothing, both mean unknown.
    Processes: compute and graphics; None where NVML keeps no list (WSL, some containers).
    """
    import pynvml

    capability = _ask(pynvml.nvmlDeviceGetCudaComputeCapability, handle)
    utilisation = _ask(pynvml.nvmlDeviceGetUtilizationRates, handle)
    power_mw = _ask(pynvml.nvmlDeviceGetPowerUsage, handle)
    display = _ask(pynvml.nvmlDeviceGetDisplayActive, handle)
    compute = _ask(pynvml.nvmlDeviceGetComputeRunningProcesses, handle)
    graphics = _ask(pynvml.nvmlDeviceGetGraphicsRunningProcesses, handle)
    lists = {"compute": compute or (), "graphics": graphics or ()}
    listed = [
        {"pid": process.pid, "kind": kind, "bytes": process.usedGpuMemory}
        for kind, processes in lists.items()
        for process in processes
    ]
    memory = _ask(pynvml.nvmlDeviceGetMemoryInfo, handle, MEMORY_INFO_V2)
    memory = memory or _ask(pynvml.nvmlDeviceGetMemoryInfo, handle)
    numbers = (pynvml.nvmlDeviceGetGpuInstanceId, pynvml.nvmlDeviceGetComputeInstanceId) if mig else ()
    instance = [_ask(number, handle) for number in numbers] or [None]
    total = None if memory is None or memory.total in (0, NOT_AVAILABLE) else memory.total
    return {
        "state": "ok",
        "nvml_index": index,
        "minor": _ask(pynvml.nvmlDeviceGetMinorNumber, handle),
        "name": _ask(pynvml.nvmlDeviceGetName, handle) or "unknown card",
        "uuid": _ask(pynvml.nvmlDeviceGetUUID, handle) or "",
        "mig": mig,
        "parent": parent,
        "instance": None if None in instance else instance,
        "capability": list(capability) if capability else None,
        "display": None if display is None else bool(display),
        "utilisation": None if utilisation is None else utilisation.gpu / 100,
        "power_w": None if power_mw is None else power_mw / 1000,
        "temperature_c": _ask(pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU),
        "processes": None if compute is None else listed,
        **_rates(handle, capability),
        "total_bytes": total,
        "free_bytes": memory.free if memory and total and memory.free <= total else None,
        "used_bytes": memory.used if memory and total and memory.used <= total else None,
    }


def _rates(handle: object, capability: tuple[int, int] | None) -> dict[str, object]:
    """What a card's speed is made of: SMs (a slice's own), highest clocks, memory bus, PCIe link, and whether a
    hypervisor shares it out. The link's width is that of now, its generation the best that card and slot agree on:
    it falls while the card is idle."""
    import pynvml

    slice_ = _ask(pynvml.nvmlDeviceGetAttributes_v2, handle)
    cores = _ask(pynvml.nvmlDeviceGetNumGpuCores, handle)
    width = _ask(pynvml.nvmlDeviceGetCurrPcieLinkWidth, handle)
    lane = LANE_BYTES_S.get(_ask(pynvml.nvmlDeviceGetMaxPcieLinkGeneration, handle) or 0)
    mode = _ask(pynvml.nvmlDeviceGetVirtualizationMode, handle)
    sm_count = slice_.multiprocessorCount if slice_ else None
    if sm_count is None and cores and capability:
        sm_count = cores // (64 if tuple(capability) in HALF_SMS else 128)
    return {
        "sm_count": sm_count,
        "clock_mhz": _ask(pynvml.nvmlDeviceGetMaxClockInfo, handle, pynvml.NVML_CLOCK_SM),
        "memory_clock_mhz": _ask(pynvml.nvmlDeviceGetMaxClockInfo, handle, pynvml.NVML_CLOCK_MEM),
        "memory_bus_bits": _ask(pynvml.nvmlDeviceGetMemoryBusWidth, handle),
        "pcie_bytes_s": LINK_SHARE * lane * width if lane and width else None,
        "vgpu": None if mode is None else mode == pynvml.NVML_GPU_VIRTUALIZATION_MODE_VGPU,
    }


if __name__ == "__main__":
    main()
