"""What every test needs before its first import: interpreted Triton, no network, no telemetry."""

import os
import sys

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.fault_table import numbers

HERE = Path(__file__).parent

# CI's machines are small and busy: how long an example takes says nothing about the code
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


def pytest_collection_modifyitems(items):
    """`-k fault_25` selects every test that the fault table of README.md names in that row."""
    for item in items:
        if item.path.is_relative_to(HERE) and isinstance(item, pytest.Function):
            name = str(item.path.relative_to(HERE))
            item.extra_keyword_matches.update(numbers().get((name, item.originalname), ()))


def pytest_terminal_summary(terminalreporter):
    """What the attack suite sent and what came of it, from every process of a parallel run."""
    for report in terminalreporter.stats.get("passed", []):
        for name, counts in report.user_properties:
            if name == "attack":
                terminalreporter.write_line(f"attack: {counts}")


@pytest.fixture(scope="session", autouse=True)
def no_state_folder_of_the_person(tmp_path_factory):
    """Nor do the apps that serve several tests, which start before the folder of any one of them is made."""
    with pytest.MonkeyPatch.context() as session:
        session.setenv("TURBODIFF_STATE", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(autouse=True)
def a_state_folder_of_its_own(tmp_path_factory, monkeypatch):
    """No test touches the person's queue, caches or models."""
    monkeypatch.setenv("TURBODIFF_STATE", str(tmp_path_factory.mktemp("state")))
    monkeypatch.delenv("TURBODIFF_MODELS", raising=False)
    monkeypatch.delenv("TURBODIFF_PRETEND_VRAM", raising=False)


@pytest.fixture(autouse=True)
def ordinary_floats_for_the_next_test():
    """What flushes denormals for speed must not leave it so: hypothesis refuses to work in such a process."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)
