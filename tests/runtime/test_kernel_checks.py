"""Kernels are checked before the first phase of the first clip on a card, and never in the middle of a step."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from turbodiff_kernels import backend

from turbodiff.runtime.attempt import Attempt
from turbodiff.spec.events import NoticeEvent


@pytest.fixture
def attempt(monkeypatch):
    """One on a second card that nobody has, with what it sends."""
    sent: list[NoticeEvent] = []
    monkeypatch.setattr(backend, "arch", lambda device: 89)
    models = SimpleNamespace(device=SimpleNamespace(torch_device=torch.device("cuda:1")))
    here = Path()
    return Attempt(1, 1, None, here, here, models, sent.append, None), sent  # type: ignore[arg-type]


def unchecked(op, device):
    return backend.Implementation(op, "triton", "unchecked")


def test_a_new_card_hears_of_every_kernel_that_is_checked(attempt, monkeypatch):
    attempt, sent = attempt
    monkeypatch.setattr(backend, "expected", unchecked)
    monkeypatch.setattr(backend, "chosen", lambda op, device: backend.Implementation(op, "triton", "equal"))
    attempt.check_kernels()
    assert [event.numbers["n"] for event in sent] == list(range(1, len(backend.OPS) + 1))
    assert {event.key for event in sent} == {"kernels_checked"}


def test_a_card_that_is_known_checks_nothing(attempt, monkeypatch):
    attempt, sent = attempt
    monkeypatch.setattr(backend, "expected", lambda op, device: backend.Implementation(op, "triton", "equal"))
    monkeypatch.setattr(backend, "chosen", lambda op, device: pytest.fail("checked again"))
    attempt.check_kernels()
    assert sent == []


def test_a_full_card_is_left_to_the_phases(attempt, monkeypatch):
    def full(op, device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(backend, "expected", unchecked)
    monkeypatch.setattr(backend, "chosen", full)
    attempt[0].check_kernels()
