"""The plan's schedule is the sampler's: what it says about experts is what runs."""

import pytest

from turbodiff.plan.experts import experts_by_step, timesteps
from turbodiff.sampling.experts import experts_for
from turbodiff.sampling.schedule import rcm_timesteps
from turbodiff.sampling.unipc import unipc_timesteps

BOUNDARIES = (0.5, 0.6, 0.7, 0.853, 0.875, 0.9, 0.933, 0.95, 0.985, 1.0)


def experts_that_run(times, boundary):
    return "".join("H" if expert == "high" else "L" for expert in experts_for(times, boundary))


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 5.0, 7.3, 12.0, 20.0])
def test_unipc_is_planned_for_the_very_timesteps_of_diffusers(shift):
    for steps in (1, 2, 3, 7, 8, 20, 25, 30, 40, 50, 99, 100):
        asked = unipc_timesteps(steps, shift)
        planned = timesteps("unipc", steps, 80.0, shift)
        assert planned == asked.tolist()[:-1]
        for boundary in BOUNDARIES:
            assert experts_by_step(planned, boundary) == experts_that_run(asked, boundary)


@pytest.mark.parametrize("sigma_max", [1.0, 80.0, 200.0, 1600.0, 100_000.0])
def test_rcm_is_planned_for_the_very_times_of_the_sampler(sigma_max):
    for steps in (1, 2, 3, 4):
        asked = rcm_timesteps(steps, sigma_max)
        planned = timesteps("sde", steps, sigma_max, 5.0)
        assert planned == pytest.approx(asked.tolist()[:-1], abs=1e-15)
        for boundary in BOUNDARIES:
            assert experts_by_step(planned, boundary) == experts_that_run(asked, boundary)
