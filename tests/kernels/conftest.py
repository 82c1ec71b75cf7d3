"""The kernels run in Triton's interpreter here, unless TRITON_INTERPRET=0 asks for the card."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

from contextlib import nullcontext

import pytest
import torch
from turbodiff_kernels import backend

from tests.soak import SOAK

DEVICE = "cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda"
LENGTHS = (1, 63, 64, 65, 127, 517, *([630] if SOAK else []))


@pytest.fixture(autouse=True)
def nan_filled_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a kernel is given and does not write shows up: new float tensors start as NaN, bytes as 99."""
    for name in ("new_empty", "empty_like"):
        owner = torch.Tensor if name == "new_empty" else torch
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


@pytest.fixture
def on_a_card(monkeypatch, tmp_path):
    """torch and the backend as on an H200, with a state folder of its own."""
    monkeypatch.setenv("TURBODIFF_STATE", str(tmp_path))
    monkeypatch.delenv("TURBODIFF_KERNELS", raising=False)
    monkeypatch.setattr(backend, "arch", lambda device: 90)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())


def _poisoned(make):
    def build(*args, **kwargs):
        tensor = make(*args, **kwargs)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 99)

    return build


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Reproducible normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device=DEVICE, dtype=dtype)


def relative_l2(got: torch.Tensor, expected: torch.Tensor) -> float:
    """|got - expected| / |expected|; NaN anywhere gives NaN, which fails every bound."""
    got, expected = got.double(), expected.double()
    return ((got - expected).norm() / expected.norm().clamp_min(1e-30)).item()
