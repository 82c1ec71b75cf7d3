"""Whole stages of a clip against diffusers', and against TurboDiffusion's where its sources are given.

    scripts/bench_pipeline.py --stage dit                       one step of Wan 1.3B at 480p, 81 frames
    scripts/bench_pipeline.py --stage dit --model 14b --size 720p --blocks 8
    scripts/bench_pipeline.py --stage vae --size 720p           latents of a clip to frames
    scripts/bench_pipeline.py --stage text                      a prompt to 512 rows
    scripts/bench_pipeline.py --stage dit --turbodiffusion PATH PATH is the folder turbodiffusion/ of its checkout

Random weights at real shapes, contenders interleaved in one process; run it alone on the card. rel-L2 is the distance
to the same network in float32; with random weights that of sparse attention says how much it leaves out, not how good
its clips are. FLOP are those of dense attention, so rates compare times. `--blocks` takes the first blocks only: a step
is their time times the share. Without a GPU nothing is measured, and the script says so; --dry runs every contender
at toy size on any device.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from scripts import bench_timing  # noqa: E402
from scripts.bench_timing import Job  # noqa: E402
from turbodiff.models import vae as vae_driver  # noqa: E402
from turbodiff.models import vae_modules  # noqa: E402
from turbodiff.models.attention import AttentionPlan, rope_tables  # noqa: E402
from turbodiff.models.linear import int8_blocks  # noqa: E402
from turbodiff.models.patches import PATCH  # noqa: E402
from turbodiff.models.text_encoder import encode, make_text_encoder  # noqa: E402
from turbodiff.models.wan_dit import CrossAttentionCache, WanConfig, WanDiT  # noqa: E402
from turbodiff.weights.keymaps import names_from, rename  # noqa: E402

TOPK = 0.1
STAGES = ("dit", "vae", "text")
PROMPT_TOKENS = 120  # a long prompt; the rest of the 512 rows is zeros
DIFFUSERS_LAYOUT = {ours: theirs for theirs, ours in names_from("dit", "diffusers").items()}
Latent = tuple[int, int, int]  # frames, rows, columns of the latents


class Text(NamedTuple):
    """Sizes of a text encoder, as `TextFacts` names them; without pydantic, so that a bare machine can run this."""

    dim: int
    dim_attn: int
    dim_ffn: int
    num_heads: int
    num_layers: int
    vocab: int
    num_buckets: int = 32
    max_distance: int = 128


class Scale(NamedTuple):
    """Sizes of the networks and of the clip."""

    name: str
    dit: WanConfig
    vae_dim: int
    text: Text
    latent: Latent


UMT5_XXL = Text(dim=4096, dim_attn=4096, dim_ffn=10240, num_heads=64, num_layers=24, vocab=256384)
MODELS = {
    "1.3b": WanConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, sla=True),
    "14b": WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, sla=True),
}
LATENTS = {"480p": (21, 60, 104), "720p": (21, 90, 160)}  # 81 frames, 16:9
TINY = Scale(
    "toy",
    WanConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=2, text_dim=48, sla=True),
    8,
    Text(dim=32, dim_attn=32, dim_ffn=48, num_heads=4, num_layers=2, vocab=300),
    (2, 8, 10),
)


def scale_of(options: argparse.Namespace) -> Scale:
    """What the flags ask for."""
    if options.dry:
        return TINY
    config = MODELS[options.model]
    blocks = options.blocks or config.num_layers
    name = f"{options.model} {options.size}" + (f", {blocks} of {config.num_layers} blocks" if options.blocks else "")
    return Scale(name, WanConfig(**{**vars(config), "num_layers": blocks}), 96, UMT5_XXL, LATENTS[options.size])


class Bench:
    """The three stages at one scale on one device; a network is made when its contender first runs."""

    def __init__(self, scale: Scale, device: torch.device, turbodiffusion: str | None) -> None:
        self.scale, self.device, self.turbodiffusion = scale, device, turbodiffusion
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.random = torch.Generator(device).manual_seed(0)

    def randn(self, *shape: int) -> Tensor:
        """Normal numbers: zeros would run faster than clips do."""
        return torch.randn(shape, generator=self.random, device=self.device)

    def made(self, make: Callable[[], nn.Module]) -> Any:
        """A network with random weights on the device."""
        torch.manual_seed(0)
        with self.device:
            return make().eval().requires_grad_(False).to(self.dtype)

    def dit(self) -> Job:
        """One step of the denoiser."""
        config, (frames, rows, columns) = self.scale.dit, self.scale.latent
        model = self.made(lambda: WanDiT(config))
        given = self.randn(1, 16, frames, rows, columns), torch.full((1, 1), 700.0, device=self.device)
        text = self.randn(1, 512, config.text_dim).to(self.dtype)
        tiles = cache(lambda: int8_blocks(copy.deepcopy(model), "tiles"))
        fast = cache(lambda: int8_blocks(copy.deepcopy(model), "tokens"))
        contenders = {"diffusers": lambda: theirs()(given[0].to(self.dtype), given[1].flatten(), text).sample}
        theirs = cache(partial(_diffusers_dit, model))
        for kind in ("dense", "sage", "sla", "sagesla"):
            contenders[f"turbodiff {kind}"] = Step(lambda: model, given, text, kind)
        contenders["turbodiff sagesla, tiles"] = Step(tiles, given, text, "sagesla")
        contenders["turbodiff sagesla, tokens"] = Step(fast, given, text, "sagesla")
        if self.turbodiffusion:
            for kind in ("original", "sla", "sagesla"):
                contenders[f"TurboDiffusion {kind}"] = _turbodiffusion(self.turbodiffusion, model, given, text, kind)
        return Job(
            f"{self.scale.name} step",
            contenders,
            flop=step_flop(config, frames * rows * columns // (PATCH[1] * PATCH[2])),
            expected=lambda: copy.deepcopy(model).float()(*given, text.float()),
        )

    def vae(self) -> Job:
        """Latents of a whole clip to frames of bytes' range, diffusers' way and ours."""
        vae = self.made(lambda: vae_driver.make_vae(self.scale.vae_dim))
        latents = self.randn(1, 16, *self.scale.latent)
        pair = (vae_modules.LATENTS_MEAN, vae_modules.LATENTS_STD)
        mean, std = (torch.tensor(values, device=self.device).view(1, -1, 1, 1, 1) for values in pair)
        made = cache(partial(diffusers_vae, vae))

        def theirs(module: Any = None) -> Tensor:
            module = module or made()
            return module.decode((latents * std + mean).to(module.dtype)).sample

        return Job(
            f"VAE decode {self.scale.name}",
            {
                "diffusers": theirs,
                "turbodiff": lambda: vae_driver.decode(vae, latents).clamp(-1, 1),
                "turbodiff, tiled": lambda: vae_driver.decode(vae, latents, tile=32).clamp(-1, 1),
            },
            traffic_bytes=3.0 * vae_frames(self.scale.latent),
            expected=lambda: theirs(copy.deepcopy(made()).float()),
        )

    def text(self) -> Job:
        """A prompt of PROMPT_TOKENS tokens to 512 rows: all rows computed and masked, or only the prompt's."""
        facts = self.scale.text
        model = self.made(lambda: make_text_encoder(facts))
        ids = torch.randint(3, facts.vocab, (1, 512), generator=self.random, device=self.device)
        mask = (torch.arange(512, device=self.device) < PROMPT_TOKENS).long()[None]
        short = ids[:, :PROMPT_TOKENS], mask[:, :PROMPT_TOKENS]
        width, inner = facts.dim, facts.dim_attn
        flop = 2.0 * PROMPT_TOKENS * facts.num_layers * (4 * width * inner + 3 * width * facts.dim_ffn)
        return Job(
            f"UMT5 {self.scale.name}",
            {"512 rows": lambda: encode(model, ids, mask), "turbodiff": lambda: encode(model, *short)},
            flop=flop,
            expected=lambda: encode(copy.deepcopy(model).float(), ids, mask),
        )


class Step:
    """One step as the runtime takes it: text and rotary tables of the clip are there already."""

    def __init__(self, model: Callable[[], WanDiT], given: tuple[Tensor, Tensor], text: Tensor, kind: str) -> None:
        self._model, self._given, self._text = model, given, text
        self._plan, self._clip = AttentionPlan(kind, TOPK), None  # type: ignore[arg-type]

    def __call__(self) -> Tensor:
        """Velocity, float32."""
        model = self._model()
        if self._clip is None:
            grid = [size // patch for size, patch in zip(self._given[0].shape[2:], PATCH, strict=True)]
            rope = rope_tables(*grid, model.config.head_dim, device=self._text.device)
            self._clip = {"context": CrossAttentionCache(model.embed_text(self._text)), "rope": rope}
        x, inputs = model.prepare(*self._given, attention=self._plan, **self._clip)
        for index, block in enumerate(model.blocks):
            x = block(x, inputs, index)
        return model.finish(x, inputs)


def _diffusers_dit(model: WanDiT) -> nn.Module:
    """diffusers' transformer on the very same weights."""
    from diffusers import WanTransformer3DModel

    c = model.config
    with torch.device("meta"):
        theirs = WanTransformer3DModel(
            num_attention_heads=c.num_heads, attention_head_dim=c.head_dim, in_channels=c.in_dim, text_dim=c.text_dim,
            ffn_dim=c.ffn_dim, num_layers=c.num_layers, cross_attn_norm=True,
        ).eval()  # fmt: skip
    state = {rename(k, DIFFUSERS_LAYOUT): v for k, v in model.state_dict().items() if "proj_l" not in k}
    state["patch_embedding.weight"] = state["patch_embedding.weight"].view(theirs.patch_embedding.weight.shape)
    theirs.load_state_dict(state, assign=True)
    theirs.rope = type(theirs.rope)(c.head_dim, (1, 2, 2), 1024).to(next(model.parameters()).device)
    return theirs.requires_grad_(False)


def diffusers_vae(vae: Any) -> Any:
    """diffusers' VAE on the very same weights, of the usual depth."""
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        theirs: Any = AutoencoderKLWan(base_dim=vae.encoder.conv_in.out_channels).eval().requires_grad_(False)
    theirs.load_state_dict(vae.state_dict(), assign=True)
    return theirs


def _turbodiffusion(path: str, model: WanDiT, given: tuple, text: Tensor, kind: str) -> Callable[[], Tensor]:
    """TurboDiffusion's own network on the same weights, 16 bits; what it lacks here becomes the contender's error.

    Its attention modules are put in place by hand, because its helper for that needs its compiled extension.
    """

    @cache
    def theirs() -> Any:
        sys.path.insert(0, path)
        from rcm.networks import wan2pt1  # type: ignore[import-not-found]

        if getattr(wan2pt1, "flash_apply_rotary_emb", None) is None:
            wan2pt1.flash_apply_rotary_emb = _rotary
        c = model.config
        net = wan2pt1.WanModel(
            dim=c.dim, eps=c.eps, ffn_dim=c.ffn_dim, freq_dim=c.freq_dim, in_dim=c.in_dim, model_type="t2v",
            num_heads=c.num_heads, num_layers=c.num_layers, out_dim=c.out_dim, text_dim=c.text_dim, text_len=512,
        )  # fmt: skip
        for layer in [module for module in net.modules() if type(module) is wan2pt1.WanSelfAttention]:
            if kind != "original":
                layer.attn_op.local_attn = _their_attention(kind, c.head_dim)
        missing, _ = net.load_state_dict(model.state_dict(), strict=False)
        assert not missing, missing[:3]
        return net.to(text.device, text.dtype).eval().requires_grad_(False)

    latents, timesteps = given[0].to(text.dtype), given[1].to(text.dtype)
    return lambda: theirs()(x_B_C_T_H_W=latents, timesteps_B_T=timesteps, crossattn_emb=text)


def _their_attention(kind: str, head_dim: int) -> nn.Module:
    import SLA  # type: ignore[import-not-found]

    if kind == "sagesla":
        return SLA.SageSparseLinearAttention(head_dim=head_dim, topk=TOPK)
    return SLA.SparseLinearAttention(head_dim=head_dim, topk=TOPK, BLKQ=128, BLKK=64)


def _rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = True, inplace: bool = False) -> Tensor:
    """What flash-attn's rotary does, where it is not installed: interleaved pairs of x [B, L, H, D]."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def step_flop(config: WanConfig, tokens: int, text_rows: int = 512) -> float:
    """Multiplications and additions of one step with dense attention; norms and embeddings left out."""
    d, f = config.dim, config.ffn_dim
    products = 2 * tokens * (6 * d * d + 2 * d * f) + 4 * text_rows * d * d
    return float(config.num_layers * (products + 4 * tokens**2 * d + 4 * tokens * text_rows * d))


def vae_frames(latent: Latent) -> float:
    """Pixels of the frames that the latents become."""
    from turbodiff.spec.shapes import SPACE_STRIDE, pixel_frames

    return float(pixel_frames(latent[0]) * latent[1] * latent[2] * SPACE_STRIDE**2)


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = bench_timing.flags(__doc__ or "", rounds=10)
    parser.add_argument("--stage", choices=STAGES, action="append")
    parser.add_argument("--model", choices=MODELS, default="1.3b")
    parser.add_argument("--size", choices=LATENTS, default="480p")
    parser.add_argument("--blocks", type=int, help="only the first blocks of the transformer")
    options = parser.parse_args(argv)
    with torch.inference_mode():
        return bench_timing.run("pipeline", options, partial(jobs, options))


def jobs(options: argparse.Namespace, device: torch.device) -> Iterator[Job]:
    """Every stage asked for."""
    bench = Bench(scale_of(options), device, options.turbodiffusion)
    for stage in options.stage or STAGES:
        yield getattr(bench, stage)()


if __name__ == "__main__":
    sys.exit(main())
