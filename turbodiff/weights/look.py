"""One file looked at: which models it fills, or why none. Never raises; read again when it changes."""

from collections.abc import Mapping
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, cast

from turbodiff.spec.errors import FileError
from turbodiff.spec.models import Component, ModelSpec, all_models
from turbodiff.spec.schedules import PLAIN, Training
from turbodiff.spec.shapes import LIGHT_VAE_DIM, WAN_VAE_DIM
from turbodiff.weights import experts
from turbodiff.weights.detect import Checkpoint, open_checkpoint
from turbodiff.weights.distillation import training_of
from turbodiff.weights.fit import misfit, network_shapes
from turbodiff.weights.forms import GGUF_COMMAND, TOKENIZER_TENSOR
from turbodiff.weights.headers import bad_file
from turbodiff.weights.kinds import family_of, other_kind


class Looked(NamedTuple):
    """What looking at one file gave: the models that it fills and what the search needs of its header, or an error;
    both where a package is missing that reads it."""

    models: tuple[str, ...] = ()
    error: FileError | None = None
    component: Component = "dit"
    layout: str = ""
    nbytes: int = 0
    quant: bool = False
    sla: bool = False
    converted: bool = False
    metadata: Mapping[str, str] = MappingProxyType({})
    training: Training = PLAIN
    tokenizer_bytes: int = 0  # of one inside the file of a text encoder


@lru_cache(maxsize=4096)
def look(path: Path, _size: int, _mtime_ns: int, _configs: str) -> Looked:
    """What the header says; read again when size or time of the file change. Never raises."""
    try:
        checkpoint = open_checkpoint(path)
        error, models = None, []
        light = checkpoint.component == "vae" and checkpoint.numbers["base_dim"] == LIGHT_VAE_DIM
        small = light or checkpoint.component == "tiny_vae"
        fills: Component = "preview_vae" if small else cast("Component", checkpoint.component)
        for spec in (spec for spec in all_models() if _sizes_fit(spec, checkpoint)):
            component = "light_vae" if light else checkpoint.component
            shapes = network_shapes(spec, component, checkpoint.quant, checkpoint.sla)
            error = misfit(checkpoint, shapes)
            models += [] if error else [spec.name]
        if models and checkpoint.layout.endswith("gguf") and find_spec("gguf") is None:
            missing = FileError(
                "GGUF weights need the gguf package", code="gguf_missing", field=str(path), got="a GGUF file",
                expected=GGUF_COMMAND, try_instead=GGUF_COMMAND,
            )  # fmt: skip
            return Looked(tuple(models), missing, fills)
        if not models:
            sizes = ", ".join(f"{name} {number}" for name, number in checkpoint.numbers.items())
            got = other_kind(checkpoint.unknown) or family_of(checkpoint.component, checkpoint.numbers) or sizes
            error = error or bad_file(
                path, "no model here has these sizes", code="no_model", got=got, expected="turbodiff models list"
            )
            return Looked(error=error)
        mapped = ("I8", "F32") if checkpoint.quant else ("BF16",)  # what stays the file itself on a card (load.py)
        used = {name for source in checkpoint.sources.values() for name in (source.stored, source.scale) if name}
        stored = [checkpoint.header.tensors[name] for name in used]  # a file may hold the other networks, too
        made_bytes = sum(info.nbytes for info in stored if info.dtype not in mapped)
        titles = {name: text[:200] for name, text in checkpoint.header.metadata.items() if name in experts.TITLES}
        return Looked(
            tuple(models), None, fills, checkpoint.layout, sum(info.nbytes for info in stored), checkpoint.quant,
            checkpoint.sla, 2 * made_bytes > sum(info.nbytes for info in stored), titles,
            training_of(checkpoint.header.written_names, checkpoint.header.metadata, path),
            inside.nbytes if (inside := checkpoint.header.tensors.get(TOKENIZER_TENSOR)) else 0,
        )  # fmt: skip
    except FileError as error:
        return Looked(error=error.to_keep())
    except Exception as error:  # noqa: BLE001  one file, whatever is in it, must not hide the others
        got = f"{type(error).__name__}: {error}"[:120]
        return Looked(error=bad_file(path, "the file is damaged", code="file_damaged", got=got))


def _sizes_fit(spec: ModelSpec, checkpoint: Checkpoint) -> bool:
    dit = spec.dit.model_dump() | {"text_dim": spec.text_encoder.dim, "head_dim": spec.dit.head_dim}
    clip = spec.image_encoder.model_dump() if spec.image_encoder else {}
    vae, text = spec.vae.model_dump(), spec.text_encoder.model_dump()
    tiny = {"z_dim": spec.vae.z_dim} if spec.vae.base_dim == WAN_VAE_DIM else {}  # the demo has latents of its own
    if tiny and checkpoint.numbers.get("base_dim") == LIGHT_VAE_DIM:
        vae["base_dim"] = LIGHT_VAE_DIM
    networks = {"dit": dit, "vae": vae, "tiny_vae": tiny, "text_encoder": text, "image_encoder": clip}
    facts = networks[checkpoint.component]
    told = {name: number for name, number in checkpoint.numbers.items() if (name, number) != ("head_dim", 0)}
    return all(facts.get(name) == number for name, number in told.items())
