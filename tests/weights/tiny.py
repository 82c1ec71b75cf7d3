"""Tiny checkpoints in everybody's layouts, made from one WanDiT, one VAE and one UMT5 encoder."""

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from turbodiff.models.wan_dit import WanConfig, WanDiT
from turbodiff.weights import keymaps

CONFIG = WanConfig(dim=128, ffn_dim=256, num_heads=1, num_layers=2, text_dim=32, freq_dim=64, sla=True)
QUANTISED = (".self_attn.", ".cross_attn.", ".ffn.")


def dit_state(sla: bool = True) -> dict[str, Tensor]:
    """Parameters of one DiT in our names, float32, the same each time; values that bfloat16 holds exactly."""
    torch.manual_seed(0)
    state = WanDiT(CONFIG).state_dict()
    state = {name: torch.randn_like(value).mul(0.05).bfloat16().float() for name, value in state.items()}
    return {name: value for name, value in state.items() if sla or ".proj_l." not in name}


def wan(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Original Wan: the patch embedding is a 3-D convolution, there is no linear branch."""
    state = {name: value for name, value in state.items() if ".proj_l." not in name}
    weight = state["patch_embedding.weight"]
    return state | {"patch_embedding.weight": weight.reshape(weight.shape[0], -1, 1, 2, 2)}


def diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' names."""
    return renamed(wan(state), keymaps.names_from("dit", "diffusers"))


def renamed(state: Mapping[str, Tensor], table: Mapping[str, str]) -> dict[str, Tensor]:
    """Names of another layout with the linear branch, as the community exports TurboWan."""
    back = inverse(table)
    return {keymaps.rename(name, back) or name: value for name, value in state.items()}


def inverse(table: Mapping[str, str]) -> dict[str, str]:
    """Our names -> theirs."""
    result = {ours: theirs for theirs, ours in table.items()}
    assert len(result) == len(table), "two rows with one name"
    return result


def diffusers_quant(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """INT8 exports in diffusers' names call the tiles `weight` and their scales `weight_scale_inv`."""
    named = renamed(quant(state), keymaps.names_from("dit", "diffusers"))
    ends = {"int8_weight": "weight", "scale": "weight_scale_inv"}
    parts = {name: name.rpartition(".") for name in named}
    return {f"{parts[name][0]}.{ends.get(parts[name][2], parts[name][2])}".lstrip("."): named[name] for name in named}


def quant(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """TurboWan -quant: ten linears of each block in INT8 tiles of one scale."""
    result = dict(state)
    for name, value in state.items():
        if name.endswith(".weight") and value.ndim == 2 and any(part in name for part in QUANTISED):
            if ".proj_l." in name:
                continue
            module = name.removesuffix(".weight")
            rows, columns = (-(-size // 128) for size in value.shape)
            result[f"{module}.int8_weight"] = (result.pop(name) * 128).round().clamp(-128, 127).to(torch.int8)
            result[f"{module}.scale"] = torch.full((rows, columns), 1 / 128)
    return result


def fp8(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """ComfyUI's scaled fp8: a scale beside each matrix of a block, under its prefix."""
    result = {}
    for name, value in wan(state).items():
        if name.startswith("blocks.") and value.ndim == 2:
            result[name] = (value / 0.5).to(torch.float8_e4m3fn)
            result[name.removesuffix("weight") + "scale_weight"] = torch.tensor(0.5)
        else:
            result[name] = value
    result["scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    return prefixed(result, "model.diffusion_model.")


def prefixed(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Every name behind `prefix`."""
    return {prefix + name: value for name, value in state.items()}


def save_safetensors(state: Mapping[str, Tensor], path: Path) -> Path:
    """One safetensors file."""
    save_file({name: value.contiguous() for name, value in state.items()}, path)
    return path


def save_pth(state: Mapping[str, Tensor], path: Path) -> Path:
    """One torch zip file."""
    torch.save(dict(state), path)
    return path


def save_shards(state: Mapping[str, Tensor], folder: Path) -> Path:
    """A diffusers folder of two shards and their index."""
    folder.mkdir()
    names = sorted(state)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_safetensors({name: state[name] for name in part}, folder / file)
    where = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def save_gguf(state: Mapping[str, Tensor], path: Path) -> Path:
    """A GGUF file: matrices of the blocks as Q8_0, patch embeddings in the shape that the format allows, others F32."""
    entries, blob, shapes = b"", b"", b""
    for name, value in state.items():
        quantise = name.startswith("blocks.") and value.ndim == 2
        data = q8_0(value) if quantise else value.float().numpy().tobytes()
        shape = value.flatten(1).shape if value.ndim > 4 else value.shape
        if value.ndim > 4:
            shapes += gguf_text(f"comfy.gguf.orig_shape.{name}") + struct.pack("<IIQ", 9, 5, value.ndim)
            shapes += struct.pack(f"<{value.ndim}i", *value.shape)
        entries += gguf_text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        entries += struct.pack("<IQ", 8 if quantise else 0, len(blob))
        blob += data + b"\0" * (-len(data) % 32)
    count = sum(value.ndim > 4 for value in state.values())
    head = b"GGUF" + struct.pack("<IQQ", 3, len(state), count) + shapes + entries
    path.write_bytes(head + b"\0" * (-len(head) % 32) + blob)
    return path


def gguf_text(text: str) -> bytes:
    """A string of GGUF."""
    return struct.pack("<Q", len(text)) + text.encode()


def q8_0(value: Tensor) -> bytes:
    """Blocks of 32 values: a float16 scale and 32 int8."""
    blocks = value.float().reshape(-1, 32)
    scale = (blocks.abs().amax(dim=1, keepdim=True) / 127).half()
    numbers = (blocks / scale.float()).round().to(torch.int8)
    return torch.cat((scale.view(torch.int8), numbers), dim=1).numpy().tobytes()


# layout -> (state in that layout, how it is saved, file name, what detect says)
Layout = tuple[Callable[[], Mapping[str, Tensor]], Callable[[Mapping[str, Tensor], Path], Path], str, str]
LAYOUTS: dict[str, Layout] = {
    "wan.pth": (lambda: wan(dit_state()), save_pth, "a.pth", "wan"),
    "wan.safetensors": (lambda: wan(dit_state()), save_safetensors, "a.safetensors", "wan"),
    "turbowan.pth": (dit_state, save_pth, "a.pth", "turbowan"),
    "turbowan wrapped": (lambda: {"state_dict": dit_state()}, save_pth, "a.pth", "turbowan"),
    "turbowan-quant": (lambda: quant(dit_state()), save_pth, "a.pth", "turbowan-quant"),
    "net. dump": (lambda: prefixed(dit_state(), "net."), save_pth, "a.pt", "turbowan"),
    "net_ema. dump": (
        lambda: prefixed(dit_state(), "net_ema._checkpoint_wrapped_module."), save_pth, "a.pt", "turbowan"
    ),
    "comfy repack": (lambda: prefixed(wan(dit_state()), "diffusion_model."), save_safetensors, "a.safetensors", "wan"),
    "comfy fp8": (lambda: fp8(dit_state()), save_safetensors, "a.safetensors", "wan-fp8"),
    "fastvideo": (
        lambda: renamed(dit_state(), keymaps.names_from("dit", "fastvideo")), save_safetensors, "a.safetensors",
        "fastvideo",
    ),
    "diffusers-quant": (
        lambda: diffusers_quant(dit_state()), save_safetensors, "a.safetensors", "diffusers-quant"
    ),
    "diffusers": (lambda: diffusers(dit_state()), save_safetensors, "a.safetensors", "diffusers"),
    "diffusers shards": (lambda: diffusers(dit_state()), save_shards, "transformer", "diffusers"),
}  # fmt: skip


def write(layout: str, folder: Path) -> Path:
    """The tiny checkpoint in that layout, saved under `folder`."""
    make, save, name, _ = LAYOUTS[layout]
    return save(make(), folder / name)
