"""The front door: what the page, the command line and the API may ask of turbodiff. Never imports torch.

A request is planned here, in the asker's process, by arithmetic; it runs in a worker process.
"""

import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turbodiff.archive import disk
from turbodiff.archive.clip_index import ONLY, ORDERS, ClipIndex, Entry, Found, tags_of
from turbodiff.archive.clips import Clip
from turbodiff.archive.recipes import Recipes
from turbodiff.archive.seeds import Seed
from turbodiff.diagnostics import background_tasks, logs, support_bundle
from turbodiff.diagnostics.background_tasks import SelfTest
from turbodiff.diagnostics.doctor import DoctorReport, doctor
from turbodiff.diagnostics.downloads import Download, Downloads, Move, Offer, download_offers
from turbodiff.diagnostics.exports import Exporting, Exports
from turbodiff.gpu import probe
from turbodiff.gpu.processes import HOST_COMMAND, CardHolders, Holder, holders
from turbodiff.jobs import measurements
from turbodiff.jobs.database import DATABASE
from turbodiff.jobs.store import Store
from turbodiff.media import pictures
from turbodiff.media.ffmpeg import nvenc_fault
from turbodiff.media.pictures import Look
from turbodiff.plan.calibration import History
from turbodiff.plan.hardware import GpuFacts, Machine, only, pretend
from turbodiff.plan.planner import Outlook, Policy, outlook, plan_request
from turbodiff.plan.tiers import Installed, Round, Tier, counted_on, fits_of, installed, rounds, tier_here
from turbodiff.prompt.wildcards import choose, has_wildcards
from turbodiff.spec.cached import CachedValue
from turbodiff.spec.clips import ClipResult
from turbodiff.spec.environment import current_folder
from turbodiff.spec.errors import RequestError, TurbodiffError
from turbodiff.spec.events import Event, RunCommand
from turbodiff.spec.files import state_folder
from turbodiff.spec.jobs import ACTIVE, Outcome, QueuedJob, Recovered
from turbodiff.spec.models import Inventory, all_models
from turbodiff.spec.page_flags import HERE, UsedCards
from turbodiff.spec.plan import Plan
from turbodiff.spec.request import Request, make_request
from turbodiff.studio.cards import Begin, Cards, Fleet
from turbodiff.studio.library import Library
from turbodiff.studio.longer_clips import after_unknown, continuing_fields, continuing_model, storyboard_requests
from turbodiff.studio.serving import Serving
from turbodiff.studio.waiting import Waiting
from turbodiff.studio.weights import Weights
from turbodiff.supervisor import ownership, worker_process
from turbodiff.supervisor.context import machine_of, worker_pids
from turbodiff.supervisor.ownership import Identity
from turbodiff.supervisor.run_alone import run_alone
from turbodiff.weights.locate import LoraFile, resolve_files, with_loras
from turbodiff.weights.locate import inventory as find_weights
from turbodiff.weights.lora_facts import LoraFacts
from turbodiff.weights.storage import Storage, StoredFile

if TYPE_CHECKING:
    from turbodiff.prompt.enhancer import Enhancer

POLICIES: tuple[Policy, ...] = ("auto", "ask", "never")  # what a person may choose; "anyway" is for one run
TASKS, PICTURES = "tasks", "pictures"  # folders in the state folder
MAX_JOBS = 10_000  # looked at for the models that they need
WEIGHTS_FRESH_S = 1.0  # for submits: the search asks the disk for hundreds of names
OnEvent = Callable[[Event], None]


class Studio:
    """The queue, the library and the machine, as one process of the page or the shell sees them.

    Plans, cards and models are looked at without a trace; the state folder is made when the queue is first needed.

    Args:
        state: the state folder; None for the person's own.
        outputs: the folder of the library.
    """

    def __init__(self, state: Path | None = None, outputs: Path = Path("outputs")) -> None:
        self.state, self.outputs = Path(state or state_folder()), Path(outputs).resolve()
        self.database = self.state / DATABASE  # a file that no server may hand out
        self.downloads = Downloads(self.state / "downloads")
        self.exports = Exports(self.state / "exports")
        self.recipes = Recipes(self.state)
        self.storage = Storage(self._models_in_jobs)
        self.enhancer: Enhancer | None = None  # set by who starts the page
        library = self._library = Library(self.outputs, lambda: self._store)
        self.clips, self.clip, self.sidecar_of = library.clips, library.clip, library.sidecar_of
        self.seeds, self.seed, self.rate = library.seeds, library.seed, library.rate
        self.clip_index = ClipIndex(self.outputs, self.state)
        self.seeds_text, self.import_seeds = library.seeds_text, library.import_seeds
        self.cards = Cards(lambda: self._store if self.database.exists() else None)
        weights = Weights(self.state / PICTURES)
        self._weights = CachedValue(find_weights, WEIGHTS_FRESH_S)
        self.models, self.inventory, self.count_tokens = weights.models, weights.inventory, weights.count_tokens
        self.loras, self.lora_folder = weights.loras, weights.lora_folder
        self.waiting = Waiting(lambda: self._store, lambda fields, anyway: self._asked([fields], anyway)[0])
        self.serving = Serving(self.state, lambda: self._store, self._asked)
        self.pause, self.resume = self.waiting.pause, self.waiting.resume
        self.lora_facts, self.lora_picture = weights.lora_facts, weights.lora_picture

    @cached_property
    def _store(self) -> Store:
        return Store(self.state)

    def close(self) -> None:
        """Close the connection to the queue; the object is of no use afterwards."""
        self._store.close()

    def serve(self, web_argv: Sequence[str], address: tuple[str, int] | None = None, cards: UsedCards = HERE) -> int:
        """The exit code of the supervisor, run in this main thread; the page is replaced when `address` is silent.

        Raises:
            StateInUseError: another turbodiff holds the state folder.
        """
        from turbodiff.cluster.remote import supervisor_with  # the page's process never runs its loop

        return supervisor_with(self.state, self.outputs, cards).serve(web_argv, address)

    @property
    def served(self) -> bool:
        """Whether an app holds the state folder now."""
        return ownership.is_held(self.state)

    # --- plan and run --------------------------------------------------------------------------------------------

    def plan(
        self,
        fields: Mapping[str, Any],
        machine: Machine | None = None,
        inventory: Inventory | None = None,
        policy: Policy = "auto",
        history: History | None = None,
    ) -> Plan:
        """The plan for what a form or flags say, with what earlier runs taught; pure arithmetic but for that.

        Raises:
            RequestError: a field cannot be honoured.
            DoesNotFitError: nothing that the pins allow fits.
        """
        request, history = _request_of(fields, inventory), history or self.history()
        machine, there = self.cards.planned_on(
            machine or probe.machine_now(), inventory or find_weights(), request.gpu, request.model
        )
        found = counted_on(request, machine, history, there)
        return plan_request(request, machine, with_loras(found, request.loras), policy=policy, history=history)

    def outlook(
        self, fields: Mapping[str, Any], machine: Machine, inventory: Inventory, history: History | None = None
    ) -> Outlook:
        """The band, seconds and steps of a plan, for many at once. Raises RequestError: a field cannot be honoured."""
        request = _request_of(fields, inventory)
        here, there = self.cards.planned_on(machine, inventory, request.gpu, request.model)
        found = counted_on(request, machine, history, there)
        return outlook(request, here, with_loras(found, request.loras), history=history)

    def history(self) -> History | None:
        """What earlier runs taught; None where nothing ran yet: asking leaves no file behind."""
        return measurements.history(self._store) if self.database.exists() else None

    def generate(
        self, fields: Mapping[str, Any], *, output: Path | None, device: str = "auto", on_event: OnEvent
    ) -> ClipResult:
        """One clip in a worker of its own, beside the queue: plan, run, hand on every event.

        Raises:
            TurbodiffError: in the person's words; nothing half-done stays behind.
        """
        request = self._worded(_request_of(fields).seeded())
        inventory = with_loras(find_weights(), request.loras)
        resolve_files(request.model, inventory, request.loras)
        size = (request.width, request.height, request.num_frames)
        if output:
            disk.check_output(output, *size)
        else:
            disk.check_place(self.outputs, self.state, *size)
            disk.remove_left(self.outputs)
        machine = probe.machine_now()
        device = self.cards.device_of(request.gpu, machine) if request.gpu else device
        machine = only(machine, device)
        plan = plan_request(request, machine, inventory, history=self.history())
        number = uuid.uuid4().int % 2**31  # not in the queue; it names the temporary files
        command = RunCommand(
            job=number, request=plan.request, plan=plan, outputs=self.outputs, state=self.state,
            output=output.resolve() if output else None, cards=plan.followers,
        )  # fmt: skip
        runs_on = plan.device if device == "auto" and not machine.pretended else device
        return run_alone(command, (*worker_process.WORKER, "--device", runs_on), on_event, machine)

    def submit(self, fields: Mapping[str, Any]) -> int:
        """Queue a request and return its job id; see `submit_all`."""
        return self.submit_all([fields])[0]

    def submit_all(self, many: Sequence[Mapping[str, Any]], anyway: bool = False, client: str = "") -> list[int]:
        """Queue requests, all or none, and return their job ids; the same nonce gives the same job.

        `anyway` lowers nothing of the picture, also where it does not fit; the policy "never" refuses instead.
        `client`: the address of another machine, which has a share of the queue; "" for this one, which has all.
        """
        return self._store.submit_all(self._asked(many, anyway), client=client)

    def _asked(self, many: Sequence[Mapping[str, Any]], anyway: bool) -> list[tuple[Request, Plan]]:
        """The requests that these fields mean, each with its plan."""
        policy: Policy = "anyway" if anyway else self.policy
        try:
            return self._planned(many, policy, self._weights())
        except TurbodiffError:  # what was seen a moment ago refuses nothing
            return self._planned(many, policy, self._weights.now())

    def _planned(
        self, many: Sequence[Mapping[str, Any]], policy: Policy, found: Inventory
    ) -> list[tuple[Request, Plan]]:
        """Requests to queue with their plans."""
        machine, history, asked, earlier = self.machine(), self.history(), list[tuple[Request, Plan]](), set[str]()
        for fields in many:
            request = self._worded(_request_of(fields, found).seeded())
            request = request.model_copy(update={"gpu": self.cards.uuid_of(request.gpu, machine)})
            if request.after not in ("", *earlier) and not self._store.rows(
                "SELECT 1 FROM job WHERE nonce = ?", request.after
            ):
                raise after_unknown(request)
            earlier.add(request.nonce)
            here, there = self.cards.planned_on(machine, found, request.gpu, request.model)
            if there is not found and self.cards.may_download(request.model, found):
                there = counted_on(request, here, history, there)
            inventory = with_loras(there, request.loras)
            resolve_files(request.model, inventory, request.loras)
            disk.check_place(self.outputs, self.state, request.width, request.height, request.num_frames)
            asked.append((request, plan_request(request, here, inventory, policy=policy, history=history)))
        return asked

    def _worded(self, request: Request) -> Request:
        """The request with what its seed chooses for the wildcards of its prompt."""
        if not has_wildcards(request.prompt):
            return request
        prompt = choose(request.prompt, self.recipes.wildcards(), request.seed or 0)
        return request.model_copy(update={"prompt": prompt})

    @property
    def policy(self) -> Policy:
        """What happens to a wish that does not fit: "auto" lowers it and says so, "ask" first asks, "never" refuses."""
        kept = self._store.fact("policy")
        return kept if kept in POLICIES else "auto"

    def set_policy(self, policy: str) -> None:
        """Choose the policy for everybody at this machine. Raises RequestError: none of the three."""
        if policy not in POLICIES:
            expected = " | ".join(POLICIES)
            raise RequestError("no such policy", code="bad_policy", field="policy", got=policy[:40], expected=expected)
        self._store.put("policy", policy)

    # --- the queue -----------------------------------------------------------------------------------------------

    def jobs(self, limit: int = 50) -> list[QueuedJob]:
        """The newest jobs."""
        return self._store.jobs(limit)

    def overview(self, limit: int) -> tuple[list[QueuedJob], int]:
        """What runs, what runs next and what came last, the newest first; and how many wait in all."""
        return self._store.overview(limit)

    def job(self, job: int) -> QueuedJob:
        """One job."""
        return self._store.job(job)

    def events(self, job: int, after: int = 0) -> list[tuple[int, Event]]:
        """The events of a job behind sequence number `after`."""
        return self._store.events(job, after)

    def cancel(self, job: int) -> str:
        """Stop a job; returns the state it is in now."""
        return self._store.cancel(job)

    def stop_and_decode(self, job: int) -> None:
        """Ask a running job to stop stepping and turn what it has into a clip."""
        self._store.stop_and_decode(job)

    def retry(self, job: int, fields: Mapping[str, Any] | None = None) -> int:
        """Run a job again that is over or parked, perhaps with other fields; what waits for its clip goes on waiting.
        Returns the id of the job that will run."""
        self.check_files(self._store.job(job).request)
        return self._store.retry(job, *(self._asked([fields], False)[0] if fields else ()))

    def duplicate(self, job: int) -> int:
        """Queue the request of a job once more; returns the id of the new job."""
        self.check_files(self._store.job(job).request)
        return self._store.duplicate(job)

    def check_files(self, request: Request) -> None:
        """Refuse a stored request that names files which nobody chose here; see `Library.check_files`."""
        loras = self.loras() if request.loras else ()
        self._library.check_files(request, self.state / PICTURES, {str(lora.path) for lora in loras})

    @property
    def paused(self) -> bool:
        """Whether the queue is paused."""
        return self._store.paused

    @property
    def recovered(self) -> Recovered | None:
        """What the last start of the app had to bring back of the queue; None where all was sound."""
        return Recovered.model_validate(found) if (found := self._store.fact("recovered")) else None

    def restart(self, by: str) -> int:
        """Ask the supervisor for a fresh worker; returns a number to watch with `restart_outcome`."""
        return self._store.ask("restart", by=by)

    def restart_outcome(self, number: int) -> Outcome | None:
        """What came of a restart, None while it is under way."""
        return self._store.outcome(number)

    def offers(self, machine: Machine | None = None) -> dict[str, tuple[Offer, ...]]:
        """By model name: what there is to download, each with what a plan says of it on this machine."""
        here, machine, history = find_weights(), machine or self.machine(), self.history()
        told, mirror = {spec: fits_of(spec, machine, history, here) for spec in all_models()}, self.downloads.mirror
        return {spec.name: download_offers(spec, here, fits, mirror) for spec, fits in told.items()}

    def installed(self, machine: Machine | None = None) -> dict[str, Installed]:
        """By model name: the networks on this disk, and how the form's first clip would run with them."""
        return installed(machine or self.machine(), find_weights(), self.history())

    def _models_in_jobs(self) -> set[str]:
        states = (*ACTIVE, "queued") if self.database.exists() else ()
        return {job.request.model for job in (self._store.jobs(MAX_JOBS, states) if states else ())}

    # --- this machine --------------------------------------------------------------------------------------------

    def machine(self) -> Machine:
        """The machine as the supervisor's probe saw it in the last seconds, else asked now (which takes 0.6 s)."""
        return machine_of(self._store) or probe.machine_now()

    def holders(self) -> tuple[CardHolders, ...]:
        """Who holds the memory of each card, from the supervisor's probe; () without one."""
        seen, left = self._store.fact("probe"), [worker.pid for worker in self.leftovers()]
        return holders(probe.Sample.model_validate(seen), worker_pids(self._store), left) if seen else ()

    def cards_now(self) -> tuple[Machine, tuple[CardHolders, ...]]:
        """The machine as the driver says now, and who holds the memory of each card."""
        sample = probe.take_sample()
        ours = worker_pids(self._store) if self.database.exists() else frozenset[int]()
        left = {found.pid for found in ownership.leftover_workers(self.state)} - ours
        return probe.machine_from(sample, ours), holders(sample, ours, left)

    def leftovers(self) -> list[Identity]:
        """Workers of an earlier run that still live."""
        now = (self._store.fact("supervisor") or {}).get("run_id")
        return [found for found in ownership.leftover_workers(self.state) if found.run_id != now]

    def end_leftover(self, pid: int) -> bool:
        """End one of `leftovers`; True when it is gone. No other process is ever signalled."""
        return any(ownership.end_worker(found) for found in self.leftovers() if found.pid == pid)

    def tier(self) -> Tier | None:
        """The tier of this machine's largest card."""
        return tier_here(self.machine())

    def rounds(self, demo: bool = False) -> tuple[Round, ...]:
        """The three rounds from an idea to a clip, and the one between; the demo has its own."""
        return rounds(demo)

    def start_selftest(self) -> None:
        """Run the self-test in a process of its own."""
        background_tasks.start_task(self.state / TASKS, "selftest", background_tasks.SELFTEST)

    def selftest(self) -> SelfTest:
        """How the last self-test is doing."""
        return background_tasks.selftest(self.state / TASKS, "selftest")

    def log_tail(self, lines: int = 200, name: str = logs.STARTUP_LOG) -> list[str]:
        """The end of the start-up log or of the run log (`logs.RUN_LOG`), wherever the supervisor writes them."""
        told = self._store.fact("supervisor") or {}
        return logs.tail(Path(told.get("log") or name).with_name(name), lines)

    def support_bundle(self, path: Path, with_prompts: bool = False) -> Path:
        """Logs, versions and the last jobs as one zip."""
        folder = logs.log_folder(current_folder(), self.state)
        return support_bundle.support_bundle(self._store, folder, self.outputs, path, with_prompts)


def _request_of(fields: Mapping[str, Any], here: Inventory | None = None) -> Request:
    """The request that a form or flags mean, in the picture's own aspect where Adaptive Resolution is on, in the size
    of the clip that it continues.

    Raises:
        RequestError, FileError: a field or the picture cannot be honoured.
    """
    if fields.get("continues") or fields.get("after"):
        fields = continuing_fields(fields, here or find_weights())
    return pictures.adapt_size(make_request(fields))


__all__ = [
    "HOST_COMMAND", "ONLY", "ORDERS", "POLICIES", "Begin", "CardHolders", "Clip", "DoctorReport", "Download",
    "Downloads", "Entry", "Exporting", "Fleet", "Found", "GpuFacts", "Holder", "Identity", "Installed", "Look",
    "LoraFacts", "LoraFile", "Machine", "Move", "Offer", "Outlook", "Policy", "Round", "Seed", "SelfTest", "Storage",
    "StoredFile", "Studio", "Tier", "continuing_model", "doctor", "nvenc_fault", "pictures", "pretend",
    "state_folder", "storyboard_requests", "tags_of",
]  # fmt: skip
