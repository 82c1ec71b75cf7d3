"""What this machine has, what is wrong with it, and the line that mends it. Torch is asked in a process of its own."""

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from turbodiff.gpu.probe import machine_now
from turbodiff.plan import torch_compat
from turbodiff.plan.hardware import Machine
from turbodiff.spec.numbers import GB


def doctor() -> dict[str, Any]:
    """What this machine has, warnings (key, sentence), torch's pip line, kernels (operation, runs, why), notes."""
    machine, torch_facts = machine_now(), worker_report()
    capability = torch_facts.get("capability")
    advice = torch_compat.advise(
        torch_facts.get("torch") or "0.0",
        torch_facts.get("cuda", ""),
        torch_facts.get("cudnn", 0),
        machine.driver,
        tuple(capability) if capability else None,
    )
    return {
        "found": _found(machine, torch_facts),
        "warnings": [*advice.warnings, *_trouble(torch_facts)],
        "pip_line": advice.pip_line,
        "kernels": torch_facts.get("kernels", []),
        "notes": [
            "SageAttention, SpargeAttn and flash-attn are not needed: turbodiff brings its own Triton kernels.",
            "Do not install `sparselinear`: it is an unrelated package of 2020. torchvision is not needed either.",
        ],
    }


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


def _found(machine: Machine, torch_facts: Mapping[str, Any]) -> dict[str, str]:
    cards = ", ".join(f"{gpu.name} ({_gb(gpu.total_bytes)})" for gpu in machine.gpus)
    found = {name: str(torch_facts.get(name) or "none") for name in ("torch", "cuda", "cudnn", "triton", "diffusers")}
    optional = torch_facts.get("optional", {})
    return {
        "python": sys.version.split()[0],
        **found,
        "driver": machine.driver or "none",
        "GPU": cards or f"none ({machine.gpu_state})",
        "RAM": _gb(machine.ram_total_bytes),
        "ffmpeg": _ffmpeg_version(),
        "free disk here": _gb(shutil.disk_usage(Path.cwd()).free),
        **{name: version or "not found, not needed" for name, version in optional.items()},
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
