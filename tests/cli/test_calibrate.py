"""`turbodiff calibrate` as a person types it; the measuring itself needs a GPU, its rows do not."""

import json
import sys

import pytest

from tests.plan.machines import ask, card, disk, gpu
from turbodiff.cli import link_rate, main
from turbodiff.cli.calibration import samples_of
from turbodiff.gpu.card_measurements import card_measurements
from turbodiff.jobs import measurements
from turbodiff.jobs.store import Store
from turbodiff.plan import planner
from turbodiff.plan.calibration import History, work_bytes
from turbodiff.plan.hardware import Machine
from turbodiff.plan.planner import plan_request
from turbodiff.spec.models import all_models


def calibrate(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["turbodiff", "calibrate", *flags])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code


def rows_of(plan, ratio):
    """What the measuring process says of a plan whose work memory is `ratio` times the predicted one."""
    for phase in plan.phases[:-1]:
        work = work_bytes(plan, phase)
        weights = {"weights_bytes": phase.weights_bytes, "measured_bytes": phase.weights_bytes + round(ratio * work)}
        yield {
            "name": phase.name,
            "planned_work_bytes": work,
            "reserved_bytes": None,
            "slack_bytes": phase.slack_bytes,
            **weights,
        }


def test_without_a_gpu_it_says_in_one_line_what_it_would_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("turbodiff.gpu.probe.machine_now", Machine)
    assert calibrate(monkeypatch, "--state-dir", str(tmp_path), "--model", "wan2.1-1.3b") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no GPU" in line and "17 and 49 frames of wan2.1-1.3b" in line


@pytest.mark.parametrize("spec", [spec for spec in all_models() if not spec.bundled], ids=lambda spec: spec.name)
def test_every_model_can_be_asked_for(tmp_path, monkeypatch, spec):
    """A picture belongs to those that start from one, by the table and not by the name: Wan2.2-T2V-A14B does not."""
    asked = []
    monkeypatch.setattr("turbodiff.gpu.probe.machine_now", lambda: card(24))
    monkeypatch.setattr("turbodiff.cli.calibration.MEASURE", (sys.executable, "-c", "input()"))
    plan = planner.plan_request

    def noted(request, *args):
        asked.append((request.model, bool(request.image)))
        return plan(request, *args)

    monkeypatch.setattr("turbodiff.plan.planner.plan_request", noted)
    assert not calibrate(monkeypatch, "--state-dir", str(tmp_path), "--model", spec.display_name)
    assert asked == [(spec.name, spec.kind == "i2v")] * 2


def test_what_was_learned_is_used_shown_and_forgotten(tmp_path, monkeypatch, capsys):
    store, here = Store(tmp_path), card(24)
    request = ask("wan2.1-1.3b")
    plan = plan_request(request, here, disk())
    assert plan_request(request, here, disk(), history=History(measurements.samples(store))) == plan
    for sample in samples_of(plan, [*rows_of(plan, 1.1), {"name": "denoise", "oom": "CUDA out of memory"}], here, 0):
        measurements.keep_sample(store, sample)
    learned = plan_request(request, here, disk(), history=History(measurements.samples(store)))
    (told,) = [reason.numbers for reason in learned.reasons if reason.key == "calibrated"]
    assert told == {"phase": plan.binding_phase.name, "formula_bytes": plan.peak_bytes, "samples": 1}
    assert learned.peak_bytes > plan.peak_bytes and learned.request == plan.request
    other = plan_request(request, card(16), disk(), history=History(measurements.samples(store)))
    assert other == plan_request(request, card(16), disk())
    assert calibrate(monkeypatch, "--state-dir", str(tmp_path), "--list") == 0
    assert "memory x 1.10 from 1 samples" in capsys.readouterr().out
    assert calibrate(monkeypatch, "--state-dir", str(tmp_path), "--clear") == 0
    assert plan_request(request, here, disk(), history=History(measurements.samples(store))) == plan


def test_samples_taken_while_a_neighbour_moved_teach_nothing(tmp_path):
    store, here, request = Store(tmp_path), card(24), ask("wan2.1-1.3b")
    plan = plan_request(request, here, disk())
    for sample in samples_of(plan, list(rows_of(plan, 1.2)), here, 300 << 20):
        measurements.keep_sample(store, sample)
    assert plan_request(request, here, disk(), history=History(measurements.samples(store))) == plan


PARTS = """
import json, sys
part = sys.argv[1]
if part == "vmm":
    VMM
print("a library says hello")
print(json.dumps({"facts": {"context_bytes": 333, "kernels": {"norm": "", "gemm": "differs"}, "unknown": 1}}))
print(json.dumps({"facts": {"pcie_bytes_s": 12e9, "page_locked_bytes": 0, "page_lock_refused": True}}), flush=True)
END
"""


@pytest.fixture
def parts(monkeypatch, tmp_path):
    """Put other parts in the place of those that need a card; the parent's side is what runs."""

    def use(vmm: str = "print(json.dumps({'facts': {'vmm_works': True}})); sys.exit(0)", end: str = "") -> None:
        script = tmp_path / "parts.py"
        script.write_text(PARTS.replace("VMM", vmm).replace("END", end))
        monkeypatch.setattr("turbodiff.cli.calibration.QUICK", (sys.executable, str(script)))
        monkeypatch.setattr("turbodiff.gpu.probe.machine_now", lambda: card(24))

    return use


@pytest.mark.parametrize("flags", [(), ("--json",)], ids=["lines", "json"])
def test_quick_without_a_gpu_says_so_and_ends_well(tmp_path, monkeypatch, capsys, flags):
    monkeypatch.setattr("turbodiff.gpu.probe.machine_now", Machine)
    assert calibrate(monkeypatch, "--quick", "--state-dir", str(tmp_path), *flags) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert "no" in line.lower() and (not flags or json.loads(line)["measured"] is False)
    assert card_measurements() == ()


def test_quick_keeps_what_each_part_told(tmp_path, monkeypatch, capsys, parts):
    parts()
    assert calibrate(monkeypatch, "--quick", "--state-dir", str(tmp_path)) == 0
    (kept,) = card_measurements()
    assert (kept.name, kept.total_bytes, kept.torch) == (card(24).gpus[0].name, 24 << 30, "2.13.0")
    assert (kept.vmm_works, kept.context_bytes, kept.pcie_bytes_s) == (True, 333, 12e9)
    assert kept.kernels == {"norm": "", "gemm": "differs"} and kept.page_lock_refused
    assert "12.0 GB/s" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [(), ("--json",)], ids=["lines", "json"])
def test_where_torch_cannot_use_the_card_nothing_of_a_cpu_is_kept_as_the_card_s(tmp_path, monkeypatch, capsys, flags):
    """A torch without CUDA beside a card: a CPU's rates, and that no kernel runs, were kept as the card's."""
    monkeypatch.setattr("turbodiff.gpu.probe.machine_now", lambda: card(24))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert calibrate(monkeypatch, "--quick", "--state-dir", str(tmp_path), *flags) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert "torch 2.13.0 cannot use the GPU" in line and (not flags or json.loads(line)["measured"] is False)
    assert card_measurements() == ()


@pytest.mark.parametrize("failure", ["sys.exit(1)", "os = __import__('os'); os.abort()", "1 / 0"])
def test_a_card_on_which_expandable_segments_fail_is_known_as_one(tmp_path, monkeypatch, parts, failure):
    parts(vmm=failure)
    assert calibrate(monkeypatch, "--quick", "--state-dir", str(tmp_path)) == 0
    (kept,) = card_measurements()
    assert kept.vmm_works is False and kept.context_bytes == 333


def test_a_part_that_hangs_costs_what_it_had_not_told(tmp_path, monkeypatch, parts):
    parts(end="__import__('time').sleep(60)")
    monkeypatch.setattr("turbodiff.cli.calibration.QUICK_S", 4.0)
    assert calibrate(monkeypatch, "--quick", "--state-dir", str(tmp_path)) == 0
    (kept,) = card_measurements()
    assert (kept.context_bytes, kept.pcie_bytes_s, kept.block_rate) == (333, 12e9, None)


def test_what_two_cards_send_to_each_other_is_measured_kept_and_planned_with(tmp_path, monkeypatch, capsys, parts):
    """Their processes are ours, over gloo, as no card is here; the plan takes their rate for that of the cards."""
    parts()
    two = card(24).model_copy(update={"gpus": tuple(gpu(24, uuid=f"GPU-{index}", index=index) for index in range(2))})
    monkeypatch.setattr("turbodiff.gpu.probe.machine_now", lambda: two)
    assert calibrate(monkeypatch, "--quick", "--state-dir", str(tmp_path)) == 0
    (kept,) = card_measurements()
    ((cards, bytes_s),) = kept.link_bytes_s
    assert cards == 2 and bytes_s > 1e6 and "among 2 cards" in capsys.readouterr().out
    measured = two.model_copy(update={"gpus": tuple(gpu.model_copy(update=kept.facts) for gpu in two.gpus)})
    plan = plan_request(ask("wan2.1-14b", cards=2), measured, disk())
    (told,) = [reason.numbers for reason in plan.reasons if reason.key == "link_measured"]
    assert told["gb_per_second"] == round(bytes_s / 1e9, 1)


def test_processes_that_cannot_meet_measure_nothing(monkeypatch):
    monkeypatch.setattr(link_rate, "LINK", (sys.executable, "-c", "import sys; sys.exit(1)"))
    assert link_rate.link_rate([{}, {}]) is None
    monkeypatch.setattr(link_rate, "LINK", (sys.executable, "-c", "import time; time.sleep(60)"))
    monkeypatch.setattr(link_rate, "LINK_S", 1.0)
    assert link_rate.link_rate([{}, {}]) is None
