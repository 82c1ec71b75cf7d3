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


def store(state, verdicts: dict[str, str], capability: int = 90) -> None:
    for op, verdict in verdicts.items():
        file = state / FILE
        backend._write(file, backend._read(file), backend.fingerprint(capability), op, verdict)


def test_verdicts_that_the_worker_stored_are_read_without_torch(state):
    store(state, {"norm": "", "gemm": "0.3 instead of 0.1", "sage": backend.CHECKING})
    assert kernels_of((9, 0)) == Kernels(norm=True, gemm=False, sage=False)


def test_those_of_another_card_or_version_say_nothing(state):
    store(state, {"norm": "wrong"}, capability=80)
    assert kernels_of((9, 0)) == Kernels()
    machine = backend.fingerprint(90)
    backend._write(state / FILE, {}, machine[:-1] + ("0" if machine[-1] != "0" else "1"), "norm", "wrong")
    assert kernels_of((9, 0)) == Kernels()


@pytest.mark.parametrize("text", ["", "[]", '{"x": 1}', "{"])
def test_a_damaged_file_says_nothing(state, text):
    (state / FILE).write_text(text)
    assert kernels_of((9, 0)) == Kernels()
    assert kernels_of(None) == Kernels()


def test_a_person_who_insists_is_believed(monkeypatch):
    monkeypatch.setenv("TURBODIFF_KERNELS", "reference")
    assert kernels_of((9, 0)) == ALL_REFERENCE.model_copy(update={"wish": "reference"})
    monkeypatch.setenv("TURBODIFF_KERNELS", "triton")
    assert kernels_of((9, 0)).gemm is True
