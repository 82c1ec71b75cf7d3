"""What several cards gain on one clip, against what others published and against what it must never say."""

import pytest

from turbodiff.plan.shared_clip import (
    INT8_BYTES,
    NVLINK_SHARE,
    possible_ranks,
    sent_bytes,
    shared,
    strip_factor,
)
from turbodiff.spec.models import find_model
from turbodiff.spec.numbers import GB

# Wan2.2 README, assets/comp_effic.png @42bf4cf: T2V-A14B, 40 steps with guidance, Ulysses + FSDP, seconds from start to
# file on 1, 4 and 8 cards; NVLink GB/s one way and dense bf16 TFLOPS of the card (data sheets)
PUBLISHED = {
    ("H100", "720p"): (1041.5, 288.7, 155.1, 450, 989),
    ("H100", "480p"): (326.9, 91.7, 51.5, 450, 989),
    ("A100", "720p"): (2735.7, 725.3, 386.7, 300, 312),
    ("H20", "720p"): (4048.7, 1067.8, 564.7, 450, 148),
}
TOKENS, PIXELS = {"720p": 75600, "480p": 32760}, {"720p": 81 * 1280 * 720, "480p": 81 * 832 * 480}
VAE_FLOPS_PER_PIXEL, VAE_SHARE, TEXT_S = 8.5e6, 0.3, 1.5


@pytest.fixture(scope="module")
def dit():
    return find_model("wan2.2-t2v-a14b").dit


@pytest.mark.parametrize("card, size", PUBLISHED)
def test_the_efficiency_is_within_a_tenth_of_wans_own_table(dit, card, size):
    alone_s, four_s, eight_s, nvlink_gb_s, tflops = PUBLISHED[card, size]
    vae_s = VAE_FLOPS_PER_PIXEL * PIXELS[size] / (VAE_SHARE * tflops * 1e12)  # on the first card alone, in theirs
    for ranks, published_s in ((4, four_s), (8, eight_s)):
        got = shared(
            dit, TOKENS[size], ranks, split_s=alone_s - vae_s - TEXT_S, strips_s=0, width=160, serial_s=vae_s + TEXT_S,
            forwards=80, link_bytes_s=NVLINK_SHARE * nvlink_gb_s * GB,
        )  # fmt: skip
        assert got.efficiency == pytest.approx(alone_s / published_s / ranks, rel=0.10), (ranks, got)


def test_bytes_are_those_of_the_exchange(dit):
    assert sent_bytes(dit, 75600, 2) // dit.num_layers == 774_144_000  # 8 L d (R - 1) / R^2
    assert sent_bytes(dit, 75600, 8, INT8_BYTES) == pytest.approx(sent_bytes(dit, 75600, 8) / 2, rel=0.04)


def clip(dit, ranks, link_gb_s, element_bytes=2):
    """720p of an RTX 5090 in 3 steps (TurboDiffusion's 24 s), warm."""
    parts = {"split_s": 24.0, "strips_s": 6.0, "width": 160, "serial_s": 1.5, "forwards": 3}
    return shared(dit, 75600, ranks, **parts, link_bytes_s=link_gb_s * GB, element_bytes=element_bytes)


def test_it_is_offered_only_where_it_helps(dit):
    assert clip(dit, 2, 40).helps and clip(dit, 2, 40).speedup > 1.6
    assert not clip(dit, 2, 3).helps and clip(dit, 2, 3).speedup < 1.2
    assert clip(dit, 2, 9, INT8_BYTES).speedup > clip(dit, 2, 9).speedup


def test_clips_side_by_side_always_finish_more(dit):
    for ranks in (2, 4, 8):
        for link_gb_s in (3, 40, 400):
            assert clip(dit, ranks, link_gb_s).side_by_side > 1


def test_a_strip_costs_its_share_and_its_margins():
    assert strip_factor(160, 2) == pytest.approx(1 / 1.86, rel=0.01) and strip_factor(16, 8) < 1


def test_processes_divide_the_heads_and_have_a_tile_each():
    assert possible_ranks(40, 75600, 8) == [8, 5, 4, 2]
    assert possible_ranks(12, 32760, 8) == [6, 4, 3, 2]
    assert possible_ranks(2, 128, 2) == [] and possible_ranks(2, 129, 4) == [2]
