"""Between two phases: what had stayed on the card leaves when a neighbour grew. Cards of people, networks on meta."""

import pytest
import torch

from tests.plan.machines import ask, card, disk
from tests.runtime.small_card import CardLedger, Counted
from tests.test_tiny import EventList, NoCommands
from turbodiff.memory_lab.measure import DummyModels
from turbodiff.models import vae as vae_driver
from turbodiff.plan.hardware import CONTEXT_BYTES
from turbodiff.plan.planner import plan_request
from turbodiff.runtime import offload, replan
from turbodiff.runtime.attempt import Attempt
from turbodiff.runtime.device import Device
from turbodiff.runtime.model_cache import ModelCache
from turbodiff.spec.errors import OutOfMemoryError
from turbodiff.spec.numbers import GIB

META_CARD = torch.device("meta", 0)  # another device than "meta" to torch, so that moving there allocates


class MetaCache(ModelCache):
    """A model cache whose networks have their sizes and no numbers."""

    def __init__(self, spec, cap_bytes):
        self.ledger = CardLedger("meta", cap_bytes)
        self.full_bytes = cap_bytes
        super().__init__(Counted(META_CARD, "a card", torch.bfloat16, self.ledger, lambda: self.ledger.cap_bytes))
        made = DummyModels(spec, Device(torch.device("meta"), "host", torch.bfloat16))
        for name in ("text_encoder", "vae", "dit"):
            self._kept[name] = made.get_or_make(name)
            self.ledger.ignore(self._kept[name])

    def get_or_load(self, component, dtype=None):
        assert dtype is None
        return self._kept[component]

    def _half_vae(self, plan):
        return False

    def neighbour_takes(self, n_bytes):
        self.ledger.cap_bytes = self.full_bytes - n_bytes


@pytest.fixture
def on_4090(monkeypatch, tmp_path):
    """An attempt at a clip of the 1.3B model on a 24 GiB card, where all networks stay once they came."""
    monkeypatch.setattr(replan, "inventory", disk)
    plan = plan_request(ask("wan2.1-1.3b", resolution="720p", num_frames=17, quant_linear="off"), card(24), disk())
    assert (plan.levers.text, plan.levers.experts, plan.levers.vae) == ("resident", "resident", "whole")
    models, events = MetaCache(plan.request.spec, 24 * GIB - CONTEXT_BYTES), EventList()
    attempt = Attempt(1, 1, plan, tmp_path, tmp_path, models, events, NoCommands, machine=card(24))
    with models.ledger:
        for name in ("text_encoder", "dit"):
            with offload.on_device(models.get_or_load(name), META_CARD, stay=True):
                pass
        models.ledger.reset_peak()
        yield attempt


def decode(attempt):
    """As the pipeline does, frames thrown away."""
    with attempt.phase("vae_decode"), attempt.models.on_device("vae", attempt.plan) as vae, torch.inference_mode():
        latents = torch.empty(1, *attempt.request.shape.latent, device=META_CARD)
        for chunk in vae_driver.decode_stream(vae, latents, tile=attempt.plan.levers.tile):
            vae_driver.frames_to_uint8(chunk)


def notices(attempt):
    return [notice.key for notice in attempt.send.of("notice")]


def test_on_a_card_that_nobody_else_uses_all_networks_stay(on_4090):
    staying = offload.bytes_away(on_4090.models._networks())
    assert staying > 12 * GIB  # 10.6 of text encoder, 2.6 of transformer
    decode(on_4090)
    assert not notices(on_4090)
    assert offload.bytes_away(on_4090.models._networks()) > staying  # the VAE stays, too


@pytest.mark.parametrize("grown_gib", [3, 8])
def test_what_stayed_leaves_before_the_decode_where_a_neighbour_grew(on_4090, grown_gib):
    on_4090.models.neighbour_takes(grown_gib * GIB)
    staying = offload.bytes_away(on_4090.models._networks())
    decode(on_4090)
    assert "weights_left" in notices(on_4090)
    (left,) = (notice for notice in on_4090.send.of("notice") if notice.key == "weights_left")
    assert left.numbers == {"phase": "vae_decode", "bytes": staying}
    assert on_4090.models.ledger.peak_bytes <= on_4090.models.ledger.cap_bytes
    assert offload.bytes_away(on_4090.models._networks()) == 0  # nor does the VAE stay


def test_the_decode_would_have_run_out_beside_them(on_4090, monkeypatch):
    """What the test above would see if nothing left."""
    monkeypatch.setattr(on_4090.models, "make_room", lambda plan, budget_bytes: 0)
    on_4090.models.neighbour_takes(8 * GIB)
    with pytest.raises(OutOfMemoryError):
        decode(on_4090)


def test_a_network_at_work_does_not_leave_nor_what_it_shares_with_another(on_4090):
    models = on_4090.models
    dit = models.get_or_load("dit")
    models._kept["with a LoRA"] = offload.share_parameters(dit)
    dit_bytes, all_bytes = offload.bytes_away([dit]), offload.bytes_away(models._networks())
    assert 0 < dit_bytes < all_bytes
    assert models.make_room(on_4090.plan, 8 * GIB, but=models._kept["with a LoRA"]) == all_bytes - dit_bytes
    assert offload.bytes_away(models._networks()) == offload.bytes_away([dit]) == dit_bytes
    assert models.make_room(on_4090.plan, 8 * GIB) == dit_bytes
