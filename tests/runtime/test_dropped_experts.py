"""An expert that leaves host memory before the next is read comes back with the same weights."""

import torch

from tests.plan.machines import ask, disk, machine
from turbodiff.plan.planner import plan_request
from turbodiff.runtime.device import Device
from turbodiff.runtime.model_cache import ModelCache
from turbodiff.spec.experts import Expert


def test_one_expert_at_a_time_is_in_host_memory_and_comes_back_the_same(monkeypatch):
    """And the graphs of those that left are freed with them."""
    plan = plan_request(ask("demo-i2v", num_frames=5), machine(), disk())
    dropped = plan.model_copy(update={"levers": plan.levers.model_copy(update={"made_experts": "dropped"})})
    models = ModelCache(Device.pick("cpu"))
    models.open(plan.request)
    seen, weights, dropped_for = [], {}, []
    monkeypatch.setattr(models.graphs, "drop_all_but", dropped_for.append)
    for turn in (plan, dropped):
        for expert in (Expert.HIGH, Expert.LOW, Expert.HIGH):
            with models.dit(expert, turn) as placed:
                seen.append(len(models._networks()))
                now = [tensor.clone() for tensor in placed.dit.parameters()]
            before = weights.setdefault(expert, now)
            assert all(map(torch.equal, before, now))
    assert seen == [1, 2, 2, 1, 1, 1]
    assert [len(kept) for kept in dropped_for] == [1, 0, 0]
