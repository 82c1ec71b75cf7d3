"""Video latents to tokens and back: a token is a patch of latent positions."""

from torch import Tensor

from turbodiff.spec import shapes

PATCH = (1, shapes.PATCH, shapes.PATCH)  # latent frames, rows and columns of one token (Wan2.1)


def patchify(x: Tensor) -> Tensor:
    """[B, C, T, H, W] -> [B, N, C * patch volume]; tokens in (t, h, w), channels in (c, t, h, w) order (Wan2.1)."""
    b, c, t, h, w = x.shape
    pt, ph, pw = PATCH
    x = x.reshape(b, c, t // pt, pt, h // ph, ph, w // pw, pw)
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)


def unpatchify(x: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """[B, N, patch volume * C] -> [B, C, T, H, W]; channels of a token come in (t, h, w, c) order (Wan2.1)."""
    x = x.unflatten(2, (*PATCH, -1)).unflatten(1, grid)
    return x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6).flatten(4, 5).flatten(2, 3)
