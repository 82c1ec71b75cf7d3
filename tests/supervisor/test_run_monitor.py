"""What a person hears while a job runs and the world around it changes: each cause once, in words, with its numbers."""

from collections.abc import Callable

import pytest

from supervisor.bench import Bench, scripted
from supervisor.cards import GIB, Card
from tests.plan.machines import ask, card, disk
from turbodiff.plan.planner import plan_request
from turbodiff.runtime.attempt import levers_notice
from turbodiff.spec.events import Notice, PhaseEvent, StepEvent
from turbodiff.supervisor.watchdog import AGAIN_S, Evidence, RunMonitor, expected_steps_s
from webui.wording import Words

CALM = Evidence(others_bytes=GIB, own_bytes=8 * GIB, vram_free_bytes=10 * GIB, ram_available_bytes=20 * GIB)


def monitor(*steps_s: float, expected_s: float = 10.0) -> RunMonitor:
    """A monitor whose job took those seconds for its steps."""
    made = RunMonitor(others_bytes=GIB, step_s={"denoise": expected_s})
    made.on_event(PhaseEvent(name="denoise", state="start"))
    for dt_s in steps_s:
        made.on_event(StepEvent(i=1, n=4, t=0.5, expert="single", dt_s=dt_s, eta_s=0.0))
    return made


def keys(found: list[Notice]) -> list[str]:
    return [notice.key for notice in found]


def test_a_calm_run_says_nothing() -> None:
    assert monitor(60.0, 10.0, 11.0).check(0.0, CALM) == []  # kernels compile in the first step
    assert monitor(10.0, 10.0).check(0.0, Evidence()) == []  # unknown is unknown, never bad


def test_a_neighbour_that_grows_is_said_once_and_again_after_a_while() -> None:
    made = monitor(10.0)
    grown = Evidence(others_bytes=4 * GIB, vram_free_bytes=7 * GIB)
    (notice,) = made.check(0.0, grown)
    assert notice.key == "neighbour_grew"
    assert notice.numbers == {"grew_bytes": 3 * GIB, "free_bytes": 7 * GIB}
    assert made.check(AGAIN_S - 1, grown) == []
    assert keys(made.check(AGAIN_S, grown)) == ["neighbour_grew"]


def test_a_full_card_with_steps_that_slow_down_spills() -> None:
    full = Evidence(others_bytes=GIB, vram_free_bytes=100 << 20)
    assert monitor(10.0, 10.0).check(0.0, full) == []  # a card may be full; that alone is what it was bought for
    assert keys(monitor(10.0, 5.0, 11.0).check(0.0, full)) == ["spill"]
    assert monitor(10.0, 5.0, 11.0).check(0.0, CALM) == []


def test_little_ram_is_said() -> None:
    (notice,) = monitor().check(0.0, Evidence(ram_available_bytes=GIB // 2))
    assert (notice.key, notice.numbers) == ("host_ram_low", {"available_bytes": GIB // 2})


@pytest.mark.parametrize(
    ("seen", "cause"),
    [
        (CALM, "unknown"),
        (Evidence(), "cold"),
        (Evidence(others_bytes=4 * GIB), "neighbour_grew"),
        (Evidence(ram_available_bytes=GIB // 2), "host_ram_low"),
        (Evidence(vram_free_bytes=100 << 20), "spill"),
    ],
    ids=["unknown", "cold", "neighbour", "ram", "spill"],
)
def test_a_step_far_over_plan_comes_with_its_cause(seen: Evidence, cause: str) -> None:
    found = monitor(10.0, 10.0, 31.0).check(0.0, seen, cold=cause == "cold")
    assert found[-1].key == "slow_step"
    assert found[-1].numbers == {"step_s": 31.0, "expected_s": 10.0, "cause": cause}


def test_the_peak_that_the_driver_shows_is_that_of_the_phase() -> None:
    made = monitor()
    made.check(0.0, Evidence(own_bytes=9 * GIB))
    made.check(1.0, Evidence(own_bytes=8 * GIB))
    assert made.peak_bytes == 9 * GIB
    made.on_event(PhaseEvent(name="vae_decode", state="start"))
    assert made.peak_bytes is None


def test_a_step_is_expected_to_take_what_earlier_runs_took_else_what_the_plan_says() -> None:
    plan = plan_request(ask("wan2.1-1.3b", steps=4), card(24), disk())
    planned = next(phase.seconds for phase in plan.phases if phase.name == "denoise")
    assert expected_steps_s(plan, {}) == {"denoise": pytest.approx(planned / 4)}
    assert expected_steps_s(plan, {"denoise": 8.0}) == {"denoise": 2.0}
    assert expected_steps_s(plan.model_copy(update={"device": "cpu"}), {}) == {}
    experts = expected_steps_s(plan_request(ask("wan2.2-a14b"), card(80), disk()), {})
    assert set(experts) == {"denoise_high", "denoise_low"}


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_every_notice_is_worded_with_its_own_numbers(lang: str) -> None:
    made = monitor(10.0, 5.0, 31.0)
    every = made.check(
        0.0, Evidence(others_bytes=4 * GIB, own_bytes=8 * GIB, vram_free_bytes=100 << 20, ram_available_bytes=GIB // 2)
    )
    assert set(keys(every)) == {"neighbour_grew", "spill", "host_ram_low", "slow_step"}
    plan = plan_request(ask("wan2.1-1.3b"), card(12), disk())
    every += [levers_notice(plan, phase="vae_decode"), levers_notice(plan, cap_bytes=8 * GIB)]
    for told in every:
        said = Words(lang).notice(told)
        assert said != told.text  # no fall-back to the log's own words
        assert "{" not in said and "_" not in said


def test_a_notice_reaches_the_job_and_both_logs(make_bench: Callable[..., Bench], monkeypatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("turbodiff.supervisor.attempt_monitor.CHECK_EVERY_S", 0.0)
    beside = Card()
    bench = make_bench(sample=beside)
    beside.worker_pid = lambda: bench.slot.worker.pid if bench.slot.worker else None
    job = bench.store.submit(scripted({"steps": 1000, "dt_s": 0.02}))
    bench.turn_until(lambda: bench.store.job(job).progress)
    beside.others_bytes = 2 * GIB
    bench.turn_until(lambda: "another program took 2.0 GiB" in bench.log_text())
    told = [event for _, event in bench.store.events(job) if event.type == "notice"]
    assert keys(told) == ["neighbour_grew"], told
    assert "another program took 2.0 GiB" in bench.run_log_text()
    bench.store.cancel(job)
    bench.turn_until(lambda: bench.store.job(job).over)
