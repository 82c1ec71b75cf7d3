"""The genuine nvidia-ml-py against a fake driver library: a documented answer for every way NVML can fail."""

import os
import re
import resource
import subprocess
import sys
import time

import pytest

from tests.plan.machines import ask, disk
from turbodiff.cli.machine import doctor as doctor_command
from turbodiff.cli.machine import gpu as gpu_command
from turbodiff.cli.show import plan_table
from turbodiff.gpu import probe
from turbodiff.gpu.allocator import VARIABLES
from turbodiff.plan.hardware import only
from turbodiff.plan.planner import plan_request
from turbodiff.spec.numbers import GIB
from turbodiff.supervisor import context as supervisor_context
from turbodiff.supervisor.context import Memory
from webui.panels import system
from webui.wording import Words

ANSWER_S = 30.0  # a loaded test machine starts Python slowly; the deadline itself is tested with "hang"


def machine():
    return probe.machine_now(ANSWER_S)


def test_a_normal_card_is_read_in_full(fake_nvml):
    fake_nvml("normal")
    (card,) = machine().gpus
    assert (card.name, card.uuid, card.capability) == ("NVIDIA GeForce RTX 4090", "GPU-aaaa", (8, 9))
    assert (card.total_bytes, card.used_bytes, card.free_bytes) == (int(23.5 * GIB), 3 * GIB, 20 * GIB)
    assert (card.display, card.utilisation, card.power_w, card.temperature_c) == (True, 0.4, 123.0, None)
    assert machine().driver == "580.82.07"


def test_memory_of_our_own_worker_is_reclaimable(fake_nvml):
    fake_nvml("normal")
    (card,) = probe.machine_now(ANSWER_S, own_pids=frozenset({os.getpid()})).gpus
    assert card.reclaimable_bytes == 2 * GIB


def test_an_old_driver_without_the_new_call_still_gives_memory(fake_nvml):
    fake_nvml("old_driver")
    (card,) = machine().gpus
    assert card.free_bytes == 20 * GIB


def test_no_library_is_no_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(probe, "_spawn", lambda *args: _sampler_without_library(tmp_path))
    assert machine().gpus == ()
    assert machine().gpu_state == "none"


def _sampler_without_library(tmp_path):
    script = tmp_path / "no_library.py"
    script.write_text(
        "import ctypes, runpy\n"
        "def refuse(name, *rest, **more): raise OSError(name + ': No such file or directory')\n"
        f"ctypes.CDLL = refuse\nrunpy.run_path({str(probe.SAMPLER)!r}, run_name='__main__')\n"
    )
    return subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE)


FAILURES = [  # of the fake driver; state and reason; what of its own words must be told
    ("mismatch", "mismatch", "gpu_mismatch", "version mismatch"),
    ("no_driver", "none", "gpu_no_driver", ""),
    ("lost", "lost", "gpu_lost", ""),
    ("no_permission", "error", "gpu_no_permission", ""),
    ("unknown_error", "error", "gpu_nvml", ""),
    ("crash", "error", "gpu_sampler_crashed", "SIGABRT"),
    ("leaves", "error", "gpu_unreadable", "no licence for this"),
]


@pytest.mark.parametrize(("mode", "state", "reason", "words"), FAILURES)
def test_a_driver_that_fails_says_how_and_every_place_says_it_in_the_persons_language(
    fake_nvml, mode, state, reason, words, monkeypatch, capsys
):
    fake_nvml(mode)
    found = machine()
    assert (found.gpus, found.gpu_state, found.gpu_reason) == ((), state, reason)
    assert words in found.gpu_error and found.ram_total_bytes
    monkeypatch.setattr("turbodiff.diagnostics.doctor.machine_now", lambda: found)
    monkeypatch.setattr("turbodiff.studio.Studio.cards_now", lambda studio: (found, ()))
    monkeypatch.setattr("turbodiff.diagnostics.doctor.TORCH_REPORT", (sys.executable, "-c", "print('{}')"))
    plan = plan_request(ask("demo"), found, disk())
    for lang in ("en", "zh"):
        monkeypatch.setenv("LC_ALL", {"en": "en_US.UTF-8", "zh": "zh_CN.UTF-8"}[lang])
        sentence = Words(lang).reason(reason, {"got": found.gpu_error})
        assert words in sentence and bool(re.search("[\u4e00-\u9fff]", sentence)) == (lang == "zh")
        assert sentence in dict(system._cards(found, Words(lang)))[Words(lang)("bar.no_gpu")]
        doctor_command()
        gpu_command()
        if state != "none":
            plan_table(plan, Words(lang))
        told = capsys.readouterr().out.replace("\n", "")
        assert told.count(sentence.replace("\n", "")) == (2 if state == "none" else 3)


def test_a_library_that_cannot_be_loaded_is_no_missing_driver(tmp_path, monkeypatch):
    (tmp_path / "libnvidia-ml.so.1").write_text("of another kind of machine")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    found = machine()
    assert (found.gpu_state, found.gpu_reason) == ("error", "gpu_bad_library") and "libnvidia-ml" in found.gpu_error


def test_libraries_that_print_cost_no_sample(fake_nvml, tmp_path, monkeypatch):
    """To standard output, with and without an end of line, before and in each sample; and for a long time."""
    fake_nvml("talks")
    (tmp_path / "sitecustomize.py").write_text("print('welcome to this cluster', end='')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert [card.uuid for card in machine().gpus] == ["GPU-aaaa"]
    running = probe.Probe(interval_s=0.01, deadline_s=ANSWER_S)
    seen, until_s = set(), time.monotonic() + 2 * ANSWER_S
    try:
        while len(seen) < 20 and time.monotonic() < until_s:
            found = running.latest()
            seen |= {found.taken_s} if found.state == "ok" else set()
            time.sleep(0.005)
        assert len(seen) == 20
        assert os.fstat(running._child.stderr.fileno()).st_size < 1000  # of one sample, not of twenty
    finally:
        running.stop()


@pytest.mark.parametrize("mode", ["stdout", "stderr"])
def test_nothing_but_garbage_is_told_with_its_beginning_and_has_an_end(fake_nvml, tmp_path, monkeypatch, mode):
    if mode == "stdout":
        fake_nvml("normal")
        flood = "import os\nwhile True:\n    os.write(1, b'garbage of a library' * 1000)\n"
        (tmp_path / "sitecustomize.py").write_text(flood)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    else:
        fake_nvml("floods")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = probe.machine_now(6.0)  # the end of the deadline is what is waited for
    assert found.gpu_reason == ("gpu_unreadable" if mode == "stdout" else "gpu_hang")
    assert "garbage of a library" in found.gpu_error and len(found.gpu_error) <= probe.MOST_ERROR
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 64 << 10  # KiB


def test_a_sampler_that_cannot_be_started_is_told_and_tried_again(fake_nvml, monkeypatch):
    fake_nvml("normal")
    right = sys.executable
    monkeypatch.setattr(sys, "executable", "/dev/null")
    assert (machine().gpu_reason, machine().gpu_error) == ("gpu_sampler_not_started", "Permission denied")
    running = probe.Probe(deadline_s=ANSWER_S)
    try:
        assert running.latest().reason == "gpu_sampler_not_started"
        monkeypatch.setattr(sys, "executable", right)
        until_s = time.monotonic() + ANSWER_S
        while running.latest().state != "ok" and time.monotonic() < until_s:
            time.sleep(0.05)
        assert running.latest().state == "ok"
    finally:
        running.stop()


def test_samples_without_a_card_are_told_apart():
    """All of them hold one and the same empty tuple: the first one's state and RAM stood for ever."""
    samples = iter([probe._failed("hang", "gpu_hang", "2 s"), probe._failed("error", "gpu_nvml", "x")])
    memory = Memory(lambda: next(samples))
    assert [memory.machine().gpu_state for _ in range(2)] == ["hang", "error"]


def test_our_workers_are_asked_once_for_a_sample_and_again_when_one_of_them_changed(monkeypatch):
    """32 slots ask for their card a hundred times a turn, and each time all of them were listed."""
    monkeypatch.setattr(supervisor_context, "ASK_WORKERS_S", 3600.0)
    asked, samples = list[int](), [probe._failed("hang", "gpu_hang", "2 s")]
    memory = Memory(lambda: samples[-1], lambda: asked.append(1) or [os.getpid()])
    for change in (
        lambda: None,
        memory.workers_changed,
        lambda: samples.append(probe._failed("error", "gpu_nvml", "")),
    ):
        change()
        assert [memory.machine() is memory.machine() for _ in range(3)] == [True] * 3
    assert len(asked) == 3 and memory.machine().gpu_state == "error"


def test_unknown_memory_is_unknown_and_never_zero(fake_nvml):
    fake_nvml("na_memory")
    (card,) = machine().gpus
    assert (card.total_bytes, card.free_bytes, card.used_bytes) == (None, None, None)


def test_mig_slices_are_cards_of_their_own(fake_nvml):
    fake_nvml("mig")
    cards = machine().gpus
    assert [card.uuid for card in cards] == ["MIG-1111", "MIG-2222"]
    assert all(card.mig and card.total_bytes == 10 * GIB and card.utilisation is None for card in cards)


@pytest.mark.parametrize("mode", ["hang", "hang_in_memory"])
def test_a_hanging_driver_costs_no_more_than_the_deadline(fake_nvml, mode):
    fake_nvml(mode)
    start_s = time.monotonic()
    found = probe.machine_now()
    assert time.monotonic() - start_s < probe.DEADLINE_S + 0.5  # what a loaded test machine may add
    assert (found.gpus, found.gpu_state) == ((), "hang")


def test_a_driver_that_hangs_later_is_noticed_and_the_sampler_replaced(fake_nvml):
    fake_nvml("hang_later")
    running = probe.Probe(interval_s=0.05, deadline_s=1.0)
    try:
        until_s = time.monotonic() + ANSWER_S
        while running.latest().state != "ok" and time.monotonic() < until_s:
            time.sleep(0.05)
        while running.latest().state != "hang" and time.monotonic() < until_s:
            time.sleep(0.05)
        assert running.latest().cards == ()
    finally:
        running.stop()


def test_ram_that_our_own_worker_holds_alone_counts_as_free_for_the_next_job(fake_nvml):
    fake_nvml("no_driver")
    kept = bytearray(b"x" * (64 << 20))
    mine = probe.machine_now(ANSWER_S, own_pids=frozenset({os.getpid()}))
    assert machine().ram_reclaimable_bytes == 0
    assert mine.ram_reclaimable_bytes >= len(kept)
    assert probe.machine_now(ANSWER_S, own_pids=frozenset({1 << 22})).ram_reclaimable_bytes == 0


def test_of_two_cards_the_freest_is_planned_for(fake_nvml):
    fake_nvml("two")
    plan = plan_request(ask("wan2.1-1.3b"), machine().model_copy(update={"torch": "2.13.0"}), disk())
    assert plan.device == "cuda:1"
    first = only(machine(), "cuda:0").model_copy(update={"torch": "2.13.0"})
    assert plan_request(ask("wan2.1-1.3b"), first, disk()).device == "cuda:0"
    assert only(machine(), "cpu").gpus == ()


def test_the_running_probe_never_blocks_and_reports_a_hang(fake_nvml):
    fake_nvml("hang")
    running = probe.Probe(interval_s=0.05, deadline_s=0.2)
    try:
        running.latest()
        time.sleep(0.4)
        start_s = time.monotonic()
        assert running.latest().state == "hang"
        assert time.monotonic() - start_s < 0.5
    finally:
        running.stop()


def test_the_running_probe_hands_out_the_newest_sample_with_its_age(fake_nvml):
    fake_nvml("two")
    running = probe.Probe(interval_s=0.05, deadline_s=ANSWER_S)
    try:
        until_s = time.monotonic() + ANSWER_S
        while running.latest().state == "hang" and time.monotonic() < until_s:
            time.sleep(0.05)
        newest = running.latest()
        assert [card.uuid for card in newest.cards] == ["GPU-aaaa", "GPU-bbbb"]
        assert newest.age_s < ANSWER_S
    finally:
        running.stop()


@pytest.mark.parametrize(
    ("devices", "uuids"),
    [
        (None, ["GPU-aaaa", "GPU-bbbb"]),
        ("1", ["GPU-bbbb"]),
        ("1,0", ["GPU-bbbb", "GPU-aaaa"]),
        ("GPU-bb", ["GPU-bbbb"]),
        ("", []),
        ("-1", []),
        ("0,7,1", ["GPU-aaaa"]),  # CUDA stops at the first name that matches nothing
        ("0,0", []),  # a card named twice leaves none
        ("GPU-aaaa,GPU-aa", []),
        (" 1 , 0 ", ["GPU-bbbb", "GPU-aaaa"]),
        ("1x,0", ["GPU-bbbb", "GPU-aaaa"]),  # strtoul
        ("+1", ["GPU-bbbb"]),
        ("0,-1,1", ["GPU-aaaa"]),
        ("0,GPU-bbbb", ["GPU-aaaa"]),  # of the kind of the first name
        ("GPU-bbbb,0", ["GPU-bbbb"]),
        ("NoDevFiles", []),
        ("void", []),
    ],
)
def test_cuda_visible_devices_chooses_and_orders(devices, uuids):
    cards = [probe.CardSample(uuid="GPU-aaaa", nvml_index=0), probe.CardSample(uuid="GPU-bbbb", nvml_index=1)]
    assert [card.uuid for card in probe.visible(cards, devices)] == uuids


def test_a_mig_slice_is_named_by_its_own_uuid_or_its_parents():
    cards = [
        probe.CardSample(uuid="MIG-1111", nvml_index=0, parent="GPU-aaaa"),
        probe.CardSample(uuid="MIG-2222", nvml_index=0, parent="GPU-aaaa", instance=(2, 0)),
    ]
    assert [card.uuid for card in probe.visible(cards, "MIG-GPU-aaaa/2/0")] == ["MIG-2222"]
    assert probe.visible(cards, "MIG-GPU-aaaa/7/0") == []
    assert [card.uuid for card in probe.visible(cards, "MIG-2222")] == ["MIG-2222"]
    assert [card.uuid for card in probe.visible(cards, "GPU-aaaa")] == ["MIG-1111"]


@pytest.mark.parametrize(
    ("mode", "devices", "uuids"),
    [
        ("mig", "MIG-GPU-aaaa/2/0", ["MIG-2222"]),
        ("mig", "MIG-GPU-aaaa/2/0,MIG-GPU-aaaa/1/0", ["MIG-2222", "MIG-1111"]),
        ("mig", "MIG-GPU-aaaa/1/1", []),
        ("mig", "MIG-GPU-bbbb/1/0", []),
        ("mig", "MIG-GPU-aaaa/2/0,MIG-2222", []),  # one slice named twice
        ("mig", "GPU-aaaa", ["MIG-1111"]),
        ("mig_old", "MIG-GPU-aaaa/2/0", ["MIG-GPU-aaaa/2/0"]),
        ("mig_nameless", "MIG-GPU-aaaa/2/0", ["MIG-GPU-aaaa/2/0"]),  # a driver that tells no instances
    ],
)
def test_the_old_names_of_mig_slices_choose_through_the_real_sampler(fake_nvml, monkeypatch, mode, devices, uuids):
    fake_nvml(mode)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
    assert [card.uuid for card in machine().gpus] == uuids


def test_a_pretended_card_replaces_the_real_one(fake_nvml, monkeypatch):
    fake_nvml("normal")
    monkeypatch.setenv("TURBODIFF_PRETEND_VRAM", "12")
    found = machine()
    assert found.pretended
    assert [card.total_bytes for card in found.gpus] == [12 * GIB]
    assert found.gpus[0].name == "NVIDIA GeForce RTX 4090"


@pytest.mark.parametrize(
    ("module", "why"),
    [
        ("def nvmlInit(): pass\nclass NVMLError(Exception): pass\n", "module 'pynvml' has no attribute"),
        ("raise RuntimeError('made for Python 2')", "RuntimeError: made for Python 2"),
        ("print 'hello'", "SyntaxError"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("raise SystemExit('no licence')", "status 1: no licence"),
        ("import sys; sys.stderr.write('x' * 200_000 + '\\nlast words'); sys.exit(3)", "status 3: last words"),
    ],
    ids=["old", "raises", "python 2", "crashes", "exits", "talks"],
)
def test_a_sampler_that_dies_tells_its_reason_and_is_no_hang(fake_nvml, tmp_path, monkeypatch, module, why):
    """An old pynvml in the environment read as a driver that hangs."""
    fake_nvml("normal")
    (tmp_path / "pynvml.py").write_text(module)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    sample = probe.take_sample(60.0)
    assert sample.state == "error" and why in sample.error, sample
    running = probe.Probe(deadline_s=60.0)
    until_s = time.monotonic() + 60
    while running.latest().state == "hang" and time.monotonic() < until_s:
        time.sleep(0.05)
    found = running.latest()
    running.stop()
    assert found.state == "error" and why in found.error, found


def test_a_sampler_that_crashes_later_and_whose_successors_crash_is_an_error(fake_nvml, tmp_path, monkeypatch):
    fake_nvml("normal")
    running = probe.Probe(interval_s=0.1, deadline_s=60.0)
    try:
        until_s = time.monotonic() + 120
        while running.latest().state != "ok" and time.monotonic() < until_s:
            time.sleep(0.05)
        (tmp_path / "pynvml.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        running._child.kill()
        while running.latest().state == "ok" and time.monotonic() < until_s:
            time.sleep(0.05)
        found = running.latest()
    finally:
        running.stop()
    assert found.state == "error" and "SIGSEGV" in found.error, found


def test_what_a_cards_speed_is_made_of_is_read(fake_nvml):
    fake_nvml("normal")
    (card,) = machine().gpus
    assert (card.sm_count, card.clock_mhz) == (128, 3105)
    assert (card.memory_bus_bits, card.memory_clock_mhz) == (384, 10501)
    assert card.vgpu is False
    assert card.pcie_bytes_s == pytest.approx(0.75 * 31.5e9, rel=0.01)
    fake_nvml("riser")
    (slow,) = machine().gpus
    assert slow.pcie_bytes_s == card.pcie_bytes_s / 4
    fake_nvml("mig")
    assert [part.sm_count for part in machine().gpus] == [14, 14]
    fake_nvml("old_driver")
    (old,) = machine().gpus
    assert (old.sm_count, old.pcie_bytes_s, old.vgpu) == (None, None, None)


def test_a_virtual_gpu_runs_without_expandable_segments(fake_nvml, monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    fake_nvml("vgpu")
    assert machine().allocator == "limited"
    fake_nvml("normal")
    assert machine().allocator == "expandable"
