"""Weights that are all header: names, shapes and sizes of the published files over sparse nothing. No torch.

The planner reads headers only and the scripted worker reads no weights at all, so the page can run Wan models here.
"""

import json
import math
import os
import struct
from pathlib import Path

from turbodiff.spec.models import ModelSpec, find_model
from turbodiff.weights import keymaps
from turbodiff.weights.fit import network_shapes

Shapes = dict[str, tuple[int, ...]]


def models(folder: Path, *names: str) -> Path:
    """Everything that these models need, below `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        spec = find_model(name)
        for file in spec.files:
            path = folder / Path(file.names[0]).with_suffix(".safetensors").name
            if file.component == "tokenizer":
                tokenizer(folder / "spiece.model")
            elif not file.quant and not path.exists():
                save(shapes_of(spec, file.component), path)
    return folder


def tokenizer(path: Path) -> None:
    """The demo's tokenizer with a field that no reader knows, as large as UMT5's."""
    import turbodiff.demo as demo

    known = (Path(demo.__file__).parent / "spiece.model").read_bytes()
    path.write_bytes(known + varint(200 << 3 | 2) + varint(4 << 20) + bytes(4 << 20))


def varint(number: int) -> bytes:
    """A number as protobuf writes it."""
    head = bytes([number & 127 | 128]) if number > 127 else bytes([number])
    return head + (varint(number >> 7) if number > 127 else b"")


def shapes_of(spec: ModelSpec, component: str) -> Shapes:
    """Every name of the component with its shape; the VAE and the encoder as Wan publishes them."""
    part = "dit" if component.startswith("dit") else component
    shapes = network_shapes(spec, part, False, spec.turbo)
    names = {ours: theirs for theirs, ours in keymaps.names_from("vae", "wan").items()} if part == "vae" else {}
    shapes = {keymaps.rename(name, names) or name: shape for name, shape in shapes.items()}
    shapes.pop("encoder.embed_tokens.weight", None)
    return dict(sorted(shapes.items()))


def save(shapes: Shapes, path: Path) -> None:
    """A sparse safetensors file of bfloat16 zeros."""
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + at)
