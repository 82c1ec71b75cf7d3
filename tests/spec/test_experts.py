"""Wan2.2's two experts: who runs at which step; what the plan says about it is what the samplers run."""

import pytest
from diffusers import UniPCMultistepScheduler

from turbodiff.sampling.samplers import timesteps as schedule
from turbodiff.spec.experts import TRAIN_STEPS, Expert, expert_at, experts_by_step, rcm_times, unipc_times
from turbodiff.spec.models import all_models

PATTERNS = {
    0.95: ["H", "HL", "HLL", "HLLL"],
    0.9: ["H", "HH", "HHL", "HHLL"],
    0.875: ["H", "HH", "HHL", "HHLL"],
    0.7: ["H", "HH", "HHH", "HHHL"],
    0.6: ["H", "HH", "HHH", "HHHH"],
    0.5: ["H", "HH", "HHH", "HHHH"],
}
BOUNDARIES = (0.5, 0.6, 0.7, 0.853, 0.875, 0.9, 0.933, 0.95, 0.985, 1.0)


def letters(experts):
    return "".join(expert.letter for expert in experts)


@pytest.mark.parametrize("boundary", PATTERNS)
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_the_table_of_experts(boundary, steps):
    assert letters(experts_by_step("sde", steps, 200.0, 5.0, boundary)) == PATTERNS[boundary][steps - 1]


def test_the_boundary_itself_is_still_high_noise():
    assert expert_at(0.9, 0.9) == "high" and expert_at(0.8999, 0.9) == "low"


def test_an_expert_names_its_files_its_phase_and_its_letter():
    assert [(e.component, e.phase, e.letter) for e in Expert] == [
        ("dit", "denoise", "S"),
        ("dit_high", "denoise_high", "H"),
        ("dit_low", "denoise_low", "L"),
    ]
    for spec in all_models():
        assert {e.component for e in spec.experts} == {f.component for f in spec.files if "dit" in f.component}


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 5.0, 7.3, 12.0, 20.0])
def test_unipc_is_planned_for_the_very_timesteps_of_diffusers(shift):
    for steps in (1, 2, 3, 7, 8, 20, 25, 30, 40, 50, 99, 100):
        scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
        scheduler.set_timesteps(steps)
        asked = (scheduler.timesteps.double() / TRAIN_STEPS).tolist()
        assert list(unipc_times(steps, shift)) == asked
        for boundary in BOUNDARIES:
            planned = experts_by_step("unipc", steps, 80.0, shift, boundary)
            assert planned == tuple(expert_at(t, boundary) for t in asked)


@pytest.mark.parametrize("sigma_max", [1.0, 80.0, 200.0, 1600.0, 100_000.0])
def test_rcm_is_planned_for_the_very_times_of_the_sampler(sigma_max):
    for steps in (1, 2, 3, 4):
        asked = schedule("sde", steps, sigma_max).tolist()[:-1]
        assert list(rcm_times(steps, sigma_max)) == asked
        for boundary in BOUNDARIES:
            planned = experts_by_step("sde", steps, sigma_max, 5.0, boundary)
            assert planned == tuple(expert_at(t, boundary) for t in asked)
