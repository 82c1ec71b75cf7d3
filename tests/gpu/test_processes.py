import os
from pathlib import Path

from turbodiff.gpu import probe
from turbodiff.gpu.processes import HOST_COMMAND, MAX_PID, holders, is_running, start_ticks
from turbodiff.spec.numbers import GIB

ANSWER_S = 30.0


def one_card(**leaders):
    (card,) = holders(probe.take_sample(ANSWER_S), **leaders)
    return card


def test_every_byte_in_use_is_accounted_for(fake_nvml):
    fake_nvml("normal")
    card = one_card()
    assert card.listed
    assert sum(row.bytes for row in card.rows) == card.used_bytes == 3 * GIB
    assert card.rows[-1].kind == "unaccounted"


def test_a_program_of_the_same_user_comes_with_a_line_to_copy(fake_nvml):
    fake_nvml("normal")
    mine = next(row for row in one_card().rows if row.pid == os.getpid())
    assert mine.kind == "same_user"
    assert mine.kill_line == f"kill {os.getpid()}"
    assert mine.command.split()[0] in Path("/proc/self/cmdline").read_text()
    assert mine.age_s > 0


def test_our_worker_and_a_leftover_worker_are_told_apart(fake_nvml):
    fake_nvml("normal")
    assert one_card(own_pids={os.getpid()}).rows[0].kind == "worker"
    leftover = one_card(leftover_pids={os.getpid()}).rows[0]
    assert leftover.kind == "leftover"
    assert leftover.kill_line == ""  # ended by its button, which checks who it is first


def test_garbage_from_the_driver_is_not_believed(fake_nvml):
    fake_nvml("garbage")
    card = one_card()
    assert not card.listed
    assert card.host_command == HOST_COMMAND
    assert card.rows[-1].kind == "unaccounted"
    assert card.rows[-1].bytes == 3 * GIB


def test_without_a_process_list_the_host_command_is_offered(fake_nvml):
    for mode in ("no_list", "empty"):
        fake_nvml(mode)
        card = one_card()
        assert not card.listed
        assert card.host_command == HOST_COMMAND


def test_a_lost_card_has_no_rows(fake_nvml):
    fake_nvml("lost")
    assert holders(probe.take_sample(ANSWER_S)) == ()


def test_start_ticks_are_the_kernels_own_so_that_older_state_files_still_name_their_process():
    field_22 = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    assert start_ticks(os.getpid()) == field_22
    assert is_running(os.getpid(), field_22) and not is_running(os.getpid(), field_22 - 1)
    assert start_ticks(MAX_PID + 1) is None
