"""The VAE runs in float16 where it proved itself on the card, and in the device's dtype wherever it did not."""

from contextlib import nullcontext

import pytest
import torch
from turbodiff_kernels import backend

from tests.test_tiny import EventList
from turbodiff.plan.hardware import GpuFacts
from turbodiff.runtime import half_vae
from turbodiff.runtime.pipeline import generate


def test_a_vae_is_safe_only_where_its_frames_are_finite_and_near(attempt_of, models, monkeypatch):
    attempt_of()
    here, clip = torch.device("cpu"), half_vae.moving_shapes()
    monkeypatch.setattr(half_vae, "moving_shapes", lambda: clip[:, :, :1, ::8, ::8])  # a CPU is slow at float16
    assert half_vae.fault(models._load("vae", torch.float32), here) == ""
    monkeypatch.setattr(half_vae, "LEAST_DB", 150)
    assert "dB only" in half_vae.fault(models._load("vae", torch.float32), here)
    vae = models._load("vae", torch.float32)
    vae.decoder.conv_in.weight.data = 1e6 * vae.decoder.conv_in.weight  # which norms take back where it is finite
    assert half_vae.fault(vae, here) == "its frames are not finite"


def test_a_verdict_holds_for_a_file_on_a_card_until_a_clip_overflows(monkeypatch, tmp_path):
    card, tried = torch.device("cuda:1"), []
    monkeypatch.setenv("TURBODIFF_STATE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(backend, "arch", lambda device: 90)
    monkeypatch.setattr(backend, "current", lambda device: nullcontext())
    monkeypatch.setattr(half_vae, "fault", lambda vae, device: tried.append(vae) or vae)

    def usable(key, said):
        return half_vae.usable(key, card, lambda: said)

    assert usable("a", "") and usable("a", "never asked") and not usable("b", "50 dB are not reached")
    assert tried == ["", "50 dB are not reached"]
    half_vae.forbid("a", card)
    assert not usable("a", "") and len(tried) == 2
    assert not half_vae.usable("c", torch.device("cpu"), lambda: pytest.fail("tried on a CPU"))

    def full():
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert not half_vae.usable("c", card, full), "and what is not known is tried again"
    assert usable("c", "")


def test_a_clip_that_float16_cannot_hold_is_decoded_again_without(attempt_of, models, monkeypatch):
    """A CPU that passes for a card: the demo in float16, with a weight that makes its numbers infinite."""
    forbidden = []
    monkeypatch.setattr(half_vae, "usable", lambda key, device, wide: not forbidden)
    monkeypatch.setattr(half_vae, "forbid", lambda key, device: forbidden.append(key))
    attempt = attempt_of(seed=8)
    half = models.get_or_load("vae", torch.float16)
    assert half.dtype == torch.float16 and models.get_or_load("vae").dtype == torch.float32
    half.decoder.conv_in.weight.data = 1e6 * half.decoder.conv_in.weight
    generate(attempt)
    assert len(forbidden) == 1 and isinstance(attempt.send, EventList)
    decodes = [event.state for event in attempt.send.of("phase") if event.name == "vae_decode"]
    assert decodes == ["start", "start", "done"]


def test_a_trial_fits_into_the_decode_that_it_comes_before():
    """Bytes of float32 weights, and of the clip that is tried, on meta tensors."""
    from turbodiff.memory_lab.dry_run import Ledger
    from turbodiff.models.vae import make_vae
    from turbodiff.plan import phase_costs
    from turbodiff.plan.candidates import as_wished
    from turbodiff.plan.context import plan_context
    from turbodiff.plan.hardware import Machine
    from turbodiff.plan.offload_search import cost_inputs
    from turbodiff.spec.models import Inventory
    from turbodiff.spec.request import make_request

    with Ledger("meta") as ledger, torch.device("meta"):
        vae = make_vae(96)
        half_vae.vae_driver.decode(vae, half_vae.vae_driver.encode(vae, half_vae.moving_shapes().to("meta")))
    request = make_request({"prompt": "a cat", "model": "wan2.1-1.3b", "resolution": "480p", "num_frames": 5})
    machine = Machine(gpus=(GpuFacts(total_bytes=8 << 30, free_bytes=8 << 30, capability=(8, 9)),), gpu_state="ok")
    inputs = cost_inputs(request, as_wished(request, False), plan_context(machine, Inventory()))
    smallest = phase_costs.vae(inputs, "vae_decode", 32)
    assert ledger.peak_bytes <= smallest.weights_bytes + smallest.activations_bytes
