"""The Wan2.1 VAE: diffusers' modules and weights, our own way through them.

Both directions are causal in time, so both run as a stream: the decoder takes one latent frame at a time, the encoder
one frame and then four at a time, and every temporal convolution remembers its last two input frames. The result is
the same as for the whole clip at once, and so is the result of tiling: what looks at the whole picture (the middle
block's attention) runs on the whole picture, only the convolutions around it run in tiles, whose margin is wider than
what the convolutions carry across.

Frames travel as [t, C, H, W], one sample of the batch at a time, in channels-last memory order: matrix units read it
without a transposition, and norm and SiLU are one pass over it.
"""

from collections.abc import Iterable, Iterator
from itertools import product
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from turbodiff_kernels import backend
from turbodiff_kernels.norm import rms_norm_silu

from turbodiff.models.attention import attention
from turbodiff.models.parallel import SequenceParallel
from turbodiff.plan.torch_compat import conv3d_is_broken
from turbodiff.spec.shapes import DECODER_MARGINS, ENCODER_MARGIN, SPACE_STRIDE, TIME_STRIDE, is_frame_count

DiffusersModule: TypeAlias = Any  # a part of AutoencoderKLWan: to a type checker its attributes are Tensor | Module
Vae: TypeAlias = DiffusersModule  # AutoencoderKLWan itself, imported where it is made: that takes over a second
ConvMethod = Literal["auto", "conv3d", "conv2d"]


def make_vae(base_dim: int, z_dim: int = 16, dim_mult: tuple[int, ...] = (1, 2, 4, 4), num_res_blocks: int = 2) -> Vae:
    """diffusers' VAE of these sizes with random weights; base_dim 96 is the published one."""
    from diffusers import AutoencoderKLWan

    vae: Vae = AutoencoderKLWan(base_dim=base_dim, z_dim=z_dim, dim_mult=list(dim_mult), num_res_blocks=num_res_blocks)
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def encode(
    vae: Vae, video: Tensor, *, tile: int | None = None, conv: ConvMethod = "auto",
    parallel: SequenceParallel | None = None,
) -> Tensor:  # fmt: skip
    """Video [B, 3, F, H, W] in [-1, 1], F = 1, 5, 9, ... -> normalised mean latents, float32 [B, 16, T, H/8, W/8].

    tile: side of a tile in latent pixels, None for the whole picture. conv: see `prefers_conv2d`. parallel: every rank
    encodes a strip of the columns, and gets the latents of all of them.
    """
    assert is_frame_count(video.shape[2]), video.shape
    video = video.to(vae.dtype)
    chunks = [1] + [TIME_STRIDE] * ((video.shape[2] - 1) // TIME_STRIDE)
    height, width = (size // SPACE_STRIDE for size in video.shape[3:])
    means = []
    for frames in video.transpose(1, 2):
        columns = parallel.columns(width) if parallel else range(width)
        features = video.new_empty(len(chunks), vae.encoder.conv_out.in_channels, height, len(columns))
        for part in _tiles(height, width, tile, columns):
            stream = _Stream(vae, conv)
            tile_frames = frames[:, :, *part.read(ENCODER_MARGIN, SPACE_STRIDE)]
            rows, across = part.read(0)
            here = slice(across.start - columns.start, across.stop - columns.start)
            for feature, chunk in zip(features.split(1), tile_frames.split(chunks), strict=True):
                x = stream.down(vae.encoder, chunk)
                feature[:, :, rows, here] = x[:, :, *part.crop(ENCODER_MARGIN, 0)]
        stream = _Stream(vae, conv)  # what the last tile remembered is of no use
        if parallel:
            features = parallel.gather_columns(features, width)
        moments = [stream.encoder_end(vae, feature) for feature in features.split(1)]
        means.append(torch.cat(moments).chunk(2, dim=1)[0])
    latents = torch.stack(means).transpose(1, 2).float()
    mean, std = _latent_statistics(vae, latents)
    return (latents - mean) / std


@torch.no_grad()
def decode_stream(
    vae: Vae, latents: Tensor, *, tile: int | None = None, conv: ConvMethod = "auto", columns: range | None = None
) -> Iterator[Tensor]:
    """Normalised latents [B, 16, T, h, w] -> T chunks of frames [B, 3, 1 or 4, 8h, 8w] in the dtype of the VAE.

    The range is about [-1, 1], not clamped: `frames_to_uint8` does that. The first chunk is one frame, the others
    four. Whole (tile None): each chunk is computed when it is asked for. Tiled: tile after tile is decoded over all
    its frames, so that only one tile's memory of past frames exists; the frames gather in one canvas and are handed
    out at the end. `columns`: of latent pixels, of which the frames are made, with the numbers that they have in the
    whole picture; None: all.
    """
    mean, std = _latent_statistics(vae, latents)
    z = (latents.float() * std + mean).to(vae.dtype)
    streams = [_decode_one(vae, sample.transpose(0, 1), tile, conv, columns or range(z.shape[-1])) for sample in z]
    for parts in zip(*streams, strict=True):
        yield torch.stack(parts).transpose(1, 2)


def decode(vae: Vae, latents: Tensor, *, tile: int | None = None, conv: ConvMethod = "auto") -> Tensor:
    """All chunks of `decode_stream` as one video [B, 3, F, H, W]."""
    return torch.cat(list(decode_stream(vae, latents, tile=tile, conv=conv)), dim=2)


def frames_to_uint8(frames: Tensor) -> Tensor:
    """Frames [B, 3, t, H, W] in [-1, 1] -> uint8 [B, t, H, W, 3], rounded half up (TurboDiffusion)."""
    return frames.float().add(1).mul(127.5).add(0.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 4, 1)


def prefers_conv2d(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a 3-D convolution runs better as a sum of 2-D ones.

    On a CPU it is several times faster. On CUDA it avoids torch 2.9 and 2.10 with cuDNN < 9.15, which compute
    half-precision conv3d on a fallback of many times the memory (pytorch issues 166643, 177406).
    """
    if device.type != "cuda":
        return True
    cudnn = torch.backends.cudnn.version() or 1  # torch's own fallback, without cuDNN, is as hungry as an old one
    return dtype != torch.float32 and conv3d_is_broken(torch.__version__, cudnn)


def _latent_statistics(vae: Vae, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each latent channel over the training set, float32 [16, 1, 1, 1] (Wan2.1)."""
    pair = (vae.config["latents_mean"], vae.config["latents_std"])
    mean, std = (torch.tensor(values, dtype=torch.float32, device=like.device).view(-1, 1, 1, 1) for values in pair)
    return mean, std


def _decode_one(vae: Vae, z: Tensor, side: int | None, conv: ConvMethod, columns: range) -> Iterable[Tensor]:
    """Latents [T, 16, h, w], not normalised -> T chunks [1 or 4, 3, 8h, 8 * columns].

    Tiled: from one canvas. Beside it nothing of the work is left when they are handed out.
    """
    stream, features = _Stream(vae, conv), _Stream(vae, conv).decoder_features(vae, z)
    height, width = z.shape[2:]
    tiles = _tiles(height, width, side, columns)
    if side is None:
        if len(columns) == width:
            return (stream.up(vae.decoder, feature) for feature in features)
        (strip,) = tiles
        read = strip.read(DECODER_MARGINS[0])
        return (stream.up(vae.decoder, feature[:, :, *read], strip) for feature in features)
    whole = torch.cat(list(features))
    chunks = [1] + [TIME_STRIDE] * (len(z) - 1)
    canvas = z.new_empty(sum(chunks), 3, height * SPACE_STRIDE, len(columns) * SPACE_STRIDE)
    for tile in tiles:
        stream = _Stream(vae, conv)
        tile_features = whole[:, :, *tile.read(DECODER_MARGINS[0])]
        for into, feature in zip(canvas.split(chunks), tile_features.split(1), strict=True):
            rows, across = tile.read(0, SPACE_STRIDE)
            left = columns.start * SPACE_STRIDE
            into[:, :, rows, across.start - left : across.stop - left] = stream.up(vae.decoder, feature, tile)
    parts: tuple[Tensor, ...] = canvas.split(chunks)
    return parts


class _Span(NamedTuple):
    """Rows or columns start..stop of `size`, in latent pixels."""

    start: int
    stop: int
    size: int

    def read(self, margin: int, scale: int) -> slice:
        """The span with its margin, cut at the picture's edge, in pixels of 1 / scale."""
        return slice(max(0, self.start - margin) * scale, min(self.size, self.stop + margin) * scale)

    def crop(self, have: int, want: int, scale: int) -> slice:
        """Where the span with margin `want` lies within the span with margin `have`."""
        outer, inner = self.read(have, scale), self.read(want, scale)
        return slice(inner.start - outer.start, inner.stop - outer.start)


class _Tile(NamedTuple):
    """A rectangle of the picture."""

    rows: _Span
    columns: _Span

    def read(self, margin: int, scale: int = 1) -> list[slice]:
        """`_Span.read` of rows and columns."""
        return [span.read(margin, scale) for span in self]

    def crop(self, have: int, want: int, scale: int = 1) -> list[slice]:
        """`_Span.crop` of rows and columns."""
        return [span.crop(have, want, scale) for span in self]


def _tiles(height: int, width: int, side: int | None, columns: range) -> list[_Tile]:
    """Tiles of at most `side` latent pixels that cover these columns of the picture; one tile when side is None."""
    rows, across = (
        [_Span(start, min(start + step, part.stop), size) for start in range(part.start, part.stop, step)]
        for part, size, step in ((range(height), height, side or height), (columns, width, side or width))
    )
    return [_Tile(*pair) for pair in product(rows, across)]


class _Stream:
    """One causal pass: how frames go through the modules, and what the temporal convolutions remember of the past."""

    def __init__(self, vae: Vae, conv: ConvMethod) -> None:
        self._conv2d = prefers_conv2d(vae.device, vae.dtype) if conv == "auto" else conv == "conv2d"
        self._past: dict[nn.Module, list[Tensor]] = {}  # at most two frames [1, C, H, W] each, latest last

    def decoder_features(self, vae: Vae, z: Tensor) -> Iterator[Tensor]:
        """Latents [T, 16, h, w] -> T times features [1, C, h, w]: what must see the whole picture."""
        for latent in z.split(1):
            decoder, latent = vae.decoder, self._conv(vae.post_quant_conv, latent)
            yield self._middle(decoder.mid_block, self._conv(decoder.conv_in, latent))

    def up(self, decoder: DiffusersModule, x: Tensor, tile: _Tile | None = None) -> Tensor:
        """Features of one latent frame -> one frame (the first) or four, [t, 3, 8h, 8w].

        With a tile, x has the first of DECODER_MARGINS around it, and the frames have none. The last block works at
        full size and does not change the time, so it takes one frame at a time.
        """
        *blocks, last = decoder.up_blocks
        for i, block in enumerate(blocks):
            for resnet in block.resnets:
                x = self._residual(resnet, x)
            x = self._upsample(block.upsamplers[0], x)
            if tile:
                x = x[:, :, *tile.crop(DECODER_MARGINS[i], DECODER_MARGINS[i + 1], 2 ** (i + 1))]
        frames = []
        for frame in x.split(1):
            for resnet in last.resnets:
                frame = self._residual(resnet, frame)
            frames.append(self._conv(decoder.conv_out, _norm_silu(decoder.norm_out, frame)))
        x = torch.cat(frames)
        return x[:, :, *tile.crop(DECODER_MARGINS[-1], 0, SPACE_STRIDE)] if tile else x

    def down(self, encoder: DiffusersModule, chunk: Tensor) -> Tensor:
        """One frame (the first) or four [t, 3, H, W] -> features of one latent frame [1, C, h, w].

        Up to the first layer that works on time, one frame at a time.
        """
        layers = list(encoder.down_blocks)
        in_time = next(i for i, layer in enumerate(layers) if hasattr(layer, "time_conv"))
        frames = []
        for frame in chunk.split(1):
            frame = self._conv(encoder.conv_in, frame)
            for layer in layers[:in_time]:
                frame = self._down_layer(layer, frame)
            frames.append(frame)
        x = torch.cat(frames)
        for layer in layers[in_time:]:
            x = self._down_layer(layer, x)
        return x

    def encoder_end(self, vae: Vae, x: Tensor) -> Tensor:
        """Features [1, C, h, w] -> mean and log variance [1, 32, h, w]."""
        x = self._middle(vae.encoder.mid_block, x)
        x = self._conv(vae.encoder.conv_out, _norm_silu(vae.encoder.norm_out, x))
        return self._conv(vae.quant_conv, x)

    def _middle(self, block: DiffusersModule, x: Tensor) -> Tensor:
        """Two residual blocks, and between them attention over the pixels of each frame, one head of all channels."""
        x, attn = self._residual(block.resnets[0], x), block.attentions[0]
        qkv = attn.to_qkv(_norm(attn.norm, x)).flatten(2).transpose(1, 2)[:, :, None]
        y = attention(*qkv.chunk(3, dim=-1)).flatten(2).transpose(1, 2)
        del qkv
        y = attn.proj(y.unflatten(2, x.shape[2:])).add_(x)
        del x
        return self._residual(block.resnets[1], y)

    def _residual(self, block: DiffusersModule, x: Tensor) -> Tensor:
        y = self._conv(block.conv1, _norm_silu(block.norm1, x))
        y = self._conv(block.conv2, _norm_silu(block.norm2, y))
        return y.add_(x if isinstance(block.conv_shortcut, nn.Identity) else self._conv(block.conv_shortcut, x))

    def _down_layer(self, layer: DiffusersModule, x: Tensor) -> Tensor:
        if not hasattr(layer, "resample"):
            return self._residual(layer, x)
        x = layer.resample(x)
        if not hasattr(layer, "time_conv"):
            return x
        past = self._past.get(layer.time_conv)
        self._past[layer.time_conv] = [x[-1:].clone()]
        if past is None:
            return x
        # 2n + 1 frames -> n: a temporal convolution of three frames and stride two
        x, weight, bias = torch.cat((*past, x)), layer.time_conv.weight, layer.time_conv.bias
        if not self._conv2d:
            return F.conv3d(x.transpose(0, 1), weight, bias, stride=(2, 1, 1)).transpose(0, 1)
        first, middle, last = weight.unbind(2)
        return F.conv2d(x[2::2], last, bias) + F.conv2d(x[1::2], middle) + F.conv2d(x[:-1:2], first)

    def _upsample(self, layer: DiffusersModule, x: Tensor) -> Tensor:
        """Twice the rows and columns; where the layer works on time, t frames become 2t.

        Not so the clip's first latent frame, which stays one and is not remembered.
        """
        if hasattr(layer, "time_conv"):
            if layer.time_conv in self._past:
                x = self._conv(layer.time_conv, x).unflatten(1, (2, -1)).flatten(0, 1)
            else:
                self._past[layer.time_conv] = []
        conv = layer.resample[1]
        shape = (len(x), conv.out_channels, 2 * x.shape[2], 2 * x.shape[3])
        out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        for i, frame in enumerate(x.split(1)):
            out[i : i + 1] = conv(F.interpolate(frame, scale_factor=2, mode="nearest-exact"))
        return out

    def _conv(self, layer: nn.Conv3d, x: Tensor) -> Tensor:
        """A causal convolution of frames [t, C, H, W]; frames before the first are zeros."""
        padding = [size // 2 for size in layer.kernel_size[1:]]
        if layer.kernel_size[0] == 1:
            return F.conv2d(x, layer.weight[:, :, 0], layer.bias, padding=padding)
        past = self._past.get(layer, [])
        self._past[layer] = [*past, x][-2:] if len(x) == 1 else [frame.clone() for frame in x[-2:].split(1)]
        if self._conv2d:
            # a sum of 2-D convolutions: each tap adds the frames `back` steps earlier, zeros are skipped
            frames = x.contiguous(memory_format=torch.channels_last)  # up to twice as fast on a CPU
            out = F.conv2d(frames, layer.weight[:, :, 2], layer.bias, padding=padding)
            for back in (1, 2):
                tap = layer.weight[:, :, 2 - back]
                if len(x) > back:
                    out[back:] += F.conv2d(frames[:-back], tap, padding=padding)
                for i, frame in enumerate(past[-back:], start=max(0, back - len(past))):
                    if i < len(x):
                        out[i : i + 1] += F.conv2d(frame, tap, padding=padding)
            return out
        shape, order = (1, x.shape[1], 2 + len(x), *x.shape[2:]), torch.channels_last_3d
        clip = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=order)
        frames = clip[0].transpose(0, 1)
        frames[: 2 - len(past)] = 0
        for i, frame in enumerate((*past, x)):
            start = 2 - len(past) + i
            frames[start : start + len(frame)] = frame
        return F.conv3d(clip, layer.weight, layer.bias, padding=(0, *padding))[0].transpose(0, 1)


def _norm_silu(norm: DiffusersModule, x: Tensor) -> Tensor:
    """SiLU of the channel norm `x / |x| * sqrt(C) * gamma`; the length |x| in float32."""
    if backend.chosen("norm", x.device).runs == "triton":
        return rms_norm_silu(x, norm.gamma.flatten())
    return F.silu(_norm(norm, x), inplace=True)  # where no kernel runs, in fewer copies than its reference


def _norm(norm: DiffusersModule, x: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32).clamp_min_(1e-12)
    gamma = (norm.gamma * norm.scale).view(-1, 1, 1)
    return torch.div(x, length, out=torch.empty_like(x)).mul_(gamma)
