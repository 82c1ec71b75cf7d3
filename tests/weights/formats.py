"""The table of formats: how each file is written from the demo's own weights, and what must come of it.

`tests/weights/formats.md` is made from it: `python -m tests.weights.formats` writes it, a test compares the two.
"""

import contextlib
import io
import json
import os
import pickle
import shutil
import struct
import sys
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.weights import tiny
from turbodiff.models.text_encoder import make_text_encoder
from turbodiff.models.vae import make_vae
from turbodiff.models.wan_dit import WanDiT
from turbodiff.runtime.model_cache import dit_config
from turbodiff.spec.models import FoundFile, PassedOver, find_model
from turbodiff.weights import keymaps, locate
from turbodiff.weights.detect import open_checkpoint
from turbodiff.weights.load import load_into
from webui.wording import Words

DEMO = Path(locate.__file__).resolve().parents[1] / "demo"
TABLE = Path(__file__).with_name("formats.md")
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LINEARS = tuple(f".{name}.weight" for name in keymaps.DIT_LINEARS)

State = Mapping[str, Tensor]
Made = tuple[State, State]  # what is written, and the numbers that it stands for, in our names


@cache
def weights(file: str) -> State:
    """A network of the demo in our names, float32."""
    return {name: value.float() for name, value in load_file(DEMO / file).items()}


def dit() -> State:
    """The demo's transformer without the linear branch."""
    return {name: value for name, value in weights("dit_t2v.safetensors").items() if ".proj_l." not in name}


def is_linear(name: str) -> bool:
    """Whether this is the weight of one of the ten linears of a block."""
    return name.startswith("blocks.") and name.endswith(LINEARS)


# --- numbers -----------------------------------------------------------------------------------------------------


def cast(dtype: torch.dtype) -> Callable[[], Made]:
    """Every parameter in a dtype."""
    return lambda: (
        {name: value.to(dtype) for name, value in tiny.wan(dit()).items()},
        {name: value.to(dtype).float() for name, value in dit().items()},
    )


def each_linear(change: Callable[[Tensor], tuple[Mapping[str, Tensor], Tensor]]) -> Made:
    """The linears of the blocks changed into leaves, with what these stand for."""
    written, meant = {}, dict(dit())
    for name, value in tiny.wan(dit()).items():
        if is_linear(name):
            leaves, meant[name] = change(value)
            module = name.removesuffix(".weight")
            written |= {f"{module}.{leaf}": tensor for leaf, tensor in leaves.items()}
        else:
            written[name] = value.bfloat16()
            meant[name] = written[name].float().reshape(meant[name].shape)
    return written, meant


def grid_of(value: Tensor, rows: int, columns: int) -> Tensor:
    """The greatest magnitude of each tile [ceil(o / rows), ceil(i / columns)]."""
    o, i = value.shape
    padded = torch.nn.functional.pad(value.abs(), (0, -i % columns, 0, -o % rows))
    return padded.view(-(-o // rows), rows, -(-i // columns), columns).amax(dim=(1, 3)).clamp_min(1e-12)


def spread(grid: Tensor, like: Tensor, rows: int, columns: int) -> Tensor:
    """A scale for each value of `like`."""
    return grid.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: like.shape[0], : like.shape[1]]


def scaled(
    dtype: torch.dtype, rows: int, columns: int, leaf: str, *, shape: str = "grid", weight: str = "weight",
    top: float = 448.0, more: Mapping[str, Tensor] | None = None, times: float = 1.0,
) -> Callable[[], Made]:  # fmt: skip
    """Linears in a small dtype with a scale per tile; 0 rows or columns: all of them share one."""

    def change(value: Tensor) -> tuple[Mapping[str, Tensor], Tensor]:
        o, i = value.shape
        tile = rows or o, columns or i
        grid = grid_of(value, *tile) / top
        small = value / spread(grid, value, *tile)
        small = small.round().clamp(-128, 127).to(dtype) if dtype == torch.int8 else small.to(dtype)
        meant = small.float() * spread(grid / times * times, value, *tile)
        stored = {"grid": grid.shape, "flat": (grid.numel(),), "one": ()}[shape]
        beside = {name: tensor.clone() for name, tensor in (more or {}).items()}
        return {weight: small, leaf: grid.reshape(stored) / times} | beside, meant

    return lambda: each_linear(change)


def marker(**fields: object) -> Tensor:
    """ComfyUI's marker of a layer."""
    return torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)


def packed(leaves: Callable[[Tensor], Mapping[str, Tensor]]) -> Callable[[], Made]:
    """Linears in a form that is only named."""
    return lambda: each_linear(lambda value: (leaves(value), value))


def u8(value: Tensor) -> Tensor:
    """Two values a byte."""
    return torch.zeros(value.shape[0], value.shape[1] // 2, dtype=torch.uint8)


def tiles() -> Made:
    """TurboWan -quant."""
    made = tiny.quant(weights("dit_t2v.safetensors"))
    meant = dict(dit())
    for name, value in made.items():
        if name.endswith(".int8_weight"):
            module = name.removesuffix("int8_weight")
            meant[f"{module}weight"] = value.float() * spread(made[f"{module}scale"], value, 128, 128)
    return made, meant


# --- files -------------------------------------------------------------------------------------------------------


def plain() -> Made:
    """The original layout in bfloat16, as the demo has it."""
    return {name: value.bfloat16() for name, value in tiny.wan(dit()).items()}, dit()


def turbo() -> Made:
    """TurboWan's layout with the linear branch."""
    return {name: value.bfloat16() for name, value in weights("dit_t2v.safetensors").items()}, dit()


def named(dialect: str) -> Callable[[], Made]:
    """Other names of the same parameters."""
    return lambda: (tiny.renamed(plain()[0], keymaps.names_from("dit", dialect)), dit())


def under(prefix: str) -> Callable[[], Made]:
    """Names behind a prefix."""
    return lambda: (tiny.prefixed(plain()[0], prefix), dit())


def with_more(**shapes: tuple[int, ...]) -> Callable[[], Made]:
    """The transformer with tensors that ours does not have; `__` stands for a dot."""
    more = {name.replace("__", "."): torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    return lambda: (dict(plain()[0]) | more, dit())


def wrapped(*names: str) -> Callable[[State, Path], None]:
    """torch.save of the state dict in dicts; of several names beside each other only the first holds our numbers."""

    def save(state: State, path: Path) -> None:
        value: object = dict(state)
        for name in reversed(names[0].split("/")):
            value = {name: value}
        for other in names[1:]:
            value |= {other: {name: torch.zeros_like(tensor) for name, tensor in state.items()}}  # type: ignore[operator]
        torch.save(value, path)

    return save


def safetensors(state: State, path: Path) -> None:
    """One safetensors file."""
    save_file({name: value.contiguous() for name, value in state.items()}, path)


def pth(state: State, path: Path) -> None:
    """One torch zip file."""
    torch.save(dict(state), path)


def shards(state: State, path: Path) -> None:
    """A folder of shards and their index."""
    tiny.save_shards({name: value.contiguous() for name, value in state.items()}, path)


def variant_shards(state: State, path: Path) -> None:
    """A folder of shards as diffusers writes them with variant="fp16"."""
    shards(state, path)
    for part in path.iterdir():
        name = part.name.replace(".safetensors.index.json", ".safetensors.index.fp16.json")
        part.rename(part.with_name(name if name != part.name else part.name.replace("-0000", ".fp16-0000", 1)))
    (index,) = path.glob("*.json")
    index.write_text(index.read_text().replace("-0000", ".fp16-0000").replace("-of.fp16-0000", "-of-0000"))


def bin_shards(state: State, path: Path) -> None:
    """A folder of two .bin files and their index, as diffusers wrote before safetensors."""
    path.mkdir()
    names, where = sorted(state), {}
    for place, part in enumerate((names[::2], names[1::2])):
        file = f"diffusion_pytorch_model-0000{place + 1}-of-00002.bin"
        torch.save({name: state[name] for name in part}, path / file)
        where |= dict.fromkeys(part, file)
    (path / "diffusion_pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))


def block_files(state: State, path: Path) -> None:
    """A folder of a file per block and one for the rest, as LightX2V writes it."""
    path.mkdir()
    where = {}
    for name in state:
        block = name.split(".")[1] if name.startswith("blocks.") else ""
        where[name] = f"block_{block}.safetensors" if block else "non_block.safetensors"
    for file in set(where.values()):
        safetensors({name: state[name] for name in state if where[name] == file}, path / file)
    (path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def deepspeed(state: State, path: Path) -> None:
    """mp_rank_00_model_states.pt of DeepSpeed."""
    shapes = OrderedDict((name, tensor.shape) for name, tensor in state.items())
    told = {"param_shapes": [shapes], "ds_version": "0.17.1", "dp_world_size": 8, "buffer_names": [], "optimizer": None}
    torch.save({"module": dict(state), **told}, path)


def lightning(state: State, path: Path) -> None:
    """A checkpoint of Lightning: its own counters and a tensor beside the weights."""
    told = {"epoch": 3, "global_step": 100, "pytorch-lightning_version": "2.5.1", "callbacks": {}, "loops": {"a": {}}}
    torch.save({"seed": torch.tensor(7), "state_dict": dict(state), **told, "lr_schedulers": [{"last": 0.1}]}, path)


def parameters(state: State, path: Path) -> None:
    """dict(model.named_parameters())."""
    torch.save({name: nn.Parameter(tensor, requires_grad=False) for name, tensor in state.items()}, path)


def transformer_engine(state: State, path: Path) -> None:
    """A dump of rCM's training, whose norms are Transformer Engine's: a state of theirs that is no tensor."""
    extra = {f"{name.removesuffix('weight')}_extra_state": io.BytesIO(b"x" * 9) for name in state if ".norm_" in name}
    torch.save({f"net.{name}": value for name, value in (*state.items(), *extra.items())}, path)


def gguf_file(kind: str, patch: str = "orig") -> Callable[[State, Path], None]:
    """A GGUF file with matrices of the blocks in `kind`; the patch convolution with its shape, or in four axes."""

    def save(state: State, path: Path) -> None:
        import gguf

        writer = gguf.GGUFWriter(path, "wan")
        code = gguf.GGMLQuantizationType[kind]
        for name, value in state.items():
            data = value.float().numpy()
            if is_linear(name.removeprefix("model.diffusion_model.")):
                raw = quantised(data, code)
                writer.add_tensor(name, raw, raw_dtype=code)
                continue
            if data.ndim > 4:
                d, c, _, h, w = data.shape
                if patch == "orig":
                    writer.add_array(f"comfy.gguf.orig_shape.{name}", list(data.shape))
                data = data.reshape({"orig": (d, -1), "4-D": (d, c, h, w), "flat": (d * c, 1, h, w)}[patch])
            writer.add_tensor(name, data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    return save


def quantised(data: np.ndarray, code: object) -> np.ndarray:
    """Blocks of a matrix; where the library cannot make a type, the same bytes each time, small enough to be finite."""
    import gguf

    try:
        return gguf.quants.quantize(data, code)
    except NotImplementedError:
        block, nbytes = gguf.GGML_QUANT_SIZES[code]
        shape = (data.shape[0], data.shape[1] // block * nbytes)
        return np.random.default_rng(0).integers(0, 0x30, shape, dtype=np.uint8)


def gguf_made(kind: str) -> Callable[[], Made]:
    """The original layout, and what gguf's own dequantiser makes of its blocks."""

    def make() -> Made:
        import gguf

        code, meant = gguf.GGMLQuantizationType[kind], dict(dit())
        for name, value in meant.items():
            if is_linear(name):
                meant[name] = torch.from_numpy(gguf.quants.dequantize(quantised(value.numpy(), code), code))
        return tiny.wan(dit()), meant

    return make


def component(file: str, dialect: str, dtype: torch.dtype = torch.bfloat16) -> Callable[[], Made]:
    """The demo's VAE or text encoder in a dialect."""
    part = "vae" if file.startswith("vae") else "text_encoder"

    def make() -> Made:
        meant = {name: value.to(dtype).float() for name, value in canonical(file).items()}
        once = {name: value.to(dtype) for name, value in meant.items() if name != "encoder.embed_tokens.weight"}
        return (tiny.renamed(once, keymaps.names_from(part, dialect)) if dialect != "ours" else once), meant

    return make


@cache
def canonical(file: str) -> State:
    """A component of the demo in our names."""
    module = make_module("vae" if file.startswith("vae") else "text_encoder", DEMO / file)
    return {name: value.clone() for name, value in module.state_dict().items()}


def whole_umt5() -> Made:
    """google/umt5-xxl: the decoder is not used."""
    written, meant = component("umt5.safetensors", "ours")()
    return dict(written) | {"lm_head.weight": torch.zeros(4), "decoder.final_layer_norm.weight": torch.zeros(4)}, meant


def umt5_comfy() -> Made:
    """ComfyUI's UMT5: scaled fp8 and the tokenizer inside."""
    written, meant = {}, dict(canonical("umt5.safetensors"))
    for name, value in component("umt5.safetensors", "ours")()[0].items():
        if ".q." in name:
            small = (value.float() / 2).to(E4M3)
            written |= {name: small, name.removesuffix("weight") + "scale_weight": torch.tensor([2.0])}
            meant[name] = small.float() * 2
        else:
            written[name] = value
            meant[name] = value.float()
    meant["encoder.embed_tokens.weight"] = meant["shared.weight"]
    piece = torch.frombuffer(bytearray((DEMO / "spiece.model").read_bytes()), dtype=torch.uint8)
    return written | {"scaled_fp8": torch.zeros(2, dtype=E4M3), "spiece_model": piece}, meant


def small_umt5(dialect: str, small: Callable[[Tensor], tuple[Mapping[str, Tensor], Tensor]]) -> Callable[[], Made]:
    """UMT5 with its linears in other leaves."""

    def make() -> Made:
        written, meant = {}, dict(canonical("umt5.safetensors"))
        back = tiny.inverse(keymaps.names_from("text_encoder", dialect))
        for name, value in component("umt5.safetensors", "ours")()[0].items():
            theirs, ours = (keymaps.rename(name, back) or name).removesuffix(".weight"), name
            meant[ours], leaves = value.float(), {"weight": value}
            if ("SelfAttention." in name and "relative" not in name) or "DenseReluDense" in name:
                leaves, meant[ours] = small(value.float())
            written |= {f"{theirs}.{leaf}": tensor for leaf, tensor in leaves.items()}
        meant["encoder.embed_tokens.weight"] = meant["shared.weight"]
        return written, meant

    return make


def int8_rows(value: Tensor) -> tuple[Mapping[str, Tensor], Tensor]:
    """INT8 with a scale per row."""
    grid = value.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
    small = (value / grid).round().to(torch.int8)
    return {"weight": small, "weight_scale": grid}, small.float() * grid


def umt5_gguf(state: State, path: Path) -> None:
    """city96's UMT5: llama.cpp's names, Q8_0 but for the norms and the bias of positions."""
    import gguf

    writer, code = gguf.GGUFWriter(path, "t5encoder"), gguf.GGMLQuantizationType.Q8_0
    for name, value in state.items():
        data = value.float().numpy()
        plain = data.ndim < 2 or "rel_b" in name
        writer.add_tensor(name, data if plain else quantised(data, code), raw_dtype=None if plain else code)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def umt5_q8() -> Made:
    """llama.cpp's names, and what gguf's own dequantiser makes of Q8_0."""
    import gguf

    code, meant = gguf.GGMLQuantizationType.Q8_0, dict(canonical("umt5.safetensors"))
    for name, value in meant.items():
        if value.ndim == 2 and "relative" not in name:
            meant[name] = torch.from_numpy(gguf.quants.dequantize(quantised(value.numpy(), code), code))
    return component("umt5.safetensors", "llama.cpp", torch.float32)()[0], meant


def all_in_one() -> Made:
    """A checkpoint of ComfyUI: transformer, VAE and text encoder in one file."""
    vae, text = component("vae.safetensors", "wan")()[0], component("umt5.safetensors", "ours")()[0]
    parts = (("model.diffusion_model.", plain()[0]), ("vae.", vae), ("text_encoders.umt5xxl.transformer.", text))
    return {k: v for prefix, state in parts for k, v in tiny.prefixed(state, prefix).items()}, dit()


def mixed() -> Made:
    """Kijai's fp8_scaled: what is no linear of a block in float32."""
    written, meant = scaled(E4M3, 0, 0, "scale_weight", shape="flat")()
    written = {name: value.float() if value.dtype == torch.bfloat16 else value for name, value in written.items()}
    return written | {"scaled_fp8": torch.zeros(0, dtype=E4M3)}, meant


def comfy_2025() -> Made:
    """ComfyUI's fp8_scaled before its markers: an empty tensor says that there are scales."""
    one = {"scale_input": torch.tensor(1.0)}
    written, meant = scaled(E4M3, 0, 0, "scale_weight", shape="one", more=one)()
    written = dict(written) | {"scaled_fp8": torch.zeros(2, dtype=E4M3)}
    return tiny.prefixed(written, "model.diffusion_model."), meant


def block_scaled() -> Made:
    """musubi-tuner's fp8: groups of 64 columns, the scale [o, groups, 1]."""
    written, meant = scaled(E4M3, 1, 64, "scale_weight")()
    return {k: v[..., None] if k.endswith("scale_weight") else v for k, v in written.items()}, meant


def beside(*, leaf: str = "", whole: Mapping[str, tuple[int, ...]] | None = None) -> Callable[[], Made]:
    """The transformer with tensors that say nothing: a leaf beside each norm of q and k, or whole names."""

    def make() -> Made:
        more = {name: torch.zeros(shape) for name, shape in (whole or {}).items()}
        norms = [name for name in plain()[0] if ".norm_" in name] if leaf else []
        more |= {f"{name.removesuffix('weight')}{leaf}": torch.zeros(4, dtype=torch.uint8) for name in norms}
        return dict(plain()[0]) | more, dit()

    return make


def raw(data: bytes) -> Callable[[State, Path], None]:
    """A file of these bytes."""
    return lambda _state, path: path.write_bytes(data) and None


def archive(change: Callable[[bytearray], None]) -> Callable[[State, Path], None]:
    """A torch zip whose bytes were changed."""

    def save(state: State, path: Path) -> None:
        buffer = io.BytesIO()
        torch.save({"w": torch.zeros(2)}, buffer)
        data = bytearray(buffer.getvalue())
        change(data)
        path.write_bytes(data)

    return save


def encrypt(data: bytearray) -> None:
    """Set the flag of every member in the directory."""
    at = data.find(b"PK\1\2")
    while at >= 0:
        data[at + 8] |= 1
        at = data.find(b"PK\1\2", at + 4)


def truncated(state: State, path: Path) -> None:
    """The first two thirds of a file."""
    safetensors(state, path)
    os.truncate(path, path.stat().st_size * 2 // 3)


def unfinished(state: State, path: Path) -> None:
    """What aria2 leaves: a valid header, zeros, and its own file beside it."""
    safetensors(state, path)
    path.with_name(path.name + ".aria2").write_bytes(b"\0\1")


def only(**shapes: tuple[int, ...]) -> Callable[[], Made]:
    """A file of other tensors; `__` stands for a dot."""
    return lambda: ({name.replace("__", "."): torch.zeros(shape) for name, shape in shapes.items()}, {})


def nothing() -> Made:
    """No tensors."""
    return {}, {}


def fun_control() -> Made:
    """More input channels."""
    state = dict(plain()[0])
    state["patch_embedding.weight"] = torch.zeros(256, 48, 1, 2, 2, dtype=torch.bfloat16)
    return state, {}


def zip_of(**members: bytes) -> Callable[[State, Path], None]:
    """A zip of these members, stored."""

    def save(_state: State, path: Path) -> None:
        with zipfile.ZipFile(path, "w") as made:
            for name, data in members.items():
                made.writestr(name.replace("__", "/").replace("_pkl", ".pkl"), data)

    return save


def pipe(_state: State, path: Path) -> None:
    """A pipe without a writer."""
    os.mkfifo(path)


@dataclass(frozen=True)
class Format:
    """One row: how it is made and written, the file's name, and "" where it loads or the code of the reason."""

    name: str
    make: Callable[[], Made]
    save: Callable[[State, Path], None] = safetensors
    file: str = "a.safetensors"
    code: str = ""


def loading() -> Iterator[Format]:
    """Formats of the transformer that load."""
    yield Format("Wan-AI .pth", plain, pth, "a.pth")
    yield Format("Wan-AI safetensors", plain)
    yield Format("ending .sft", plain, file="a.sft")
    yield Format("ending .SAFETENSORS", plain, file="A.SAFETENSORS")
    for kind, dtype in (("float16", torch.float16), ("float32", torch.float32), ("float64", torch.float64)):
        yield Format(f"{kind}", cast(dtype))
    yield Format("TurboWan .pth", turbo, pth, "a.pth")
    yield Format("TurboWan safetensors", turbo)
    yield Format("TurboWan -quant .pth", tiles, pth, "a.pth")
    yield Format("TurboWan -quant safetensors", tiles)
    yield Format(
        "INT8 tiles in diffusers' names", lambda: (tiny.diffusers_quant(weights("dit_t2v.safetensors")), tiles()[1])
    )
    for name in (
        "state_dict", "model", "module", "generator", "generator_ema", "net", "ema", "model_state_dict",
        "model/state_dict", "student", "weights_of_somebody",
    ):  # fmt: skip
        yield Format(f".pth in {name}", plain, wrapped(name), "a.pth")
    yield Format(".pth in generator_ema beside generator", plain, wrapped("generator_ema", "generator"), "a.pt")
    for prefix in (
        "net.", "net_ema.", "model.diffusion_model.", "diffusion_model.", "model.", "module.", "transformer.",
        "pipe.dit.", "_orig_mod.", "model._fsdp_wrapped_module.", "net_ema._checkpoint_wrapped_module.",
    ):  # fmt: skip
        yield Format(f"prefix {prefix}", under(prefix))
    yield Format("diffusers", named("diffusers"))
    yield Format("diffusers shards", named("diffusers"), shards, "transformer")
    yield Format("FastVideo's names", named("fastvideo"))
    yield Format("fp8 e4m3, cast", cast_linears(E4M3))
    yield Format("fp8 e5m2, cast", cast_linears(E5M2))
    for leaf in ("scale_weight", "weight_scale"):
        yield Format(f"fp8 scaled, {leaf}", scaled(E4M3, 0, 0, leaf, shape="one"))
        yield Format(f"fp8 scaled by row, {leaf} [o]", scaled(E4M3, 1, 0, leaf, shape="flat"))
        yield Format(f"fp8 scaled by row, {leaf} [o, 1]", scaled(E4M3, 1, 0, leaf))
    yield Format("fp8 e5m2 scaled", scaled(E5M2, 0, 0, "scale_weight", shape="flat", top=57344.0))
    yield Format("fp8 in blocks of 128, weight_scale_inv", scaled(E4M3, 128, 128, "weight_scale_inv"))
    yield Format("fp8 in blocks of 64, weight_scale", scaled(E4M3, 64, 64, "weight_scale"))
    yield Format("fp8 in groups of 32 columns", scaled(E4M3, 1, 32, "weight_scale"))
    fp8_marked = {"comfy_quant": marker(format="float8_e4m3fn"), "input_scale": torch.tensor(1.0)}
    yield Format("fp8 with ComfyUI's markers", scaled(E4M3, 0, 0, "weight_scale", shape="one", more=fp8_marked))
    yield Format("INT8 by row, LightX2V", scaled(torch.int8, 1, 0, "weight_scale", top=127.0))
    int8_marked = {"comfy_quant": marker(format="int8_tensorwise")}
    yield Format(
        "INT8, ComfyUI (one scale)", scaled(torch.int8, 0, 0, "weight_scale", shape="one", top=127.0, more=int8_marked)
    )
    yield Format("INT8 by row, ComfyUI", scaled(torch.int8, 1, 0, "weight_scale", top=127.0, more=int8_marked))
    yield Format("INT8 in blocks of 64", scaled(torch.int8, 64, 64, "weight_scale", top=127.0))
    yield Format(
        "INT8, optimum-quanto",
        scaled(
            torch.int8, 1, 0, "weight._scale", weight="weight._data", top=127.0,
            more={"input_scale": torch.tensor(1.0), "output_scale": torch.tensor(1.0)},
        ),
    )  # fmt: skip
    yield Format("fp8, optimum-quanto", scaled(E4M3, 1, 0, "weight._scale", weight="weight._data"))
    bnb = {"weight_format": torch.zeros(1, dtype=torch.uint8)}
    yield Format(
        "INT8, bitsandbytes", scaled(torch.int8, 1, 0, "SCB", shape="flat", top=127.0, times=1 / 127, more=bnb)
    )
    kinds = """F16 Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS
        IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S TQ1_0 TQ2_0 MXFP4"""
    for kind in kinds.split():
        yield Format(f"GGUF {kind}", gguf_made(kind), gguf_file(kind), "a.gguf")
    yield Format("GGUF, patch embedding [d, C, 2, 2]", gguf_made("Q8_0"), gguf_file("Q8_0", "4-D"), "a.gguf")
    yield Format("GGUF, patch embedding [d * C, 1, 2, 2]", gguf_made("Q8_0"), gguf_file("Q8_0", "flat"), "a.gguf")


def cast_linears(dtype: torch.dtype) -> Callable[[], Made]:
    """Linears in a small dtype without a scale."""
    return lambda: each_linear(lambda value: ({"weight": value.to(dtype)}, value.to(dtype).float()))


def more_loading() -> Iterator[Format]:
    """Formats of the transformer as trainers and repackers write them."""
    yield Format("rCM dump with Transformer Engine's state", plain, transformer_engine, "a.pt")
    yield Format("Transformer Engine's state as bytes", beside(leaf="_extra_state"))
    yield Format("DeepSpeed, mp_rank_00_model_states.pt", plain, deepspeed, "mp_rank_00_model_states.pt")
    yield Format("Lightning .ckpt, pipe.dit.", under("pipe.dit."), lightning, "a.ckpt")
    yield Format(".pth of parameters", plain, parameters, "a.pth")
    yield Format("Self-Forcing dump", under("model._fsdp_wrapped_module."), wrapped("generator_ema", "critic"), "a.pt")
    yield Format("diffusers with its tables of RoPE", lambda: (
        dict(named("diffusers")()[0]) | {f"rope.freqs_{x}": torch.zeros(8, 128) for x in ("cos", "sin")}, dit()
    ))  # fmt: skip
    yield Format("diffusers shards, variant fp16", named("diffusers"), variant_shards, "transformer")
    yield Format("diffusers shards, .bin", named("diffusers"), bin_shards, "transformer")
    yield Format("LightX2V, a file per block", plain, block_files, "distill_model")
    yield Format("all in one, ComfyUI", all_in_one)
    yield Format("fp8 e4m3, norms and biases, too", cast(E4M3))
    yield Format("fp8 scaled, ComfyUI before its markers", comfy_2025)
    yield Format("fp8 scaled beside float32, Kijai", mixed)
    yield Format("fp8 in groups of 64 columns, scale [o, n, 1]", block_scaled)
    yield Format("GGUF BF16", gguf_made("BF16"), gguf_file("BF16"), "a.gguf")
    yield Format("GGUF Q8_0, stable-diffusion.cpp", lambda: (
        tiny.prefixed(gguf_made("Q8_0")()[0], "model.diffusion_model."), gguf_made("Q8_0")()[1]
    ), gguf_file("Q8_0"), "a.gguf")  # fmt: skip


def components() -> Iterator[Format]:
    """The VAE and the text encoder."""
    for file, dialects in (("vae.safetensors", ("wan", "ours")), ("umt5.safetensors", ("wan", "ours", "llama.cpp"))):
        what = "VAE" if file.startswith("vae") else "UMT5"
        for dialect in dialects:
            theirs = {"ours": "diffusers" if what == "VAE" else "transformers", "wan": "Wan-AI"}.get(dialect, dialect)
            yield Format(f"{what}, {theirs} .pth", component(file, dialect), pth, "a.pth")
            yield Format(f"{what}, {theirs} float32", component(file, dialect, torch.float32))
        yield Format(f"{what}, diffusers shards", component(file, "ours"), shards, what.lower())
    yield Format("UMT5, ComfyUI fp8 with its tokenizer", umt5_comfy)
    yield Format("UMT5 with its decoder", whole_umt5)
    for kind, small in (("INT8", int8_rows), ("fp8", lambda w: ({"weight": w.to(E4M3)}, w.to(E4M3).float()))):
        yield Format(f"UMT5, Wan-AI's names in {kind}", small_umt5("wan", small), pth, "a.pth")
    yield Format("UMT5, GGUF Q8_0", umt5_q8, umt5_gguf, "a.gguf")
    yield Format("VAE float16", component("vae.safetensors", "wan", torch.float16))
    for prefix in ("model.", "first_stage_model.", "vae."):
        yield Format(f"VAE, prefix {prefix}", lambda prefix=prefix: (
            tiny.prefixed(component("vae.safetensors", "wan")()[0], prefix), component("vae.safetensors", "wan")()[1]
        ))  # fmt: skip


def refused() -> Iterator[Format]:
    """Files that no model uses, each with its reason."""
    code = "format_unsupported"
    yield Format(
        "nvfp4", packed(lambda w: {
            "weight": u8(w), "weight_scale": torch.zeros(w.shape[0], w.shape[1] // 16).to(E4M3),
            "weight_scale_2": torch.tensor(1.0),
        }), code=code,
    )  # fmt: skip
    yield Format(
        "mxfp8", packed(lambda w: {
            "weight": w.to(E4M3), "weight_scale": torch.zeros(w.shape[0], w.shape[1] // 32, dtype=torch.uint8),
        }), code=code,
    )  # fmt: skip
    yield Format(
        "mxfp4", packed(lambda w: {
            "weight": u8(w), "weight_scale": torch.zeros(w.shape[0], w.shape[1] // 32, dtype=torch.uint8),
        }), code=code,
    )  # fmt: skip
    for kind in ("nf4", "fp4"):
        yield Format(
            f"bitsandbytes {kind}", packed(lambda w, kind=kind: {
                "weight": torch.zeros(w.numel() // 2, 1, dtype=torch.uint8),
                "weight.absmax": torch.zeros(w.numel() // 64),
                "weight.quant_map": torch.zeros(16),
                f"weight.quant_state.bitsandbytes__{kind}": torch.zeros(9, dtype=torch.uint8),
            }), code=code,
        )  # fmt: skip
    yield Format(
        "Nunchaku int4", packed(lambda w: {
            "qweight": u8(w).to(torch.int8), "wscales": torch.zeros(w.shape[1] // 64, w.shape[0]),
            "smooth_factor": torch.zeros(w.shape[1]),
        }), code=code,
    )  # fmt: skip
    yield Format(
        "GPTQ int4", packed(lambda w: {
            "qweight": torch.zeros(w.shape[1] // 8, w.shape[0], dtype=torch.int32),
            "qzeros": torch.zeros(1, w.shape[0] // 8, dtype=torch.int32), "scales": torch.zeros(1, w.shape[0]),
        }), code=code,
    )  # fmt: skip
    yield Format(
        "optimum-quanto int4", packed(lambda w: {
            "weight._data": u8(w), "weight._scale": torch.zeros(w.shape[0], 1),
            "weight._shift": torch.zeros(w.shape[0], 1),
        }), code=code,
    )  # fmt: skip
    yield Format("compressed-tensors int4", packed(lambda w: {"weight_packed": u8(w).int()}), code=code)
    yield Format("HQQ", packed(lambda w: {"W_q": u8(w), "scale": torch.ones(w.shape[0], 1)}), code=code)
    yield Format("INT8 with zero points", scaled(
        torch.int8, 1, 0, "weight_scale", top=127.0, more={"weight_zero_point": torch.zeros(1, dtype=torch.int8)}
    ), code=code)  # fmt: skip
    rotated = {"comfy_quant": marker(format="int8_tensorwise", convrot=True, convrot_groupsize=256)}
    yield Format("INT8 rotated (ConvRot)", scaled(torch.int8, 1, 0, "weight_scale", top=127.0, more=rotated), code=code)
    yield Format("INT8 without a scale", packed(lambda w: {"weight": w.to(torch.int8)}), code=code)
    yield Format("INT8 with scales that do not fit", packed(
        lambda w: {"weight": w.to(torch.int8), "weight_scale": torch.ones(7, 1)}), code=code)  # fmt: skip
    yield Format("Wan VACE", with_more(vace_blocks__0__norm3__weight=(256,)), code="key_unexpected")
    yield Format("a piece of Wan2.1 I2V", with_more(
        blocks__0__cross_attn__k_img__weight=(256, 256)), code="key_unexpected")  # fmt: skip
    yield Format("Wan2.1 FLF2V", with_more(img_emb__emb_pos=(1, 514, 1280)), code="key_unexpected")
    yield Format("Wan-S2V", with_more(casual_audio_encoder__weights=(1, 4)), code="key_unexpected")
    yield Format("Wan-Animate", with_more(face_adapter__fuser_blocks__0__q_norm__weight=(4,)), code="key_unexpected")
    yield Format("SkyReels-V2, diffusion forcing", with_more(
        fps_embedding__weight=(2, 256), fps_projection__0__weight=(256, 256)), code="key_unexpected")  # fmt: skip
    yield Format("UniAnimate", with_more(dwpose_embedding__0__weight=(4,)), code="key_unexpected")
    yield Format("all in one with VACE", lambda: (
        tiny.prefixed(with_more(vace_blocks__0__norm3__weight=(256,))()[0], "model.diffusion_model."), {}
    ), code="key_unexpected")  # fmt: skip
    yield Format("FastWan with gates", with_more(
        blocks__0__self_attn__to_gate_compress__weight=(256, 256)), code="key_unexpected")  # fmt: skip
    yield Format("Wan Fun-Control", fun_control, code="no_model")
    yield Format("the VAE of Wan2.2 TI2V-5B", only(
        encoder__downsamples__0__downsamples__0__residual__0__gamma=(4,)), code="file_foreign")  # fmt: skip
    yield Format("TAEHV", only(decoder__1__conv__0__weight=(4,), encoder__0__weight=(4,)), code="file_foreign")
    yield Format("a LoRA", only(diffusion_model__blocks__0__self_attn__q__lora_A__weight=(2, 2)), code="file_foreign")
    yield Format("FLUX", only(double_blocks__0__img_attn__qkv__weight=(2, 2)), code="file_foreign")
    yield Format("Stable Diffusion", only(
        model__diffusion_model__input_blocks__0__0__weight=(2, 2)), code="file_foreign")  # fmt: skip
    yield Format("a language model", only(model__layers__0__mlp__up_proj__weight=(2, 2)), code="file_foreign")
    yield Format("CLIP, open-clip", only(visual__transformer__resblocks__0__ln_1__weight=(2,)), code="file_foreign")
    yield Format("a web page", nothing, raw(b"<!doctype html><p>not found"), code="file_foreign")
    yield Format("a Git LFS pointer", nothing, raw(
        b"version https://git-lfs.github.com/spec/v1\nsize 1\n"), code="file_foreign")  # fmt: skip
    yield Format("an empty file", nothing, raw(b""), code="file_truncated")
    yield Format("a bare pickle", nothing, raw(pickle.dumps({"a": 1}, 2) + bytes(9)), "a.pth", "file_foreign")
    yield Format("a pickle that calls", nothing, zip_of(a__data_pkl=b"cos\nsystem\n(Vls\ntR."), "a.pth", "file_unsafe")
    yield Format("an encrypted zip", nothing, archive(encrypt), "a.pth", "file_foreign")
    yield Format("another zip", nothing, zip_of(readme=b"x"), "a.pth", "file_foreign")
    yield Format("two thirds of a file", plain, truncated, code="file_truncated")
    yield Format("a download of aria2", plain, unfinished, code="file_unfinished")
    yield Format("a pipe", nothing, pipe, "a.pth", "file_foreign")
    head = struct.pack("<Q", 64 << 20) + b"{" + bytes(20)
    yield Format("a header of 64 MB", nothing, raw(head), code="file_foreign")
    many = b"GGUF" + struct.pack("<IQQ", 3, 1 << 20, 0) + bytes(64)
    yield Format("GGUF of a million tensors", nothing, raw(many), "a.gguf", "file_bomb")


FORMATS = {row.name: row for rows in (loading, more_loading, components, refused) for row in rows()}


def make_module(part: str, path: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The demo's network with the numbers of a file."""
    spec = find_model("demo")
    checkpoint = open_checkpoint(path)
    with torch.device("meta"):
        if part == "vae":
            module: nn.Module = make_vae(**spec.vae.model_dump())
        elif part == "text_encoder":
            module = make_text_encoder(spec.text_encoder)
        else:
            module = WanDiT(dit_config(spec, quant_linear=checkpoint.quant))
    return load_into(module, checkpoint, dtype=dtype).module


def look(folder: Path) -> tuple[tuple[FoundFile, ...], tuple[PassedOver, ...]]:
    """What the search says of a folder, for the demo alone."""
    found = locate.inventory([folder])
    here = [file for file in found.files if Path(file.path).is_relative_to(folder) and file.model == "demo"]
    return tuple(here), tuple(one for one in found.passed_over if Path(one.path).is_relative_to(folder))


def numbers(module: nn.Module) -> dict[str, Tensor]:
    """Its parameters in our names, INT8 tiles multiplied out."""
    state = dict(module.state_dict())
    for name in [name for name in state if name.endswith(".int8_weight")]:
        stem = name.removesuffix("int8_weight")
        weight = state.pop(name)
        state[f"{stem}weight"] = weight.float() * spread(state.pop(f"{stem}scale"), weight, 128, 128)
    return {name: value.float() for name, value in state.items()}


def row(format_: Format, folder: Path) -> tuple[str, str, str]:
    """(recognised, loads, difference or sentence) of one format; raises where what loads is not what was meant."""
    written, meant = format_.make()
    format_.save(written, folder / format_.file)
    files, passed_over = look(folder)
    if format_.code:
        assert not files and len(passed_over) == 1, (files, passed_over)
        (one,) = passed_over
        assert one.code == format_.code, one
        told = {"field": Path(one.path).name, "got": one.got, "expected": one.expected.replace(str(folder), "")}
        return "named", "no", Words("en").or_else(f"error.{one.code}", one.what, **told).replace("\n", " ")
    networks = [file for file in files if file.component != "tokenizer"]
    assert len(networks) == 1 and not passed_over, (files, passed_over)
    (file,) = networks
    loaded = numbers(make_module(file.component, Path(file.path)))
    reference = (
        canonical(f"{'vae' if file.component == 'vae' else 'umt5'}.safetensors") if file.component != "dit" else dit()
    )
    assert loaded.keys() == meant.keys()
    for name, value in loaded.items():
        assert torch.equal(value, meant[name]), (name, (value - meant[name]).abs().max())
    greatest = max(
        float((value - reference[name]).abs().max() / reference[name].abs().max().clamp_min(1e-30))
        for name, value in loaded.items()
    )
    return f"{file.component} {file.layout}", "yes", f"{greatest:.0e}" if greatest else "0"


@contextlib.contextmanager
def lone_demo() -> Iterator[Path]:
    """An empty folder, and a search that finds neither the bundle nor a cache."""
    folder = Path(tempfile.mkdtemp())
    bundled, locate.bundled_root = locate.bundled_root, lambda: folder / "none"
    try:
        yield folder
    finally:
        locate.bundled_root = bundled
        shutil.rmtree(folder, ignore_errors=True)


def table() -> str:
    """formats.md."""
    lines = [
        "# Formats of weights, tried on the demo's own", "",
        "Made by `python -m tests.weights.formats` from `tests/weights/formats.py`; a test compares the two.",
        "Difference: the greatest of any parameter to the demo's, relative to the greatest value of that parameter.",
        "What loads is equal, number by number, to what the file stands for. Types that the GGUF library cannot write",
        "(K and IQ) hold bytes made up for the test, so only the equality says something there.", "",
        "| format | recognised as | loads | difference, or what a person reads |", "|---|---|---|---|",
    ]  # fmt: skip
    for name, format_ in FORMATS.items():
        with lone_demo() as folder:
            lines.append(f"| {name} | {' | '.join(part.replace('|', '/') for part in row(format_, folder))} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    TABLE.write_text(table(), "utf-8")
    sys.stdout.write(f"{len(FORMATS)} formats in {TABLE}\n")
