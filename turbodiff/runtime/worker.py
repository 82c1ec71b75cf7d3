"""The worker: the only process that ever touches the GPU. It stays warm between jobs and dies with its parent.

    python -m turbodiff.runtime.worker --events-fd 5 --commands-fd 6

Commands come in and events go out as JSON lines on two pipes (spec/events.py); log text goes to stderr. A thread
reads commands, so that a cancel is seen between two steps; a thread beats once a second; the main thread works.
"""

import argparse
import contextlib
import faulthandler
import json
import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

import psutil

from turbodiff.gpu.process_identity import start_ticks
from turbodiff.plan.hardware import CONTEXT_BYTES
from turbodiff.spec.errors import OutOfMemoryError, TurbodiffError
from turbodiff.spec.events import BeatEvent, ErrorEvent, Event, HelloEvent, ResultEvent, RunCommand, WaitEvent
from turbodiff.spec.out_of_memory import memory_failure

if TYPE_CHECKING:
    from turbodiff.runtime.device import Device
    from turbodiff.runtime.model_cache import ModelCache

log = logging.getLogger("turbodiff.worker")

BEAT_S = 1.0
GRACE_S = 2.0  # from `exit` or the loss of the parent until the process ends, whatever it is doing


class EventWriter:
    """Writes event lines; one line per write, so that readers never see half an event."""

    def __init__(self, fd: int) -> None:
        self._fd, self._lock = fd, threading.Lock()
        self.job = self.attempt = 0

    def send(self, event: Event) -> None:
        """Send one event as one of the current job."""
        line = event.model_copy(update={"job": self.job, "attempt": self.attempt}).line()
        with self._lock:
            os.write(self._fd, line.encode() + b"\n")


class CommandReader:
    """Commands from the parent: jobs to run in order, and which of them to stop."""

    def __init__(self, stream: BinaryIO) -> None:
        self._runs: queue.SimpleQueue[dict[str, object] | None] = queue.SimpleQueue()
        self.cancelled: set[int] = set()
        self.decode_now: set[int] = set()
        threading.Thread(target=self._read, args=(stream,), name="commands", daemon=True).start()

    def runs(self) -> Iterator[dict[str, object]]:
        """The `run` commands, until `exit` or until the parent is gone."""
        while (command := self._runs.get()) is not None:
            yield command

    def _read(self, stream: BinaryIO) -> None:
        for line in stream:
            command = json.loads(line)
            if command["cmd"] == "run":
                self._runs.put(command)
            elif command["cmd"] == "cancel":
                self.cancelled.add(command["job"])
            elif command["cmd"] == "stop_and_decode":
                self.decode_now.add(command["job"])
            else:
                break
        self._runs.put(None)
        time.sleep(GRACE_S)  # the main thread ends by itself if it is idle
        os._exit(0)


def main(argv: list[str] | None = None) -> int:
    """Run jobs until told to exit."""
    parser = argparse.ArgumentParser(prog="turbodiff-worker")
    parser.add_argument("--events-fd", type=int, required=True)
    parser.add_argument("--commands-fd", type=int, required=True)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="[%(levelname)s] %(message)s", force=True)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of a CPU kernel that nobody here uses
    faulthandler.register(signal.SIGUSR1)  # whoever finds this process stuck can ask where
    with contextlib.suppress(OSError):  # when host memory runs out the kernel should take this process, not the parent
        Path("/proc/self/oom_score_adj").write_text("800")
    return serve(EventWriter(args.events_fd), CommandReader(os.fdopen(args.commands_fd, "rb")), args.device)


def serve(events: EventWriter, commands: CommandReader, device_name: str) -> int:
    """Say hello, then run one job after the other with warm models; an out-of-memory ends the process."""
    import torch

    from turbodiff.runtime.device import Device
    from turbodiff.runtime.model_cache import ModelCache

    try:
        device = Device.pick(device_name)
    except TurbodiffError as error:
        events.send(ErrorEvent(**error.fields(), exit_code=error.exit_code))
        return error.exit_code
    torch.set_flush_denormal(True)  # denormals make CPU convolutions several times slower
    events.send(HelloEvent(pid=os.getpid(), start_time=start_ticks(os.getpid()) or 0, **device.facts()))
    threading.Thread(target=beat, args=(events, device), name="beat", daemon=True).start()
    import_early()
    models = ModelCache(device)
    for command in commands.runs():
        events.job, events.attempt = cast("int", command["job"]), cast("int", command["attempt"])
        try:
            run(command, models, events, commands)
        except OutOfMemoryError:
            return 1  # the traceback pins tensors: only a new process has all of the memory
        finally:
            events.job = events.attempt = 0
    return 0


def run(fields: dict[str, object], models: "ModelCache", events: EventWriter, commands: CommandReader) -> None:
    """Run the job of a `run` command; every failure becomes one `error` event.

    Raises:
        OutOfMemoryError: reported already.
    """
    from turbodiff.runtime.attempt import Attempt, levers_notice, out_of_memory
    from turbodiff.runtime.pipeline import generate
    from turbodiff.runtime.replan import WaitForMemory, first_plan, machine_for

    try:
        command = RunCommand.model_validate(fields)
        machine = machine_for(command, models.device)
        plan = first_plan(command, machine, models.device)
        if command.cap_bytes is not None:
            events.send(levers_notice(plan, cap_bytes=command.cap_bytes))
        attempt = Attempt(
            id=command.job,
            number=command.attempt,
            plan=plan,
            outputs=command.outputs,
            state=command.state,
            models=models,
            send=events.send,
            commands=commands,
            output=command.output,
            machine=machine,
            calibration=command.calibration,
            cards=command.cards,
            measures_link=command.measure_link,
            names=command.names,
            away=command.away,
        )
        events.send(ResultEvent(**generate(attempt).model_dump()))
    except WaitForMemory as waits:
        events.send(WaitEvent(**waits.shortage._asdict()))
    except TurbodiffError as error:
        events.send(ErrorEvent(**error.fields(), exit_code=error.exit_code))
        if isinstance(error, OutOfMemoryError):
            raise
    except Exception as error:  # the outermost frame: whatever it was, the parent must hear of it
        log.exception("job %d failed", events.job)
        if (ran_out := memory_failure(error)) is not None:
            oom = out_of_memory(ran_out, "the job")
            events.send(ErrorEvent(**oom.fields(), exit_code=oom.exit_code))
            raise oom from None
        what = f"{type(error).__name__}: {error}"[:2000]
        failure = TurbodiffError(what, code="unexpected", try_instead="see the log")
        events.send(ErrorEvent(**failure.fields(), exit_code=failure.exit_code))


def import_early() -> None:
    """Import what most first jobs need while the plan of theirs is made. What cannot be imported is told by the job
    that needs it."""
    with contextlib.suppress(Exception):
        from turbodiff.runtime import attempt, pipeline  # noqa: F401


def beat(events: EventWriter, device: "Device") -> None:
    """Send a `beat` every second, until nobody reads any more: then end this process."""
    me, has_context = psutil.Process(), False
    while True:
        time.sleep(BEAT_S)
        held_bytes = device.held_bytes()
        has_context = has_context or held_bytes > 0
        try:
            held_bytes += CONTEXT_BYTES if has_context else 0
            events.send(BeatEvent(rss_bytes=me.memory_info().rss, held_bytes=held_bytes))
        except OSError:
            os._exit(1)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # taking down an interpreter with torch in it takes seconds and saves nothing
