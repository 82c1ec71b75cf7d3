from pathlib import Path

import pytest

from scripts.tier_table import SHOWN_SHARE, TABLE_GB, TABLE_MODELS, table_plan, tier_table
from tests.plan.machines import disk, gpu, machine
from turbodiff.plan.planner import plan_request
from turbodiff.plan.tiers import rounds, tier_of, tiers
from turbodiff.spec.numbers import GIB
from turbodiff.spec.plan import Plan
from turbodiff.spec.request import make_request

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("kind", TABLE_MODELS)
@pytest.mark.parametrize("gb", TABLE_GB)
def test_every_size_of_card_has_a_plan_with_the_model_that_was_asked_for(gb, kind):
    plan = table_plan(gb, kind)
    assert isinstance(plan, Plan)
    assert plan.request.model == TABLE_MODELS[kind]
    assert plan.peak_bytes <= plan.budget_bytes


def test_a_larger_card_never_runs_less():
    for kind in TABLE_MODELS:
        runs = [table_plan(gb, kind).request for gb in TABLE_GB]
        areas = [run.width * run.height * run.num_frames for run in runs]
        assert areas == sorted(areas)


def test_the_table_has_a_row_for_each():
    lines = tier_table().splitlines()
    assert len(lines) == 2 + len(TABLE_GB) * len(TABLE_MODELS)
    assert len({line.count("|") for line in lines}) == 1


@pytest.mark.parametrize("readme", ["README.md", "README.zh.md"])
def test_the_readme_holds_what_the_command_prints(readme):
    assert tier_table() in (ROOT / readme).read_text("utf-8")


@pytest.mark.parametrize("kind", ["t2v", "i2v"])
@pytest.mark.parametrize("tier", tiers(), ids=lambda tier: tier.name.replace(" ", "-"))
def test_what_a_tier_starts_with_runs_as_it_is_on_its_smallest_card(tier, kind):
    """`from_gib` with a desktop beside: nothing of the picture is lowered, and the nameplate's own card is above it."""
    total = round(tier.from_gib * GIB)
    card = gpu(tier.from_gib, display=True)
    image = {"image": "cat.jpg"} if kind == "i2v" else {}
    request = make_request({"prompt": "a cat runs", **image, **getattr(tier, kind).fields()})
    plan = plan_request(request, machine(card, ram_gib=32 if tier.nameplate_gb < 24 else 64), disk())
    assert not any(change.lossy for change in plan.changes)
    assert tier_of(total) is tier
    assert tier.from_gib < SHOWN_SHARE * tier.nameplate_gb
    assert tier.cards


def test_a_tier_fills_a_legal_request_of_its_kind():
    for tier in tiers():
        for kind, start in (("t2v", tier.t2v), ("i2v", tier.i2v)):
            image = {"image": "cat.jpg"} if kind == "i2v" else {}
            request = make_request({"prompt": "a cat runs", **image, **start.fields()})
            assert request.kind == kind
            assert request.pinned == frozenset()


def test_the_guides_own_rows():
    by_name = {tier.name: tier for tier in tiers()}
    for name in ("12 GB", "16 GB"):
        row = by_name[name].t2v
        assert (row.model, row.resolution, row.num_frames, row.quant_linear) == ("wan2.1-1.3b", "480p", 49, "on")
    assert by_name["24 GB"].i2v.boundary == 0.7
    assert (by_name["40 GB+"].t2v.model, by_name["40 GB+"].t2v.topk) == ("wan2.1-14b", 0.15)


def test_a_5090_is_a_32_gb_card():
    tier = tier_of(round(31.36 * GIB))
    assert tier.name == "32 GB"
    assert "RTX 5090" in tier.cards


def test_an_unknown_or_tiny_card_has_no_tier():
    assert tier_of(None) is None
    assert tier_of(4 * GIB) is None


def test_rounds_scout_polish_deliver():
    first = rounds()[:3]
    assert [(r.name, r.budget_s) for r in first] == [("scout", 120), ("polish", 300), ("deliver", 180)]
    assert (first[0].t2v.model, first[0].t2v.steps, first[2].t2v.resolution) == ("wan2.1-1.3b", 2, "720p")
    assert first[0].i2v.num_frames == 49
