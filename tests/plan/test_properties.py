"""What must hold for every request on every machine; 2,000 cases and more, all by arithmetic."""

import os

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.plan.machines import ask, converted, disk, gpu, machine
from turbodiff.plan.candidates import SIZE_PINS, WORTHWHILE_FRAMES, as_wished, candidates, smaller_models
from turbodiff.plan.context import plan_context
from turbodiff.plan.memory_limits import NEARLY
from turbodiff.plan.offload_search import evaluate, settled
from turbodiff.plan.planner import LOSSY_FIELDS, SLOW, plan_request
from turbodiff.spec.errors import DoesNotFitError
from turbodiff.spec.models import all_models
from turbodiff.spec.numbers import GIB

# TURBODIFF_PLAN_CASES=30000 for a long run
COUNT = int(os.environ.get("TURBODIFF_PLAN_CASES", "200"))
CASES = settings(max_examples=COUNT, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)

MODELS = [spec.name for spec in all_models() if spec.turbo]  # published files are distilled for rCM
PINS = st.sets(st.sampled_from(["model", "resolution", "num_frames", "quant_linear"]))


@st.composite
def requests(draw, pins=PINS):
    model = draw(st.sampled_from(MODELS))
    if "demo" in model:
        return ask(model, num_frames=draw(st.sampled_from([5, 9, 17])), pinned=draw(pins))
    size = draw(
        st.one_of(
            st.fixed_dictionaries(
                {"resolution": st.sampled_from(["480p", "720p"]), "aspect": st.sampled_from(["16:9", "1:1"])}
            ),
            st.builds(lambda w, h: {"size": f"{16 * w}x{16 * h}"}, st.integers(16, 90), st.integers(16, 90)),
        )
    )
    return ask(
        model,
        **size,
        num_frames=draw(st.sampled_from([5, 17, 49, 57, 81, 121, 161])),
        steps=draw(st.integers(1, 4)),
        quant_linear=draw(st.sampled_from(["auto", "on", "off"])),
        attention=draw(st.sampled_from(["auto", "dense", "sage", "sla", "sagesla"])),
        pinned=draw(pins),
    )


VRAM_GIB = st.one_of(st.floats(1, 8), st.floats(2, 150))  # losses happen below 8 GiB
RAM_GIB = st.one_of(st.none(), st.floats(2, 200))
DISKS = st.sampled_from(
    [
        *(disk(), disk("wan2.1-14b", "wan2.2-a14b"), disk(quant=(True,)), disk(quant=(False,)), disk("demo")),
        *(converted(disk()), converted(disk(), 200)),
    ]
)


@st.composite
def machines(draw, vram_gib=VRAM_GIB):
    if draw(st.integers(0, 9)) == 0:
        return machine(ram_gib=draw(RAM_GIB))
    total = draw(vram_gib)
    used = draw(st.floats(0, 0.9)) * total
    facts = {"free_bytes": round((total - used) * GIB), "used_bytes": round(used * GIB)}
    return machine(gpu(total, **facts, pcie_bytes_s=draw(st.sampled_from([None, 1e9, 25e9]))), ram_gib=draw(RAM_GIB))


def plan_or_refusal(request, where, inventory, **more):
    try:
        return plan_request(request, where, inventory, **more)
    except DoesNotFitError as error:
        return error


@CASES
@given(requests(), machines(), DISKS)
def test_a_plan_is_never_over_budget(request, where, inventory):
    plan = plan_or_refusal(request, where, inventory)
    assume(not isinstance(plan, DoesNotFitError))
    assert plan.band in ("fits", "tight")
    assert plan.peak_bytes == max(phase.peak_bytes for phase in plan.phases) <= plan.budget_bytes
    if where.ram_available_bytes is not None:
        assert all(phase.host_ram_bytes <= where.ram_available_bytes for phase in plan.phases)


@CASES
@given(requests(), machines(), DISKS)
def test_pins_are_kept_and_nothing_is_raised(request, where, inventory):
    plan = plan_or_refusal(request, where, inventory)
    assume(not isinstance(plan, DoesNotFitError))
    after = plan.request
    for field in request.pinned:
        if getattr(request, field) != "auto" and not (field == "quant_linear" and after.quant_linear == "on"):
            assert getattr(after, field) == getattr(request, field)
    assert after.num_frames <= request.num_frames
    assert after.width * after.height <= request.width * request.height
    assert after.spec.dit.dim <= request.spec.dit.dim
    same = ["prompt", "seed", "boundary", "topk", "fps", "kind", "pinned"]
    if after.spec.turbo:  # distilled for rCM; Wan2.1-I2V-14B, which may stand in for the pair, is not
        assert after.sampler == "sde"
        same.append("steps")
    assert all(getattr(after, field) == getattr(request, field) for field in same)


@CASES
@given(requests(), machines(), DISKS)
def test_a_plan_applied_to_itself_changes_nothing(request, where, inventory):
    plan = plan_or_refusal(request, where, inventory)
    assume(not isinstance(plan, DoesNotFitError))
    again = plan_request(plan.request, where, inventory)
    assert again.changes == ()
    assert (again.request, again.levers, again.phases) == (plan.request, plan.levers, plan.phases)


@CASES
@given(requests(), machines(), DISKS)
def test_the_same_input_gives_the_same_plan(request, where, inventory):
    first, second = (plan_or_refusal(request, where, inventory) for _ in range(2))
    assert str(first) == str(second)


def quality(request, wish):
    """Smaller is better: the planner's order of sacrifice. INT8 is a loss only where plain weights were asked for."""
    model = [request.model, *(spec.name for spec in all_models())].index(request.model)
    sizes = -request.spec.dit.dim, model
    few = sum(request.num_frames < worthwhile for worthwhile in WORTHWHILE_FRAMES)
    return (
        few,
        sizes,
        -request.width * request.height,
        -request.num_frames,
        (wish.quant_linear, request.quant_linear) == ("off", "on"),
    )


def is_slow(plan, request, where, inventory):
    first = next(candidates(plan.request, where, inventory, None, frozenset()))
    chosen = as_wished(plan.request, first.int8)
    return plan.seconds > SLOW * evaluate(request, chosen, plan_context(where, inventory), unlimited=True).seconds


@CASES
@given(requests(), VRAM_GIB, st.floats(0, 40), DISKS, st.sampled_from([None, 1e9]))
def test_more_memory_never_gives_a_worse_choice(request, total, more, inventory, pcie):
    """Worse in the planner's order: a choice that its levers do not slow down first, then the order of sacrifice."""
    small, big = (machine(gpu(size, pcie_bytes_s=pcie)) for size in (total, total + more))
    before, after = plan_or_refusal(request, small, inventory), plan_or_refusal(request, big, inventory)
    if isinstance(before, DoesNotFitError):
        return
    assert not isinstance(after, DoesNotFitError)
    ranks = [
        (is_slow(plan, request, where, inventory), quality(plan.request, request))
        for plan, where in ((after, big), (before, small))
    ]
    assert ranks[0] <= ranks[1]
    if before.request == after.request:
        assert after.seconds <= before.seconds * NEARLY


@CASES
@given(requests(), VRAM_GIB, st.floats(0, 40))
def test_the_same_choice_is_never_slower_with_more_memory(request, total, more):
    """Beyond what "nearly as fast and fits with ease" may cost."""
    small, big = (plan_context(machine(gpu(size)), disk()) for size in (total, total + more))
    for choice in (next(candidates(request, small.machine, disk(), None, frozenset())),):
        before, after = evaluate(request, choice, small), evaluate(request, choice, big)
        if before.fits:
            assert after.fits
            assert after.seconds <= before.seconds * NEARLY


@CASES
@given(requests(), machines(), DISKS)
def test_a_choice_is_never_slower_and_not_better_than_one_that_was_skipped(request, where, inventory):
    plan = plan_or_refusal(request, where, inventory)
    assume(not isinstance(plan, DoesNotFitError))
    context = plan_context(where, inventory)
    for skipped in settled(request, context, request.pinned):
        if skipped.visible == (plan.request.model, plan.request.width, plan.request.height, plan.request.num_frames):
            break
        cost = evaluate(request, skipped, context)
        assert not cost.fits or cost.seconds > plan.seconds - 0.01


@CASES
@given(requests(pins=st.just(set())), machines(), DISKS)
def test_lossless_levers_come_before_losses(request, where, inventory):
    """Whenever the wish fits and its levers do not make it three times slower, nothing of it is given up."""
    as_asked = plan_or_refusal(request, where, inventory, policy="never")
    assume(not isinstance(as_asked, DoesNotFitError))
    assume(not is_slow(as_asked, request, where, inventory))
    plan = plan_request(request, where, inventory)
    lossy = {change.field for change in plan.changes if change.lossy}
    assert lossy <= {"quant_linear"} if request.quant_linear == "off" else not lossy


@CASES
@given(requests(), machines(st.floats(0.5, 7)), DISKS)
def test_every_refusal_names_a_release_that_fits_or_shows_that_none_does(request, where, inventory):
    refusal = plan_or_refusal(request, where, inventory)
    assume(isinstance(refusal, DoesNotFitError))
    assert refusal.try_instead
    released = set(refusal.field.split(" and ")) if refusal.field else set(LOSSY_FIELDS)
    if "resolution" in released:
        released |= SIZE_PINS
    freed = request.model_copy(update={"pinned": request.pinned - released})
    assert isinstance(plan_or_refusal(freed, where, inventory), DoesNotFitError) == (not refusal.field)


def test_the_ladder_of_models_never_ends_at_the_demo():
    assert all(not other.bundled for spec in all_models() for other in smaller_models(spec))
