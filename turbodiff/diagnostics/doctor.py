"""What this machine has, what is wrong with it, and the line that mends it. Torch is asked in a process of its own."""

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from turbodiff.gpu.probe import machine_now
from turbodiff.plan import torch_compat
from turbodiff.plan.hardware import Machine
from turbodiff.spec.numbers import GB


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


def doctor() -> DoctorReport:
    """What this machine has, warnings, torch's pip line, which kernels run and why."""
    machine, torch_facts = machine_now(), worker_report()
    capability = torch_facts.get("capability")
    advice = torch_compat.advise(
        torch_facts.get("torch") or "0.0",
        torch_facts.get("cuda", ""),
        torch_facts.get("cudnn", 0),
        machine.driver,
        tuple(capability) if capability else None,
    )
    optional: dict[str, str] = torch_facts.get("optional", {})
    versions = {**_versions(machine, torch_facts), **optional}
    none = {**dict.fromkeys(versions, "none"), "GPU": f"none ({machine.gpu_state})"}
    none |= dict.fromkeys(optional, "not found, not needed")
    return DoctorReport(
        found={name: version or none[name] for name, version in versions.items()},
        warnings=[*advice.warnings, *_trouble(torch_facts)],
        pip_line=advice.pip_line,
        kernels=torch_facts.get("kernels", []),
        notes=[
            "SageAttention, SpargeAttn and flash-attn are not needed: turbodiff brings its own Triton kernels.",
            "Do not install `sparselinear`: it is an unrelated package of 2020. torchvision is not needed either.",
        ],
        machine=machine,
        versions=versions,
        optional=frozenset(optional),
        kernel_reasons=torch_facts.get("kernel_reasons", []),
    )


def worker_report() -> dict[str, Any]:
    """What torch says, asked of a process of its own: {} with an "error" when it does not answer."""
    argv = [sys.executable, "-m", "turbodiff.runtime.report"]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=True)
        report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except subprocess.CalledProcessError as error:
        return {"error": (error.stderr or "").strip().splitlines()[-1:] or ["no words"]}
    except subprocess.TimeoutExpired:
        return {"error": ["torch did not answer within 120 s"]}
    return report


def _versions(machine: Machine, torch_facts: Mapping[str, Any]) -> dict[str, str]:
    cards = ", ".join(f"{gpu.name} ({_gb(gpu.total_bytes)})" for gpu in machine.gpus)
    return {
        "python": sys.version.split()[0],
        **{name: str(torch_facts.get(name) or "") for name in ("torch", "cuda", "cudnn", "triton", "diffusers")},
        "driver": machine.driver or "",
        "GPU": cards,
        "RAM": _gb(machine.ram_total_bytes),
        "ffmpeg": _ffmpeg_version(),
        "free disk here": _gb(shutil.disk_usage(Path.cwd()).free),
    }


def _ffmpeg_version() -> str:
    import imageio_ffmpeg

    try:
        return str(imageio_ffmpeg.get_ffmpeg_version())
    except RuntimeError as error:
        return str(error)


def _trouble(torch_facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    trouble = []
    if "error" in torch_facts:
        trouble.append(("torch_silent", f"torch does not start: {' '.join(torch_facts['error'])}"))
    if torch_facts.get("conv3d", "ok") != "ok":
        trouble.append(("conv3d_fails", f"a small conv3d fails: {torch_facts['conv3d']}"))
    return trouble


def _gb(n_bytes: int | None) -> str:
    return "unknown" if n_bytes is None else f"{n_bytes / GB:.1f} GB"
