"""Which attention runs where a kernel did not prove itself: the next plainer kind, said in the clip's record."""

import pytest
import torch
from turbodiff_kernels import backend

from turbodiff.models.attention import resolve_attention

CARD, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def failing(monkeypatch):
    """Says which kernels fail their check on the card."""
    monkeypatch.delenv("TURBODIFF_KERNELS", raising=False)
    bad: set[str] = set()
    chosen = lambda op, device: backend.Implementation(op, "reference" if op in bad or device == CPU else "triton", "")  # noqa: E731
    monkeypatch.setattr(backend, "chosen", chosen)
    return bad


@pytest.mark.parametrize(
    ("asked", "bad", "ran"),
    [
        ("sagesla", set(), ("sagesla", "triton")),
        ("sagesla", {"sagesla"}, ("sla", "triton")),
        ("sagesla", {"sagesla", "sla"}, ("sla", "reference")),
        ("sla", {"sla"}, ("sla", "reference")),
        ("sage", {"sage"}, ("dense", "torch")),
        ("sage", {"sla"}, ("sage", "triton")),
        ("dense", set(), ("dense", "torch")),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(sorted(value)) or "none",
)
def test_a_kernel_that_failed_makes_room_for_the_next_plainer_kind(asked, bad, ran, failing):
    failing |= bad
    assert resolve_attention(asked, CARD) == ran


@pytest.mark.parametrize("kind", ["sage", "sla", "sagesla"])
def test_a_cpu_and_a_person_who_wants_references_get_those_of_what_was_asked(kind, failing, monkeypatch):
    assert resolve_attention(kind, CPU) == (kind, "reference")
    monkeypatch.setenv("TURBODIFF_KERNELS", "reference")
    failing |= {kind}
    assert resolve_attention(kind, CARD) == (kind, "reference")
