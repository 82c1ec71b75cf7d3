"""Wan2.2's two experts: who runs at which step."""

import pytest

from turbodiff.sampling.experts import expert_at, experts_for
from turbodiff.sampling.schedule import rcm_timesteps

PATTERNS = {
    0.95: ["H", "HL", "HLL", "HLLL"],
    0.9: ["H", "HH", "HHL", "HHLL"],
    0.875: ["H", "HH", "HHL", "HHLL"],
    0.7: ["H", "HH", "HHH", "HHHL"],
    0.6: ["H", "HH", "HHH", "HHHH"],
    0.5: ["H", "HH", "HHH", "HHHH"],
}


@pytest.mark.parametrize("boundary", PATTERNS)
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_the_table_of_experts(boundary, steps):
    ran = experts_for(rcm_timesteps(steps, 200.0), boundary)
    assert "".join(expert[0].upper() for expert in ran) == PATTERNS[boundary][steps - 1]


def test_the_boundary_itself_is_still_high_noise():
    assert expert_at(0.9, 0.9) == "high" and expert_at(0.8999, 0.9) == "low"
