"""Whether a checkpoint fills a network: names, shapes and kinds of numbers, from its header alone. No torch.

The search asks with the shapes of `network_shapes`, the loader with those of the module itself; a test holds that the
two are the same, so what is listed loads.
"""

import math
from collections.abc import Iterator, Mapping
from functools import lru_cache

from turbodiff.spec.errors import FileError
from turbodiff.spec.models import ModelSpec, TextFacts, VaeFacts
from turbodiff.spec.shapes import INT8_TILE, LIGHT_VAE_DIM, PATCH, TINY_VAE_WIDTHS
from turbodiff.weights import keymaps
from turbodiff.weights.detect import Checkpoint
from turbodiff.weights.forms import FLOATS
from turbodiff.weights.headers import GGUF_PREFIX, bad_file
from turbodiff.weights.kinds import other_kind

LINEAR_BRANCH = ".proj_l."  # may be missing (plain Wan) or unwanted (dense attention)
Shapes = Mapping[str, tuple[int, ...]]


def misfit(checkpoint: Checkpoint, wanted: Shapes) -> FileError | None:
    """What keeps a checkpoint from filling a network with these parameters, or None; names the first key at fault."""
    return _names_misfit(checkpoint, wanted) or next(
        (error for name, shape in wanted.items() if (error := _tensor_misfit(checkpoint, name, shape))), None
    )


def _names_misfit(checkpoint: Checkpoint, wanted: Shapes) -> FileError | None:
    what, code = "tensors are missing", "key_missing"
    names = [name for name in wanted if name not in checkpoint.sources and LINEAR_BRANCH not in name]
    if not names:
        what, code = "tensors without a place in this model", "key_unexpected"
        names = [source.stored for name, source in checkpoint.sources.items() if name not in wanted]
        names = [name for name in names if LINEAR_BRANCH not in name] + list(checkpoint.unknown)
    if not names:
        return None
    looks = other_kind(names)
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return bad_file(
        checkpoint.header.path, what + (f": this looks like {looks}" if looks else ""), code=code, key=names[0] + more,
        got=looks or f"{names[0][:80]}{more}" if code == "key_unexpected" else f"layout {checkpoint.layout}",
        expected="exactly the tensors of this model" if code == "key_unexpected" else names[0],
    )  # fmt: skip


def _tensor_misfit(checkpoint: Checkpoint, name: str, wanted: tuple[int, ...]) -> FileError | None:
    """Axes of size one do not count, and a patch convolution [d, C, 1, 2, 2] is as good as the matrix [d, 4C]."""
    source = checkpoint.sources.get(name)
    if source is None:
        return None
    info, path = checkpoint.info(name), checkpoint.header.path
    same = [size for size in info.shape if size != 1] == [size for size in wanted if size != 1]
    if len(info.shape) > 2 and len(wanted) == 2:
        # GGUF of some converters: the patch convolution as [d, C, 2, 2] or [d * C, 1, 2, 2], in the same order
        same |= math.prod(info.shape) == math.prod(wanted) and info.shape[0] % max(wanted[0], 1) == 0
    if not same:
        return bad_file(
            path, "a tensor of another shape", code="key_shape", key=source.stored, got=list(info.shape),
            expected=list(wanted),
        )  # fmt: skip
    if name.endswith(".int8_weight") or source.scale:
        return None  # weights/forms.py has seen these and their scales
    if info.dtype.startswith(GGUF_PREFIX) or info.dtype in FLOATS:
        return None
    return bad_file(
        path, "a tensor of another dtype", code="key_dtype", key=source.stored, got=info.dtype,
        expected="F32, BF16, F16 or F8",
    )  # fmt: skip


@lru_cache(64)
def network_shapes(spec: ModelSpec, component: str, quant: bool, sla: bool) -> Shapes:
    """Every parameter of a component of a model with its shape, as our modules have them."""
    if component in ("vae", "light_vae"):
        base = spec.vae.base_dim if component == "vae" else LIGHT_VAE_DIM
        return dict(_vae_shapes(spec.vae.model_copy(update={"base_dim": base})))
    if component == "tiny_vae":
        width, *narrower = TINY_VAE_WIDTHS
        parts = [*_conv("decoder.1", width, spec.vae.z_dim, (3, 3))]
        for stage, out in enumerate(narrower):
            first = 3 + 6 * stage
            for block in range(first, first + 3):
                for place in (0, 2, 4):
                    parts += _conv(f"decoder.{block}.conv.{place}", width, width * (1 if place else 2), (3, 3))
            parts.append((f"decoder.{first + 4}.conv.weight", (width * (2 if stage else 1), width, 1, 1)))
            parts.append((f"decoder.{first + 5}.weight", (out, width, 3, 3)))
            width = out
        return dict([*parts, *_conv("decoder.22", 3, width, (3, 3))])
    if component == "text_encoder":
        return dict(_text_shapes(spec.text_encoder))
    if component == "image_encoder" and (clip := spec.image_encoder):
        d, patch = clip.dim, clip.patch
        wide: Shapes = {
            "mlp.fc1": (clip.dim_ffn, d), "mlp.fc2": (d, clip.dim_ffn),
            "embeddings.position_embedding": (clip.tokens, d), "embeddings.patch_embedding": (d, 3, patch, patch),
        }  # fmt: skip
        shapes = {}
        for name in keymaps.parameter_names("image_encoder", clip.num_layers):
            module, _, leaf = name.rpartition(".")
            short = module.split(".", 3)[-1] if module.startswith("encoder.layers.") else module
            shape = wide.get(short, (d, d) if short.endswith("_proj") else (d,))
            shapes[name] = shape if leaf == "weight" else shape[:1]
        return shapes
    return dict(_dit_shapes(spec, quant, sla))


def _dit_shapes(spec: ModelSpec, quant: bool, sla: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    facts, d = spec.dit, spec.dit.dim
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embedding": (d, facts.in_dim * PATCH**2), "text_embedding.0": (d, spec.text_encoder.dim),
        "time_embedding.0": (d, facts.freq_dim), "time_projection.1": (6 * d, d),
        "head.head": (facts.out_dim * PATCH**2, d), "head.modulation": (1, 2, d), "modulation": (1, 6, d),
        "self_attn.attn_op.local_attn.proj_l": (facts.head_dim, facts.head_dim),
        "ffn.0": (facts.ffn_dim, d), "ffn.2": (d, facts.ffn_dim),
        "img_emb.proj.0": (facts.image_dim,), "img_emb.proj.1": (facts.image_dim, facts.image_dim),
        "img_emb.proj.3": (d, facts.image_dim), "img_emb.proj.4": (d,),
    }  # fmt: skip
    kinds = {"quant": quant, "sla": sla, "picture": facts.image_dim > 0}
    for name in keymaps.parameter_names("dit", facts.num_layers, **kinds):
        module, _, leaf = name.rpartition(".")
        key = name if name.endswith("modulation") else module
        key = key.split(".", 2)[2] if key.startswith("blocks.") else key
        one = ".norm" in name
        shape = shapes.get(key, (d,) if one else (d, d))
        if leaf == "bias":
            shape = shape[:1]
        elif leaf == "scale":
            shape = tuple(-(-size // INT8_TILE) for size in shape)
        yield name, shape


def _text_shapes(facts: TextFacts) -> Iterator[tuple[str, tuple[int, ...]]]:
    d, attn, ffn = facts.dim, facts.dim_attn, facts.dim_ffn
    shapes = {
        "q": (attn, d), "k": (attn, d), "v": (attn, d), "o": (d, attn), "wi_0": (ffn, d), "wi_1": (ffn, d),
        "wo": (d, ffn), "relative_attention_bias": (facts.num_buckets, facts.num_heads), "shared": (facts.vocab, d),
        "embed_tokens": (facts.vocab, d),
    }  # fmt: skip
    for name in keymaps.parameter_names("text_encoder", facts.num_layers):
        yield name, shapes.get(name.split(".")[-2], (d,))


def _vae_shapes(facts: VaeFacts) -> Iterator[tuple[str, tuple[int, ...]]]:
    """diffusers' AutoencoderKLWan: convolutions [out, in, time, rows, columns], RMS norms [channels, 1, 1, 1]."""
    widths = [facts.base_dim * mult for mult in facts.dim_mult]
    last = len(widths) - 1
    yield from _conv("encoder.conv_in", facts.base_dim, 3)
    width, place = facts.base_dim, 0
    for stage, wide in enumerate(widths):
        for _ in range(facts.num_res_blocks):
            yield from _residual(f"encoder.down_blocks.{place}", width, wide)
            width, place = wide, place + 1
        if stage < last:
            yield from _resample(f"encoder.down_blocks.{place}", width, width, width if stage else 0)
            place += 1
    yield from _middle("encoder", width)
    yield "encoder.norm_out.gamma", (width, 1, 1, 1)
    yield from _conv("encoder.conv_out", 2 * facts.z_dim, width)
    yield from _conv("quant_conv", 2 * facts.z_dim, 2 * facts.z_dim, (1, 1, 1))
    yield from _conv("post_quant_conv", facts.z_dim, facts.z_dim, (1, 1, 1))
    yield from _conv("decoder.conv_in", width, facts.z_dim)
    yield from _middle("decoder", width)
    for stage, wide in enumerate(reversed(widths)):
        for place in range(facts.num_res_blocks + 1):
            yield from _residual(f"decoder.up_blocks.{stage}.resnets.{place}", width, wide)
            width = wide
        if stage < last:
            yield from _resample(
                f"decoder.up_blocks.{stage}.upsamplers.0", width, width // 2, 2 * width if stage < last - 1 else 0
            )
            width //= 2
    yield "decoder.norm_out.gamma", (width, 1, 1, 1)
    yield from _conv("decoder.conv_out", 3, width)


def _conv(
    name: str, out: int, width: int, kernel: tuple[int, ...] = (3, 3, 3)
) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (out, width, *kernel)
    yield f"{name}.bias", (out,)


def _residual(name: str, width: int, out: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.norm1.gamma", (width, 1, 1, 1)
    yield from _conv(f"{name}.conv1", out, width)
    yield f"{name}.norm2.gamma", (out, 1, 1, 1)
    yield from _conv(f"{name}.conv2", out, out)
    if width != out:
        yield from _conv(f"{name}.conv_shortcut", out, width, (1, 1, 1))


def _resample(name: str, width: int, out: int, in_time: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """`in_time`: channels that leave the convolution in time; 0 where there is none."""
    yield from _conv(f"{name}.resample.1", out, width, (3, 3))
    if in_time:
        yield from _conv(f"{name}.time_conv", in_time, width, (3, 1, 1))


def _middle(half: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for place in range(2):
        yield from _residual(f"{half}.mid_block.resnets.{place}", width, width)
    attention = f"{half}.mid_block.attentions.0"
    yield f"{attention}.norm.gamma", (width, 1, 1)
    yield from _conv(f"{attention}.to_qkv", 3 * width, width, (1, 1))
    yield from _conv(f"{attention}.proj", width, width, (1, 1))
