"""The bundled demo on a CPU, warm for all tests of this room."""

import pytest

from tests.test_tiny import EventList, NoCommands
from turbodiff.gpu.probe import machine_now
from turbodiff.plan.planner import plan_request
from turbodiff.runtime.attempt import Attempt
from turbodiff.runtime.device import Device
from turbodiff.runtime.model_cache import ModelCache
from turbodiff.spec.request import make_request
from turbodiff.weights.locate import inventory


@pytest.fixture(scope="session")
def models():
    return ModelCache(Device.pick("cpu"))


@pytest.fixture(scope="session")
def machine():
    return machine_now()


@pytest.fixture
def attempt_of(tmp_path, models, machine):
    """An attempt at the demo for some fields of a request and some levers; nothing of it has happened yet."""

    def make(levers=None, **fields):
        request = make_request({"prompt": "a red circle moves right", "seed": 7, "steps": 2, "num_frames": 5, **fields})
        plan = plan_request(request, machine, inventory())
        if levers:
            plan = plan.model_copy(update={"levers": plan.levers.model_copy(update=levers)})
        models.open(plan.request)
        return Attempt(1, 1, plan, tmp_path / "outputs", tmp_path / "state", models, EventList(), NoCommands)

    return make
