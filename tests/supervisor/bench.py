"""Requests with a script, and a supervisor on the scripted worker that is turned by hand."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from turbodiff.jobs.store import Store
from turbodiff.spec.jobs import QueuedJob
from turbodiff.spec.request import Request, make_request
from turbodiff.supervisor.supervisor import Supervisor

SCRIPTED = (sys.executable, str(Path(__file__).with_name("scripted_worker.py")))


def request(prompt: str = "a red circle moves right", **fields: Any) -> Request:
    return make_request({"prompt": prompt, **fields})


def scripted(*attempts: dict[str, Any], **fields: Any) -> Request:
    """A request whose attempts follow these scripts."""
    script = {"attempts": list(attempts)} if len(attempts) != 1 else attempts[0]
    return request(json.dumps(script), **fields)


def wait_until(condition: Callable[[], bool], timeout_s: float, every_s: float = 0.05) -> bool:
    """Poll a condition; True as soon as it holds."""
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() >= end:
            return False
        time.sleep(every_s)
    return True


class Bench:
    """A supervisor in this process, turned by hand."""

    def __init__(self, folder: Path, **options: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.state, self.outputs = folder / "state", folder / "outputs"
        options = {"worker_argv": SCRIPTED, "sample": lambda: None, **options}
        self.supervisor = Supervisor(self.state, self.outputs, working=folder, **options)
        self.store: Store = self.supervisor.store

    @property
    def slot(self) -> Any:
        return self.supervisor.slots[0]

    def turn_until(self, condition: Callable[[], Any], timeout_s: float = 60.0) -> None:
        end = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end, f"not in {timeout_s} s; log:\n" + self.log_text()
            self.supervisor.tick(0.02)

    def run(self, asked: Request, timeout_s: float = 60.0) -> QueuedJob:
        """Submit and turn until the job is over or parked."""
        job = self.store.submit(asked)
        self.turn_until(lambda: self.store.job(job).over or self.store.job(job).state == "parked", timeout_s)
        return self.store.job(job)

    def log_text(self) -> str:
        return self.supervisor.log.path.read_text()

    def run_log_text(self) -> str:
        return self.supervisor.context.run_log.path.read_text()
