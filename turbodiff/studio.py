"""The front door: what the page, the command line and the API may ask of turbodiff. Never imports torch.

A request is planned here, in the asker's process, by arithmetic; it runs in a worker process.
"""

import os
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from turbodiff.archive import clips, disk
from turbodiff.archive import seeds as archive
from turbodiff.diagnostics import background_tasks, downloads, logs, support_bundle
from turbodiff.diagnostics.doctor import doctor
from turbodiff.gpu.holders import CardHolders, holders
from turbodiff.gpu.probe import Sample, machine_now
from turbodiff.jobs import measurements, retry_policy
from turbodiff.jobs.database import DATABASE
from turbodiff.jobs.store import Job, Store, Where
from turbodiff.media import pictures
from turbodiff.plan import tiers
from turbodiff.plan.hardware import Machine, only, pretend, read_machine
from turbodiff.plan.planner import Policy, plan_request
from turbodiff.prompt.clean import clean
from turbodiff.prompt.tokens import Tokenizer
from turbodiff.prompt.weights import parse
from turbodiff.spec.errors import (
    CancelledByUser,
    DoesNotFitError,
    FileError,
    OutOfMemoryError,
    OutputError,
    RequestError,
    TurbodiffError,
    VerifyError,
)
from turbodiff.spec.events import Event
from turbodiff.spec.inventory import Inventory
from turbodiff.spec.models import ModelSpec, all_models
from turbodiff.spec.numbers import gib
from turbodiff.spec.plan import Plan
from turbodiff.spec.request import Request, make_request
from turbodiff.supervisor import leftover_workers, state_lock, supervisor, worker_process
from turbodiff.supervisor.memory import machine_of, worker_pids
from turbodiff.weights.locate import inventory as find_weights
from turbodiff.weights.locate import need
from turbodiff.weights.lora_files import find_loras

POLICIES: tuple[Policy, ...] = ("auto", "ask", "never")  # what a person may choose; "anyway" is for one run
SELFTEST = (sys.executable, "-m", "turbodiff.cli", "selftest")
OnEvent = Callable[[Event], None]
running = state_lock.holder  # the app that holds a state folder, {"pid": ...}, or None


def state_folder() -> Path:
    """Where the queue, the caches and the logs live: $TURBODIFF_STATE, else the XDG state folder."""
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(os.environ.get("TURBODIFF_STATE") or Path(home) / "turbodiff")


def estimate(
    fields: Mapping[str, Any],
    machine: Machine | None = None,
    inventory: Inventory | None = None,
    policy: Policy = "auto",
    store: Store | None = None,
) -> Plan:
    """The plan for what a form or flags say, with what the runs in a store taught; pure arithmetic but for that.

    Raises:
        RequestError: a field cannot be honoured.
        DoesNotFitError: nothing that the pins allow fits.
    """
    machine = machine or machine_now()
    taught = measurements.samples(store) if store else ()
    return plan_request(asked(fields), machine, inventory or find_weights(), policy=policy, samples=taught)


def asked(fields: Mapping[str, Any]) -> Request:
    """The request that a form or flags mean, in the picture's own aspect where Adaptive Resolution is on.

    Raises:
        RequestError, FileError: a field or the picture cannot be honoured.
    """
    request = make_request(fields)
    if not request.image:
        return request
    from turbodiff.media.images import adapt_size

    return adapt_size(request)


def run_once(
    fields: Mapping[str, Any], *, output: Path | None, outputs: Path, device: str = "auto", on_event: OnEvent
) -> dict[str, Any]:
    """One clip in a worker of its own: plan, run, tell every event; returns the result's fields.

    Raises:
        TurbodiffError: in the person's words; nothing half-done stays behind.
    """
    request = asked(fields).seeded()
    inventory = find_weights()
    need(request.model, inventory)
    check_place(output, outputs, request)
    machine = only(machine_now(), device)
    store = history()
    plan = plan_request(request, machine, inventory, samples=measurements.samples(store) if store else ())
    command = worker_process.build_run_command(
        plan.request.model_dump(mode="json"),
        plan.model_dump(mode="json"),
        outputs.resolve(),
        state_folder(),
        job=uuid.uuid4().int % 2**31,  # a run of its own has no row in the queue; the number names its temporary files
        output=str(output.resolve()) if output else None,
    )
    runs_on = plan.device if device == "auto" and not machine.pretended else device
    argv = (*worker_process.WORKER, "--device", runs_on)
    for _ in range(retry_policy.LIMITS["oom"]):
        try:
            return _attempt(command, argv, on_event)
        except OutOfMemoryError as error:
            cap = {"cap_bytes": retry_policy.next_cap(command["plan"], command["cap_bytes"]), "plan": None}
            command = {**command, **cap, "attempt": command["attempt"] + 1}
            sys.stderr.write(f"{error}\nonce more, one rung lower\n")
    return _attempt(command, argv, on_event)


def _attempt(command: dict[str, Any], argv: Sequence[str], on_event: OnEvent) -> dict[str, Any]:
    for event in worker_process.run_once(command, argv, on_output=_to_stderr):
        if event.type == "error":
            raise error_from(event.fields)
        on_event(event)
        if event.type == "result":
            return event.fields
        if event.type == "wait":  # there is no queue to wait in
            free, need = gib(event.fields["free_bytes"]), gib(event.fields["need_bytes"])
            what = "another program took the memory of the device meanwhile"
            raise DoesNotFitError(what, code="does_not_fit", got=f"{free} free", expected=need, try_instead="end it")
    raise AssertionError("a run ends with a result or an error")


def check_place(output: Path | None, outputs: Path, request: Request, state: Path | None = None) -> None:
    """Fail before the work, not after it, where the clip cannot be written.

    Raises:
        OutputError: field `output`.
    """
    size, state = (request.width, request.height, request.num_frames), state or state_folder()
    if output is None:
        disk.check_place(outputs, state, *size)
    else:
        clips.check_output(output)
        disk.check_room(output.resolve().parent, disk.need_bytes(*size), "output")


def machine_for(pretend_gib: float | None = None, file: Path | None = None) -> Machine:
    """This machine, a machine described in a file, or either with one card of another size.

    Raises:
        FileError: the file is not a machine.
    """
    machine = read_machine(file) if file is not None else machine_now()
    return machine if pretend_gib is None else pretend(machine, pretend_gib)


def model_states() -> list[tuple[ModelSpec, list[str]]]:
    """Every model of configs/ and what is missing of its files."""
    here = find_weights()
    return [(spec, _missing(spec, here)) for spec in all_models()]


def _missing(spec: ModelSpec, inventory: Inventory) -> list[str]:
    try:
        need(spec.name, inventory)
    except FileError as error:
        return error.expected.split("; ")
    return []


def history() -> Store | None:
    """The store of the state folder, None where nothing ran yet: asking leaves no file behind."""
    return Store(state_folder()) if (state_folder() / DATABASE).exists() else None


def _to_stderr(line: str) -> None:
    if not line.startswith("[INFO]"):
        sys.stderr.write(line + "\n")


def error_from(fields: Mapping[str, Any]) -> TurbodiffError:
    """The error of an `error` event, with the exit code that the worker gave it."""
    by_code = {"oom": OutOfMemoryError, "cancelled": CancelledByUser, "does_not_fit": DoesNotFitError}
    by_exit: dict[int, type[TurbodiffError]] = {2: RequestError, 5: DoesNotFitError, 130: CancelledByUser}
    kind = by_code.get(str(fields.get("code"))) or by_exit.get(int(fields.get("exit_code", 1)), TurbodiffError)
    names = ("code", "field", "got", "expected", "try_instead")
    return kind(str(fields.get("what", "failed")), **{name: fields.get(name, "") for name in names})


def run_log() -> Callable[[str], None]:
    """Says a line in `webui_test.log`, the run log."""
    log = logs.LogFile(logs.log_folder(Path.cwd(), state_folder()) / logs.RUN_LOG)
    return lambda text: log.say(text, who="selftest")


def serve(state: Path | None, outputs: Path, web_argv: Sequence[str], address: tuple[str, int] | None = None) -> int:
    """Run the supervisor in the main thread, with the page as its child, replaced when `address` stops answering.

    Raises:
        StateInUseError: another turbodiff holds the state folder.
    """
    return supervisor.Supervisor(Path(state or state_folder()), Path(outputs)).serve(web_argv, address)


@cache
def _tokenizer(path: Path) -> Tokenizer:
    return Tokenizer(path)


class Studio:
    """The queue, the library and the machine, as one page or API process sees them."""

    # what needs no state folder
    inventory = staticmethod(find_weights)
    loras = staticmethod(find_loras)
    models = staticmethod(model_states)
    rounds = staticmethod(tiers.rounds)
    sidecar_of = staticmethod(clips.read_sidecar)

    def __init__(self, state: Path | None = None, outputs: Path = Path("outputs")) -> None:
        self.state, self.outputs = Path(state or state_folder()), Path(outputs).resolve()
        self.state.mkdir(parents=True, exist_ok=True)
        self.store = Store(self.state)

    def submit(self, fields: Mapping[str, Any], anyway: bool = False) -> int:
        """Queue a request and return its job id; the same nonce gives the same job.

        `anyway` lowers nothing of the picture, also where the plan says that it does not fit; nor does the policy
        "never", which refuses instead. Asking is the business of the page.
        """
        request = asked(fields).seeded()
        inventory = find_weights()
        need(request.model, inventory)
        check_place(None, self.outputs, request, self.state)
        policy: Policy = "anyway" if anyway else self.policy
        taught = measurements.samples(self.store)
        plan = plan_request(request, self.machine(), inventory, policy=policy, samples=taught)
        return self.store.submit(request, plan)

    @property
    def policy(self) -> Policy:
        """What happens to a wish that does not fit: "auto" lowers it and says so, "ask" first asks, "never" refuses."""
        kept = self.store.fact("policy")
        return kept if kept in POLICIES else "auto"

    def set_policy(self, policy: str) -> None:
        """Choose the policy for everybody at this machine.

        Raises:
            RequestError: none of the three.
        """
        if policy not in POLICIES:
            raise RequestError(
                "no such policy", code="bad_policy", field="policy", got=policy[:40], expected=" | ".join(POLICIES)
            )
        self.store.put("policy", policy)

    def jobs(self, limit: int = 50) -> list[Job]:
        """The newest jobs."""
        return self.store.jobs(limit)

    def job(self, job: int) -> Job:
        """One job."""
        return self.store.job(job)

    def events(self, job: int, after: int = 0) -> list[tuple[int, Event]]:
        """The events of a job behind sequence number `after`."""
        return self.store.events(job, after)

    def cancel(self, job: int) -> str:
        """Stop a job; returns the state it is in now."""
        return self.store.cancel(job)

    def stop_and_decode(self, job: int) -> None:
        """Ask a running job to stop stepping and turn what it has into a clip."""
        self.store.stop_and_decode(job)

    def retry(self, job: int) -> int:
        """Run a job again; returns the id of the row that will run."""
        return self.store.retry(job)

    def duplicate(self, job: int) -> int:
        """The same request once more, as a new job at the end of the queue."""
        return self.store.duplicate(job)

    def move(self, job: int, where: Where) -> None:
        """Move a waiting job in the queue; any other job stays as it is."""
        self.store.move(job, where)

    def pause(self, paused: bool = True) -> None:
        """Start nothing more, or start jobs again; what runs goes on."""
        self.store.put("paused", paused)

    def clips(self, limit: int = 24) -> list[clips.Clip]:
        """The newest clips of the library."""
        return clips.clips(self.outputs, limit)

    def log_tail(self, lines: int = 200) -> list[str]:
        """The end of the start-up log, wherever the supervisor writes it."""
        told = self.store.fact("supervisor") or {}
        return logs.tail(Path(told.get("log") or logs.STARTUP_LOG), lines)

    def offers(self) -> dict[str, downloads.Offer]:
        """By model name: the files that suit this machine's card and are not here."""
        here, sizes = find_weights(), [gpu.total_bytes for gpu in self.machine().gpus if gpu.total_bytes]
        found = {spec.name: downloads.offer(spec, max(sizes, default=None), here) for spec in all_models()}
        return {name: offer for name, offer in found.items() if offer is not None}

    def start_download(self, model: str) -> None:
        """Download what a model needs, in a process of its own."""
        downloads.start(self.state, model)

    def download(self, model: str) -> downloads.Download:
        """How the download of a model is doing."""
        return downloads.download(self.state, model)

    def start_selftest(self) -> None:
        """Run the self-test in a process of its own."""
        background_tasks.start(self.state / "errands", "selftest", SELFTEST)

    def selftest(self) -> background_tasks.Errand:
        """How the last self-test is doing."""
        return background_tasks.errand(self.state / "errands", "selftest")

    def machine(self) -> Machine:
        """The machine as the supervisor's probe saw it in the last seconds, else asked now (which takes 0.6 s)."""
        return machine_of(self.store) or machine_now()

    def holders(self) -> tuple[CardHolders, ...]:
        """Who holds the memory of each card, from the supervisor's probe; () without one."""
        seen = self.store.fact("probe")
        return holders(Sample(**seen), worker_pids(self.store), [left.pid for left in self.leftovers()]) if seen else ()

    def count_tokens(self, model: str, prompt: str) -> int | None:
        """Tokens of a prompt for a model's encoder; None while its tokenizer is not on this disk."""
        file = find_weights().of(model, "tokenizer")
        return _tokenizer(Path(file.path)).count(parse(clean(prompt)).text) if file else None

    def tier(self) -> tiers.Tier | None:
        """The tier of this machine's largest card."""
        sizes = [gpu.total_bytes for gpu in self.machine().gpus if gpu.total_bytes]
        return tiers.tier_of(max(sizes)) if sizes else None

    def seeds(self, search: str = "", limit: int = 200) -> list[archive.Seed]:
        """The seed archive, the newest rows first; `search` looks in prompt, note, rating, model and seed."""
        return archive.list_seeds(self.store, search, limit)

    def rate(self, row: int, rating: str | None = None, note: str | None = None) -> archive.Seed:
        """Rate a row of the archive, also in the clip's sidecar and in seeds.md."""
        return archive.rate(self.store, self.outputs, row, rating, note)

    def seeds_text(self) -> str:
        """The archive as a Markdown table."""
        return archive.export_text(self.store)

    def import_seeds(self, path: Path) -> int:
        """Take over the rows of a Markdown table; returns how many it has."""
        return archive.import_file(self.store, self.outputs, path)

    def support_bundle(self, path: Path, with_prompts: bool = False) -> Path:
        """Logs, versions and the last jobs as one zip."""
        return support_bundle.support_bundle(self.store, logs.log_folder(Path.cwd(), self.state), path, with_prompts)

    def leftovers(self) -> list[leftover_workers.Identity]:
        """Workers of an earlier run that still live."""
        now = (self.store.fact("supervisor") or {}).get("run_id")
        return [found for found in leftover_workers.leftovers(self.state) if found.run_id != now]

    def end_leftover(self, pid: int) -> bool:
        """End one of `leftovers`; True when it is gone. No other process is ever signalled."""
        return any(leftover_workers.end(found) for found in self.leftovers() if found.pid == pid)


__all__ = [
    "OutputError", "Plan", "Request", "Studio", "VerifyError", "doctor", "error_from", "estimate", "machine_for",
    "machine_now", "model_states", "pictures", "run_log", "run_once", "running",
]  # fmt: skip
