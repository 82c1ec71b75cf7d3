"""A kernel runs only where it proved itself; the verdict is kept."""

import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from turbodiff_kernels import backend, selfcheck
from turbodiff_kernels.norm import kernel as norm_kernel
from turbodiff_kernels.norm import norm_modulate
from turbodiff_kernels.norm.reference import rms_norm_rope
from turbodiff_kernels.sage import kernel as sage_kernel
from turbodiff_kernels.sla import kernel as sla_kernel
from turbodiff_kernels.sla import reference as sla_reference
from turbodiff_kernels.sla.reference import _block_means

from tests.kernels.conftest import DEVICE, relative_l2

CARD = torch.device(DEVICE)


@pytest.fixture
def half(monkeypatch):
    """The checks in float16: the interpreter has no bfloat16."""
    monkeypatch.setattr(
        selfcheck, "difference", lambda op, device, check=selfcheck.difference: check(op, device, torch.float16)
    )


@pytest.mark.parametrize("op", selfcheck.CHECKS)
def test_every_kernel_passes_its_check_here(op):
    assert selfcheck.difference(op, CARD, torch.float16) == ""


@pytest.mark.parametrize("op", selfcheck.HOPPER)
def test_the_check_of_hoppers_loop_runs_that_loop(op, monkeypatch):
    """Beside the plain one: FP8 in the interpreter is further from the references than on a card."""
    runs, plain = [], sage_kernel.settings(90, int8=True, linear=False)._replace(pair=False)
    monkeypatch.setattr(sage_kernel, "settings", lambda *_, **__: plain)
    loop = sage_kernel.attend_hopper
    monkeypatch.setattr(sage_kernel, "attend_hopper", lambda *args, **more: (runs.append(op), loop(*args, **more)))
    make = selfcheck.Inputs(torch.device("cpu"), torch.float16)
    module = {"sage": sage_kernel, "sagesla": sla_kernel}[selfcheck.HOPPER[op]]
    got, expected = (selfcheck.results(name, module, make) for name in (op, selfcheck.HOPPER[op]))
    assert len(runs) == len(got) == 2
    for g, e in zip(got, expected, strict=True):
        assert ((g.double() - e.double()).norm() / e.double().norm()).item() < 1e-3


@pytest.mark.parametrize("normed", [False, True], ids=["", "normed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_blocks_that_the_check_keeps_do_not_hang_by_a_rounding(dtype, normed):
    """A kernel may sum in another order: the last block kept must be ahead of the next by five standard errors."""
    make = selfcheck.Inputs(torch.device("cpu"), dtype)
    if normed:
        q, k, _, q_weight, k_weight, *angles = selfcheck._projections(make)
        q, k = (rms_norm_rope(t, w, *angles).unflatten(-1, (2, 128)) for t, w in ((q, q_weight), (k, k_weight)))
    else:
        q, k, _ = selfcheck._heads(make)
    q, k = q.double(), k.double()
    q_means, k_means = _block_means(q, 128), _block_means(k - k.mean(1, keepdim=True), 64)
    ranked = (q_means @ k_means.mT).sort(-1, descending=True).values
    terms = (q_means[..., :, None, :] * k_means[..., None, :, :]).square().sum(-1).sqrt()
    error = torch.finfo(dtype).eps / 2 * (2**0.5 * terms + ranked.abs()).amax(-1)
    kept = ranked.shape[-1] // 2
    assert ((ranked[..., kept - 1] - ranked[..., kept]) > 5 * error).all()


@pytest.mark.parametrize("branch", ["_sparse", "_linear"])
@pytest.mark.parametrize("op", ["sla", "sagesla"])
def test_a_branch_of_sparse_attention_that_is_a_quarter_too_small_is_seen(op, branch, monkeypatch):
    """The bias was ten times what the sparse branch made: with half of that the check was content."""
    make, right = selfcheck.Inputs(torch.device("cpu"), torch.float32), getattr(sla_reference, branch)
    expected = selfcheck.results(op, sla_reference, make)
    monkeypatch.setattr(sla_reference, branch, lambda *args: 0.75 * right(*args))
    for got, e in zip(selfcheck.results(op, sla_reference, make), expected, strict=True):
        assert relative_l2(got, e) > selfcheck.CHECKS[op].bound


def test_a_kernel_that_is_wrong_is_refused_with_the_size_of_its_error(monkeypatch, half, tmp_path):
    right = norm_kernel.layer_norm
    monkeypatch.setattr(norm_kernel, "layer_norm", lambda *args: right(*args) * 1.1)
    file = tmp_path / "kernels.json"
    assert "result 1 is off by 0.1" in backend.checked("norm", CARD, "sm_90", file)
    assert "off by 0.1" in json.loads(file.read_text())["sm_90"]["norm"]


def test_memory_that_a_kernel_forgets_to_write_is_a_failure(monkeypatch):
    monkeypatch.setattr(sla_kernel, "sla_attention", lambda q, *args, **more: torch.full_like(q, float("nan")))
    assert "nan" in selfcheck.difference("sla", CARD, torch.float16)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("Failed to find C compiler."), OSError(28, "No space left on device"), FileNotFoundError("ptxas")],
    ids=["no compiler", "full disk", "no ptxas"],
)
def test_a_fault_of_the_machine_is_told_and_no_verdict(error, monkeypatch, tmp_path, caplog):
    """It was stored for ever as a bad kernel: a compiler that was installed later changed nothing."""

    def broken(op, device):
        raise error

    file = tmp_path / "kernels.json"
    with monkeypatch.context() as now:
        now.setattr(selfcheck, "difference", broken)
        told = backend.checked("sagesla", CARD, "sm_90", file)
    assert str(error) in told and str(error) in caplog.text
    assert "sagesla" not in json.loads(file.read_text())["sm_90"]
    monkeypatch.setattr(selfcheck, "difference", lambda op, device: "")
    assert backend.checked("sagesla", CARD, "sm_90", file) == ""


def test_checks_and_operators_run_with_their_card_as_the_current_one(monkeypatch, tmp_path):
    """Triton launches on the current device: on cuda:1 every kernel failed, and the verdict was kept for cuda:0 too."""
    entered: list[torch.device] = []

    @contextmanager
    def enter(device):
        entered.append(device)
        yield

    monkeypatch.setattr(torch.cuda, "device", enter)
    monkeypatch.setattr(selfcheck, "difference", lambda op, device: "" if entered else "no CUDA context")
    monkeypatch.setattr(selfcheck, "slowness", lambda op, device: "" if entered else "no CUDA context")
    second = torch.device("cuda:1")
    assert backend.checked("norm", second, "sm_90", tmp_path / "kernels.json") == ""
    assert entered == [second]
    monkeypatch.setattr(backend, "current", enter)
    x = torch.ones(1, 2, 64)
    with torch.no_grad():
        norm_modulate(x, x[:, :1], x[:, :1], 1e-6)
    assert entered[1:] == [x.device]


def test_two_at_once_check_a_kernel_once_and_agree(monkeypatch, tmp_path):
    """The second read "the check ended the program last time" while the first was still checking, and gave it up."""
    runs, both = [], threading.Barrier(2)

    def slow(op, device):
        runs.append(op)
        time.sleep(0.05)
        return ""

    def ask(_):
        both.wait(timeout=10)
        return backend.checked("sage", CARD, "sm_90", tmp_path / "kernels.json")

    monkeypatch.setattr(selfcheck, "difference", slow)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(ask, range(2))) == ["", ""]
    assert runs == ["sage"]


def test_checks_side_by_side_lose_no_verdict_and_tell_each(on_a_card, monkeypatch, tmp_path):
    """Each reads and writes the one file."""
    monkeypatch.setattr(selfcheck, "slowness", lambda op, device: "")
    monkeypatch.setattr(selfcheck, "difference", lambda op, device: "off" if op == "gemm" else "")
    backend._chosen.cache_clear()
    told: list[backend.Implementation] = []
    backend.check_all(torch.device("cuda:3"), told.append)
    backend._chosen.cache_clear()
    assert {choice.op: choice.runs for choice in told} == {
        op: "reference" if op == "gemm" else "triton" for op in backend.OPS
    }
    (verdicts,) = json.loads((tmp_path / "kernels.json").read_text()).values()
    assert verdicts == {op: "off" if op == "gemm" else "" for op in (*backend.OPS, *selfcheck.HOPPER)}


@pytest.fixture
def nothing_known():
    """No choice of another test."""
    caches = backend._chosen, backend.hopper_loop, backend._check_once
    for function in caches:
        function.cache_clear()
    yield
    for function in caches:
        function.cache_clear()


def test_the_loop_of_hopper_is_used_where_it_is_right_and_faster(on_a_card, nothing_known, monkeypatch):
    slow = "slower than the plain loop: 2.00 ms against 1.00 ms"
    monkeypatch.setattr(selfcheck, "difference", lambda op, device: "")
    monkeypatch.setattr(selfcheck, "slowness", lambda op, device: slow if op == "hopper sage" else "")
    monkeypatch.setattr(backend, "triton_version", lambda: backend.HOPPER_TRITON)
    card = torch.device("cuda:3")
    assert backend.due(card)
    backend.check_all(card)
    assert not backend.due(card)
    assert (backend.hopper_loop("sage", card), backend.hopper_loop("sagesla", card)) == (False, True)


def test_the_loop_of_hopper_is_used_once_it_is_proven_though_a_clip_asked_before(on_a_card, nothing_known, monkeypatch):
    """A card that was full at the first check kept the plain loop until the worker ended."""
    monkeypatch.setattr(selfcheck, "difference", lambda op, device: "")
    monkeypatch.setattr(selfcheck, "slowness", lambda op, device: "")
    monkeypatch.setattr(backend, "triton_version", lambda: backend.HOPPER_TRITON)
    card = torch.device("cuda:3")
    assert not backend.hopper_loop("sage", card)
    backend.check_all(card)
    assert backend.hopper_loop("sage", card)


def test_a_clip_checks_no_loop_of_hopper(on_a_card, nothing_known, monkeypatch):
    """It would compile in the middle of a step, and a full card would be the step's fault."""
    monkeypatch.setattr(backend, "checked", lambda *args: pytest.fail("was checked"))
    assert not backend.hopper_loop("sage", torch.device("cuda:3"))


@pytest.mark.parametrize(
    ("arch", "triton", "kernels"),
    [(100, (3, 7), "auto"), (90, (3, 6), "auto"), (90, (3, 7), "triton")],
    ids=["another card", "an older compiler", "kernels unchecked by a person's wish"],
)
def test_the_loop_of_hopper_is_not_even_tried(arch, triton, kernels, on_a_card, nothing_known, monkeypatch):
    monkeypatch.setattr(backend, "arch", lambda device: arch)
    monkeypatch.setattr(backend, "triton_version", lambda: triton)
    monkeypatch.setenv("TURBODIFF_KERNELS", kernels)
    asked = []
    monkeypatch.setattr(backend, "checked", lambda op, *args: asked.append(op) or "")
    card = torch.device("cuda:3")
    backend.check_all(card)
    assert not backend.hopper_loop("sage", card)
    assert not set(asked) & set(selfcheck.HOPPER)


def test_a_second_loop_must_be_the_faster_one_without_a_margin():
    calls = {"hopper sage": lambda: 1.05, "the plain loop": lambda: 1.0}
    assert selfcheck.faster(calls, lambda call: call()) == ""
    assert "the plain loop" in selfcheck.faster(calls, lambda call: call(), 1.0)


@pytest.mark.parametrize(
    "content",
    ['{"sm_90": null}', '{"sm_90": "x"}', '{"sm_90": []}', '{"sm_90": {"norm": 5}}', "[]", "{", "[" * 100_000],
    ids=lambda content: content[:24],
)
def test_a_file_of_verdicts_with_odd_contents_costs_a_check(content, half, monkeypatch, tmp_path):
    file = tmp_path / "kernels.json"
    file.write_text(content)
    monkeypatch.setattr(selfcheck, "difference", lambda op, device: "")
    assert backend.checked("norm", CARD, "sm_90", file) == ""
    assert json.loads(file.read_text())["sm_90"] == {"norm": ""}


def test_nothing_is_compiled_while_a_kernel_is_timed(monkeypatch, tmp_path):
    """The compiler holds the interpreter's lock: a kernel of six launches lost against torch's one."""
    busy, seen = set(), []

    def compile_(op, device):
        busy.add(op)
        time.sleep(0.02)
        busy.remove(op)
        return ""

    def time_it(op, device):
        seen.append(set(busy))
        time.sleep(0.02)
        seen.append(set(busy))
        return ""

    monkeypatch.setattr(selfcheck, "difference", compile_)
    monkeypatch.setattr(selfcheck, "slowness", time_it)
    with ThreadPoolExecutor(len(backend.OPS)) as pool:
        list(pool.map(lambda op: backend.checked(op, CARD, "sm_90", tmp_path / "kernels.json"), backend.OPS))
    assert seen == [set()] * (2 * len(backend.OPS))


def test_a_kernel_that_is_right_and_slow_makes_room_and_says_so(on_a_card, monkeypatch, tmp_path):
    monkeypatch.setattr(selfcheck, "difference", lambda op, device: "")
    times = iter((3.0, 2.0))
    monkeypatch.setattr(selfcheck, "milliseconds", lambda call: next(times))
    monkeypatch.setattr(selfcheck, "contenders", lambda *args: {"sage": int, "torch's attention": int})
    choice = backend._choose("sage", torch.device("cuda:0"), "auto", run_check=True)
    assert (choice.runs, choice.key) == ("reference", "slower")
    assert choice.why == "slower than torch's attention: 3.00 ms against 2.00 ms"


@pytest.mark.parametrize("op", selfcheck.CHECKS)
def test_every_contender_of_a_kernel_can_be_run(op):
    ran = []

    def time_ms(call):
        ran.append(call())
        return float(len(ran))

    calls = selfcheck.contenders(op, selfcheck.Inputs(CARD, torch.float16), 130, 1)
    assert selfcheck.faster(calls, time_ms) == "", "the first is the fastest here"
    assert len(ran) == 1 if op == "sla" else len(ran) in (2, 3)


def test_within_the_margin_of_a_measurement_a_kernel_stays_and_what_cannot_run_does_not_count():
    def broken():
        raise RuntimeError("No available kernel")

    calls = {"sage": lambda: 1.05, "torch's attention": lambda: 1.0, "cuDNN's attention": broken}
    assert selfcheck.faster(calls, lambda call: call()) == ""


def test_a_check_runs_once_per_machine(monkeypatch, tmp_path):
    runs = []
    monkeypatch.setattr(selfcheck, "difference", lambda op, device: runs.append(op) or "")
    file = tmp_path / "state" / "kernels.json"
    for machine in ("sm_90", "sm_90", "sm_120", "sm_90"):
        assert backend.checked("norm", CARD, machine, file) == ""
    assert runs == ["norm", "norm"]


def test_a_second_loop_that_cannot_be_timed_beside_the_first_is_no_verdict(monkeypatch):
    """No room for the plain loop counted as a race that Hopper's own had won."""

    def full():
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(selfcheck, "contenders", lambda *args: {"own": lambda: None, "the plain loop": full})
    monkeypatch.setattr(selfcheck, "milliseconds", lambda call: call() or 1.0)
    with pytest.raises(torch.OutOfMemoryError):
        selfcheck.slowness("hopper sage", torch.device("cuda:0"))
    assert selfcheck.slowness("sage", torch.device("cuda:0")) == ""


def test_a_file_system_without_locks_costs_no_check(monkeypatch, tmp_path):
    """flock's error ended every job there."""

    def no_locks(*args):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(backend.fcntl, "flock", no_locks)
    monkeypatch.setattr(selfcheck, "difference", lambda op, device: "")
    assert backend.checked("norm", CARD, "sm_90", tmp_path / "kernels.json") == ""
    assert json.loads((tmp_path / "kernels.json").read_text()) == {"sm_90": {"norm": ""}}


def test_a_hopper_without_triton_runs_references(on_a_card, nothing_known, monkeypatch):
    """Asking for Hopper's loop imported a Triton that is not there: no clip ended well."""
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "triton", None)
    card, told = torch.device("cuda:3"), []
    assert not backend.due(card)
    backend.check_all(card, told.append)
    assert {choice.key for choice in told} == {"no_triton"}
    assert not backend.hopper_loop("sage", card)


def test_a_full_card_is_no_verdict(monkeypatch, tmp_path):
    def full(op, device):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(selfcheck, "difference", full)
    with pytest.raises(torch.OutOfMemoryError):
        backend.checked("sage", CARD, "sm_90", tmp_path / "kernels.json")
    monkeypatch.setattr(selfcheck, "difference", lambda op, device: "")
    assert backend.checked("sage", CARD, "sm_90", tmp_path / "kernels.json") == ""


def test_a_damaged_or_unwritable_file_costs_a_check_and_no_more(monkeypatch, tmp_path):
    monkeypatch.setattr(selfcheck, "difference", lambda op, device: "")
    damaged, blocked = tmp_path / "kernels.json", tmp_path / "kernels.json" / "below" / "kernels.json"
    damaged.write_text("{half a")
    assert backend.checked("sage", CARD, "sm_90", damaged) == ""
    assert backend.checked("sage", CARD, "sm_90", blocked) == ""


def test_a_cpu_runs_the_references_and_says_why():
    choice = backend.chosen("sla", torch.device("cpu"))
    assert (choice.op, choice.runs, choice.why) == ("sla", "reference", "device is cpu")


def test_the_person_has_the_last_word(monkeypatch):
    monkeypatch.setenv("TURBODIFF_KERNELS", "triton")
    choice = backend.chosen("sagesla", CARD)
    assert (choice.op, choice.runs, choice.why) == ("sagesla", "triton", "TURBODIFF_KERNELS=triton")
    assert backend.kernel_module("sagesla", CARD) is sla_kernel
    monkeypatch.setenv("TURBODIFF_KERNELS", "cuda")
    with pytest.raises(ValueError, match="expected auto, reference or triton"):
        backend.chosen("sla", CARD)


def test_a_new_kernel_or_torch_is_a_new_machine():
    here = backend.fingerprint("NVIDIA H200", 90)
    assert here != backend.fingerprint("NVIDIA H200", 89)
    assert here != backend.fingerprint("NVIDIA H100 PCIe", 90), "times are those of one card"
    assert torch.__version__ in here
