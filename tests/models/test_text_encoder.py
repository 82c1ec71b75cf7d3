"""The text encoder: transformers' rows of the prompt, zeros behind it; the reference files check its numbers too."""

import pytest
import torch
from transformers import UMT5Config, UMT5EncoderModel
from transformers.models.umt5.modeling_umt5 import UMT5Attention

from turbodiff.models.text_encoder import distance_buckets, encode, make_text_encoder
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


@pytest.fixture
def pair():
    """Ours, with a table that is wide enough to tell distances apart, and transformers' with the same weights."""
    torch.manual_seed(0)
    ours = make_text_encoder(FACTS)
    for layer in ours.encoder.block:
        layer.layer[0]["SelfAttention"].relative_attention_bias.weight.mul_(3)
        for part in layer.layer:
            part["layer_norm"].weight.uniform_(0.5, 1.5)
    config = UMT5Config(
        vocab_size=FACTS.vocab, d_model=FACTS.dim, d_kv=FACTS.dim_attn // FACTS.num_heads, d_ff=FACTS.dim_ffn,
        num_layers=FACTS.num_layers, num_heads=FACTS.num_heads, relative_attention_num_buckets=FACTS.num_buckets,
        relative_attention_max_distance=FACTS.max_distance, feed_forward_proj="gated-gelu", dropout_rate=0.0,
    )  # fmt: skip
    theirs = UMT5EncoderModel(config).eval().requires_grad_(False)
    assert set(ours.state_dict()) == set(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("shape", [(1, 1), (2, 12), (1, 512)])
def test_rows_are_those_of_transformers(pair, shape):
    ours, theirs = pair
    ids = torch.randint(3, 100, shape)
    mask = torch.ones_like(ids)
    mask[0, 3 * shape[1] // 4 + 1 :] = 0
    expected = theirs(input_ids=ids, attention_mask=mask).last_hidden_state * mask[..., None]
    assert torch.allclose(encode(ours, ids, mask)[:, : shape[1]], expected, atol=2e-5)  # rows are of size 1


def test_in_16_bits_they_are_no_further_from_the_wide_ones_than_those_of_transformers(pair):
    ours, theirs = pair
    ids = torch.randint(3, 100, (1, 200))
    mask = torch.ones_like(ids)
    wide = theirs(input_ids=ids, attention_mask=mask).last_hidden_state
    there = theirs.bfloat16()(input_ids=ids, attention_mask=mask).last_hidden_state
    here = encode(ours.bfloat16(), ids, mask, 200)
    assert here.dtype == torch.bfloat16
    assert (here - wide).norm() < 1.1 * (there - wide).norm() < 0.05 * wide.norm()


@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 20)])
def test_distances_fall_into_the_buckets_of_transformers(buckets, max_distance):
    config = UMT5Config(relative_attention_num_buckets=buckets, relative_attention_max_distance=max_distance)
    distance = torch.arange(-600, 601)
    expected = UMT5Attention(config)._relative_position_bucket(distance)
    assert torch.equal(distance_buckets(distance, buckets, max_distance), expected)
