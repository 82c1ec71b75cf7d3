"""What the self-check of the kernels found reaches the plan, through the file that both sides know."""

import pytest
from turbodiff_kernels import backend

from turbodiff.gpu.kernel_verdicts import FILE, kernels_of
from turbodiff.plan.hardware import ALL_REFERENCE, Kernels


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("TURBODIFF_STATE", str(tmp_path))
    monkeypatch.delenv("TURBODIFF_KERNELS", raising=False)
    return tmp_path


CARD = "NVIDIA H200", (9, 0)


def store(state, verdicts: dict[str, str], name: str = CARD[0], capability: int = 90) -> None:
    for op, verdict in verdicts.items():
        backend.keep_verdict(state / FILE, backend.fingerprint(name, capability), op, verdict)


def test_verdicts_that_the_worker_stored_are_read_without_torch(state):
    store(state, {"norm": "", "gemm": "0.3 instead of 0.1", "sla": backend.ENDED, f"sage {backend.BEGUN}": ""})
    assert kernels_of(*CARD) == Kernels(norm=True, gemm=False, sla=False, sage=None)


def test_those_of_another_card_or_version_say_nothing(state):
    store(state, {"norm": "wrong"}, capability=80)
    store(state, {"norm": "slower than reference: 2 ms against 1 ms"}, name="NVIDIA H100 PCIe")
    assert kernels_of(*CARD) == Kernels()
    machine = backend.fingerprint(CARD[0], 90)
    backend.keep_verdict(state / FILE, machine[:-1] + ("0" if machine[-1] != "0" else "1"), "norm", "wrong")
    assert kernels_of(*CARD) == Kernels()


@pytest.mark.parametrize("text", ["", "[]", '{"x": 1}', "{"])
def test_a_damaged_file_says_nothing(state, text):
    (state / FILE).write_text(text)
    assert kernels_of(*CARD) == Kernels()
    assert kernels_of("NVIDIA H200", None) == Kernels()


def test_a_person_who_insists_is_believed(monkeypatch):
    monkeypatch.setenv("TURBODIFF_KERNELS", "reference")
    assert kernels_of(*CARD) == ALL_REFERENCE.model_copy(update={"wish": "reference"})
    monkeypatch.setenv("TURBODIFF_KERNELS", "triton")
    assert kernels_of(*CARD).gemm is True
