"""`turbodiff jobs`: the queue from the shell, also while the app runs."""

import json
import sys
from typing import Annotated, Literal

import typer
from pydantic_core import to_jsonable_python

from turbodiff.cli import flags
from turbodiff.cli.places import StateDir, open_studio
from turbodiff.spec.errors import RequestError

jobs_app = typer.Typer(help="The queue: list, show, cancel, retry, move, pause, resume.", no_args_is_help=True)
JobId = Annotated[int, typer.Argument(help="number of the job")]


@jobs_app.command("list")
def list_jobs(state_dir: StateDir = None, limit: Annotated[int, typer.Option("--limit")] = 20) -> None:
    """The newest jobs first."""
    for job in open_studio(state_dir).jobs(limit):
        sys.stdout.write(f"{job.id:6} {job.state:10} {job.request.model:14} {job.request.prompt[:60]}\n")


@jobs_app.command("show")
def show_job(job: JobId, state_dir: StateDir = None, as_json: flags.Json = False) -> None:
    """One job: what was asked, how far it is, what came of it."""
    found = open_studio(state_dir).job(job)
    names = ("id", "state", "attempt", "request", "plan", "progress", "error", "result", "strikes")
    facts = {name: to_jsonable_python(getattr(found, name)) for name in names}
    if as_json:
        sys.stdout.write(json.dumps(facts) + "\n")
        return
    for name, value in facts.items():
        if value and name != "plan":
            sys.stdout.write(f"{name:10} {value}\n")


@jobs_app.command("cancel")
def cancel_job(job: JobId, state_dir: StateDir = None) -> None:
    """Stop a job between two steps, or take it out of the queue."""
    sys.stdout.write(f"job {job}: {open_studio(state_dir).cancel(job)}\n")


@jobs_app.command("retry")
def retry_job(job: JobId, state_dir: StateDir = None) -> None:
    """Queue a job again that failed, was cancelled or was parked."""
    sys.stdout.write(f"queued as job {open_studio(state_dir).retry(job)}\n")


@jobs_app.command("move")
def move_job(job: JobId, where: Literal["first", "up", "down", "last"], state_dir: StateDir = None) -> None:
    """Move a waiting job: first, up, down, last."""
    studio = open_studio(state_dir)
    state = studio.job(job).state
    if state != "queued":
        raise RequestError(
            f"job {job} is {state}", code="job_not_waiting", field="job", try_instead="turbodiff jobs list"
        )
    studio.move(job, where)
    sys.stdout.write(f"job {job}: {where}\n")


@jobs_app.command("pause")
def pause_queue(state_dir: StateDir = None) -> None:
    """Start no further job; the one that runs goes on."""
    open_studio(state_dir).pause()
    sys.stdout.write("the queue is paused\n")


@jobs_app.command("resume")
def resume_queue(state_dir: StateDir = None) -> None:
    """Go on with the queue."""
    open_studio(state_dir).resume()
    sys.stdout.write("the queue goes on\n")
