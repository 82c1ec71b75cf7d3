import signal
from typing import Any

import pytest
from supervisor.bench import request

from turbodiff.jobs.retry_policy import LIMITS, Ending, decide
from turbodiff.spec.events import JobError
from turbodiff.spec.jobs import QueuedJob
from turbodiff.spec.plan import Plan


def planned(peak_bytes: int = 20 << 30, attention: str = "sagesla") -> Plan:
    sizes = {"peak_bytes": peak_bytes, "budget_bytes": 22 << 30}
    return Plan.model_construct(request=request(attention=attention), **sizes)


def job(**fields: Any) -> QueuedJob:
    base: dict[str, Any] = dict.fromkeys(QueuedJob.__dataclass_fields__)
    base |= {"id": 1, "attempt": 1, "request": request(), "plan": planned(), "ask": ""}
    return QueuedJob(**{**base, "strikes": {}, "overrides": {}, **fields})


def error(code: str, exit_code: int = 1, **fields: Any) -> Ending:
    return Ending("error", JobError(**{"code": code, "what": code, "exit_code": exit_code, **fields}))


def test_fault_2_a_neighbour_that_grew_means_wait_not_shrink() -> None:
    grown = Ending("error", JobError(code="oom", what="OOM", exit_code=1), others_grew_bytes=3 << 30)
    decision = decide(job(), grown)
    assert (decision.to, decision.columns["hold_bytes"]) == ("queued", 20 << 30)
    assert "cap_bytes" not in decision.columns and "oom" not in decision.columns["strikes"]


def test_fault_13_each_out_of_memory_goes_one_rung_lower_and_the_third_parks() -> None:
    first = decide(job(), error("oom"))
    assert first.to == "queued" and first.end_worker and first.columns["plan"] is None
    assert first.columns["cap_bytes"] == int(0.9 * (22 << 30))
    tight = job(plan=planned(10 << 30))
    assert decide(tight, error("oom")).columns["cap_bytes"] == (10 << 30) - 1
    second = decide(job(strikes={"oom": 1}, cap_bytes=8 << 30, plan=None), error("oom"))
    assert second.to == "queued" and second.columns["cap_bytes"] == int(0.9 * (8 << 30))
    third = decide(job(strikes={"oom": 2}), error("oom"))
    assert third.to == "parked" and third.columns["error"].code == "oom"


def test_an_abort_within_an_allocation_is_an_out_of_memory_and_any_other_a_crash() -> None:
    aborted = Ending("died", exit_status=-signal.SIGABRT, allocation="CUDA driver error: out of memory")
    decision = decide(job(), aborted)
    assert (decision.to, decision.columns["strikes"]) == ("queued", {"oom": 1}) and decision.columns["cap_bytes"]
    assert decide(job(), Ending("died", exit_status=-signal.SIGABRT)).columns["strikes"] == {"crash": 1}
    neighbour = Ending("died", exit_status=-signal.SIGABRT, allocation="CUDA out of memory", others_grew_bytes=3 << 30)
    assert decide(job(), neighbour).columns["strikes"] == {"neighbour": 1}


def test_a_card_that_was_lost_is_no_crash_of_the_job_that_it_shared() -> None:
    decision = decide(job(strikes={"crash": 1}), error("ranks_lost"))
    assert decision.to == "queued" and decision.end_worker
    assert decision.columns["strikes"] == {"crash": 1, "rank": 1} and "plan" not in decision.columns


def test_host_memory_that_ran_out_is_planned_anew_once() -> None:
    first = decide(job(), error("host_ram"))
    assert first.to == "queued" and first.end_worker and first.columns["plan"] is None
    assert decide(job(strikes={"host_ram": 1}), error("host_ram")).to == "parked"


def test_fault_16_memory_words_in_another_error_are_no_out_of_memory() -> None:
    assert decide(job(), error("unexpected", what="recovered from CUDA out of memory")).to == "failed"


def test_fault_19_pins_that_do_not_fit_park_the_job() -> None:
    assert decide(job(), error("does_not_fit", 5)).to == "parked"


def test_fault_20_the_kernels_oom_kill_is_named_and_repeated_once() -> None:
    killed = Ending("died", exit_status=-signal.SIGKILL, host_oom=True)
    assert decide(job(), killed).to == "queued"
    again = decide(job(strikes={"host_ram": 1}), killed)
    assert again.to == "parked" and again.columns["error"].code == "host_ram" and "OOM" in again.say


def test_fault_21_two_crashes_are_poison_and_twenty_kills_from_outside_are_not() -> None:
    crash = Ending("died", exit_status=-signal.SIGSEGV)
    assert decide(job(), crash).to == "queued"
    poison = decide(job(strikes={"crash": 1}), crash)
    assert poison.to == "failed" and poison.columns["error"].code == "worker_crashed"
    killed = Ending("died", exit_status=-signal.SIGKILL)
    assert decide(job(strikes={"killed": 18}), killed).to == "queued"
    assert decide(job(strikes={"killed": 19}), killed).to == "failed"


@pytest.mark.parametrize(("asked", "next_one"), [("sagesla", "sla"), ("sage", "dense")])
def test_fault_34_nan_is_tried_once_more_with_sturdier_attention(asked: str, next_one: str) -> None:
    nan = error("nan_latents", what="not numbers any more after step 2 of 4")
    decision = decide(job(plan=planned(attention=asked)), nan)
    assert decision.to == "queued" and decision.columns["overrides"] == {"attention": next_one}
    again = decide(job(strikes={"nan": 1}, overrides={"attention": next_one}), nan)
    assert again.to == "failed" and "step 2" in again.say


def test_fault_34_a_pinned_attention_is_never_changed() -> None:
    pinned = request(attention="sage", pinned="attention")
    assert decide(job(request=pinned, plan=None), error("nan_latents")).to == "failed"


def test_fault_40_a_full_disk_parks_the_job_that_kept_its_latents() -> None:
    assert decide(job(), error("disk_full", 2, field="output")).to == "parked"


def test_fault_41_a_read_only_output_folder_parks_the_job() -> None:
    assert decide(job(), error("output_unwritable", 2, field="output")).to == "parked"


def test_bad_input_fails_at_once() -> None:
    assert decide(job(), error("key_missing", 2)).to == "failed"


def test_a_sticky_cuda_error_gets_one_new_process() -> None:
    sticky = error("unexpected", what="AcceleratorError: CUDA error: an illegal memory access was encountered")
    decision = decide(job(), sticky)
    assert decision.to == "queued" and decision.end_worker
    assert decide(job(strikes={"device": 1}), sticky).to == "failed"


def test_what_a_person_or_a_neighbour_did_charges_nothing() -> None:
    for ending in (Ending("stopped", reason="restart"), Ending("wait", need_bytes=5)):
        decision = decide(job(), ending)
        assert decision.to == "queued" and "strikes" not in decision.columns


def test_a_cancelled_job_that_takes_the_worker_with_it_is_cancelled() -> None:
    assert decide(job(ask="cancel"), Ending("died", exit_status=-9)).to == "cancelled"


def test_every_strike_has_a_limit_so_no_job_runs_for_ever() -> None:
    nan = error("nan_latents")
    for strike, limit in LIMITS.items():
        assert 1 <= limit <= 19, strike
    assert decide(job(strikes={"nan": 1}), nan).to == "failed"


def test_a_lost_machine_is_charged_apart_and_parks_the_job_after_the_sixth() -> None:
    first = decide(job(), Ending("lost", JobError(got="far")))
    assert (first.to, first.columns["strikes"]) == ("queued", {"node": 1})
    sixth = decide(job(strikes={"node": 5}), Ending("lost", JobError(got="far")))
    assert sixth.to == "parked" and sixth.columns["error"].code == "node_lost"
