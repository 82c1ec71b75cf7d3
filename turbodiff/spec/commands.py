"""Commands: what a worker is told, one JSON line each on a pipe of its own (events.py is what it answers)."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from turbodiff.spec.plan import Calibration, Plan
from turbodiff.spec.request import Request


class RunCommand(BaseModel):
    """Run one attempt of one job.

    Args:
        plan: as it was shown; None: the worker plans. After an out-of-memory (`cap_bytes`) it is not used.
        cap_bytes: what the new plan stays below.
        output: a file name of the person's own; None: the library names the clip.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")
    cmd: Literal["run"] = "run"
    job: int = 1
    attempt: int = 1
    request: Request
    plan: Plan | None = None
    cap_bytes: int | None = None
    outputs: Path
    state: Path
    output: Path | None = None
    calibration: Calibration | None = None

    @property
    def given_plan(self) -> Plan | None:
        """The plan to keep to, None where one is to be made."""
        return self.plan if self.cap_bytes is None else None


class JobCommand(BaseModel):
    """Stop a running job: give it up, or decode what there is."""

    model_config = ConfigDict(frozen=True)
    cmd: Literal["cancel", "stop_and_decode"]
    job: int


class ExitCommand(BaseModel):
    """End the worker."""

    model_config = ConfigDict(frozen=True)
    cmd: Literal["exit"] = "exit"
