from typing import Any

import psutil
from hypothesis import given
from hypothesis import strategies as st

from turbodiff.spec.events import BeatEvent, PhaseEvent, StepEvent
from turbodiff.spec.wording import Words
from turbodiff.supervisor.watchdog import Evidence, Watchdog


def step(dt_s: float) -> StepEvent:
    return StepEvent(i=1, n=4, t=0.5, expert="single", dt_s=dt_s, eta_s=0.0)


def denoising(dt_s: float = 2.0, steps: int = 3, **options: Any) -> Watchdog:
    """A watchdog at t = 0 that has seen some steps."""
    watchdog = Watchdog(0.0, **options)
    watchdog.on_event(PhaseEvent(name="denoise", state="start"), 0.0)
    for _ in range(steps):
        watchdog.on_event(step(dt_s), 0.0)
    return watchdog


def verdicts(
    watchdog: Watchdog, until_s: int, evidence: Any = lambda now: Evidence(), from_s: int = 1
) -> dict[str, int]:
    """Second of the first occurrence of each verdict but ok."""
    found: dict[str, int] = {}
    for now in range(from_s, until_s):
        verdict = watchdog.check(float(now), evidence(now))
        if verdict != "ok":
            found.setdefault(verdict, now)
    return found


def test_a_silent_step_is_named_at_10_s_and_ended_at_twice_its_deadline() -> None:
    assert verdicts(denoising(), 200) == {"quiet": 11, "slow": 60, "dump": 90, "end": 120}


def test_a_slow_card_has_eight_times_its_usual_step() -> None:
    found = verdicts(denoising(dt_s=30.0), 500)
    assert (found["slow"], found["end"]) == (240, 480)


def test_fault_29_heartbeats_alone_are_no_progress() -> None:
    watchdog = denoising()
    found = set()
    for now in range(1, 130):
        watchdog.on_event(BeatEvent(rss_bytes=1), now)
        found.add(watchdog.check(float(now), Evidence(cpu_s=float(now))))
    assert "end" in found
    assert "CPU busy, no progress" in watchdog.reason()


def test_fault_29_a_busy_cpu_beside_a_cold_gpu_is_ended_like_any_silence() -> None:
    watchdog = denoising()
    found = verdicts(watchdog, 200, lambda now: Evidence(cpu_s=float(now), utilisation=0.0, power_w=60.0))
    assert found == {"quiet": 11, "slow": 60, "dump": 90, "end": 120}
    assert "CPU busy while the GPU is idle" in watchdog.reason()


def test_fault_30_a_slow_disk_is_not_stuck_while_bytes_arrive() -> None:
    watchdog = Watchdog(0.0)
    watchdog.on_event(PhaseEvent(name="text_encode", state="start"), 0.0)
    found = verdicts(watchdog, 5000, lambda now: Evidence(bytes_read=now * 1_000_000))
    assert list(found) == ["quiet"]
    assert "bytes still rising" in watchdog.reason()


def test_a_busy_cpu_that_reads_a_little_is_not_called_a_slow_disk() -> None:
    watchdog = denoising()
    for now in range(1, 15):
        watchdog.check(float(now), Evidence(bytes_read=now << 20, cpu_s=float(now)))
    assert "CPU busy" in watchdog.reason()


def test_loading_that_reads_nothing_for_300_s_is_slow() -> None:
    assert verdicts(Watchdog(0.0), 700) == {"quiet": 11, "slow": 300, "dump": 450, "end": 600}


def test_a_first_step_may_compile_for_ten_minutes() -> None:
    watchdog = Watchdog(0.0)
    watchdog.on_event(PhaseEvent(name="denoise", state="start"), 0.0)
    assert verdicts(watchdog, 599) == {"quiet": 11}


def test_phases_learn_their_deadline_from_earlier_runs() -> None:
    watchdog = Watchdog(0.0, {"vae_decode": 30.0})
    watchdog.on_event(PhaseEvent(name="vae_decode", state="start"), 0.0)
    assert watchdog.deadline_s() == 180.0


def test_fault_31_a_busy_gpu_that_draws_no_power_is_called_slow_at_once() -> None:
    watchdog = denoising(dt_s=60.0)
    for now in range(1, 40):
        watchdog.on_event(step(60.0), now)
        watchdog.check(float(now), Evidence(utilisation=1.0, power_w=400.0))
    found = verdicts(watchdog, 70, lambda now: Evidence(utilisation=1.0, power_w=90.0), from_s=40)
    assert found["slow"] < 60
    assert "draws little power" in watchdog.reason()


def test_fault_33_sleep_and_clock_jumps_are_no_silence() -> None:
    watchdog = denoising()
    assert verdicts(watchdog, 9) == {}
    assert verdicts(watchdog, 10_005, from_s=10_000) == {}


@given(st.lists(st.floats(0.05, 55.0), min_size=1, max_size=20))
def test_no_slow_but_living_worker_is_ever_ended(gaps: list[float]) -> None:
    watchdog, now = denoising(dt_s=1.0), 0.0
    for gap in gaps:
        end = now + gap
        while now < end:
            now = min(now + 1.0, end)
            assert watchdog.check(now, Evidence()) in ("ok", "quiet")
        watchdog.on_event(step(gap), now)


def test_the_reason_names_what_the_evidence_says() -> None:
    reasons = {
        "RAM low": Evidence(ram_available_bytes=100 << 20),
        "VRAM at the cap": Evidence(vram_free_bytes=10 << 20),
        "SIGSTOP": Evidence(state=psutil.STATUS_STOPPED),
        "waits in the kernel": Evidence(state=psutil.STATUS_DISK_SLEEP),
        "nothing moves": Evidence(ram_available_bytes=9 << 30, vram_free_bytes=9 << 30),
    }
    for words, evidence in reasons.items():
        watchdog = denoising()
        for now in range(1, 15):
            watchdog.check(float(now), evidence)
        assert words in watchdog.reason()
        assert watchdog.reason().startswith("denoise silent for 14 s")
        for lang, told in (("en", "Denoise has made no progress for 14 s: "), ("zh", "去噪已有 14 秒没有进展：")):
            assert Words(lang).notice(watchdog.silence()).startswith(told)  # no name of a phase or a cause as it is
            assert "_" not in Words(lang).notice(watchdog.silence())
