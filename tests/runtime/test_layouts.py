"""The demo's own weights in every layout that people have: the same clip, or one clear error and exit code 2."""

import hashlib
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.test_tiny import PROMPT, attempt
from tests.weights import tiny
from turbodiff.runtime import pipeline
from turbodiff.runtime.device import Device
from turbodiff.runtime.model_cache import ModelCache
from turbodiff.weights import keymaps, locate

BUNDLE = locate.bundled_root()
LAYOUTS = {
    "turbowan.safetensors": (dict, tiny.save_safetensors, "dit_t2v.safetensors"),
    "turbowan.pth": (dict, tiny.save_pth, "dit_t2v.pth"),
    "wan.pth": (tiny.wan, tiny.save_pth, "wan.pth"),
    "net. dump": (lambda state: tiny.prefixed(state, "net."), tiny.save_pth, "dump.pt"),
    "comfy": (lambda state: tiny.prefixed(tiny.wan(state), "diffusion_model."), tiny.save_safetensors, "c.safetensors"),
    "diffusers": (tiny.diffusers, tiny.save_safetensors, "d.safetensors"),
    "diffusers shards": (tiny.diffusers, tiny.save_shards, "transformer"),
    "fastvideo": (
        lambda state: tiny.renamed(state, keymaps.names_from("dit", "fastvideo")), tiny.save_safetensors,
        "f.safetensors",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def dit():
    return {name: value.float() for name, value in load_file(BUNDLE / "dit_t2v.safetensors").items()}


def rounded(state, to_fewer_bits):
    """The same network with every matrix of its blocks after a way through fewer bits."""
    fits = lambda name, value: name.startswith("blocks.") and value.ndim == 2 and ".proj_l." not in name  # noqa: E731
    return {name: to_fewer_bits(value) if fits(name, value) else value for name, value in state.items()}


def through_fp8(value):
    return (value / 0.5).to(torch.float8_e4m3fn).float() * 0.5


def through_q8(value):
    blocks = np.frombuffer(tiny.q8_0(value), np.dtype([("scale", "<f2"), ("numbers", "i1", 32)]))
    scale = torch.from_numpy(blocks["scale"].astype(np.float32))[:, None]
    return (scale * torch.from_numpy(blocks["numbers"].astype(np.float32))).view(value.shape)


# layouts that round: (file, and the plain file of the same numbers)
ROUNDING = {
    "comfy fp8": (
        (tiny.fp8, tiny.save_safetensors, "c.safetensors"),
        (lambda state: rounded(state, through_fp8), tiny.save_pth, "dit_t2v.pth"),
    ),
    "gguf": (
        (tiny.wan, tiny.save_gguf, "g.gguf"),
        (lambda state: rounded(state, through_q8), tiny.save_pth, "dit_t2v.pth"),
    ),
    "int8": (
        (tiny.diffusers_quant, tiny.save_safetensors, "d-quant.safetensors"),
        (tiny.quant, tiny.save_pth, "dit_t2v-quant.pth"),
    ),
}  # fmt: skip


def bundle_with(dit, layout, folder):
    change, save, name = layout
    folder.mkdir(parents=True)
    for file in ("vae.safetensors", "umt5.safetensors", "spiece.model"):
        shutil.copy(BUNDLE / file, folder / file)
    return save(change(dit), folder / name)


def frames_of_a_clip(tmp_path, monkeypatch):
    sent = hashlib.sha256()
    decode = pipeline.decode

    def tapped(attempt, latents):
        for frames in decode(attempt, latents):
            sent.update(np.ascontiguousarray(frames))
            yield frames

    monkeypatch.setattr(pipeline, "decode", tapped)
    pipeline.generate(attempt(tmp_path, ModelCache(Device.pick("cpu")), steps=1, num_frames=5, sampler="sde"))
    return sent.hexdigest()


def clip_of(dit, layout, folder, monkeypatch):
    """The frames' hash of a short clip of these weights in this layout, with the rest of the bundle beside them.

    The sampler is pinned: plain layouts lack what tells that weights are distilled.
    """
    with monkeypatch.context() as patch:
        patch.setattr(locate, "bundled_root", lambda: folder / "bundle")
        bundle_with(dit, layout, folder / "bundle")
        return frames_of_a_clip(folder, patch)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The clip of the bundle as it is."""
    with pytest.MonkeyPatch.context() as patch:
        return frames_of_a_clip(tmp_path_factory.mktemp("published"), patch)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_weights_in_any_layout_make_the_same_clip(layout, dit, published, tmp_path, monkeypatch):
    assert clip_of(dit, LAYOUTS[layout], tmp_path, monkeypatch) == published


@pytest.mark.parametrize("layout", ROUNDING)
def test_a_layout_that_rounds_makes_the_clip_of_the_rounded_numbers(layout, dit, published, tmp_path, monkeypatch):
    if layout == "gguf":
        pytest.importorskip("gguf")
    clips = [clip_of(dit, way, tmp_path / str(i), monkeypatch) for i, way in enumerate(ROUNDING[layout])]
    assert clips[0] == clips[1] != published


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def garbage(path):
    with path.open("r+b") as file:
        file.write(b"\xff" * 64)


def drop_a_key(path):
    state = load_file(path)
    del state["blocks.1.ffn.0.bias"]
    tiny.save_safetensors(state, path)


def wrong_shape(path):
    state = load_file(path)
    state["blocks.1.ffn.0.bias"] = torch.zeros(3)
    tiny.save_safetensors(state, path)


def wrong_dtype(path):
    state = load_file(path)
    state["blocks.1.ffn.0.bias"] = state["blocks.1.ffn.0.bias"].to(torch.int32)
    tiny.save_safetensors(state, path)


@pytest.mark.parametrize("damage", [truncate, garbage, drop_a_key, wrong_shape, wrong_dtype])
def test_a_damaged_checkpoint_is_one_line_that_names_the_file(damage, tmp_path):
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    for file in BUNDLE.iterdir():
        if file.is_file():
            shutil.copy(file, checkpoints / file.name)
    damage(checkpoints / "dit_t2v.safetensors")
    code = "import sys\nfrom pathlib import Path\nfrom turbodiff.weights import locate\n" \
        "locate.bundled_root = lambda: Path('checkpoints')\nfrom turbodiff.cli import main\nmain()\n"  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code, "generate", PROMPT, "-o", "out.mp4"],
        cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "TURBODIFF_MODELS": str(checkpoints)},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error:") == 1 and "dit_t2v.safetensors" in done.stderr
    assert "weights of" not in done.stderr or damage is wrong_shape
    assert not (tmp_path / "out.mp4").exists()
