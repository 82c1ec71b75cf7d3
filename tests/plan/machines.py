"""Machines and requests for the tests of the plan."""

from turbodiff.plan.hardware import GpuFacts, Machine
from turbodiff.spec.models import FoundFile, Inventory, all_models, find_model
from turbodiff.spec.numbers import GIB
from turbodiff.spec.request import Request, make_request


def gpu(total_gib: float, **facts) -> GpuFacts:
    """A card of one speed whatever its size, idle unless told otherwise."""
    total = round(total_gib * GIB)
    known = {"name": "NVIDIA GeForce RTX 4090", "total_bytes": total, "free_bytes": total, "used_bytes": 0}
    return GpuFacts(**known | facts)


def machine(*cards: GpuFacts, ram_gib: float | None = 64, **facts) -> Machine:
    """A machine with these cards and that much RAM available."""
    ram = None if ram_gib is None else round(ram_gib * GIB)
    known = {"gpus": cards, "gpu_state": "ok" if cards else "none", "torch": "2.13.0", "cpu_count": 16}
    return Machine(**known | {"ram_total_bytes": ram, "ram_available_bytes": ram} | facts)


def card(total_gib: float, **facts) -> Machine:
    """A machine with one idle card."""
    return machine(gpu(total_gib, **facts))


def disk(*models: str, quant: tuple[bool, ...] = (False, True)) -> Inventory:
    """An inventory with every file of these models (all when none is named)."""
    found = [
        FoundFile(
            model=spec.name,
            component=file.component,
            path=file.names[0],
            bytes=file.bytes,
            quant=file.quant,
            sla=spec.turbo and file.component.startswith("dit"),  # published files that are distilled
            resolution=file.resolution,
        )
        for spec in all_models()
        if not models or spec.name in models
        for file in spec.files
        if not file.component.startswith("dit") or file.quant in quant
    ]
    return Inventory(files=tuple(found))


def converted(found: Inventory, room_gib: float | None = None) -> Inventory:
    """The same files in another dtype than they run in, on a disk with so much room for copies."""
    heavy = ("dit", "text_encoder")
    files = [file.model_copy(update={"converted": file.component.startswith(heavy)}) for file in found.files]
    room = None if room_gib is None else round(room_gib * GIB)
    return found.model_copy(update={"files": tuple(files), "copies_room_bytes": room})


def ask(model: str = "wan2.1-14b", **fields) -> Request:
    """A request for a model, with a picture where it needs one."""
    picture = {"image": "cat.jpg"} if find_model(model).kind == "i2v" else {}
    return make_request({"prompt": "a cat chases a butterfly", "model": model, **picture, **fields})
