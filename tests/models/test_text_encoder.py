"""The text encoder: rows of the prompt, zeros behind it. Its numbers are checked by the reference files."""

import torch

from turbodiff.models.text_encoder import encode, make_text_encoder
from turbodiff.spec.models import TextFacts

FACTS = TextFacts(dim=32, dim_attn=32, dim_ffn=48, num_heads=4, num_layers=2, vocab=100)


def test_rows_past_the_prompt_are_zero_and_padding_changes_nothing():
    torch.manual_seed(0)
    model = make_text_encoder(FACTS)
    ids = torch.randint(3, 100, (2, 12))
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    text = encode(model, ids, mask)
    assert text.shape == (2, 512, 32)
    assert not text[0, 7:].any() and not text[1, 12:].any()
    assert text[0, :7].any(-1).all() and text[1, :12].any(-1).all()
    assert torch.allclose(text[:1, :7], encode(model, ids[:1, :7], mask[:1, :7], 7), atol=1e-5)
