"""What this machine has, what is wrong with it, and the line that mends it. Torch is asked in a process of its own."""

import shutil
import subprocess
import sys
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from turbodiff.gpu.probe import machine_now
from turbodiff.plan import torch_compat
from turbodiff.plan.hardware import Machine
from turbodiff.spec.environment import child_environment, current_folder
from turbodiff.spec.errors import not_started
from turbodiff.spec.numbers import gb, gib
from turbodiff.spec.wording import Words

TORCH_REPORT = (sys.executable, "-P", "-m", "turbodiff.runtime.device")
TORCH_REPORT_S = 120


class KernelReason(NamedTuple):
    """What computes an operation, and why as a key with its numbers (turbodiff_kernels/backend.py)."""

    op: str
    runs: str
    key: str
    numbers: dict[str, str]


class DoctorReport(BaseModel):
    """What this machine has. The last four fields are for who words it in another language, not part of the JSON."""

    model_config = ConfigDict(frozen=True)
    found: dict[str, str]  # program or device -> version or name, in English
    warnings: list[tuple[str, str]]  # key, sentence
    pip_line: str  # installs the torch for this machine
    kernels: list[tuple[str, str, str]]  # operation, what runs ("triton" or "reference"), why
    notes: list[str]
    machine: Machine = Field(exclude=True)
    versions: dict[str, str] = Field(exclude=True)  # `found` with "" for what is not here
    optional: frozenset[str] = Field(exclude=True)  # of `versions`, what nobody needs
    kernel_reasons: list[KernelReason] = Field(exclude=True)


class TorchReport(BaseModel):
    """What runtime/device.py prints of this process' torch; `error` where it did not answer."""

    model_config = ConfigDict(frozen=True)
    torch: str = ""
    cuda: str = ""
    cudnn: int = 0
    triton: str = ""
    diffusers: str = ""
    capability: tuple[int, int] | None = None
    conv3d: str = "ok"
    kernels: list[tuple[str, str, str]] = []
    kernel_reasons: list[KernelReason] = []
    optional: dict[str, str] = {}  # attention libraries -> version, "" for what is not here
    error: str = ""


def doctor() -> DoctorReport:
    """What this machine has, warnings, torch's pip line, which kernels run and why; torch takes seconds to answer."""
    import imageio_ffmpeg

    machine = machine_now()
    try:
        done = subprocess.run(
            TORCH_REPORT, capture_output=True, text=True, timeout=TORCH_REPORT_S, check=True, env=child_environment()
        )
        report = TorchReport.model_validate_json(done.stdout.splitlines()[-1])
    except subprocess.CalledProcessError as error:
        report = TorchReport(error=((error.stderr or "").strip().splitlines() or ["no words"])[-1])
    except OSError as error:
        report = TorchReport(error=str(not_started(TORCH_REPORT[0], error)))
    except subprocess.TimeoutExpired:
        report = TorchReport(error=f"torch did not answer within {TORCH_REPORT_S} s")
    advice = torch_compat.advise(report.torch or "0.0", report.cuda, report.cudnn, machine.driver, report.capability)
    warnings = [*advice.warnings]
    if report.error:
        warnings.append(("torch_silent", f"torch does not start: {report.error}"))
    if report.conv3d != "ok":
        warnings.append(("conv3d_fails", f"a small conv3d fails: {report.conv3d}"))
    try:
        ffmpeg = str(imageio_ffmpeg.get_ffmpeg_version())
    except RuntimeError as error:
        ffmpeg = str(error)
    versions = {
        "python": sys.version.split()[0],
        "torch": report.torch,
        "cuda": report.cuda,
        "cudnn": str(report.cudnn or ""),
        "triton": report.triton,
        "diffusers": report.diffusers,
        "driver": machine.driver or "",
        "GPU": ", ".join(f"{gpu.name} ({_memory(gpu.total_bytes)})" for gpu in machine.gpus),
        "RAM": _memory(machine.ram_total_bytes),
        "ffmpeg": ffmpeg,
        "free disk here": gb(shutil.disk_usage(current_folder()).free),
        **report.optional,
    }
    why = Words("en").or_else(f"reason.{machine.gpu_reason}", machine.gpu_error, got=machine.gpu_error)
    none = {**dict.fromkeys(versions, "none"), "GPU": f"none ({machine.gpu_state}) {why}".rstrip()}
    none |= dict.fromkeys(report.optional, "not found, not needed")
    return DoctorReport(
        found={name: version or none[name] for name, version in versions.items()},
        warnings=warnings,
        pip_line=advice.pip_line,
        kernels=report.kernels,
        notes=doctor_notes(machine, Words("en")),
        machine=machine,
        versions=versions,
        optional=frozenset(report.optional),
        kernel_reasons=report.kernel_reasons,
    )


def doctor_notes(machine: Machine, words: Words) -> list[str]:
    """What nobody needs to install, and which cards were not measured yet."""
    unmeasured = (gpu.name for gpu in machine.usable_gpus if not gpu.measured)
    told = [words("shell.own_kernels"), words("shell.not_sparselinear")]
    return told + [words("shell.unmeasured", name=name) for name in unmeasured]


def _memory(n_bytes: int | None) -> str:
    return "unknown" if n_bytes is None else gib(n_bytes)
