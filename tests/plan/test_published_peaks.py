"""Peaks that others published, from our weights and the stream N = 2 L d with the activations that their code holds.

The multiples of N are those of the unfused blocks of each system (diffusers 11, TurboDiffusion 15, SceneWorks' ComfyUI
16.6, Wan2.2 with float32 modulation of every token 39-40): read off their code or implied by other rows of a system.
"""

import pytest

from turbodiff.plan.weight_sizes import weights_of
from turbodiff.spec.models import find_model
from turbodiff.spec.numbers import GIB

TOKENS = {"480p": 32_760, "720p": 75_600}  # 81 frames
# system and source, published GiB, INT8, size, networks that are resident, copies of N
ROWS = [
    ("diffusers, one forward, H100: HF diffusers/benchmarks", 30.2, False, "480p", 1, 11.1),
    ("SGLang, both experts, text on the CPU: PR 15610", 58.3, False, "480p", 2, 11.0),
    ("TurboDiffusion, after load, 5090: #42", 13.56, True, "480p", 1, 0.0),
    ("TurboDiffusion, unquantised, 48 GB card: #113", 37.3, False, "720p", 1, 15.0),
    ("SceneWorks, A14B bf16: builtin.models.jsonc", 38.56, False, "720p", 1, 16.6),
    ("SceneWorks, A14B q8: builtin.models.jsonc", 27.95, True, "720p", 1, 16.6),
    ("Wan2.2, A14B offloaded, 480p: comp_effic.png", 38.5, False, "480p", 1, 39.0),
    ("Wan2.2, A14B offloaded, 720p: comp_effic.png", 55.7, False, "720p", 1, 40.0),
]


@pytest.mark.parametrize(["source", "published", "int8", "size", "networks", "units"], ROWS, ids=[r[0] for r in ROWS])
def test_with_their_assumptions_our_arithmetic_gives_their_peak(source, published, int8, size, networks, units):
    spec = find_model("wan2.1-14b")
    stream = 2 * TOKENS[size] * spec.dit.dim
    ours = (networks * weights_of(spec, int8, 2).dit + units * stream) / GIB
    assert source
    assert ours == pytest.approx(published, rel=0.1)
