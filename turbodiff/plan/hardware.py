"""What a machine has: cards, memory, versions. Facts only; None means unknown and is never read as 0 or as free."""

import json
import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from turbodiff.spec.errors import FileError
from turbodiff.spec.models import Facts
from turbodiff.spec.numbers import GB, GIB

INT8_BELOW_BYTES = 40 * GB  # TurboDiffusion's guide: `quant_linear` is a must below 40 GB
GpuState = Literal["ok", "none", "mismatch", "lost", "hang", "error"]


class GpuFacts(Facts):
    """One card, or one MIG slice of a card, as CUDA will number it.

    Args:
        index: N of "cuda:N" under the current CUDA_VISIBLE_DEVICES.
        total_bytes / free_bytes / used_bytes: as NVML says, None where it does not.
        reclaimable_bytes: what our own worker holds, its CUDA context included; free again when the next job starts.
        context_bytes: a measured CUDA context, None for the default of plan/budget.py.
        reserve_bytes: left alone for others, None for the default of plan/budget.py.
        pcie_bytes_s: host to device, None for the default of the card's class.
    """

    index: int = 0
    name: str = "unknown card"
    uuid: str = ""
    mig: bool = False
    total_bytes: int | None = None
    free_bytes: int | None = None
    used_bytes: int | None = None
    reclaimable_bytes: int = 0
    capability: tuple[int, int] | None = None
    display: bool | None = None
    utilisation: float | None = None
    power_w: float | None = None
    temperature_c: float | None = None
    context_bytes: int | None = None
    reserve_bytes: int | None = None
    pcie_bytes_s: float | None = None


class Machine(Facts):
    """One machine at one moment. `gpu_state` says why `gpus` is empty; `pretended` makes every model of configs/
    count as present (a pretended card or a machine file is for planning, not for running)."""

    gpus: tuple[GpuFacts, ...] = ()
    gpu_state: GpuState = "none"
    gpu_error: str = ""
    ram_total_bytes: int | None = None
    ram_available_bytes: int | None = None
    ram_reclaimable_bytes: int = 0
    cpu_count: int | None = None
    driver: str | None = None
    torch: str | None = None
    cudnn: str | None = None
    wsl: bool = False
    pretended: bool = False


def prefers_int8(total_bytes: int | None) -> bool:
    """Whether a card of this memory runs, and downloads, INT8 weights; True where its memory is unknown."""
    return total_bytes is None or total_bytes < INT8_BELOW_BYTES


def pretend(machine: Machine, vram_gib: float) -> Machine:
    """The same machine with one card of `vram_gib` GiB, all of it free; a real card keeps its name and speed."""
    total = round(vram_gib * GIB)
    known = machine.gpus[0] if machine.gpus else GpuFacts(name=f"pretended card of {vram_gib:g} GiB")
    card = known.model_copy(
        update={"total_bytes": total, "free_bytes": total, "used_bytes": 0, "reclaimable_bytes": 0, "index": 0}
    )
    return machine.model_copy(update={"gpus": (card,), "gpu_state": "ok", "gpu_error": "", "pretended": True})


def only(machine: Machine, device: str) -> Machine:
    """The machine with the card of a device ("cuda:1") alone: all of them for "auto", none for "cpu"."""
    if device == "auto":
        return machine
    gpus = tuple(gpu for gpu in machine.gpus if device in (f"cuda:{gpu.index}", "cuda" if gpu.index == 0 else ""))
    return machine.model_copy(update={"gpus": gpus, "gpu_state": "ok" if gpus else "none"})


def read_machine(path: Path) -> Machine:
    """A machine file, TOML or JSON, with Machine's field names; its sizes may be GiB (`total_gib = 12`).

    Raises:
        FileError: missing, not TOML or JSON, or an unknown key.
    """
    try:
        text = path.read_text("utf-8")
        raw = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
        return Machine.model_validate(_machine_fields(raw))
    except OSError as error:
        raise FileError("cannot read the machine file", code="machine_file", field=path.name, got=error) from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise FileError(first["msg"], code="machine_key", field=f"{path.name}: {key}", got=first.get("input")) from None
    except (ValueError, AttributeError, TypeError) as error:
        raise FileError("not TOML or JSON", code="machine_syntax", field=path.name, got=error) from None


def _machine_fields(raw: dict[str, Any]) -> dict[str, Any]:
    cards = [{"index": index, **_in_bytes(card)} for index, card in enumerate(raw.get("gpus", ()))]
    for card in cards:
        card.setdefault("free_bytes", card.get("total_bytes"))
    return {"gpu_state": "ok" if cards else "none", **_in_bytes(raw), "gpus": cards, "pretended": True}


def _in_bytes(fields: dict[str, Any]) -> dict[str, Any]:
    """`x_gib = 12` as `x_bytes`, everything else as it is."""
    out = {}
    for key, value in fields.items():
        in_gib = key.endswith("_gib")
        out[key.removesuffix("_gib") + "_bytes" if in_gib else key] = round(value * GIB) if in_gib else value
    return out
