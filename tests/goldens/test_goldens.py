"""Every reference file in $TURBODIFF_GOLDENS (default: the copies beside this test) agrees with our functions.

A file is recognised by its tensors, never by its name; sizes and settings come from the JSON under the metadata key
`config`. To add one, put it into the folder.
"""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from turbodiff_kernels import backend, quant
from turbodiff_kernels.quant.reference import dequantize_tiles
from turbodiff_kernels.sla import reference as sla

from turbodiff.models import vae as vae_driver
from turbodiff.models.attention import AttentionPlan
from turbodiff.models.linear import Int8Linear
from turbodiff.models.text_encoder import encode, make_text_encoder
from turbodiff.models.wan_dit import WanConfig, WanDiT
from turbodiff.sampling.conditioning import Noise
from turbodiff.sampling.rcm import sample
from turbodiff.sampling.samplers import timesteps as schedule
from turbodiff.spec.models import TextFacts
from turbodiff.weights.keymaps import names_from, rename

pytestmark = pytest.mark.goldens

FOLDER = Path(os.environ.get("TURBODIFF_GOLDENS") or Path(__file__).parent / "data")
FILES = sorted(FOLDER.glob("*.safetensors"))

Tensors = dict[str, Tensor]


class Golden:
    """One reference file: its settings, and its tensors by group."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            self.config = json.loads((file.metadata() or {}).get("config", "{}"))
            self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 not a dict
        self.weights, self.inputs, self.outputs = (self.group(name) for name in ("weights", "inputs", "outputs"))

    def group(self, name: str) -> Tensors:
        return {key[len(name) + 1 :]: value for key, value in self.tensors.items() if key.startswith(f"{name}.")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_golden(path):
    golden = Golden(path)
    with torch.no_grad():
        check_for(golden)(golden)


def test_there_is_something_to_check():
    assert FILES, f"no *.safetensors in {FOLDER}"


def check_for(golden: Golden) -> Callable[[Golden], None]:
    if "cases" in golden.config:
        return check_rcm
    marks = {
        "patch_embedding.weight": check_dit,
        "proj_l.weight": check_sla,
        "int8_weight": check_int8,
        "token_embedding.weight": check_umt5,
        "decoder.conv1.weight": check_vae,
    }
    found = [check for mark, check in marks.items() if mark in golden.weights]
    assert len(found) == 1, f"unknown kind of reference file: {sorted(golden.tensors)[:8]}"
    return found[0]


def check_dit(golden: Golden) -> None:
    sizes = {key: value for key, value in golden.config.items() if key in WanConfig.__dataclass_fields__}
    sizes |= {"sla": any("proj_l" in name for name in golden.weights)}
    model = WanDiT(WanConfig(**sizes))
    model.load_state_dict(golden.weights)
    given = golden.inputs
    plan = AttentionPlan(golden.config.get("attention", "dense"), golden.config.get("topk", 0.1))
    velocity = model(given["latents"], given["timesteps"], given["text"], given.get("condition"), attention=plan)
    assert velocity.dtype == torch.float32
    assert furthest(velocity, golden.outputs["velocity"]) < 1e-4


def check_sla(golden: Golden) -> None:
    q, k, v = (golden.inputs[name] for name in "qkv")
    topk, block_q, block_k = (golden.config[name] for name in ("topk", "block_q", "block_k"))
    assert torch.equal(block_map(q, k, topk, block_q, block_k), golden.outputs["block_map"].to(torch.int8))
    proj_l = golden.weights["proj_l.weight"], golden.weights["proj_l.bias"]
    out = sla.sla_attention(q, k, v, *proj_l, topk, blocks=(block_q, block_k))
    assert relative(out, golden.outputs["out"]) < 2e-3
    if (block_q, block_k) == (sla.BLOCK_Q, sla.BLOCK_K):
        module = backend.kernel_module("sla", q.device) or sla
        assert relative(module.sla_attention(q, k, v, *proj_l, topk, False), golden.outputs["out"]) < 2e-3


def block_map(q: Tensor, k: Tensor, topk: float, block_q: int = sla.BLOCK_Q, block_k: int = sla.BLOCK_K) -> Tensor:
    """int8 [B, H, ceil(L / block_q), ceil(L / block_k)]: 1 where a block of queries keeps a block of keys."""
    means = sla._block_means(q, block_q), sla._block_means(k - k.mean(dim=1, keepdim=True), block_k)
    kept = sla.choose_blocks(*means, topk)
    return torch.zeros(*kept.shape[:3], -(-k.shape[1] // block_k), dtype=torch.int8).scatter_(-1, kept, 1)


def check_int8(golden: Golden) -> None:
    x, weights = golden.inputs["x"], golden.weights
    x8, scale = quant.quantize_tiles(x)
    assert torch.equal(x8, golden.outputs["x_int8"])
    assert torch.equal(scale, golden.outputs["x_scale"])
    layer = Int8Linear(x.shape[1], len(weights["int8_weight"]))
    layer.load_state_dict({name: weights[name] for name in layer.state_dict() if name in weights}, strict=False)
    assert relative(layer(x.float()), golden.outputs["y"]) < 1e-3
    if "original" in weights:
        w8, w_scale = quant.quantize_tiles(weights["original"])
        assert torch.equal(w8, weights["int8_weight"]) and torch.equal(w_scale, weights["scale"])
        step = weights["scale"].max().item()
        assert furthest(dequantize_tiles(w8, w_scale), weights["original"].float()) <= step * 1.001


def check_rcm(golden: Golden) -> None:
    for case in golden.config["cases"]:
        want = golden.group(case["key"])
        timesteps = schedule("sde", case["steps"], case["sigma_max"])
        assert furthest(timesteps, want["timesteps"]) < 1e-12, case
        shape = tuple(want["noise"].shape)
        assert torch.equal(Noise(case["seed"], shape)(), want["noise"]), case
        sampler = "ode" if case["ode"] else "sde"
        *_, last = sample(published_velocity, Noise(case["seed"], shape), timesteps, sampler)
        assert furthest(last.latents, want["result"].double()) < 1e-5, case


def published_velocity(x: Tensor, t: float) -> Tensor:
    """The stand-in for a network that the reference run used."""
    return 0.7 * torch.tanh(x) + 0.1 * t - 0.3 * torch.roll(x, 1, -1)


def check_umt5(golden: Golden) -> None:
    facts = TextFacts(**{key: value for key, value in golden.config.items() if key in TextFacts.model_fields})
    model = make_text_encoder(facts)
    table = names_from("text_encoder", "wan")
    missing, unexpected = model.load_state_dict(
        {rename(name, table): value for name, value in golden.weights.items()}, strict=False
    )
    assert set(missing) <= {"encoder.embed_tokens.weight"} and not unexpected
    ids, mask, want = golden.inputs["ids"], golden.inputs["mask"], golden.outputs["hidden"]
    assert furthest(encode(model, ids, mask, want.shape[1]), want) < 1e-4
    longest = int(mask.sum(1).max())
    assert furthest(encode(model, ids[:, :longest], mask[:, :longest], want.shape[1]), want) < 1e-4


@pytest.mark.filterwarnings("ignore")
def check_vae(golden: Golden) -> None:
    config = golden.config
    vae = vae_driver.make_vae(config["dim"], config["z_dim"], tuple(config["dim_mult"]), config["num_res_blocks"])
    table = names_from("vae", "wan")
    vae.load_state_dict({rename(name, table): value for name, value in golden.weights.items()})
    assert furthest(vae_driver.encode(vae, golden.inputs["video"]), golden.outputs["latents"]) < 1e-3
    assert furthest(vae_driver.decode(vae, golden.inputs["latents"]), golden.outputs["video"]) < 1e-3
    side = max(2, math.ceil(golden.inputs["latents"].shape[-1] / 2))
    tiled = vae_driver.decode(vae, golden.inputs["latents"], tile=side)
    assert furthest(tiled, golden.outputs["video"]) < 1e-3


def furthest(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape, (got.shape, want.shape)
    return (got.double() - want.double()).abs().max().item()


def relative(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape, (got.shape, want.shape)
    return ((got.double() - want.double()).norm() / want.double().norm()).item()
