"""The VAE driver: streamed, tiled and whole are one function, and it is diffusers'."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from scripts.bench_pipeline import diffusers_vae
from tests.runtime.small_card import CardLedger
from turbodiff.models.vae import decode, decode_stream, encode, frames_to_uint8, make_vae
from turbodiff.models.vae_cpu import upsample_conv


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    vae = make_vae(8)
    for name, parameter in vae.named_parameters():  # default weights shrink the signal to nothing: keep its size
        if name.endswith("weight"):
            torch.nn.init.kaiming_normal_(parameter.flatten(1), nonlinearity="linear")
    return vae


@pytest.fixture(scope="module")
def theirs(vae):
    """diffusers' on the same weights: that they load says that names and shapes are the same."""
    return diffusers_vae(vae)


def statistics(vae):
    return (torch.tensor(vae.config[key]).view(1, -1, 1, 1, 1) for key in ("latents_mean", "latents_std"))


def latents(frames=3, height=6, width=10, batch=1):
    return torch.randn(batch, 16, frames, height, width, generator=torch.Generator().manual_seed(5))


def test_decode_is_the_one_of_diffusers(vae, theirs):
    z = latents(batch=2)
    mean, std = statistics(theirs)
    with torch.no_grad():
        want = theirs.decode(z * std + mean).sample
    got = decode(vae, z)
    assert want.std() > 0.1, "the comparison must see a picture"
    assert (got.clamp(-1, 1) - want).abs().max() < 1e-4


def test_encode_is_the_one_of_diffusers(vae, theirs):
    video = torch.rand(2, 3, 9, 32, 48) * 2 - 1
    mean, std = statistics(theirs)
    with torch.no_grad():
        want = (theirs.encode(video).latent_dist.mean - mean) / std
    assert (encode(vae, video) - want).abs().max() < 1e-4


@pytest.mark.parametrize("tile", [12, 64])
def test_tiles_change_nothing(vae, tile):
    z = latents(2, 30, 17)
    whole = decode(vae, z)
    assert (decode(vae, z, tile=tile) - whole).abs().max() < 1e-4
    video = whole.clamp(-1, 1)
    assert (encode(vae, video, tile=tile) - encode(vae, video)).abs().max() < 1e-4


@pytest.mark.parametrize("tile", [None, 4])
def test_stream_hands_out_one_frame_then_fours(vae, tile):
    chunks = list(decode_stream(vae, latents(), tile=tile))
    assert [tuple(chunk.shape) for chunk in chunks] == [(1, 3, t, 48, 80) for t in (1, 4, 4)]


def test_when_tiles_are_handed_out_only_their_canvas_is_left(vae):
    """What the tiles remember of past frames is many times the canvas; it must not outlive them."""
    with CardLedger("cpu") as ledger:
        ledger.ignore(vae)
        z = latents(5)
        chunks = decode_stream(vae, z, tile=4)
        first = next(chunks)
        canvas_bytes = 4 * 3 * 17 * 48 * 80
        held = ledger.live_bytes - first.untyped_storage().nbytes()
        chunks.close()
    assert canvas_bytes <= held < 1.2 * canvas_bytes < ledger.peak_bytes / 2


def test_what_comes_later_does_not_change_what_came_before(vae):
    z = latents(4)
    assert torch.equal(decode(vae, z[:, :, :2]), decode(vae, z)[:, :, :5])
    video = decode(vae, z).clamp(-1, 1)
    assert torch.equal(encode(vae, video[:, :, :5]), encode(vae, video)[:, :, :2])


def test_first_chunk_is_computed_before_the_others_are_asked_for(vae):
    stream = decode_stream(vae, latents(50, 2, 2))
    assert next(stream).shape[2] == 1
    stream.close()


def test_the_fused_norm_and_channels_last_change_nothing(vae, monkeypatch):
    """The way a card goes: the kernel in Triton's interpreter instead of the passes that a CPU takes."""
    z = latents(2, 4, 4)
    want = decode(vae, z)
    monkeypatch.setenv("TURBODIFF_KERNELS", "triton")
    assert (decode(vae, z) - want).abs().max() < 1e-4


def test_phases_of_a_larger_picture_are_its_convolution():
    layer = torch.nn.Conv2d(6, 4, 3, padding=1).requires_grad_(False)
    x = torch.randn(2, 6, 5, 7)
    want = layer(torch.nn.functional.interpolate(x, scale_factor=2, mode="nearest-exact"))
    assert (upsample_conv(layer, x) - want).abs().max() < 1e-5


def test_frames_become_bytes():
    frames = torch.tensor([-1.5, -1.0, 0.0, 1.0, 1.5]).view(1, 1, 5, 1, 1).expand(1, 3, 5, 2, 2)
    pixels = frames_to_uint8(frames)
    assert pixels.shape == (1, 5, 2, 2, 3) and pixels.dtype == torch.uint8
    assert pixels[0, :, 0, 0, 0].tolist() == [0, 0, 128, 255, 255]


class Traffic(TorchDispatchMode):
    """Bytes that operations read and write but for what a convolution itself must: its bias is a pass of its own on a
    GPU. What an operation overwrites counts twice, and of `rms_norm_silu_` the sum only where it is written."""

    def __init__(self):
        super().__init__()
        self.n_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, name = func(*args, **(kwargs or {})), func._schema.name
        given, made = ([t for t in tree_iter(some) if torch.is_tensor(t)] for some in ((args, kwargs), out))
        view = {t.untyped_storage()._cdata for t in made} <= {t.untyped_storage()._cdata for t in given}
        if "conv" in name:
            self.n_bytes += 2 * out.nbytes * (args[2] is not None)
        elif name == "turbodiff::rms_norm_silu_":
            frame, x, _, y, _ = args
            self.n_bytes += frame.nbytes + x.nbytes + (0 if y is None else x.nbytes + y.nbytes)
        elif func._schema.is_mutable:
            self.n_bytes += sum(t.nbytes for t in given) + given[0].nbytes * (name not in ("aten::copy_", "aten::cat"))
        elif not view and "empty" not in name:
            self.n_bytes += sum(t.nbytes for t in (*given, *made))
        return out


def test_a_latent_frame_at_480p_moves_at_most_22_gb_outside_convolutions(monkeypatch):
    """It was 38 GB, 18 of them copies of what causal convolutions remember."""
    monkeypatch.setenv("TURBODIFF_KERNELS", "triton")
    with torch.device("meta"):
        vae = make_vae(96).bfloat16()
        chunks = decode_stream(vae, torch.empty(1, 16, 3, 60, 104))
        for _ in range(2):
            next(chunks)
        with torch.inference_mode(), Traffic() as traffic:
            assert frames_to_uint8(next(chunks)).shape == (1, 4, 480, 832, 3)
    assert 5e9 < traffic.n_bytes < 22e9
