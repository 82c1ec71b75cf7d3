import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from supervisor.bench import SCRIPTED, request, scripted, wait_until
from tests.plan.machines import disk, gpu, machine
from turbodiff.diagnostics import doctor
from turbodiff.diagnostics.background_tasks import start_task
from turbodiff.gpu.process_identity import start_ticks
from turbodiff.plan.planner import plan_request
from turbodiff.spec.errors import TurbodiffError
from turbodiff.spec.events import RunCommand
from turbodiff.supervisor.run_alone import run_alone
from turbodiff.supervisor.supervisor import Supervisor
from turbodiff.supervisor.web_process import CANNOT_RUN, WebProcess
from turbodiff.supervisor.worker_process import (
    RUN_ID,
    Worker,
    describe_exit,
    run_once,
    worker_environment,
)

ROOT = Path(__file__).parents[2]

PARENT = """
import sys, time
sys.path.insert(0, "tests")
from pathlib import Path
from supervisor.bench import SCRIPTED, scripted
from turbodiff.spec.events import RunCommand
from turbodiff.supervisor.worker_process import Worker
worker = Worker(SCRIPTED)
folder = Path(sys.argv[1])
worker.send(RunCommand(request=scripted({"hang": "gil"}, nonce="n"), outputs=folder, state=folder))
while "step" not in {event.type for event in worker.events()}:
    time.sleep(0.01)
time.sleep(0.3)  # now native code holds the GIL: no thread can see that the command pipe has ended
print(worker.pid, flush=True)
time.sleep(60)
"""


def alive(pid: int) -> bool:
    return start_ticks(pid) is not None and Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"


def test_one_job_without_store_or_supervisor(tmp_path: Path) -> None:
    command = RunCommand(request=request(nonce="n"), outputs=tmp_path, state=tmp_path)
    events = list(run_once(command, SCRIPTED))
    assert events[0].type == "hello"
    assert events[-1].type == "result" and Path(events[-1].path).is_file()


def test_closing_the_generator_ends_the_worker(tmp_path: Path) -> None:
    asked = scripted({"steps": 100, "dt_s": 0.1}, nonce="n")
    running = run_once(RunCommand(request=asked, outputs=tmp_path, state=tmp_path), SCRIPTED)
    pid = next(running).pid
    running.close()  # type: ignore[attr-defined]
    assert not alive(pid)


def test_a_worker_that_dies_without_a_word_is_an_error_that_says_how(tmp_path: Path) -> None:
    asked = scripted({"die": "SIGSEGV"}, nonce="n")
    with pytest.raises(TurbodiffError, match="signal SIGSEGV"):
        list(run_once(RunCommand(request=asked, outputs=tmp_path, state=tmp_path), SCRIPTED))


def test_a_worker_that_dies_while_it_shares_its_clip_makes_it_alone(tmp_path: Path, capsys) -> None:
    """Beside the queue: once, and nobody else's death is hidden."""
    asked = scripted({"attempts": [{"die": "exit 1", "print": "rank 1 ended with -9"}, {}]}, nonce="n")
    command, events = RunCommand(request=asked, outputs=tmp_path, state=tmp_path, cards=("",)), []
    assert Path(run_alone(command, SCRIPTED, events.append).path).is_file()
    assert events[-1].attempt == 2
    said = capsys.readouterr().err
    assert "rank 1 ended with -9" in said and "exit code 1" in said and "once more, on one card" in said
    for alone in (
        command.model_copy(update={"cards": ()}),
        command.model_copy(update={"request": scripted({"die": "exit 1"}, nonce="n")}),
    ):
        with pytest.raises(TurbodiffError, match="exit code 1"):
            run_alone(alone, SCRIPTED, events.append)


def test_a_worker_that_lost_a_card_makes_its_clip_on_those_that_are_left(tmp_path: Path, capsys) -> None:
    three = machine(*[gpu(24, index=index, uuid=f"GPU-{index}") for index in range(3)])
    asked = scripted({"attempts": [{"lost": 1}, {"lost": 1}, {}]}, nonce="n", model="wan2.1-1.3b", cards=3)
    plan, events = plan_request(asked, three, disk()), []
    command = RunCommand(request=asked, plan=plan, outputs=tmp_path, state=tmp_path, cards=plan.followers)
    assert Path(run_alone(command, SCRIPTED, events.append).path).is_file()
    told = [(event.attempt, event.plan.followers) for event in events if event.type == "plan"]
    assert told == [
        (1, ("GPU-1", "GPU-2")), (1, ("GPU-2",)), (2, ("GPU-2",)), (2, ()), (3, ())
    ]  # fmt: skip
    said = capsys.readouterr().err
    assert said.count("on the cards that are left") == said.count("once more, on one card") == 1


@pytest.mark.parametrize("program", ["missing/python", "no_right", "a_folder", "/dev/null"])
def test_a_program_that_cannot_be_run_is_one_error_everywhere(tmp_path: Path, monkeypatch, program: str) -> None:
    (tmp_path / "no_right").touch(0o600)
    (tmp_path / "a_folder").mkdir()
    argv, before = (str(tmp_path / program), "-P"), len(list(Path("/proc/self/fd").iterdir()))
    command = RunCommand(request=request(nonce="n"), outputs=tmp_path, state=tmp_path)
    with pytest.raises(TurbodiffError) as caught:
        list(run_once(command, argv))
    assert caught.value.code == "not_started" and argv[0] in caught.value.got
    with pytest.raises(TurbodiffError, match="cannot be started"):
        start_task(tmp_path / "tasks", "selftest", argv)
    monkeypatch.setattr(doctor, "TORCH_REPORT", argv)
    assert any(key == "torch_silent" and argv[0] in said for key, said in doctor.doctor().warnings)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_workers_and_a_page_that_cannot_be_run_are_tried_a_few_times_and_end_nothing(tmp_path: Path) -> None:
    """A program that nobody may run costs lines in the log: the supervisor goes on until the page is given up."""
    now_s = [0.0]
    supervisor = Supervisor(
        tmp_path / "state", tmp_path / "outputs", worker_argv=("/dev/null",), devices=("",), working=tmp_path,
        sample=lambda: None, now=lambda: now_s[0],
    )  # fmt: skip
    try:
        supervisor.web = WebProcess(["/dev/null"], supervisor.context)
        for _ in range(20):
            now_s[0] += 61.0
            supervisor.tick(0.0)
        assert supervisor.slots[0].broken and supervisor.exit_code == CANNOT_RUN
    finally:
        supervisor.close()
    said = next(tmp_path.glob("*startup*")).read_text()
    assert "cannot start: a process of turbodiff cannot be started; got /dev/null: Permission denied" in said


def seconds_from_the_parents_death_to_the_workers(folder: Path) -> float:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(folder)], cwd=ROOT, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert alive(pid)
    parent.kill()
    killed_s = time.monotonic()
    assert wait_until(lambda: not alive(pid), 5.0, every_s=0.002)
    took_s = time.monotonic() - killed_s
    parent.wait()
    parent.stdout.close()
    return took_s


def test_fault_23_the_worker_is_gone_100_ms_after_its_parents_sigkill(tmp_path: Path) -> None:
    tries = (
        seconds_from_the_parents_death_to_the_workers(tmp_path) for _ in range(3)
    )  # a busy machine may be late once
    assert any(took_s < 0.1 for took_s in tries)


def test_a_worker_that_ignores_exit_and_sigterm_is_killed_with_its_whole_group() -> None:
    code = (
        "import os, signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "child = subprocess.Popen(['sleep', '60']); print(child.pid, flush=True); time.sleep(60)"
    )
    worker = Worker((sys.executable, "-c", code))
    lines: list[str] = []
    assert wait_until(lambda: bool(lines.extend(worker.output()) or lines), 5.0)
    assert worker.stop(exit_s=0.1, term_s=0.1) == -signal.SIGKILL
    assert wait_until(lambda: not alive(int(lines[0])), 2.0)
    worker.close()


def test_an_idle_worker_leaves_when_its_command_pipe_ends() -> None:
    worker = Worker(SCRIPTED)
    assert wait_until(lambda: bool(worker.events()), 5.0)
    os.close(worker._commands)
    assert worker.wait(3.0)
    worker._commands = os.open("/dev/null", os.O_WRONLY)
    assert worker.exit_status() == 0
    worker.close()


def test_lines_that_are_no_events_go_to_the_log() -> None:
    code = "import os, sys; os.write(int(sys.argv[2]), b'hello\\n{\"v\": 9}\\n')"
    worker = Worker((sys.executable, "-c", code))
    assert worker.wait(5.0)
    assert worker.events() == []
    assert len([line for line in worker.output() if "not an event line" in line]) == 2
    worker.kill()
    worker.close()


def test_the_environment_fixes_device_order_allocator_and_owner() -> None:
    environment = worker_environment("abc", "GPU-1")
    assert environment["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert environment["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert (environment[RUN_ID], environment["CUDA_VISIBLE_DEVICES"]) == ("abc", "GPU-1")


def test_exit_statuses_are_words() -> None:
    assert describe_exit(-11) == "signal SIGSEGV"
    assert describe_exit(3) == "exit code 3"
    assert describe_exit(None) == "no answer from the driver"


def test_no_descriptor_stays_open() -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        worker = Worker(SCRIPTED)
        worker.kill()
        worker.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
