"""`models list` says of every model whether its default clip fits this machine, and what that takes."""

from tests.plan.machines import card, disk, gpu, machine
from turbodiff.plan.tiers import fit_of
from turbodiff.spec.models import Inventory, all_models, find_model


def words(model: str, gib: float) -> str:
    return fit_of(find_model(model), card(gib), disk()).words


def test_the_demo_fits_any_card_as_it_is():
    assert words("demo", 6) == "fits"


def test_a_large_card_needs_no_lever_and_a_smaller_one_says_which():
    h100 = machine(gpu(80, name="NVIDIA H100 80GB HBM3"))
    assert fit_of(find_model("Wan2.1-1.3B"), h100, disk()).words == "fits"
    assert words("Wan2.1-14B", 24).startswith("fits with int8")
    assert "experts taking turns" in words("Wan2.2-A14B", 24) or "blocks streamed" in words("Wan2.2-A14B", 24)


def test_what_gets_smaller_is_named_and_what_cannot_run_is_refused_with_figures():
    small = fit_of(find_model("Wan2.1-14B"), card(6), disk())
    assert small.band != "no" and ("frames" in small.words or "480p" in small.words)
    none = fit_of(find_model("Wan2.1-14B"), card(2), disk())
    assert none.band == "no" and none.words.startswith("does not fit: needs ") and none.peak_bytes > none.budget_bytes


def test_it_is_told_before_anything_is_downloaded():
    for spec in all_models():
        assert fit_of(spec, card(24), Inventory()).words.startswith(("fits", "tight"))
