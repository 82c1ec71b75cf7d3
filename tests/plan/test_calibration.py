import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.plan.machines import ask, card, disk
from turbodiff.plan.calibration import (
    ESTIMATOR,
    HIGHEST,
    LOWEST,
    Calibration,
    History,
    Kind,
    Sample,
    work_bytes,
)
from turbodiff.plan.planner import plan_request
from turbodiff.spec.errors import DoesNotFitError
from turbodiff.spec.numbers import GIB, MIB

KIND = Kind(
    gpu="RTX 4090",
    total_bytes=24 * GIB,
    torch="2.11.0",
    cudnn="9.16",
    attention="sagesla",
    model="wan2.1-14b",
    int8=True,
    width=1280,
    height=720,
    num_frames=81,
)


def learned_from(samples, kind) -> Calibration:
    return History(samples).calibration(kind)


def sample(ratio: float, kind: Kind = KIND, **facts) -> Sample:
    return Sample(kind=kind, phase="denoise", predicted_bytes=GIB, measured_bytes=round(ratio * GIB), **facts)


def test_without_samples_the_formula_stands():
    assert learned_from([], KIND) == Calibration(1.0, 0)


def test_an_underestimate_counts_at_once_an_overestimate_slowly():
    assert abs(learned_from([sample(1.1)], KIND).factor - 1.1) < 1e-6
    once, often = learned_from([sample(0.9)], KIND).factor, learned_from([sample(0.9)] * 30, KIND).factor
    assert 0.9 < often < once < 1.0


def test_the_factor_is_bounded_both_ways():
    assert learned_from([sample(5.0)], KIND).factor == HIGHEST
    assert learned_from([sample(0.1)] * 50, KIND).factor == LOWEST


def test_a_wrong_sample_fades():
    assert learned_from([sample(1.2), *[sample(1.0)] * 50], KIND).factor < 1.01


def test_samples_of_another_torch_or_cudnn_teach_nothing():
    for other in ({"torch": "2.9.1"}, {"cudnn": "9.10"}, {"gpu": "RTX 3090"}, {"attention": "dense"}):
        assert learned_from([sample(1.2, KIND.model_copy(update=other))], KIND).samples == 0


def test_samples_of_an_older_formula_teach_nothing():
    assert learned_from([sample(1.2, estimator=ESTIMATOR - 1)], KIND).samples == 0


def test_a_new_shape_borrows_from_its_neighbours():
    short = KIND.model_copy(update={"num_frames": 49})
    small = KIND.model_copy(update={"num_frames": 49, "width": 832, "height": 480})
    assert abs(learned_from([sample(1.1, short)], KIND).factor - 1.1) < 1e-6
    assert abs(learned_from([sample(1.1, small)], KIND).factor - 1.1) < 1e-6


def test_what_an_old_sample_asks_for_fades():
    bad = sample(1.2)
    fresh, later = learned_from([bad], KIND).factor, learned_from([bad, *[sample(1.0)] * 15], KIND).factor
    assert 1.0 < later < fresh - 0.04
    assert learned_from([sample(1.2)] * 50, KIND).factor > 1.17  # what is still true stays


def test_a_run_that_failed_says_nothing_below_what_was_predicted():
    assert learned_from([sample(0.7, out_of_memory=True)], KIND).factor == 1.0


def test_small_phases_teach_nothing():
    small = Sample(kind=KIND, phase="text_encode", predicted_bytes=100 * MIB, measured_bytes=200 * MIB)
    assert learned_from([small] * 9, KIND).factor == 1.0


def calibrated(factor: float, samples: int = 5, measured: float | None = None) -> Calibration:
    return Calibration(factor, samples, factor if measured is None else measured)


@pytest.mark.parametrize("factor", [0.9, 1.0, 1.25])
@pytest.mark.parametrize("total_gib", [12, 80])
def test_a_corrected_plan_predicts_the_same_tensors_so_nothing_is_counted_twice(factor, total_gib):
    plain = plan_request(ask(), card(total_gib), disk())
    told = plan_request(plain.request, card(total_gib), disk(), policy="anyway", calibration=calibrated(factor))
    for before, after in zip(plain.phases, told.phases, strict=True):
        if before.activations_bytes == after.activations_bytes:  # the levers may differ
            assert abs(work_bytes(plain, before) - work_bytes(told, after)) <= 2
    decode = plain.phases[-2]
    assert decode.activations_bytes < work_bytes(plain, decode) < 1.1 * decode.activations_bytes + 100 * MIB


def test_a_true_underestimate_is_learned_once_and_does_not_grow_or_swing():
    """The machine needs 15 % more than the formula: every plan after the first says so, and none says more."""
    history: list[Sample] = []
    for _ in range(12):
        learned = learned_from(history, KIND)
        plan = plan_request(ask("wan2.1-1.3b"), card(24), disk(), calibration=learned if learned.samples else None)
        if history:
            assert 1.12 < learned.factor <= 1.1501
        for phase in plan.phases[1:-1]:
            work = work_bytes(plan, phase)
            history.append(Sample(kind=KIND, phase=phase.name, predicted_bytes=work, measured_bytes=round(1.15 * work)))


@given(
    st.lists(st.tuples(st.floats(0.3, 3.0), st.booleans(), st.integers(0, 600)), max_size=60),
    st.sampled_from([8, 10, 12, 16, 20, 24, 48]),
    st.sampled_from(["wan2.1-1.3b", "wan2.1-14b", "wan2.2-a14b"]),
)
@settings(max_examples=60, deadline=None)
def test_no_history_leaves_the_bounds_and_failed_runs_never_make_a_plan_refuse(history, total_gib, model):
    samples = [
        sample(ratio, out_of_memory=failed, neighbours_moved_bytes=moved * MIB) for ratio, failed, moved in history
    ]
    learned = learned_from(samples, KIND)
    without = learned_from([each for each in samples if not each.out_of_memory], KIND)
    assert LOWEST <= learned.factor <= HIGHEST
    assert learned.samples == 0 or learned.measured <= learned.factor
    assert without.factor == pytest.approx(learned.measured, abs=0.06)  # ages differ by the failed ones between
    pins = {"model", "resolution", "num_frames", "quant_linear"}
    request = ask(model, quant_linear="on", pinned=pins)
    try:
        plan_request(request, card(total_gib), disk(), calibration=learned._replace(factor=learned.measured))
    except DoesNotFitError:
        return  # good runs said so
    assert plan_request(request, card(total_gib), disk(), calibration=learned).band != "no"


def test_only_a_failed_run_lets_a_plan_fall_back_to_what_good_runs_measured():
    request = ask("wan2.1-1.3b", num_frames=81, resolution="720p", quant_linear="on",
                  pinned={"model", "resolution", "num_frames", "quant_linear"})  # fmt: skip
    sizes = [size / 8 for size in range(24, 120)]
    smallest = next(size for size in sizes if _fits(request, size, None))
    assert not _fits(request, smallest, calibrated(1.25))
    assert _fits(request, smallest, calibrated(1.25, measured=1.0))


def _fits(request, total_gib: float, calibration: Calibration | None) -> bool:
    try:
        return plan_request(request, card(total_gib), disk(), calibration=calibration).band != "no"
    except DoesNotFitError:
        return False
