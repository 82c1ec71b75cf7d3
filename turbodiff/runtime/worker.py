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
from typing import Any, BinaryIO

from turbodiff.spec.errors import OutOfMemoryError, TurbodiffError
from turbodiff.spec.events import BeatEvent, ErrorEvent, Event, HelloEvent, NoticeEvent, WaitEvent
from turbodiff.spec.numbers import gib

log = logging.getLogger("turbodiff.worker")

BEAT_S = 1.0
GRACE_S = 2.0  # from `exit` or the loss of the parent until the process ends, whatever it is doing


class Pipe:
    """Writes event lines; one line per write, so that readers never see half an event."""

    def __init__(self, fd: int) -> None:
        self._fd, self._lock = fd, threading.Lock()
        self.job = self.attempt = 0

    def say(self, event: Event) -> None:
        """Send one event as one of the current job."""
        line = event.model_copy(update={"job": self.job, "attempt": self.attempt}).line()
        with self._lock:
            os.write(self._fd, line.encode() + b"\n")


class Orders:
    """Commands from the parent: jobs to run in order, and which of them to stop."""

    def __init__(self, stream: BinaryIO) -> None:
        self._jobs: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._cancelled: set[int] = set()
        self._decode_now: set[int] = set()
        threading.Thread(target=self._read, args=(stream,), name="orders", daemon=True).start()

    def runs(self) -> Iterator[dict[str, Any]]:
        """The `run` commands, until `exit` or until the parent is gone."""
        while (order := self._jobs.get()) is not None:
            yield order

    def cancelled(self, job: int) -> bool:
        """Whether this job was cancelled."""
        return job in self._cancelled

    def decode_now(self, job: int) -> bool:
        """Whether to stop sampling here and decode what there is."""
        return job in self._decode_now

    def _read(self, stream: BinaryIO) -> None:
        for line in stream:
            order = json.loads(line)
            if order["cmd"] == "run":
                self._jobs.put(order)
            elif order["cmd"] == "cancel":
                self._cancelled.add(order["job"])
            elif order["cmd"] == "stop_and_decode":
                self._decode_now.add(order["job"])
            else:
                break
        self._jobs.put(None)
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
    _be_the_first_to_go()
    pipe = Pipe(args.events_fd)
    orders = Orders(os.fdopen(args.commands_fd, "rb"))
    return serve(pipe, orders, args.device)


def serve(pipe: Pipe, orders: Orders, device: str) -> int:
    """Say hello, then run one job after the other with warm models; an out-of-memory ends the process."""
    import torch

    from turbodiff.runtime.device import Device
    from turbodiff.runtime.model_cache import ModelCache

    try:
        place = Device.pick(device)
    except TurbodiffError as error:
        pipe.say(ErrorEvent(**error.fields(), exit_code=error.exit_code))
        return error.exit_code
    torch.set_flush_denormal(True)  # denormals make CPU convolutions several times slower
    pipe.say(HelloEvent(pid=os.getpid(), start_time=_start_time(), **place.facts()))
    threading.Thread(target=_beat, args=(pipe,), name="beat", daemon=True).start()
    shelf = ModelCache(place)
    for order in orders.runs():
        pipe.job, pipe.attempt = order["job"], order["attempt"]
        try:
            run(order, shelf, pipe, orders)
        except OutOfMemoryError:
            return 1  # the traceback pins tensors: only a new process has all of the memory
        finally:
            pipe.job = pipe.attempt = 0
    return 0


def run(order: dict[str, Any], shelf: Any, pipe: Pipe, orders: Orders) -> None:
    """One job; every failure becomes one `error` event."""
    from turbodiff.plan.planner import Shortage
    from turbodiff.runtime.attempt import Job
    from turbodiff.runtime.pipeline import generate
    from turbodiff.runtime.replan import Waits, calibration_of, machine_of, plan_for

    try:
        machine = machine_of(order, shelf.device)
        plan = plan_for(order, machine, shelf.device)
        if isinstance(plan, Shortage):
            pipe.say(WaitEvent(**plan._asdict()))
            return
        if order.get("cap_bytes") is not None:
            pipe.say(one_rung_lower(plan, order["cap_bytes"]))
        job = Job(
            id=order["job"],
            attempt=order["attempt"],
            plan=plan,
            outputs=Path(order["outputs"]),
            state=Path(order["state"]),
            output=Path(order["output"]) if order.get("output") else None,
            machine=machine,
            calibration=calibration_of(order),
        )
        pipe.say(generate(job, shelf, pipe.say, orders))
    except Waits as waits:
        pipe.say(WaitEvent(**waits.shortage._asdict()))
    except TurbodiffError as error:
        pipe.say(ErrorEvent(**error.fields(), exit_code=error.exit_code))
        if isinstance(error, OutOfMemoryError):
            raise
    except Exception as error:  # the outermost frame: whatever it was, the parent must hear of it
        log.exception("job %d failed", order["job"])
        what = f"{type(error).__name__}: {error}"[:2000]
        failure = TurbodiffError(what, code="unexpected", try_instead="see the log")
        pipe.say(ErrorEvent(**failure.fields(), exit_code=failure.exit_code))


def one_rung_lower(plan: Any, cap_bytes: int) -> NoticeEvent:
    """The notice that an earlier attempt ran out of memory, and what this one does about it."""
    levers = " ".join(f"{name}={value}" for name, value in plan.levers.model_dump().items())
    text = f"an earlier attempt needed more than there was: this one stays below {gib(cap_bytes)} with {levers}"
    numbers = {"cap_bytes": cap_bytes, "peak_bytes": plan.peak_bytes}
    return NoticeEvent(key="one_rung_lower", text=text, numbers=numbers)


def _beat(pipe: Pipe) -> None:
    import psutil

    me = psutil.Process()
    while True:
        time.sleep(BEAT_S)
        try:
            pipe.say(BeatEvent(rss_bytes=me.memory_info().rss))
        except OSError:
            os._exit(1)  # nobody listens any more


def _be_the_first_to_go() -> None:
    """When host memory runs out the kernel should take this process, never its supervisor."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("800")


def _start_time() -> int:
    """Clock ticks after boot at which this process started: with the pid and the boot id it names the process."""
    return int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])


def leave(status: int) -> None:
    """End this process now: taking down an interpreter with torch in it takes seconds and saves nothing."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    leave(main())
