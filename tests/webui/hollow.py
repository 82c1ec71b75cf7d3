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
                save(shapes_of(spec, file.component), file.bytes, path)
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
    """Every name of the component; the shapes that tell which model it is are right, the others hold one number."""
    if component == "vae":
        return {
            "conv1.weight": (32, 32), "conv2.weight": (16, 16), "encoder.conv1.weight": (1,),
            "decoder.conv1.weight": (1,),
            "decoder.head.0.gamma": (spec.vae.base_dim, 1), "decoder.head.2.weight": (1,),
        }  # fmt: skip
    facts = spec.text_encoder
    if component == "text_encoder":
        layer = "encoder.block.0.layer"
        told: Shapes = {
            "shared.weight": (facts.vocab, facts.dim),
            f"{layer}.0.SelfAttention.relative_attention_bias.weight": (facts.num_buckets, facts.num_heads),
            f"{layer}.0.SelfAttention.q.weight": (facts.dim_attn, facts.dim),
            f"{layer}.1.DenseReluDense.wi_0.weight": (facts.dim_ffn, facts.dim),
        }
        names = keymaps.parameter_names("text_encoder", facts.num_layers) - {"encoder.embed_tokens.weight"}
    else:
        dit = spec.dit
        told = {
            "patch_embedding.weight": (dit.dim, dit.in_dim * 4),
            "blocks.0.ffn.0.weight": (dit.ffn_dim, dit.dim),
            "head.head.weight": (dit.out_dim * 4, dit.dim),
            "text_embedding.0.weight": (dit.dim, facts.dim),
            "time_embedding.0.weight": (dit.dim, dit.freq_dim),
            "blocks.0.self_attn.attn_op.local_attn.proj_l.weight": (dit.head_dim, dit.head_dim),
        }
        names = keymaps.parameter_names("dit", dit.num_layers, sla=True)
    return {name: told.get(name, (1,)) for name in sorted(names)}


def save(shapes: Shapes, nbytes: int, path: Path) -> None:
    """A sparse safetensors file of about `nbytes`, bfloat16; the last name takes what the others leave."""
    rest = nbytes // 2 - sum(math.prod(shape) for shape in shapes.values())
    last = [name for name, shape in shapes.items() if shape == (1,)][-1]
    header, at = {}, 0
    for name, shape in (shapes | {last: (max(rest, 1),)}).items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + at)
