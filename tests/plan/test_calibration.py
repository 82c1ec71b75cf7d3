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
    kind_of,
    provenance_of,
    work_bytes,
)
from turbodiff.plan.planner import plan_request
from turbodiff.spec.errors import DoesNotFitError
from turbodiff.spec.models import FoundNetwork
from turbodiff.spec.numbers import GIB, MIB
from turbodiff.spec.plan import Lesson, Phase, Plan, learned_factor

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


def learned_from(samples, kind=KIND) -> Lesson:
    """The one lesson of samples of one clip and phase."""
    found = History(samples).calibration(provenance_of(kind)).lessons
    assert len(found) <= 1
    return found[0] if found else Lesson("denoise", kind.model, kind.int8, kind.attention, "", (81, 720, 1280))


def sample(ratio: float, kind: Kind = KIND, **facts) -> Sample:
    return Sample(kind=kind, phase="denoise", predicted_bytes=GIB, measured_bytes=round(ratio * GIB), **facts)


def held(ratio: float, **facts) -> Sample:
    """A run whose tensors took what the formula says, and its allocator `ratio` times what that says with its slack."""
    return sample(0.5, slack_bytes=GIB, held_bytes=round(2 * ratio * GIB), **facts)


def of_plan(plan: Plan, phase: Phase, ratio: float, machine=None, **facts) -> Sample:
    """A run of a plan's phase whose tensors took `ratio` times what the formula says."""
    machine = machine or card(24)
    work = work_bytes(plan, phase)
    kind = kind_of(machine.gpus[0], machine, plan.request, plan.levers)
    slack = {"slack_bytes": phase.slack_bytes}
    measured = {"measured_bytes": round(ratio * work), "predicted_bytes": work}
    return Sample.model_validate({"kind": kind, "phase": phase.name, **slack, **measured, **facts})


def test_without_samples_the_formula_stands():
    assert History([]).calibration(provenance_of(KIND)) == Calibration()


def test_an_underestimate_counts_at_once_an_overestimate_slowly():
    assert abs(learned_from([sample(1.1)]).factor - 1.1) < 1e-6
    once, often = learned_from([held(0.9)]).factor, learned_from([held(0.9)] * 30).factor
    assert 0.9 < often < once < 1.0


def test_the_factor_is_bounded_both_ways():
    assert learned_from([sample(5.0)]).factor == HIGHEST
    assert learned_from([held(0.3)] * 50).factor == LOWEST


def test_what_the_allocator_holds_and_not_what_tensors_take_lowers_a_prediction():
    """Tensors that take less say nothing: the cap counts what the allocator took to place them."""
    assert learned_from([sample(0.6)] * 50).factor == 1.0
    assert learned_from([held(1.0)] * 50).factor == 1.0
    assert learned_from([held(1.3)] * 50).factor == 1.0  # what it keeps and would give again is no need
    assert learned_from([held(0.95)] * 50).factor == pytest.approx(0.95, abs=0.01)


@given(st.lists(st.floats(0.5, 1.5), min_size=1, max_size=60))
@settings(max_examples=60, deadline=None)
def test_a_correction_never_goes_below_the_most_that_was_measured(ratios):
    assert learned_from([held(ratio) for ratio in ratios]).factor >= min(1.0, max(ratios[-50:])) - 1e-6


def test_a_wrong_sample_fades():
    assert learned_from([sample(1.2), *[sample(1.0)] * 50]).factor < 1.01


@pytest.mark.parametrize(
    "other",
    [
        {"torch": "2.9.1"}, {"cudnn": "9.10"}, {"gpu": "RTX 3090"}, {"driver": "580"}, {"allocator": "native"},
        {"kernels": "norm"}, {"total_bytes": 16 * GIB},
    ],
    ids=str,
)  # fmt: skip
def test_samples_of_another_torch_or_cudnn_teach_nothing(other):
    """Nor of another card, driver, allocator or set of kernels."""
    found = History([sample(1.2, KIND.model_copy(update=other))]).calibration(provenance_of(KIND))
    assert found == Calibration()


@pytest.mark.parametrize("other", [{"model": "wan2.1-1.3b"}, {"quant_linear": "off"}, {"attention": "sage"}], ids=str)
def test_another_model_or_form_of_its_blocks_learns_nothing(other):
    here, request = card(24), ask("wan2.1-14b", quant_linear="on")
    plain = plan_request(request, here, disk())
    history = History([of_plan(plain, phase, 1.2) for phase in plain.phases if phase.name == "denoise"])
    asked = ask(**{"model": "wan2.1-14b", "quant_linear": "on", **other})
    assert plan_request(request, here, disk(), history=history).phases != plain.phases
    assert plan_request(asked, here, disk(), history=history) == plan_request(asked, here, disk())


def test_samples_of_an_older_formula_teach_nothing():
    assert History([sample(1.2, estimator=ESTIMATOR - 1)]).calibration(provenance_of(KIND)) == Calibration()


def test_a_clip_teaches_upwards_about_smaller_ones_and_never_about_larger_ones():
    lesson = learned_from([sample(1.2)])
    factors = [learned_factor([lesson], "denoise", "", round(size * GIB)) for size in (0.5, 0.98, 1.0, 1.02, 2.0)]
    assert factors == [pytest.approx(1.2)] * 3 + [1.0] * 2
    lower = learned_from([held(0.95)] * 50)
    factors = [learned_factor([lower], "denoise", "", round(2 * size * GIB)) for size in (0.5, 0.98, 1.0, 1.02, 2.0)]
    assert factors == [1.0, 1.0, pytest.approx(0.95, abs=0.01), 1.0, 1.0]


@pytest.mark.parametrize("frames, learns", [(49, True), (81, True), (113, False)])
def test_plans_of_other_lengths_learn_from_longer_clips_alone(frames, learns):
    here = card(48)
    fields = {"model": "wan2.1-1.3b", "resolution": "480p", "quant_linear": "on"}
    measured = plan_request(ask(num_frames=81, **fields), here, disk())
    history = History([of_plan(measured, phase, 1.2, here) for phase in measured.phases if phase.name == "vae_decode"])
    plain, told = (
        plan_request(ask(num_frames=frames, **fields), here, disk(), history=known) for known in (None, history)
    )
    changed = {phase.name for phase, before in zip(told.phases, plain.phases, strict=True) if phase != before}
    whole = measured.levers.vae == "whole"
    assert whole
    assert changed in ({"vae_decode"}, set()) and (bool(changed) == learns or frames > 81)


def test_each_phase_learns_for_itself():
    here = card(24)
    plain = plan_request(ask("wan2.1-1.3b"), here, disk())
    (decode,) = [phase for phase in plain.phases if phase.name == "vae_decode"]
    told = plan_request(ask("wan2.1-1.3b"), here, disk(), history=History([of_plan(plain, decode, 1.1)]))
    for before, after in zip(plain.phases, told.phases, strict=True):
        assert (after.learned_bytes > 0) == (after.name == "vae_decode")
        assert after.peak_bytes - after.learned_bytes == before.peak_bytes


def test_what_an_old_sample_asks_for_fades():
    bad = sample(1.2)
    fresh, later = learned_from([bad]).factor, learned_from([bad, *[sample(1.0)] * 15]).factor
    assert 1.0 < later < fresh - 0.04
    assert learned_from([sample(1.2)] * 50).factor > 1.17  # what is still true stays


def timed(plan: Plan, factor: float, machine) -> list[Sample]:
    """Runs of a plan, each phase of which took `factor` times as long as the formula says."""
    gpu = machine.gpus[0] if machine.gpus else None
    kind = kind_of(gpu, machine, plan.request, plan.levers)
    nothing = {"predicted_bytes": 0, "measured_bytes": 0}
    return [
        Sample(
            kind=kind,
            phase=phase.name,
            **nothing,
            predicted_s=phase.seconds,
            measured_s=factor * phase.seconds,
            network=plan.request.networks.get(phase.name),
        )
        for phase in plan.phases
    ]


@pytest.mark.parametrize("machine", [card(24), card(24).model_copy(update={"gpus": ()})], ids=["card", "cpu"])
@pytest.mark.parametrize("factor", [0.5, 4.0])
def test_seconds_are_those_that_runs_took_and_change_no_choice(machine, factor):
    request = ask("wan2.1-1.3b", num_frames=49)
    plain = plan_request(request, machine, disk())
    history = History(timed(plain, factor, machine))
    told = plan_request(request, machine, disk(), history=history)
    assert told.seconds == pytest.approx(factor * plain.seconds, rel=0.02)
    assert (told.request, told.levers, told.peak_bytes) == (plain.request, plain.levers, plain.peak_bytes)
    assert [phase.seconds - phase.learned_s for phase in told.phases] == pytest.approx(
        [phase.seconds for phase in plain.phases], abs=0.002
    )
    again = History(timed(told.model_copy(update={"phases": plain.phases}), factor, machine) * 9)
    assert plan_request(request, machine, disk(), history=again).seconds == pytest.approx(told.seconds, rel=0.02)
    longer = ask("wan2.1-1.3b", num_frames=81)
    shown, formula = (plan_request(longer, machine, disk(), history=known).seconds for known in (history, None))
    assert shown == pytest.approx(factor * formula, rel=0.05)


def test_what_one_network_behind_the_decode_took_says_nothing_of_another():
    machine = card(24)
    files = [("interpolator", "rife.pkl"), ("upscaler", "x4.pth"), ("upscaler", "other.pth")]
    found = [FoundNetwork(kind=kind, name=name, path=name, bytes=64 * MIB) for kind, name in files]
    here = disk().model_copy(update={"networks": tuple(found)})

    def planned(history=None, **by):
        return plan_request(ask("wan2.1-1.3b", smooth_fps=60, upscale=2, **by), machine, here, history=history)

    def factors(history, **by):
        told, formula = planned(history, **by), planned(**by)
        pairs = zip(told.phases, formula.phases, strict=True)
        return [round(one.seconds / other.seconds) for one, other in pairs if one.name in ("interpolate", "upscale")]

    own = {"interpolator": "rife.pkl", "upscaler": "x4.pth"}
    by_ffmpeg, by_networks = timed(planned(), 9.0, machine), timed(planned(**own), 5.0, machine)
    assert factors(History(by_ffmpeg)) == [9, 9] and factors(History(by_ffmpeg), **own) == [1, 1]
    both = History(by_ffmpeg + by_networks)
    assert factors(both) == [9, 9] and factors(both, **own) == [5, 5]
    assert factors(both, **{**own, "upscaler": "other.pth"}) == [5, 1]
    old = [Sample.model_validate(one.model_dump(exclude={"network"})) for one in by_networks]
    assert factors(History(old)) == factors(History(old), **own) == [1, 1]  # nobody knows by what they were made
    assert planned(History(old)).phases[0].seconds == pytest.approx(5 * planned().phases[0].seconds, rel=0.02)


def test_a_text_that_was_known_teaches_no_seconds():
    machine = card(24)
    plain = plan_request(ask("wan2.1-1.3b"), machine, disk())
    (text, *_) = timed(plain, 0.001, machine)
    assert plan_request(ask("wan2.1-1.3b"), machine, disk(), history=History([text])).seconds == plain.seconds


def test_a_run_that_failed_says_nothing_below_what_was_predicted():
    assert learned_from([sample(0.7, out_of_memory=True)]).factor == 1.0


def test_small_phases_teach_nothing():
    small = Sample(kind=KIND, phase="text_encode", predicted_bytes=100 * MIB, measured_bytes=200 * MIB)
    assert History([small] * 9).calibration(provenance_of(KIND)) == Calibration()


def calibrated(plan: Plan, factor: float, measured: float | None = None) -> Calibration:
    """What would make each phase of a plan larger by a factor."""
    request, least = plan.request, factor if measured is None else measured
    shape = (request.num_frames, request.height, request.width)
    lessons = []
    for phase in plan.phases:
        steps, vae = phase.name == "denoise", phase.name == "vae_decode"
        form = (request.quant_linear == "on", request.attention) if steps else (False, "")
        about = (phase.name, request.model, *form, plan.levers.vae if vae else "", shape)
        lessons.append(Lesson(*about, work_bytes(plan, phase) + phase.slack_bytes, factor, least, 5))
    return Calibration(tuple(lessons))


@pytest.mark.parametrize("factor", [0.9, 1.0, 1.25])
@pytest.mark.parametrize("total_gib", [12, 80])
def test_a_corrected_plan_predicts_the_same_tensors_so_nothing_is_counted_twice(factor, total_gib):
    plain = plan_request(ask(), card(total_gib), disk())
    told = plan_request(plain.request, card(total_gib), disk(), policy="anyway", calibration=calibrated(plain, factor))
    for before, after in zip(plain.phases, told.phases, strict=True):
        if before.activations_bytes == after.activations_bytes:  # the levers may differ
            assert abs(work_bytes(plain, before) - work_bytes(told, after)) <= 2
    decode = plain.phases[-2]
    assert decode.activations_bytes < work_bytes(plain, decode) < 1.1 * decode.activations_bytes + 100 * MIB


def test_a_true_underestimate_is_learned_once_and_does_not_grow_or_swing():
    """The machine needs 15 % more than the formula: every plan after the first says so, and none says more."""
    samples: list[Sample] = []
    peaks = []
    for _ in range(12):
        plan = plan_request(ask("wan2.1-1.3b"), card(24), disk(), history=History(samples))
        (decode,) = [phase for phase in plan.phases if phase.name == "vae_decode"]
        peaks.append(decode.peak_bytes)
        if samples:
            assert 1.12 < decode.learned_bytes / (work_bytes(plan, decode) + decode.slack_bytes) + 1 <= 1.1501
        samples += [of_plan(plan, phase, 1.15) for phase in plan.phases[1:-1]]
    assert len(set(peaks)) == 2 or peaks[1:] == sorted(peaks[1:], reverse=True)  # what is old fades


@given(
    st.lists(st.tuples(st.floats(0.3, 3.0), st.booleans(), st.integers(0, 600)), max_size=60),
    st.sampled_from([8, 10, 12, 16, 20, 24, 48]),
    st.sampled_from(["wan2.1-1.3b", "wan2.1-14b", "wan2.2-a14b"]),
)
@settings(max_examples=60, deadline=None)
def test_no_history_leaves_the_bounds_and_failed_runs_never_make_a_plan_refuse(told, total_gib, model):
    pins = {"model", "resolution", "num_frames", "quant_linear"}
    request, here = ask(model, quant_linear="on", pinned=pins), card(total_gib)
    plan = plan_request(request, here, disk(), policy="anyway")
    decode = next(phase for phase in plan.phases if phase.name == "vae_decode")
    samples = [
        of_plan(plan, decode, ratio, here, out_of_memory=failed, neighbours_moved_bytes=moved * MIB)
        for ratio, failed, moved in told
    ]
    for lesson in History(samples).calibration(provenance_of(of_plan(plan, decode, 1, here).kind)).lessons:
        assert LOWEST <= lesson.measured <= lesson.factor <= HIGHEST
    good = History([one for one in samples if not one.out_of_memory])
    try:
        plan_request(request, here, disk(), history=good)
    except DoesNotFitError:
        return  # good runs said so
    assert plan_request(request, here, disk(), history=History(samples)).band != "no"


def test_only_a_failed_run_lets_a_plan_fall_back_to_what_good_runs_measured():
    request = ask("wan2.1-1.3b", num_frames=81, resolution="720p", quant_linear="on",
                  pinned={"model", "resolution", "num_frames", "quant_linear"})  # fmt: skip
    sizes = [size / 8 for size in range(24, 120)]
    smallest = next(size for size in sizes if _fits(request, size))
    assert not _fits(request, smallest, 1.25)
    assert _fits(request, smallest, 1.25, measured=1.0)


def _fits(request, total_gib: float, factor: float | None = None, measured: float | None = None) -> bool:
    known = None
    if factor is not None:
        plan = plan_request(request, card(total_gib), disk(), policy="anyway")
        known = calibrated(plan, factor, measured)
    try:
        return plan_request(request, card(total_gib), disk(), calibration=known).band != "no"
    except DoesNotFitError:
        return False
