"""重启应用, and what the probe's numbers decide."""

from collections.abc import Callable

import pytest

from supervisor.bench import Bench, request, scripted
from supervisor.cards import GIB, Card
from tests.plan import machines
from tests.plan.machines import disk
from turbodiff.jobs import measurements
from turbodiff.plan.planner import plan_request
from turbodiff.supervisor import supervisor as supervisors
from turbodiff.supervisor.cards import visible_devices
from turbodiff.supervisor.context import machine_of

Make = Callable[..., Bench]


@pytest.fixture(autouse=True)
def no_selected_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture
def card() -> Card:
    return Card()


@pytest.fixture
def carded(make_bench: Make, card: Card) -> Bench:
    bench = make_bench(sample=card)
    card.worker_pid = lambda: bench.slot.worker.pid if bench.slot.worker else None
    return bench


def test_a_restart_says_how_many_bytes_the_driver_confirms(carded: Bench) -> None:
    carded.turn_until(lambda: carded.slot.free)
    first = carded.slot.worker.pid
    control = carded.store.ask("restart", by="page")
    carded.turn_until(lambda: carded.store.outcome(control))
    outcome = carded.store.outcome(control)
    assert outcome is not None and outcome.ok
    assert outcome.freed_bytes == 18 * GIB and outcome.text.startswith("freed 18.0 GiB in")
    carded.turn_until(lambda: carded.slot.free)
    assert carded.slot.worker.pid != first


def test_a_restart_during_a_job_puts_it_back_uncharged_and_it_runs_again(carded: Bench) -> None:
    job = carded.store.submit(scripted({"steps": 1000, "dt_s": 0.02}, {"steps": 1}))
    carded.turn_until(lambda: carded.store.job(job).progress)
    control = carded.store.ask("restart")
    carded.turn_until(lambda: carded.store.job(job).over)
    assert (carded.store.job(job).state, carded.store.job(job).strikes) == ("done", {})
    outcome = carded.store.outcome(control)
    assert outcome is not None and outcome.jobs == {job: "queued"}
    assert f"Job {job} is back in the queue." in carded.log_text()


def test_a_stop_says_what_became_of_each_job(carded: Bench) -> None:
    jobs = [carded.store.submit(scripted({"steps": 1000, "dt_s": 0.02})) for _ in range(3)]
    carded.turn_until(lambda: carded.store.job(jobs[0]).progress)
    carded.supervisor.close()
    assert (
        carded.log_text()
        .splitlines()[-1]
        .endswith(f"Stopped. Job {jobs[0]} is back in the queue. Waiting for the next start: 3.")
    )


def test_memory_that_does_not_come_back_is_no_success(
    carded: Bench, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisors, "PROOF_S", 0.5)
    carded.turn_until(lambda: carded.slot.free)
    card.leaks = True
    control = carded.store.ask("restart")
    carded.turn_until(lambda: carded.store.outcome(control))
    outcome = carded.store.outcome(control)
    assert outcome is not None and not outcome.ok
    assert "18.0 GiB did not come back" in outcome.text


def test_without_a_driver_a_restart_claims_nothing(bench: Bench) -> None:
    bench.turn_until(lambda: bench.slot.free)
    control = bench.store.ask("restart")
    bench.turn_until(lambda: bench.store.outcome(control))
    outcome = bench.store.outcome(control)
    assert outcome is not None and outcome.ok and outcome.freed_bytes is None


def test_fault_2_out_of_memory_beside_a_neighbour_that_grew_waits_for_it(carded: Bench, card: Card) -> None:
    plan_bytes = 20 * GIB
    oom = {"error": {"code": "oom", "what": "OOM: the device ran out"}, "load_s": 0.3}
    asked = scripted(oom, {})
    plan = plan_request(asked, machines.card(24), disk())
    sized = plan.model_copy(update={"peak_bytes": plan_bytes, "budget_bytes": 22 * GIB})
    job = carded.store.submit(asked, sized)
    carded.turn_until(lambda: carded.slot.job)
    card.others_bytes = 10 * GIB
    carded.turn_until(lambda: carded.store.job(job).strikes)
    waiting = carded.store.job(job)
    assert (waiting.state, waiting.strikes, waiting.hold_bytes) == ("queued", {"neighbour": 1}, plan_bytes)
    carded.turn_until(lambda: carded.slot.free)
    for _ in range(5):
        carded.supervisor.tick(0.02)
    assert carded.store.job(job).state == "queued"  # 14 GiB could be had, 20 are needed
    card.others_bytes = 0
    carded.turn_until(lambda: carded.store.job(job).over)
    assert carded.store.job(job).state == "done"


def test_fault_9_numbers_older_than_ten_seconds_are_unknown_and_never_free(carded: Bench, card: Card) -> None:
    memory = carded.supervisor.context.memory
    gpu = memory.gpu(0)
    assert (gpu.free_bytes or 0) + gpu.reclaimable_bytes == 24 * GIB and memory.others_bytes(0) == 0
    card.age_s = 11.0
    assert memory.others_bytes(0) is None
    gpu = memory.gpu(0)
    assert (gpu.free_bytes, gpu.used_bytes, gpu.utilisation, gpu.power_w) == (None, None, None, None)
    assert memory.gpu(1).free_bytes is None


def test_idle_models_are_let_go_when_a_neighbour_needs_the_memory(carded: Bench, card: Card) -> None:
    carded.run(request())
    first = carded.slot.worker.pid
    carded.turn_until(lambda: carded.slot.free)
    card.others_bytes = card.total_bytes - card.held_bytes - (100 << 20)
    carded.turn_until(lambda: carded.slot.free and carded.slot.worker.pid != first)
    assert "a neighbour needs the memory" in carded.log_text()


def test_idle_models_are_let_go_after_a_while(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisors, "IDLE_RELEASE_S", 0.5)
    bench.run(request())
    first = bench.slot.worker.pid
    bench.turn_until(lambda: bench.slot.free and bench.slot.worker.pid != first)
    assert "idle models released" in bench.log_text()


def test_the_probes_sample_is_a_fact_of_the_store(carded: Bench) -> None:
    carded.turn_until(lambda: carded.store.fact("probe"))
    assert carded.store.fact("probe")["cards"][0]["name"] == "Test 24"


def test_the_page_sees_the_machine_without_a_driver_call_of_its_own(carded: Bench, card: Card) -> None:
    carded.turn_until(lambda: carded.slot.free and carded.store.fact("probe"))
    carded.supervisor._housekeeping()
    machine = machine_of(carded.store)
    assert machine is not None
    assert (machine.gpus[0].free_bytes, machine.gpus[0].reclaimable_bytes) == (6 * GIB, 18 * GIB)
    real = carded.store.now
    carded.store.now = lambda: real() + 60
    assert machine_of(carded.store) is None  # a supervisor that is gone says nothing about now


def test_the_worker_that_nvml_does_not_know_is_credited_by_its_own_word(
    make_bench: Make, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a container and under WSL2: else the second identical job is lowered for our own first one."""
    card.sees_workers = False
    monkeypatch.setenv("SCRIPTED_HELD_BYTES", str(18 * GIB))
    bench = make_bench(sample=card)
    card.worker_pid = lambda: bench.slot.worker.pid if bench.slot.worker else None
    bench.turn_until(lambda: bench.slot.free and bench.slot.held_bytes and bench.store.fact("probe"))
    bench.supervisor._housekeeping()
    for machine in (machine_of(bench.store), bench.supervisor.context.memory.machine()):
        assert machine is not None
        assert (machine.gpus[0].free_bytes, machine.gpus[0].reclaimable_bytes) == (6 * GIB, 18 * GIB)
    assert bench.supervisor.context.memory.others_bytes(0) == 0


def test_the_log_names_the_card(carded: Bench) -> None:
    carded.turn_until(lambda: "GPU 0: Test 24 GPU-1" in carded.log_text())


def test_fault_3_samples_of_a_run_beside_a_moving_neighbour_do_not_count(carded: Bench, card: Card) -> None:
    machine = carded.supervisor.context.memory.machine()
    assert machine is not None
    with_cuda = machine.model_copy(update={"torch": "2.13.0"})
    plan = plan_request(request(quant_linear="auto", attention="auto"), with_cuda, disk())
    denoise = next(phase for phase in plan.phases if phase.name == "denoise")
    # the scripted worker says 2 GiB for denoising
    roomy = {"activations_bytes": GIB, "weights_bytes": GIB // 2, "workspace_bytes": denoise.workspace_bytes}
    phases = tuple(phase.model_copy(update=roomy) if phase is denoise else phase for phase in plan.phases)
    plan = plan.model_copy(update={"phases": phases})

    def run(moves: bool) -> None:
        job = carded.store.submit(scripted({"load_s": 0.3}), plan)
        carded.turn_until(lambda: carded.slot.monitor)
        card.others_bytes = 2 * GIB if moves else 0
        carded.turn_until(lambda: carded.store.job(job).over)

    run(moves=True)
    assert measurements.samples(carded.store) == []
    card.others_bytes = 0
    run(moves=False)
    found = {sample.phase: sample for sample in measurements.samples(carded.store)}
    assert found["denoise"].measured_bytes == 1.5 * GIB > found["denoise"].predicted_bytes > GIB
    assert measurements.usual_seconds(carded.store, carded.store.job(2), machine) == {
        "denoise": 0.1,
        "text_encode": 0.1,
    }
    job = carded.store.job(2)
    learned = measurements.calibration_of(carded.store, job, machine, 0)
    assert learned is not None
    assert next(lesson.factor for lesson in learned.lessons if lesson.phase == "denoise") > 1.2
    fault_18 = machine.model_copy(update={"torch": "another"})
    assert measurements.calibration_of(carded.store, job, fault_18, 0) is None
    assert measurements.calibration_of(carded.store, job, machine.model_copy(update={"gpus": ()}), 0) is None


def test_every_visible_card_gets_a_worker(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    one = card()
    two = one.model_copy(
        update={"cards": (one.cards[0], one.cards[0].model_copy(update={"uuid": "GPU-2", "nvml_index": 1}))}
    )
    assert visible_devices(one) == ("",) == visible_devices(None)
    assert visible_devices(two) == ("GPU-1", "GPU-2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert visible_devices(two) == ("",)
