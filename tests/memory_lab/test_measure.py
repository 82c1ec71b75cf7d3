"""The measuring process on the demo, on a CPU: every phase has its row, and dummy weights run."""

import json

import torch

from tests.plan.machines import ask, card, disk
from turbodiff.memory_lab.measure import DummyModels, rows_of
from turbodiff.plan.planner import plan_request
from turbodiff.runtime.device import Device


def test_every_phase_with_networks_is_measured():
    plan = plan_request(ask("demo-i2v", num_frames=5, attention="dense"), card(24), disk())
    models = DummyModels(plan.request.spec, Device(torch.device("cpu"), "a CPU", torch.float32))
    rows = list(rows_of(models, plan))
    assert [row["name"] for row in rows] == [phase.name for phase in plan.phases if phase.name != "write"]
    assert all(row["measured_bytes"] > 0 < row["seconds"] for row in rows)
    json.dumps(rows)
    scales = [
        tensor.dtype for name, tensor in models.get_or_make("int8 dit").named_buffers() if name.endswith(".scale")
    ]
    assert set(scales) <= {torch.float32}
    assert {tensor.dtype for tensor in models.get_or_make("vae").parameters()} == {torch.float32}
