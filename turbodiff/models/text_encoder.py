"""The UMT5 encoder that turns a prompt into the rows the video attends to; the modules are those of transformers."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from transformers import UMT5EncoderModel

    from turbodiff.spec.models import TextFacts


def make_text_encoder(facts: "TextFacts") -> "UMT5EncoderModel":
    """An encoder of these sizes with random weights; build it under `torch.device("meta")` to fill it from a file."""
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=facts.vocab,
        d_model=facts.dim,
        d_kv=facts.dim_attn // facts.num_heads,
        d_ff=facts.dim_ffn,
        num_layers=facts.num_layers,
        num_heads=facts.num_heads,
        relative_attention_num_buckets=facts.num_buckets,
        relative_attention_max_distance=facts.max_distance,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    encoder: UMT5EncoderModel = UMT5EncoderModel(config).eval().requires_grad_(False)
    return encoder


@torch.no_grad()
def encode(model: "UMT5EncoderModel", ids: Tensor, mask: Tensor, text_len: int = 512) -> Tensor:
    """Token ids and mask [B, n], n <= text_len -> text [B, text_len, dim] in the dtype of the model.

    Rows past the prompt are zeros (Wan2.1); padding may be left out of ids, it only costs time.
    """
    hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
    hidden = hidden.masked_fill(mask[..., None] == 0, 0)
    return F.pad(hidden, (0, 0, 0, text_len - ids.shape[1]))
