"""A check that ended its process: a kernel did it, or a person did. The next one looks from outside."""

import json

import pytest
import torch
from turbodiff_kernels import backend, selfcheck

from tests.kernels.conftest import DEVICE

CARD = torch.device(DEVICE)
# also where a shell had it ignored, as behind `&`
CTRL_C = "import os, signal; signal.signal(2, signal.default_int_handler); os.kill(os.getpid(), 2)"
HALF = """
import torch
from functools import partial
from turbodiff_kernels import selfcheck
selfcheck.difference = partial(selfcheck.difference, dtype=torch.float16)  # the interpreter has no bfloat16
"""


def test_a_kernel_that_breaks_the_card_for_its_process_is_not_tried_again(monkeypatch, tmp_path):
    """An access outside of its memory raised like a missing compiler: each process tried again, no job ended well."""

    def broken(op, device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    file = tmp_path / "kernels.json"
    monkeypatch.setattr(selfcheck, "difference", broken)
    monkeypatch.setattr(selfcheck, "is_lost", lambda device: True)
    monkeypatch.setattr(selfcheck, "apart", lambda op, device: f"{op} ended by SIGABRT")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        backend.checked("sage", CARD, "sm_90", file)
    monkeypatch.setattr(selfcheck, "difference", lambda op, device: pytest.fail("was tried in this process"))
    assert backend.checked("sage", CARD, "sm_90", file) == "sage ended by SIGABRT"
    assert json.loads(file.read_text())["sm_90"] == {"sage": "sage ended by SIGABRT"}


def die(op, device):
    """What a check leaves behind whose process ends: nothing is tidied up."""
    raise KeyboardInterrupt


def test_who_ends_a_first_check_loses_no_kernel(monkeypatch, tmp_path):
    """A person who closed turbodiff while kernels were compiled lost all that were in work, until the next version."""
    file = tmp_path / "kernels.json"
    monkeypatch.setattr(selfcheck, "difference", die)
    for _ in range(2):
        monkeypatch.setattr(selfcheck, "apart", die)
        with pytest.raises(KeyboardInterrupt):
            backend.checked("sage", CARD, "sm_90", file)
    monkeypatch.setattr(selfcheck, "apart", lambda op, device: "")
    assert backend.checked("sage", CARD, "sm_90", file) == ""
    assert json.loads(file.read_text())["sm_90"] == {"sage": ""}


def test_a_check_of_something_else_that_ended_the_program_is_not_tried_again(tmp_path):
    file = tmp_path / "kernels.json"
    with pytest.raises(KeyboardInterrupt):
        backend.checked("vae", CARD, "sm_90", file, lambda: die("vae", CARD))
    assert backend.checked("vae", CARD, "sm_90", file, lambda: pytest.fail("was tried")) == backend.ENDED


def test_what_is_being_checked_counts_as_unchecked(on_a_card, monkeypatch):
    monkeypatch.setattr(selfcheck, "difference", die)
    card = torch.device("cuda:3")
    with pytest.raises(KeyboardInterrupt):
        backend.checked("sage", card, backend.machine_of(card), backend.verdicts_file())
    assert backend.expected("sage", card).key == "unchecked"


def test_a_kernel_that_takes_its_process_down_is_refused_by_a_check_apart():
    assert selfcheck.apart("sage", CARD, "import os; os.abort()") == "its check ended its process by SIGABRT"
    echo = "import json, sys; print('noise'); print(json.dumps(' '.join(sys.argv[1:])))"
    assert selfcheck.apart("sage", CARD, echo) == f"sage {CARD}"


def test_a_kernel_that_hangs_is_refused():
    """Else each start would wait for the watchdog."""
    told = selfcheck.apart("sage", CARD, "import time; time.sleep(60)", limit_s=1.0)
    assert told == "its check did not end in 1 s"


@pytest.mark.parametrize(
    "code",
    ["import os; os.kill(os.getpid(), 9)", CTRL_C, "raise OSError('no C compiler')", ""],
    ids=["killed", "Ctrl-C", "no compiler", "nothing said"],
)
def test_a_check_apart_that_somebody_ended_or_that_cannot_begin_is_no_verdict(code):
    with pytest.raises(RuntimeError, match=r"exit status (-9|-2|1: OSError: no C compiler|0)"):
        selfcheck.apart("sage", CARD, code)


def test_a_check_apart_is_the_check():
    assert selfcheck.apart("quant", CARD, HALF + selfcheck.APART) == ""


@pytest.mark.parametrize("lost", [True, False])
def test_a_card_that_a_check_apart_lost_ends_its_process(lost, monkeypatch):
    class Aborted(Exception):
        pass

    def abort():
        raise Aborted

    monkeypatch.setattr(selfcheck, "difference", lambda op, device: (_ for _ in ()).throw(RuntimeError("CUDA error")))
    monkeypatch.setattr(selfcheck, "is_lost", lambda device: lost)
    monkeypatch.setattr(selfcheck.os, "abort", abort)
    with pytest.raises(Aborted if lost else RuntimeError):
        selfcheck.verdict_apart("sage", CARD)
