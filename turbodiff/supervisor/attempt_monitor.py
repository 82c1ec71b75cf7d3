"""One attempt under way: what its worker says is kept, what a person asks is passed on, how it ends is decided.

The worker itself is the slot's (slot.py); this room only asks for its end.
"""

import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from turbodiff.archive.clips import check_clip, find_clip
from turbodiff.archive.disk import check_place
from turbodiff.archive.seeds import archive_clip
from turbodiff.diagnostics.logs import LogFile
from turbodiff.diagnostics.run_log import request_line, run_lines
from turbodiff.gpu import processes
from turbodiff.jobs import measurements
from turbodiff.jobs.attempts import finish, move_on, note, set_plan
from turbodiff.jobs.retry_policy import NEIGHBOUR_BYTES, Decision, Ending, decide
from turbodiff.jobs.store import Store
from turbodiff.spec.clips import ClipResult
from turbodiff.spec.errors import FileError, TurbodiffError, VerifyError
from turbodiff.spec.events import Event, JobError, Notice, NoticeEvent, ResultEvent
from turbodiff.spec.jobs import Progress, QueuedJob
from turbodiff.supervisor.memory import Memory
from turbodiff.supervisor.run_monitor import Guard, Seen, expected_steps_s
from turbodiff.supervisor.watchdog import Evidence, Watch
from turbodiff.supervisor.worker_process import WORKER, Worker, build_run_command, exit_words

CANCEL_GRACE_S = 30.0  # a step of a large clip may take this long before the worker sees the cancel
LOOK_EVERY_S = 1.0


@dataclass
class SupervisorContext:
    """What every slot shares."""

    store: Store
    log: LogFile
    runs: LogFile
    state: Path
    outputs: Path
    run_id: str
    memory: Memory
    worker_argv: Sequence[str] = WORKER
    now: Callable[[], float] = time.monotonic


class AttemptMonitor:
    """An attempt of a job on a worker, from the command to the verdict.

    Args:
        shop: what every slot shares.
        slot: number of the slot, which is the number of its card.
        job: claimed for this attempt.
        worker: runs it; only spoken to here, never ended.
        say: writes a line about the job into the log.

    `over` once the job has left for another state; `worn` when its ending asks for a fresh worker.
    """

    def __init__(
        self, shop: SupervisorContext, slot: int, job: QueuedJob, worker: Worker, say: Callable[..., None]
    ) -> None:
        self.shop, self.slot, self.job, self.worker, self.say = shop, slot, job, worker, say
        self.over = self.worn = False
        usual_s = measurements.usual_seconds(shop.store, job)
        self.watch = Watch(shop.now(), usual_s)
        self._host_ooms, self._others_bytes = shop.memory.host_ooms(), shop.memory.others_bytes(slot)
        self.guard = Guard(self._others_bytes, expected_steps_s(job.plan, usual_s))
        self._cancel_sent_s: float | None = None
        self._stop_sent = self._heard = False
        self._looked_s = 0.0

    def start(self) -> bool:
        """Give the job to the worker; False where its clip would have no place, which ends the attempt."""
        job = self.job
        request = job.request.model_copy(update=job.overrides)
        self.shop.runs.say(request_line(request, job.attempt), "job", job.id)
        try:
            check_place(self.shop.outputs, self.shop.state, request.width, request.height, request.num_frames)
        except FileError as error:
            self.end(Ending("error", JobError(**error.fields())))
            return False
        self.worker.send(
            build_run_command(
                request,
                job.plan,
                self.shop.outputs,
                self.shop.state,
                job=job.id,
                attempt=job.attempt,
                cap_bytes=job.cap_bytes,
                parent=job.parent,
                calibration=measurements.calibration_of(self.shop.store, job, self.shop.memory.machine(), self.slot),
            )
        )
        return True

    # --- the attempt's life --------------------------------------------------------------------------------------

    def hear(self, event: Event) -> None:
        """Take in a word of the worker; the words of an earlier attempt change nothing."""
        if self.over or (event.job, event.attempt) != (self.job.id, self.job.attempt):
            return
        self._heard = True
        self.watch.heard(event, self.shop.now())
        self.guard.heard(event)
        self._keep(event)
        if event.type == "result":
            self._verify(event)
        elif event.type == "error":
            self.end(Ending("error", event, others_grew_bytes=self._others_grew()))
        elif event.type == "wait":
            self.end(Ending("wait", need_bytes=event.need_bytes))

    def _keep(self, event: Event) -> None:
        if event.type == "beat":
            return
        job, store = self.job, self.shop.store
        planned = measurements.planned_phase(job.plan, event.name) if event.type == "phase" else None
        for line in run_lines(event, planned.peak_bytes if planned else None):
            self.shop.runs.say(line, "job", job.id)
        if event.type == "plan":
            set_plan(store, job.id, job.attempt, event.plan)
            self.job = store.job(job.id)
            return
        note(store, event, progress_of(event, self.watch.phase))
        if event.type != "error" or self._others_grew() <= NEIGHBOUR_BYTES:  # else it was no mistake of the plan
            measurements.record(store, job, event, self.shop.memory.machine(), self.slot, self.guard.peak_bytes)

    def tick(self, output_lines: int) -> None:
        """Pass on what a person asked; once a second, look whether the worker is stuck."""
        self._obey()
        now = self.shop.now()
        if not (self.over or self.worn) and now - self._looked_s >= LOOK_EVERY_S:
            self._looked_s = now
            self._look(now, output_lines)

    def _obey(self) -> None:
        job, now = self.job, self.shop.now()
        ask = self.shop.store.rows("SELECT ask FROM job WHERE id = ?", job.id)[0]["ask"]
        if ask == "cancel" and self._cancel_sent_s is None:
            self.worker.send({"cmd": "cancel", "job": job.id})
            self._cancel_sent_s = now
        elif ask == "stop_and_decode" and not self._stop_sent:
            self._stop_sent = self.worker.send({"cmd": "stop_and_decode", "job": job.id})
        elif self._cancel_sent_s is not None and now - self._cancel_sent_s > CANCEL_GRACE_S:
            self.say(f"did not hear the cancel for {CANCEL_GRACE_S:.0f} s, it is ended", "WARNING")
            self.worn = True

    def _look(self, now: float, output_lines: int) -> None:
        watch, pid = self.watch, self.worker.pid
        evidence = self._evidence(output_lines)
        verdict = watch.look(now, evidence)
        for notice in self.guard.look(now, self._seen(evidence)):
            self._notice(notice)
        if verdict in ("quiet", "slow"):
            self._notice(
                Notice(key="silent", text=watch.why(), numbers={}), "slow, still alive: " if verdict == "slow" else ""
            )
        elif verdict == "dump":
            self.say("stacks of all threads follow: " + watch.why(), "ERROR")
            if processes.catches(pid, signal.SIGUSR1):  # faulthandler's, or the signal would end it
                self.worker.signal(signal.SIGUSR1)
        elif verdict == "end":
            error = TurbodiffError(
                "the worker is stuck",
                code="stuck",
                field=watch.phase,
                got=watch.why(),
                try_instead="a smaller setting; the log holds its stacks",
            )
            self.end(Ending("stuck", JobError(**error.fields())))

    def _notice(self, notice: Notice, before: str = "") -> None:
        self.say(before + notice.text, "WARNING")
        self.shop.runs.say(notice.text, "job", self.job.id, "WARNING")
        note(self.shop.store, NoticeEvent(job=self.job.id, attempt=self.job.attempt, **notice.model_dump()))

    def _seen(self, evidence: Evidence) -> Seen:
        memory = self.shop.memory
        card = memory.others_bytes(self.slot), memory.own_bytes(self.slot), evidence.vram_free_bytes
        return Seen(*card, evidence.ram_available_bytes, self.watch.cold_and_busy())

    def _evidence(self, output_lines: int) -> Evidence:
        memory, pid = self.shop.memory, self.worker.pid
        return Evidence(
            processes.bytes_read(pid),
            processes.cpu_seconds(pid),
            processes.process_state(pid),
            memory.ram_available_bytes(),
            *memory.card(self.slot),
            output_lines,
        )

    # --- how it ends ---------------------------------------------------------------------------------------------

    def _verify(self, result: ResultEvent) -> None:
        move_on(self.shop.store, self.job.id, self.job.attempt, "verifying", out_of=("running",))
        try:
            check_clip(self.shop.outputs, result)
        except VerifyError as error:
            self.end(Ending("unverified", JobError(**error.fields())))
            return
        self._done(result)

    def _done(self, result: ClipResult) -> None:
        job, store = self.job, self.shop.store
        if abs(self._others_grew()) > NEIGHBOUR_BYTES:
            measurements.forget_samples(store, job.id, job.attempt)
        if finish(store, job.id, job.attempt, result):
            archive_clip(store, self.shop.outputs, job.id)
            self.say(f"done: {result.path}")
        self.over = True

    def end(self, ending: Ending) -> None:
        """Without a clip: decide what that means for the job, say it in both logs, move the job."""
        job = self.shop.store.job(self.job.id)
        decision = decide(job, ending)
        self.shop.runs.say(f"verdict: {decision.say}", "job", job.id, _level(decision))
        self.say(f"{decision.to}: {decision.say}", _level(decision))
        columns = decision.columns
        if decision.to == "queued" and job.ask == "cancel":
            decision, columns = Decision("cancelled", "cancelled", end_worker=decision.end_worker), {}
        move_on(self.shop.store, job.id, job.attempt, decision.to, **columns)
        self.over, self.worn = True, self.worn or decision.end_worker

    def worker_died(self, status: int | None) -> None:
        """The worker ended in the middle: its clip is adopted if it was finished, else the job's fate is decided."""
        self.say(f"ended in the middle of the job: {exit_words(status)}", "ERROR")
        clip = find_clip(self.shop.outputs, self.job.nonce)
        if clip is not None:
            self.say("its clip was finished: adopted")
            self._done(clip)
            return
        host_oom = self.shop.memory.host_ooms() > self._host_ooms
        self.end(Ending("died", JobError(got=exit_words(status)), 0, status, host_oom, begun=self._heard))

    def _others_grew(self) -> int:
        now = self.shop.memory.others_bytes(self.slot)
        return now - self._others_bytes if now is not None and self._others_bytes is not None else 0


def progress_of(event: Event, phase: str) -> Progress | None:
    """What the page's progress bar shows after this event, or None for no change."""
    if event.type == "phase" and event.state == "start":
        return Progress(phase=event.name)
    if event.type == "step":
        return Progress(phase=phase, step=event.i, of=event.n, eta_s=event.eta_s)
    return None


def _level(decision: Decision) -> str:
    return {"failed": "ERROR", "parked": "ERROR"}.get(decision.to, "INFO")
