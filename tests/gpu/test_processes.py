import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from turbodiff.gpu import probe
from turbodiff.gpu.process_identity import is_running, start_ticks
from turbodiff.gpu.processes import HOST_COMMAND, MAX_PID, holders
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


@pytest.fixture
def running(tmp_path, monkeypatch):
    """Starts real programs that seem to have devices open: /proc as it is, but for their descriptors."""
    proc, started = tmp_path / "proc", []
    (proc / "sys").mkdir(parents=True)
    for name in ("stat", "uptime", "meminfo"):
        (proc / name).symlink_to(f"/proc/{name}")
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(proc))

    def start(*descriptors, argv=(sys.executable, "-c", "import time; print(flush=True); time.sleep(600)")):
        program = subprocess.Popen(argv, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
        started.append(program)
        program.stdout.readline()  # it has become what it is
        home = proc / str(program.pid)
        for name in ("fd", "fdinfo"):
            (home / name).mkdir(parents=True)
        for name in ("stat", "status", "cmdline", "comm"):
            (home / name).symlink_to(f"/proc/{program.pid}/{name}")
        for number, (target, told) in enumerate(descriptors):
            (home / "fd" / str(number)).symlink_to(target)
            (home / "fdinfo" / str(number)).write_text("pos:\t0\nflags:\t02\n" + told)
        return program.pid

    yield start
    for program in started:
        program.kill()
        program.communicate()


def opened(*names):
    return [(f"/dev/{name}", "") for name in names]


@pytest.mark.parametrize("mode", ["no_list", "empty", "garbage"])
def test_without_a_list_of_the_driver_programs_of_this_user_are_told_by_what_they_have_open(fake_nvml, running, mode):
    fake_nvml(mode)
    cuda = running(*opened("null", "nvidiactl", "nvidia-uvm", "nvidia0", "nvidia0"))
    wsl = running(*opened("dxg"))
    others = [running(*opened("null")), running(*opened("nvidiactl")), running()]
    card = one_card()
    assert not card.listed and card.host_command == HOST_COMMAND
    rows = {row.pid: row for row in card.rows if row.kind != "unaccounted"}
    assert rows.keys() == {cuda, wsl} and not rows.keys() & set(others)
    assert rows[cuda].kind == "same_user" and rows[cuda].kill_line == f"kill {cuda}"
    assert "time.sleep(600)" in rows[cuda].command and rows[cuda].bytes is None
    assert card.rows[-1].kind == "unaccounted" and card.rows[-1].bytes == 3 * GIB


def test_without_a_list_our_workers_are_told_apart_and_stand_in_the_table_before_they_open_the_card(fake_nvml, running):
    fake_nvml("no_list")
    worker, fresh, leftover = running(*opened("nvidia0")), running(), running(*opened("nvidia0"))
    rows = {row.pid: row for row in one_card(own_pids={worker, fresh, MAX_PID + 1}, leftover_pids={leftover}).rows}
    assert {pid: row.kind for pid, row in rows.items() if pid} == {
        worker: "worker", fresh: "worker", leftover: "leftover",
    }  # fmt: skip
    assert not any(row.kill_line for row in rows.values())


def test_without_a_list_each_program_stands_under_the_cards_that_it_has_open(fake_nvml, running):
    fake_nvml("two_no_list")
    first, second = running(*opened("nvidia-uvm", "nvidia0")), running(*opened("nvidia-uvm", "nvidia1"))
    both = running(*opened("nvidia0", "nvidia1"))
    cards = holders(probe.take_sample(ANSWER_S), own_pids={second})
    assert [{row.pid for row in card.rows if row.pid} for card in cards] == [{first, both}, {second, both}]


def test_what_drm_descriptors_own_up_to_is_counted_once_a_client(fake_nvml, running):
    fake_nvml("no_list")
    nouveau = "drm-driver:\tnouveau\ndrm-client-id:\t{}\ndrm-memory-vram:\t{}\ndrm-memory-gart:\t9 MiB\n"
    render = [("/dev/dri/renderD128", nouveau.format(client, size)) for client, size in ((7, "1024 KiB"), (8, "2 MiB"))]
    game = running(render[0], render[0], render[1])
    other_card = running(("/dev/dri/card1", "drm-driver:\tamdgpu\ndrm-memory-vram:\t512 MiB\n"))
    rows = {row.pid: row.bytes for row in one_card().rows}
    assert rows == {game: 3 << 20, None: 3 * GIB - (3 << 20)} and other_card not in rows


def test_our_sampler_holds_nothing(fake_nvml, running):
    fake_nvml("normal")
    argv = (sys.executable, "-P", str(probe.SAMPLER), "--watch", "60")
    sampler = running(*opened("nvidiactl", "nvidia0"), argv=argv)
    fake_nvml("no_list")
    assert sampler not in {row.pid for row in one_card().rows}


def test_programs_are_told_where_the_library_of_the_driver_does_not_answer_at_all(fake_nvml, running):
    fake_nvml("mismatch")
    running()
    assert holders(probe.take_sample(ANSWER_S)) == ()
    cuda = running(*opened("nvidia0"))
    card = one_card()
    assert (card.uuid, card.used_bytes, card.listed) == ("", None, False)
    assert [(row.pid, row.kind) for row in card.rows] == [(cuda, "same_user")]


def test_a_program_that_ends_while_it_is_looked_at_costs_nothing(fake_nvml, running, tmp_path):
    fake_nvml("no_list")
    cuda = running(*opened("nvidia0"))
    (tmp_path / "proc" / str(cuda) / "fdinfo" / "0").unlink()
    assert [row.pid for row in one_card().rows] == [None]
