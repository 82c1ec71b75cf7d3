"""Which card a name means, against the makers' published figures; and what becomes of a card that nobody listed."""

import pytest

from tests.plan.machines import ask, card, disk, gpu, machine
from turbodiff.plan.cards import BOOST_SHARE, Facts, by_name, capability_of, card_of, listed
from turbodiff.plan.hardware import GpuFacts, pretend
from turbodiff.plan.planner import plan_request
from turbodiff.plan.roofline import speed_of
from turbodiff.plan.tiers import tiers
from turbodiff.spec.numbers import GIB

GA102 = "NVIDIA GA102 white paper v2.1, appendix A"
ADA = "NVIDIA Ada white paper v2, appendix A"
BLACKWELL = "NVIDIA RTX Blackwell white paper, appendix A"
HOPPER = "nvidia.com/en-us/data-center/h100, /h200"
AMPERE = "NVIDIA A100 data sheet; A800 is the same chip"
# name as NVML gives it, dense bf16 TFLOP/s with float32 sums, dense INT8 TOPS, GB/s, source
PUBLISHED = [
    ("NVIDIA GeForce RTX 3090", 71, 284, 936, GA102),
    ("NVIDIA GeForce RTX 3080", 59.5, 238, 760, GA102),
    ("NVIDIA GeForce RTX 3070", 40.6, 162.6, 448, GA102),
    ("NVIDIA RTX A6000", 154.8, 309.7, 768, GA102),
    ("NVIDIA A40", 149.7, 299.3, 696, "NVIDIA A40 data sheet"),
    ("NVIDIA A10", 125, 250, 600, "NVIDIA A10 data sheet"),
    ("NVIDIA A10G", 70, 140, 600, "aws.amazon.com/ec2/instance-types/g5"),
    ("NVIDIA RTX A4000", 76.7, 153.4, 448, "NVIDIA RTX A4000 data sheet"),
    ("NVIDIA A100-SXM4-40GB", 312, 624, 1555, AMPERE),
    ("NVIDIA A100-SXM4-80GB", 312, 624, 2039, AMPERE),
    ("NVIDIA A100 80GB PCIe", 312, 624, 1935, AMPERE),
    ("NVIDIA A800-SXM4-80GB", 312, 624, 2039, AMPERE),
    ("NVIDIA A30", 165, 330, 933, "NVIDIA A30 data sheet"),
    ("NVIDIA GeForce RTX 4090", 165.2, 660.6, 1008, ADA),
    ("NVIDIA GeForce RTX 4080", 97.5, 389.9, 717, ADA),
    ("NVIDIA GeForce RTX 4080 SUPER", 104, 418, 736, "418 of 836 AI TOPS, nvidia.com/en-us/geforce"),
    ("NVIDIA GeForce RTX 4070 Ti SUPER", 88, 353, 672, "353 of 706 AI TOPS, nvidia.com/en-us/geforce"),
    ("NVIDIA GeForce RTX 4060 Ti", 44, 176.5, 288, "353 AI TOPS sparse, nvidia.com/en-us/geforce"),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", 79, 317, 576, "686 AI TOPS sparse at up to 2.2 GHz; 2.04 here"),
    (
        "NVIDIA GeForce RTX 5070 Laptop GPU",
        43.3,
        173,
        384,
        "36 SMs at up to 2347 MHz, nvidia.com/en-us/geforce/laptops",
    ),
    ("NVIDIA A800 40GB Active", 312, 624, 1555, AMPERE),
    ("NVIDIA RTX PRO 5000 Blackwell", 267.8, 535.6, 1344, "66.94 TFLOP/s FP32, techpowerup.com/gpu-specs"),
    ("NVIDIA H20-3e", 148, 296, 4800, "as H20, 141 GB of HBM3e"),
    ("NVIDIA L20", 119.5, 239, 864, "NVIDIA L20 as sellers print it"),
    ("NVIDIA L40S", 362, 733, 864, "NVIDIA L40S data sheet"),
    ("NVIDIA L40", 181, 362, 864, "NVIDIA L40 data sheet"),
    ("NVIDIA L4", 121, 242, 300, "NVIDIA L4 data sheet, half of the sparse figures"),
    ("NVIDIA RTX 6000 Ada Generation", 364.2, 728.5, 960, ADA),
    ("NVIDIA GeForce RTX 5090", 209.5, 838, 1792, BLACKWELL),
    ("NVIDIA GeForce RTX 5080", 112.6, 450.2, 960, BLACKWELL),
    ("NVIDIA GeForce RTX 5070", 61.7, 246.9, 672, BLACKWELL),
    ("NVIDIA GeForce RTX 5070 Ti", 87.9, 351.5, 896, BLACKWELL),
    ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 503.8, 1007.6, 1792, "NVIDIA RTX Blackwell PRO white paper"),
    ("NVIDIA H100 80GB HBM3", 989.4, 1978.9, 3350, HOPPER),
    ("NVIDIA H100 PCIe", 756, 1513, 2039, HOPPER),
    ("NVIDIA H100 NVL", 835.5, 1671, 3938, HOPPER),
    ("NVIDIA H200", 989.4, 1978.9, 4800, HOPPER),
    ("NVIDIA H20", 148, 296, 4000, "148 TFLOP/s bf16, 296 TOPS INT8, as published for H20"),
    ("NVIDIA GH200 480GB", 989.4, 1978.9, 4000, "NVIDIA GH200 data sheet"),
    ("NVIDIA B200", 2250, 4500, 8000, "NVIDIA HGX B200 data sheet"),
    ("NVIDIA GB10", 125, 250, 273, "1000 TOPS FP4 sparse, nvidia.com/en-us/products/workstations/dgx-spark"),
    ("Orin", 42.6, 85.2, 204.8, "NVIDIA Jetson AGX Orin technical brief"),
]


@pytest.mark.parametrize(("name", "bf16", "int8", "memory", "source"), PUBLISHED, ids=[row[0] for row in PUBLISHED])
def test_a_card_has_the_rates_that_its_maker_published(name, bf16, int8, memory, source):
    found = card_of(name, Facts())
    assert source
    assert found.bf16_tflops == pytest.approx(bf16, rel=0.02)
    assert found.int8_tops == pytest.approx(int8, rel=0.02)
    assert found.memory_gb_s == memory


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "4070 TI SUPER"),
        ("NVIDIA GeForce RTX 3080 Laptop GPU", "3080 LAPTOP"),
        ("NVIDIA GeForce RTX 3080 with Max-Q Design", "3080 LAPTOP"),
        ("NVIDIA GeForce RTX 5090 D", "5090 D"),
        ("NVIDIA RTX A2000 12GB", "A2000"),
        ("NVIDIA RTX 4000 SFF Ada Generation", "4000 SFF ADA"),
        ("NVIDIA RTX 5000 Ada Generation Laptop GPU", "5000 ADA LAPTOP"),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "PRO 6000 MAX Q"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "PRO 6000 SERVER"),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", "A100"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "H100"),
        ("NVIDIA H20-3e", "H20 3E"),
        ("NVIDIA RTX 6000D", "6000D"),
        ("NVIDIA GeForce RTX 5070 Laptop GPU", "5070 LAPTOP"),
        ("NVIDIA L4", "L4"),
        ("GRID A100-40C", "A100"),
        ("NVIDIA A800 40GB Active", "A800 40GB"),
    ],
)
def test_a_name_finds_its_row(name, words):
    found = by_name(name)
    assert found is not None
    assert found.words == frozenset(words.split())


@pytest.mark.parametrize(
    "name",
    [
        "Tesla V100-SXM2-32GB", "Tesla T4", "NVIDIA GeForce RTX 2080 Ti", "NVIDIA GeForce GTX 1080 Ti", "Tesla K80",
        "NVIDIA TITAN RTX", "NVIDIA TITAN V", "Tesla P100-PCIE-16GB", "Tesla P40", "NVIDIA GeForce GTX 1660 SUPER",
        "NVIDIA GeForce RTX 2060 with Max-Q Design", "NVIDIA T1000", "Tesla M40", "Quadro P4000", "Quadro RTX 8000",
    ],
)  # fmt: skip
def test_a_card_older_than_sm_80_computes_nothing_and_the_plan_says_so(name):
    where = card(31.7, name=name)
    assert where.gpus[0].too_old
    plan = plan_request(ask("wan2.1-1.3b"), where, disk())
    assert plan.device == "cpu"
    assert "card_too_old" in [reason.key for reason in plan.reasons]


def test_the_capability_that_the_driver_gives_outweighs_the_name():
    assert card(24, name="an engineering sample", capability=(7, 5)).gpus[0].too_old
    assert not card(24, name="an engineering sample", capability=(8, 6)).gpus[0].too_old


def test_beside_a_card_that_is_too_old_the_other_one_computes():
    old, new = gpu(32, name="Tesla V100-SXM2-32GB"), gpu(12, name="NVIDIA GeForce RTX 3060", index=1)
    plan = plan_request(ask("wan2.1-1.3b"), machine(old, new), disk())
    assert plan.device == "cuda:1"


def test_an_unlisted_card_is_worked_out_from_what_the_driver_says():
    """As if a 4090 had another name: SMs, clocks and bus as NVML gives them for it."""
    facts = {
        "capability": (8, 9),
        "sm_count": 128,
        "clock_mhz": 3105,
        "memory_bus_bits": 384,
        "memory_clock_mhz": 10501,
    }
    unknown, known = (speed_of(gpu(24, name=name, **facts), 8) for name in ("NVIDIA GeForce RTX 9999", "RTX 4090"))
    assert unknown.bf16_flops == pytest.approx(known.bf16_flops, rel=0.06)
    assert unknown.int8_flops == pytest.approx(known.int8_flops, rel=0.06)
    assert unknown.memory_bytes_s == pytest.approx(known.memory_bytes_s, rel=0.01)


def others_than(card, monkeypatch):
    rest = tuple(other for other in listed() if other is not card)
    monkeypatch.setattr("turbodiff.plan.cards.listed", lambda: rest)


@pytest.mark.parametrize(
    ("name", "clock_mhz"),
    [
        ("NVIDIA GeForce RTX 5070", 2512), ("NVIDIA GeForce RTX 5070 Laptop GPU", 2347), ("NVIDIA L4", 2040),
        ("NVIDIA RTX A5000", 1695), ("NVIDIA RTX PRO 4500 Blackwell", 2407), ("NVIDIA RTX 2000 Ada Generation", 2130),
        ("NVIDIA A800-SXM4-80GB", 1410),
    ],
)  # fmt: skip
def test_a_card_that_was_not_listed_would_be_worked_out_as_its_row_has_it(name, clock_mhz, monkeypatch):
    """By capability, SMs and clock. Workstation cards came out at half their rate, as GeForce sums."""
    row = by_name(name)
    others_than(row, monkeypatch)
    facts = Facts(
        row.capability, round(row.memory_gb * 1e9), sm_count=row.sm_count, clock_mhz=clock_mhz / BOOST_SHARE,
        memory_bus_bits=256, memory_clock_mhz=7000,
    )  # fmt: skip
    found = card_of(name.replace(" RTX", " RTX 9").replace("L4", "L9").replace("A800", "A900"), facts)
    assert found.bf16_tflops == pytest.approx(row.bf16_tflops, rel=0.02)
    assert found.int8_tops == pytest.approx(row.int8_tops, rel=0.02)
    assert found.memory_gb_s == 448


def test_an_unlisted_card_of_twice_the_sms_is_twice_as_fast():
    small, large = (speed_of(gpu(24, name="x", capability=(12, 0), sm_count=count), 8).bf16_flops for count in (40, 80))
    assert large == pytest.approx(2 * small)


def test_a_slice_of_a_card_has_its_share_of_it():
    whole = card_of("NVIDIA A100-SXM4-80GB", Facts())
    part = card_of("NVIDIA A100-SXM4-80GB MIG 3g.40gb", Facts(mig=True))
    assert part.bf16_tflops == pytest.approx(3 / 7 * whole.bf16_tflops, rel=0.02)
    assert part.memory_gb_s == whole.memory_gb_s / 2


def test_what_was_measured_on_a_card_stands_in_place_of_the_data_sheet():
    measured = speed_of(gpu(24, memory_bytes_s=5e11, pcie_bytes_s=6e9), 8)
    assert (measured.memory_bytes_s, measured.pcie_bytes_s) == (5e11, 6e9)


def test_an_h20_is_five_times_slower_than_an_h200():
    h20, h200 = (plan_request(ask(), card(95, name=name), disk()).seconds for name in ("NVIDIA H20", "NVIDIA H200"))
    assert h20 > 2 * h200


def test_every_tier_names_only_cards_that_can():
    for tier in tiers():
        for name in tier.cards:
            found = by_name(name)
            assert found is not None, name
            assert not GpuFacts(name=name).too_old


def test_every_listed_card_is_found_by_its_own_words():
    for one in listed():
        assert by_name(" ".join(sorted(one.words))) == one
        assert capability_of(" ".join(sorted(one.words))) >= (8, 0)


def test_a_pretended_card_of_another_size_keeps_its_kind():
    where = pretend(card(24, name="NVIDIA GeForce RTX 3090"), 80)
    assert speed_of(where.gpus[0], 8) == speed_of(card(24, name="NVIDIA GeForce RTX 3090").gpus[0], 8)
    assert where.gpus[0].total_bytes == 80 * GIB
