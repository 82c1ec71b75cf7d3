"""Rows of the fault table where the worker is one of a node: the same tests as of a worker of this machine."""

import pytest
from supervisor.bench import scripted
from supervisor.test_faults import (  # noqa: F401  run again here, with the bench of conftest.py
    test_a_job_that_waits_for_memory_charges_nothing,
    test_an_event_that_nobody_understands_is_a_line_in_the_log,
    test_fault_13_an_abort_within_an_allocation_runs_again_under_a_cap,
    test_fault_15_out_of_memory_at_every_rung_parks_the_job_and_the_worker_is_well,
    test_fault_21_a_job_that_crashes_the_worker_stops_after_two_and_others_run_on,
    test_fault_21_a_killed_worker_is_replaced_and_its_job_runs_again,
    test_fault_22_an_exit_without_a_result_is_a_crash,
    test_fault_28_29_a_hang_is_dumped_ended_and_repeated_once,
    test_fault_28_a_second_hang_fails_with_its_reason,
    test_fault_33_a_wall_clock_that_jumps_changes_no_order_and_no_verdict,
    test_fault_34_nan_latents_run_again_with_the_sturdier_attention,
    test_fault_37_a_clip_that_is_not_whole_is_never_done,
    test_fault_41_a_deleted_output_folder_is_made_again,
    test_fault_66_a_job_needs_no_page,
    test_fault_69_a_running_job_is_cancelled_at_its_next_step,
    test_fault_69_a_worker_that_does_not_hear_a_cancel_is_ended,
    test_late_words_of_an_earlier_attempt_are_dropped,
    test_stop_and_decode_makes_a_clip_of_what_there_is,
)

from cluster.conftest import FarBench


@pytest.mark.parametrize("at", ["publish", "sidecar", "linked"])
def test_a_worker_of_a_node_that_dies_around_its_commit_leaves_one_clip(bench: FarBench, at: str) -> None:
    job = bench.run(scripted({"die": "SIGSEGV", "die_at": at}, {}))
    assert (job.state, job.attempt) == ("done", 2) and job.result is not None  # what lies on the node is nobody's
    assert [str(path) for path in bench.outputs.glob("2*/*.mp4")] == [job.result.path]
