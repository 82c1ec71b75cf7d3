"""The measuring process on the demo, on a CPU: every phase has its row, and made-up weights run."""

import json

import torch

from tests.plan.machines import ask, card, disk
from turbodiff.memory_lab.measure import MadeUp, rows_of
from turbodiff.plan.planner import plan_request
from turbodiff.runtime.device import Device


def test_every_phase_with_networks_is_measured():
    plan = plan_request(ask("demo-i2v", num_frames=5, attention="dense"), card(24), disk())
    made = MadeUp(plan.request.spec, Device(torch.device("cpu"), "a CPU", torch.float32))
    rows = list(rows_of(made, plan))
    assert [row["name"] for row in rows] == [phase.name for phase in plan.phases if phase.name != "write"]
    assert all(row["measured_bytes"] > 0 < row["seconds"] for row in rows)
    json.dumps(rows)
    scales = [tensor.dtype for name, tensor in made.dit(True).named_buffers() if name.endswith(".scale")]
    assert set(scales) <= {torch.float32}
    assert {tensor.dtype for tensor in made.vae().parameters()} == {torch.float32}
