"""`turbodiff calibrate` as a person types it; the measuring itself needs a GPU, its rows do not."""

import sys

import pytest

from tests.plan.machines import ask, card, disk
from turbodiff.cli import main
from turbodiff.cli.machine import samples_of
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
        yield {"name": phase.name, "planned_work_bytes": work, "reserved_bytes": None, **weights}


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
    monkeypatch.setattr("turbodiff.cli.machine.MEASURE", (sys.executable, "-c", "input()"))
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
    assert told == {"factor": pytest.approx(1.1, abs=1e-3), "samples": len(plan.phases) - 1}
    assert learned.peak_bytes > plan.peak_bytes and learned.request == plan.request
    other = plan_request(request, card(16), disk(), history=History(measurements.samples(store)))
    assert other == plan_request(request, card(16), disk())
    assert calibrate(monkeypatch, "--state-dir", str(tmp_path), "--list") == 0
    assert "work memory x 1.10" in capsys.readouterr().out
    assert calibrate(monkeypatch, "--state-dir", str(tmp_path), "--clear") == 0
    assert plan_request(request, here, disk(), history=History(measurements.samples(store))) == plan


def test_samples_taken_while_a_neighbour_moved_teach_nothing(tmp_path):
    store, here, request = Store(tmp_path), card(24), ask("wan2.1-1.3b")
    plan = plan_request(request, here, disk())
    for sample in samples_of(plan, list(rows_of(plan, 1.2)), here, 300 << 20):
        measurements.keep_sample(store, sample)
    assert plan_request(request, here, disk(), history=History(measurements.samples(store))) == plan
