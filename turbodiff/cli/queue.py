"""The running app from the shell: its queue, its seed archive, start, restart and the support bundle."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from turbodiff.cli.flags import OUTPUTS, Json, Outputs, StateDir, open_studio
from turbodiff.spec.environment import module_path
from turbodiff.spec.errors import RequestError, TurbodiffError, not_started
from turbodiff.spec.jobs import ACTIVE
from turbodiff.spec.page_flags import page_parser

RESTART_WAIT_S = 60.0
POLL_S = 0.2

jobs_app = typer.Typer(
    help="The queue: list, show, watch, cancel, retry, move, clear, pause, resume, hold.", no_args_is_help=True
)
seeds_app = typer.Typer(help="The seed archive: list, rate, export, import.", no_args_is_help=True)
JobId = Annotated[int, typer.Argument(help="number of the job")]


@jobs_app.command("list")
def list_jobs(state_dir: StateDir = None, limit: Annotated[int, typer.Option("--limit")] = 20) -> None:
    """The newest jobs first."""
    from turbodiff.cli.show import print_lines, words_here

    words, jobs = words_here(), open_studio(state_dir).jobs(limit)
    print_lines(
        f"{job.id:6} {words(f'shell.state_{job.state}'):10} {job.request.model:14} {job.request.prompt[:60]}"
        for job in jobs
    )


@jobs_app.command("show")
def show_job(job: JobId, state_dir: StateDir = None, as_json: Json = False) -> None:
    """One job: what was asked, how far it is, what came of it."""
    from pydantic_core import to_jsonable_python

    from turbodiff.cli.show import print_lines, words_here

    studio, words = open_studio(state_dir), words_here()
    found = studio.job(job)
    names = ("id", "state", "attempt", "request", "plan", "progress", "error", "result", "strikes")
    facts = {name: to_jsonable_python(getattr(found, name)) for name in names}
    notices = [event for _, event in studio.events(job) if event.type == "notice"]
    facts["notices"] = to_jsonable_python(notices) if as_json else [words.notice(said) for said in notices]
    if as_json:
        sys.stdout.write(json.dumps(facts) + "\n")
        return
    facts["error"] = words.error(found.error.model_dump()) if found.error else ""
    if begin := studio.cards.begin_of(found):
        key = "shell.starts" if begin.start_s >= 1 else "shell.starts_now"
        facts["starts"] = words(key, time=words.seconds(begin.start_s), card=begin.card or "-")
    print_lines(f"{name:10} {value}" for name, value in facts.items() if value and name != "plan")


@jobs_app.command("watch")
def watch_job(job: JobId, state_dir: StateDir = None, as_json: Json = False) -> None:
    """Follow a job until it ends: its phases, steps and notices; ends with 1 where it made no clip."""
    from turbodiff.cli.show import event_lines, print_lines, print_raw, words_here

    studio, words, seen, over = open_studio(state_dir), words_here(), 0, False
    while not over:
        found = studio.job(job)
        over = found.state not in ("queued", *ACTIVE)  # asked before the events, so that none of them is missed
        for number, event in studio.events(job, seen):
            seen = number
            if as_json:
                sys.stdout.write(event.line() + "\n")
                continue
            print_lines(event_lines(event, words), sys.stderr)
            if event.type == "result":
                print_raw(event.path)
        sys.stdout.flush()
        time.sleep(0 if over else POLL_S)
    if found.state != "done":
        told = words.error(found.error.model_dump()) if found.error else ""
        state = words(f"shell.state_{found.state}")
        print_lines([words("shell.job_state", job=job, state=f"{state} {told}").rstrip()], sys.stderr)
        raise typer.Exit(1)


@jobs_app.command("cancel")
def cancel_job(job: JobId, state_dir: StateDir = None) -> None:
    """Stop a job between two steps, or take it out of the queue."""
    from turbodiff.cli.show import print_lines, words_here

    words, state = words_here(), open_studio(state_dir).cancel(job)
    print_lines([words("shell.job_state", job=job, state=words.or_else(f"shell.state_{state}", state))])


@jobs_app.command("retry")
def retry_job(job: JobId, state_dir: StateDir = None) -> None:
    """Queue a job again that failed, was cancelled or was parked."""
    from turbodiff.cli.show import print_lines, words_here

    print_lines([words_here()("shell.queued_as", job=open_studio(state_dir).retry(job))])


@jobs_app.command("move")
def move_job(job: JobId, where: Literal["first", "up", "down", "last"], state_dir: StateDir = None) -> None:
    """Move a waiting job: first, up, down, last."""
    from turbodiff.cli.show import print_lines, words_here

    studio = open_studio(state_dir)
    state = studio.job(job).state
    if state != "queued":
        raise RequestError(
            f"job {job} does not wait", code="job_not_waiting", field="job", got=state,
            try_instead="turbodiff jobs list",
        )  # fmt: skip
    studio.waiting.move(job, where)
    words = words_here()
    print_lines([words("shell.job_state", job=job, state=words(f"shell.{where}"))])


@jobs_app.command("any-card")
def any_card(job: JobId, state_dir: StateDir = None) -> None:
    """Let a waiting job that is for one card run on any."""
    from turbodiff.cli.show import print_lines, words_here

    studio, words = open_studio(state_dir), words_here()
    studio.cards.release(job)
    print_lines([words("shell.job_state", job=job, state=words(f"shell.state_{studio.job(job).state}"))])


def card(
    card: Annotated[str, typer.Argument(help="its name, number or UUID, as `turbodiff gpu` lists them")],
    state: Annotated[Literal["on", "paused", "excluded"], typer.Argument(help="paused: ends its job, takes no more")],
    state_dir: StateDir = None,
) -> None:
    """Let a card take jobs (on), no more of them (paused), or keep everything of ours off it (excluded)."""
    from turbodiff.cli.show import print_lines, words_here

    studio = open_studio(state_dir)
    print_lines([words_here()(f"shell.card_{state}", card=studio.cards.switch(card, state, studio.machine()))])


@jobs_app.command("pause")
def pause_queue(state_dir: StateDir = None) -> None:
    """Start no further job; the one that runs goes on."""
    from turbodiff.cli.show import print_lines, words_here

    open_studio(state_dir).pause()
    print_lines([words_here()("shell.paused")])


@jobs_app.command("resume")
def resume_queue(state_dir: StateDir = None) -> None:
    """Go on with the queue."""
    from turbodiff.cli.show import print_lines, words_here

    open_studio(state_dir).resume()
    print_lines([words_here()("shell.resumed")])


@jobs_app.command("clear")
def clear_queue(state_dir: StateDir = None) -> None:
    """Cancel every job that waits; the one that runs goes on."""
    from turbodiff.cli.show import print_lines, words_here

    print_lines([words_here()("shell.cleared", n=open_studio(state_dir).waiting.clear())])


@jobs_app.command("hold")
def hold_queue(
    clock: Annotated[
        str, typer.Argument(help="start no job before this time of the day; left out: start them now")
    ] = "",
    state_dir: StateDir = None,
) -> None:
    """Start no job before a time of the day, say 23:00; also over a restart."""
    from turbodiff.cli.show import print_lines, words_here

    until_s = open_studio(state_dir).waiting.hold(clock)
    told = time.strftime("%Y-%m-%d %H:%M", time.localtime(until_s))
    print_lines([words_here()("shell.held", time=told) if until_s else words_here()("shell.resumed")])


@seeds_app.command("list")
def list_seeds(
    search: Annotated[str, typer.Argument(help="words that must occur")] = "", state_dir: StateDir = None
) -> None:
    """The newest rows first."""
    from turbodiff.cli.show import print_lines

    for seed in open_studio(state_dir).seeds(search):
        row = seed.row
        cells = (row.prompt, row.seed, row.model, row.resolution, row.rating, row.note)
        print_lines([f"{seed.id:6} " + " | ".join(cells)])


@seeds_app.command("rate")
def rate_seed(
    row: int,
    rating: Annotated[str, typer.Argument(help="stars or words")],
    note: Annotated[str | None, typer.Option("--note")] = None,
    state_dir: StateDir = None,
    outputs: Outputs = OUTPUTS,
) -> None:
    """Rate a row; seeds.md in the outputs folder follows."""
    open_studio(state_dir, outputs).rate(row, rating, note)


@seeds_app.command("export")
def export_seeds(state_dir: StateDir = None) -> None:
    """The archive as a Markdown table on standard output."""
    from turbodiff.cli.show import print_raw

    print_raw(open_studio(state_dir).seeds_text().removesuffix("\n"))


@seeds_app.command("import")
def import_seeds(path: Path, state_dir: StateDir = None, outputs: Outputs = OUTPUTS) -> None:
    """Take over the rows of a Markdown table."""
    from turbodiff.cli.show import print_lines, words_here

    print_lines([words_here()("shell.rows", n=open_studio(state_dir, outputs).import_seeds(path))])


def serve(context: typer.Context) -> None:
    """Start the app with its page: the same as `python webui/app.py`, with the same flags."""
    page_parser("turbodiff serve").parse_args(context.args)  # --help, and what is no flag
    sys.stdout.flush()
    path = module_path(os.environ.get("PYTHONPATH", ""))  # and -P: no module of the folder it is started in
    argv = [sys.executable, "-P", "-m", "webui.app", *context.args]
    try:
        os.execve(sys.executable, argv, {**os.environ, "PYTHONPATH": path})
    except OSError as error:
        raise not_started(sys.executable, error) from None


def restart(state_dir: StateDir = None) -> None:
    """重启应用: end the worker, prove that its memory is back, start a new one. Works when the page is dead, too."""
    from turbodiff.cli.show import print_lines, words_here

    studio = open_studio(state_dir)
    if not studio.served:
        raise TurbodiffError("the app is not running", code="not_running", try_instead="turbodiff serve")
    control = studio.restart(by="shell")
    end_s = time.monotonic() + RESTART_WAIT_S
    while (outcome := studio.restart_outcome(control)) is None:
        if time.monotonic() > end_s:
            raise TurbodiffError("no answer to the restart", code="restart_silent", try_instead="see the start-up log")
        time.sleep(POLL_S)
    print_lines([outcome.text, *words_here().fates(outcome.jobs)])
    if not outcome.ok:
        raise typer.Exit(1)


def support_bundle(
    path: Annotated[Path, typer.Argument(help="the zip to write")] = Path("turbodiff-support.zip"),
    with_prompts: Annotated[bool, typer.Option("--with-prompts", help="leave prompts and picture names in")] = False,
    state_dir: StateDir = None,
) -> None:
    """Logs, versions and the last jobs in one zip, without prompts and secrets."""
    from turbodiff.cli.show import print_raw

    print_raw(str(open_studio(state_dir).support_bundle(path, with_prompts)))
