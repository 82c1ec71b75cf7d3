"""The picture encoder of Wan2.1's image to video: CLIP's ViT-H/14 as open-clip trained it beside XLM-Roberta.

The modules are those of transformers; the network attends to what comes out of the layer before the last.
"""

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from turbodiff.spec.models import ImageEncoderFacts

# of CLIP's training pictures, in [0, 1] (OpenAI CLIP, clip/clip.py; Wan2.1 wan/modules/clip.py)
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def make_image_encoder(facts: "ImageEncoderFacts") -> nn.Module:
    """An encoder of these sizes with random weights; build it under `torch.device("meta")` to fill it from a file.

    Its GELU is exact and its norms have an eps of 1e-5 (image_encoder/config.json of Wan-AI/Wan2.1-I2V-14B-480P-
    Diffusers).
    """
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=facts.dim,
        intermediate_size=facts.dim_ffn,
        num_hidden_layers=facts.num_layers,
        num_attention_heads=facts.num_heads,
        patch_size=facts.patch,
        image_size=facts.image_side,
        hidden_act="gelu",
        layer_norm_eps=1e-5,
    )
    model = CLIPVisionModel(config)
    encoder = cast(nn.Module, getattr(model, "vision_model", model))  # what is inside, in transformers 5.0
    with torch.device("cpu"):  # no file holds the numbers of the patches
        encoder.get_submodule("embeddings").register_buffer(
            "position_ids", torch.arange(facts.tokens)[None], persistent=False
        )
    return encoder.eval().requires_grad_(False)


@torch.no_grad()
def picture_features(encoder: nn.Module, picture: Tensor, facts: "ImageEncoderFacts") -> Tensor:
    """Picture [B, 3, H, W] in [-1, 1] -> features [B, tokens, dim] in the dtype of the encoder.

    The picture is squeezed to a square, bicubic and without antialiasing, and the last layer is left out (Wan2.1
    wan/modules/clip.py; diffusers' `hidden_states[-2]`).
    """
    side, dtype = facts.image_side, next(encoder.parameters()).dtype
    small = F.interpolate(picture.float(), size=(side, side), mode="bicubic", align_corners=False)
    mean, std = (torch.tensor(values, device=small.device).view(1, 3, 1, 1) for values in (MEAN, STD))
    pixels = ((small * 0.5 + 0.5 - mean) / std).to(dtype)
    return cast(Tensor, encoder(pixel_values=pixels, output_hidden_states=True).hidden_states[-2])


class PictureEmbedding(nn.Module):
    """Features of a picture [B, Lp, image_dim] -> [B, Lp, d], for cross-attention (Wan2.1 image to video).

    Norm, linear, GELU, linear, norm, as the keys `img_emb.proj.0` to `.4` of its checkpoints say; the norms in float32
    and with torch's eps of 1e-5, the GELU exact (diffusers' WanImageEmbedding, the oracle of the tests).
    """

    def __init__(self, image_dim: int, d: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.LayerNorm(image_dim),
            nn.Linear(image_dim, image_dim),
            nn.GELU(),
            nn.Linear(image_dim, d),
            nn.LayerNorm(d),
        )

    def forward(self, features: Tensor) -> Tensor:
        """In the dtype of the linears."""
        dtype = cast(nn.Linear, self.proj[1]).weight.dtype
        x = features
        for layer in self.proj:
            if isinstance(layer, nn.LayerNorm):
                w, b = layer.weight.float(), layer.bias.float()
                x = F.layer_norm(x.float(), layer.normalized_shape, w, b, layer.eps).to(dtype)
            else:
                x = layer(x)
        return x
