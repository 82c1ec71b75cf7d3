"""The Wan2.1 VAE: streamed, in tiles and strips, through the modules of vae_modules.py.

Both directions are causal in time, so both run as a stream: the decoder takes one latent frame at a time, the encoder
a frame at a time, and every temporal convolution remembers the last three frames that it was given. The result is the
same as for the whole clip at once, and so is the result of tiling: what looks at the whole picture (the middle
block's attention) runs on the whole picture, only the convolutions around it run in tiles, whose margin is wider than
what the convolutions carry across.

Frames travel one by one as [1, C, H, W], in channels-last memory order: matrix units read it without a transposition,
and sum, norm and SiLU are one pass over it, which writes where the next convolution reads. On a CPU the two frames that
a frame becomes travel together (vae_cpu.py).
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from turbodiff_kernels import backend
from turbodiff_kernels.norm import rms_norm_silu_

from turbodiff.models import vae_modules
from turbodiff.models.attention import attention
from turbodiff.models.parallel import SequenceParallel
from turbodiff.models.vae_cpu import FramePairs, upsample_conv
from turbodiff.spec.shapes import DECODER_MARGINS, ENCODER_MARGIN, SPACE_STRIDE, TIME_STRIDE, is_frame_count

TAPS = 3  # frames that a temporal convolution sees

VaeModule: TypeAlias = Any  # a part of the VAE: to a type checker its parts are Tensor | Module
Vae: TypeAlias = VaeModule  # vae_modules.Vae


def make_vae(base_dim: int, z_dim: int = 16, dim_mult: tuple[int, ...] = (1, 2, 4, 4), num_res_blocks: int = 2) -> Vae:
    """A VAE of these sizes with random weights; base_dim 96 is the published one."""
    return vae_modules.Vae(base_dim, z_dim, dim_mult, num_res_blocks).eval().requires_grad_(False)


@torch.no_grad()
def encode(vae: Vae, video: Tensor, *, tile: int | None = None, parallel: SequenceParallel | None = None) -> Tensor:
    """Video [B, 3, F, H, W] in [-1, 1], F = 1, 5, 9, ... -> normalised mean latents, float32 [B, 16, T, H/8, W/8].

    tile: side of a tile in latent pixels, None for the whole picture. parallel: every rank encodes a strip of the
    columns, and gets the latents of all of them.
    """
    assert is_frame_count(video.shape[2]), video.shape
    video = video.to(vae.dtype)
    latent_frames = 1 + (video.shape[2] - 1) // TIME_STRIDE
    height, width = (size // SPACE_STRIDE for size in video.shape[3:])
    means = []
    for frames in video.transpose(1, 2):
        columns = parallel.columns(width) if parallel else range(width)
        features = video.new_empty(latent_frames, vae.encoder.conv_out.in_channels, height, len(columns))
        for part in _tiles(height, width, tile, columns):
            stream = _Stream(vae)
            tile_frames = frames[:, :, *part.read(ENCODER_MARGIN, SPACE_STRIDE)]
            rows, across = part.read(0)
            here = slice(across.start - columns.start, across.stop - columns.start)
            done = filter(torch.is_tensor, (stream.down(vae.encoder, frame) for frame in tile_frames.split(1)))
            for feature, x in zip(features.split(1), done, strict=True):
                feature[:, :, rows, here] = x[:, :, *part.crop(ENCODER_MARGIN, 0)]
        stream = _Stream(vae)  # what the last tile remembered is of no use
        if parallel:
            features = parallel.gather_columns(features, width)
        moments = [stream.encoder_end(vae, feature) for feature in features.split(1)]
        means.append(torch.cat(moments).chunk(2, dim=1)[0])
    latents = torch.stack(means).transpose(1, 2).float()
    mean, std = _latent_statistics(latents)
    return (latents - mean) / std


@torch.no_grad()
def decode_stream(
    vae: Vae, latents: Tensor, *, tile: int | None = None, columns: range | None = None
) -> Iterator[Tensor]:
    """Normalised latents [B, 16, T, h, w] -> T chunks of frames [B, 3, 1 or 4, 8h, 8w] in the dtype of the VAE.

    The range is about [-1, 1], not clamped: `frames_to_uint8` does that. The first chunk is one frame, the others
    four. Whole (tile None): each chunk is computed when it is asked for. Tiled: tile after tile is decoded over all
    its frames, so that only one tile's memory of past frames exists; the frames gather in one canvas and are handed
    out at the end. `columns`: of latent pixels, of which the frames are made, with the numbers that they have in the
    whole picture; None: all.
    """
    mean, std = _latent_statistics(latents)
    z = (latents.float() * std + mean).to(vae.dtype)
    streams = [_decode_one(vae, sample.transpose(0, 1), tile, columns or range(z.shape[-1])) for sample in z]
    for parts in zip(*streams, strict=True):
        yield torch.stack(parts).transpose(1, 2)


def decode(vae: Vae, latents: Tensor, *, tile: int | None = None) -> Tensor:
    """All chunks of `decode_stream` as one video [B, 3, F, H, W]."""
    return torch.cat(list(decode_stream(vae, latents, tile=tile)), dim=2)


def frames_to_uint8(frames: Tensor) -> Tensor:
    """Frames [B, 3, t, H, W] in [-1, 1] -> uint8 [B, t, H, W, 3], rounded half up (TurboDiffusion)."""
    return frames.float().add(1).mul(127.5).add(0.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 4, 1)


def _latent_statistics(like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each latent channel over the training set, float32 [16, 1, 1, 1]."""
    pair = (vae_modules.LATENTS_MEAN, vae_modules.LATENTS_STD)
    mean, std = (torch.tensor(values, dtype=torch.float32, device=like.device).view(-1, 1, 1, 1) for values in pair)
    return mean, std


def _decode_one(vae: Vae, z: Tensor, side: int | None, columns: range) -> Iterable[Tensor]:
    """Latents [T, 16, h, w], not normalised -> T chunks [1 or 4, 3, 8h, 8 * columns].

    Tiled: from one canvas. Beside it nothing of the work is left when they are handed out.
    """
    stream, features = _Stream(vae), _Stream(vae).decoder_features(vae, z)
    height, width = z.shape[2:]
    tiles = _tiles(height, width, side, columns)
    if side is None:
        if len(columns) == width:
            return (stream.up(vae.decoder, feature) for feature in features)
        (strip,) = tiles
        read = strip.read(DECODER_MARGINS[0])
        return (stream.up(vae.decoder, _own(feature[:, :, *read]), strip) for feature in features)
    whole = torch.cat(list(features))
    chunks = [1] + [TIME_STRIDE] * (len(z) - 1)
    canvas = z.new_empty(sum(chunks), 3, height * SPACE_STRIDE, len(columns) * SPACE_STRIDE)
    for tile in tiles:
        stream = _Stream(vae)
        tile_features = whole[:, :, *tile.read(DECODER_MARGINS[0])]
        for into, feature in zip(canvas.split(chunks), tile_features.split(1), strict=True):
            rows, across = tile.read(0, SPACE_STRIDE)
            left = columns.start * SPACE_STRIDE
            into[:, :, rows, across.start - left : across.stop - left] = stream.up(vae.decoder, _own(feature), tile)
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


@dataclass
class _Sum:
    """Frames `x + y + bias` [1, C, H, W]; y and the bias [C] are added to x by the pass that norms them."""

    x: Tensor
    y: Tensor | None = None
    bias: Tensor | None = None

    def added(self) -> Tensor:
        """The sum, in the place of x."""
        for more in (self.y, None if self.bias is None else self.bias.view(-1, 1, 1)):
            if more is not None:
                self.x.add_(more)
        self.y = self.bias = None
        return self.x


class _Past:
    """The last three frames that a temporal convolution was given, and how many there were.

    They lie side by side in the channels of one picture [1, 3C, H, W], each in the place of the third before it: what
    is normed is written there, nothing is moved, and the convolution is one in two dimensions whose taps take turns.
    """

    def __init__(self) -> None:
        self.count, self._frames = 0, torch.empty(0)

    def next(self, like: Tensor) -> Tensor:
        """Where to write the next frame, which is like this one."""
        if not self.count:
            shape, order = (1, TAPS * like.shape[1], *like.shape[2:]), torch.channels_last
            self._frames = torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=order)
        self.count += 1
        return self._frames.chunk(TAPS, dim=1)[(self.count - 1) % TAPS]

    def conv(self, layer: nn.Conv3d, bias: Tensor | None) -> Tensor:
        """The convolution's frame at the last frame; those before the first are zeros and left out."""
        known, weight, across = min(self.count, TAPS), layer.weight, layer.kernel_size[1:]
        taps = [weight[:, :, TAPS - 1 - (self.count - 1 - place) % TAPS] for place in range(known)]
        shape, order = (layer.out_channels, known * layer.in_channels, *across), torch.channels_last
        turned = torch.empty(shape, dtype=weight.dtype, device=weight.device, memory_format=order)
        torch.cat(taps, dim=1, out=turned)
        frames = self._frames[:, : shape[1]]
        return F.conv2d(frames, turned, bias, padding=[size // 2 for size in across])


class _Stream:
    """One causal pass: each frame goes through all modules before the next one comes."""

    def __init__(self, vae: Vae) -> None:
        self._fused = backend.chosen("norm", vae.device).runs == "triton"
        self._pairs = not self._fused and vae.device.type == "cpu" and vae.dtype == torch.float32
        past: type[FramePairs] | type[_Past] = FramePairs if self._pairs else _Past
        self._past: defaultdict[nn.Module, _Past | FramePairs] = defaultdict(past)  # of each temporal convolution

    def decoder_features(self, vae: Vae, z: Tensor) -> Iterator[Tensor]:
        """Latents [T, 16, h, w] -> T times features [1, C, h, w]: what must see the whole picture."""
        decoder = vae.decoder
        for latent in z.split(1):
            x = self._conv_of(decoder.conv_in, _pointwise(vae.post_quant_conv, latent))
            yield self._middle(decoder.mid_block, x)

    def up(self, decoder: VaeModule, x: Tensor, tile: _Tile | None = None) -> Tensor:
        """Features of one latent frame, which are overwritten -> one frame (the first) or four, [t, 3, 8h, 8w].

        With a tile, x has the first of DECODER_MARGINS around it, and the frames have none.
        """
        frames = torch.cat(list(self._up(decoder, 0, [x], tile)))
        return frames[:, :, *tile.crop(DECODER_MARGINS[-1], 0, SPACE_STRIDE)] if tile else frames

    def _up(self, decoder: VaeModule, level: int, given: list[Tensor], tile: _Tile | None) -> Iterator[Tensor]:
        """The pictures that one frame becomes from this level on; it is taken out of the list."""
        block, total = decoder.up_blocks[level], _Sum(given.pop())
        for resnet in block.resnets:
            total = self._residual(resnet, total)
        if level + 1 == len(decoder.up_blocks):
            self._norm_silu(decoder.norm_out, decoder.conv_out, total)
            del total
            yield self._past[decoder.conv_out].conv(decoder.conv_out, decoder.conv_out.bias)
            return
        frames = self._more_frames(block.upsamplers[0], total.added())
        del total
        for _ in range(len(frames)):
            x, conv = frames.pop(0), block.upsamplers[0].resample[1]
            if self._pairs:
                x = upsample_conv(conv, x)
            else:  # in two lines: the small picture goes before the convolution makes its result
                x = F.interpolate(x, scale_factor=2, mode="nearest-exact")
                x = conv(x)
            if tile:
                x = _own(x[:, :, *tile.crop(DECODER_MARGINS[level], DECODER_MARGINS[level + 1], 2 ** (level + 1))])
            passed = [x]
            del x
            yield from self._up(decoder, level + 1, passed, tile)

    def _more_frames(self, layer: VaeModule, x: Tensor) -> list[Tensor]:
        """Where the layer works on time, a frame becomes two. Not so the first one, which is not remembered."""
        if not hasattr(layer, "time_conv"):
            return [x]
        if layer.time_conv not in self._past:
            self._past[layer.time_conv].count = 0
            return [x]
        both = self._conv_of(layer.time_conv, x).chunk(2, dim=1)
        if not self._pairs:
            return list(both)
        return [torch.cat(pair) for pair in zip(*(frames.split(1) for frames in both), strict=True)]

    def down(self, encoder: VaeModule, frame: Tensor) -> Tensor | None:
        """A frame [1, 3, H, W] -> features [1, C, h, w] of the latent frame that it completes, or None."""
        total = _Sum(self._conv_of(encoder.conv_in, frame))
        for layer in encoder.down_blocks:
            if not hasattr(layer, "resample"):
                total = self._residual(layer, total)
                continue
            total = _Sum(layer.resample(total.added()))
            if hasattr(layer, "time_conv"):
                # 2n + 1 frames -> n: a temporal convolution of three frames and stride two
                past = self._past[layer.time_conv]
                past.next(total.x).copy_(total.x)
                if past.count % 2 == 0:
                    return None
                if past.count > 1:
                    total = _Sum(past.conv(layer.time_conv, layer.time_conv.bias))
        return total.added()

    def encoder_end(self, vae: Vae, x: Tensor) -> Tensor:
        """Features [1, C, h, w] -> mean and log variance [1, 32, h, w]."""
        encoder, x = vae.encoder, self._middle(vae.encoder.mid_block, x)
        self._norm_silu(encoder.norm_out, encoder.conv_out, _Sum(x))
        return _pointwise(vae.quant_conv, self._past[encoder.conv_out].conv(encoder.conv_out, encoder.conv_out.bias))

    def _middle(self, block: VaeModule, x: Tensor) -> Tensor:
        """Two residual blocks, and between them attention over the pixels of each frame, one head of all channels."""
        x, attn = self._residual(block.resnets[0], _Sum(x)).added(), block.attentions[0]
        qkv = attn.to_qkv(_norm(attn.norm, x, torch.empty_like(x))).flatten(2).transpose(1, 2)[:, :, None]
        y = attention(*qkv.chunk(3, dim=-1)).flatten(2).transpose(1, 2)
        del qkv
        y = attn.proj(y.unflatten(2, x.shape[2:])).add_(x)
        del x
        return self._residual(block.resnets[1], _Sum(y.contiguous(memory_format=torch.channels_last))).added()

    def _residual(self, block: VaeModule, total: _Sum) -> _Sum:
        self._norm_silu(block.norm1, block.conv1, total)
        y = self._conv(block.conv1)
        self._norm_silu(block.norm2, block.conv2, y)
        del y
        y, shortcut = self._conv(block.conv2), block.conv_shortcut
        return _Sum(total.x if isinstance(shortcut, nn.Identity) else _pointwise(shortcut, total.x), y.x, y.bias)

    def _norm_silu(self, norm: VaeModule, layer: nn.Conv3d, total: _Sum) -> None:
        """Give a convolution the SiLU of the norm `x / |x| * sqrt(C) * gamma`, the length |x| in float32."""
        frame = self._past[layer].next(total.x)
        if self._fused:
            rms_norm_silu_(frame, total.x, norm.gamma.flatten(), total.y, total.bias)
            total.y = total.bias = None
        else:
            F.silu(_norm(norm, total.added(), frame), inplace=True)

    def _conv(self, layer: nn.Conv3d) -> _Sum:
        """A causal convolution at the frame that it was given last; its bias is left to a pass that norms it."""
        bias = layer.bias if self._fused else None
        return _Sum(self._past[layer].conv(layer, None if self._fused else layer.bias), bias=bias)

    def _conv_of(self, layer: nn.Conv3d, x: Tensor) -> Tensor:
        """A causal convolution at this frame [1, C, H, W], which is copied."""
        self._past[layer].next(x).copy_(x)
        return self._past[layer].conv(layer, layer.bias)


def _own(x: Tensor) -> Tensor:
    """A copy that may be overwritten, channels last."""
    return x.clone(memory_format=torch.channels_last)


def _pointwise(layer: nn.Conv3d, x: Tensor) -> Tensor:
    """A convolution of one pixel in one frame."""
    return F.conv2d(x, layer.weight[:, :, 0], layer.bias)


def _norm(norm: VaeModule, x: Tensor, out: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32).clamp_min_(1e-12)
    return torch.div(x, length, out=out).mul_((norm.gamma * norm.scale).view(-1, 1, 1))
