"""The kernels, not only their references, agree with TurboDiffusion's outputs in every file of $TURBODIFF_GOLDENS."""

import pytest
import torch

from tests.goldens.test_goldens import FILES, Golden, check_for, check_int8, check_sla

pytestmark = pytest.mark.goldens
CHECKS = {path: check_for(Golden(path)) for path in FILES}


@pytest.mark.parametrize(
    "path", [path for path, check in CHECKS.items() if check in (check_sla, check_int8)], ids=lambda path: path.stem
)
def test_kernel_agrees_with_the_reference_file(path, monkeypatch):
    monkeypatch.setenv("TURBODIFF_KERNELS", "triton")
    with torch.no_grad():
        CHECKS[path](Golden(path))
