"""One attempt under way: the worker's events are kept, what a person asks is passed on, how it ends is decided.

The worker itself is the slot's (slots.py); this room only asks for its end.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import replace

from turbodiff.archive.clips import find_clip
from turbodiff.archive.disk import check_place
from turbodiff.archive.seeds import archive_clip
from turbodiff.diagnostics.run_log import request_line, run_lines
from turbodiff.gpu.card_measurements import lacks_link
from turbodiff.jobs import measurements
from turbodiff.jobs.attempts import clip_before, finish_job, move_job, record_event
from turbodiff.jobs.retry_policy import NEIGHBOUR_BYTES, Decision, Ending, decide
from turbodiff.plan.hardware import GpuFacts
from turbodiff.spec.clips import ClipResult
from turbodiff.spec.errors import FileError, VerifyError
from turbodiff.spec.events import Event, JobCommand, JobError, Notice, NoticeEvent, RunCommand
from turbodiff.spec.jobs import Progress, QueuedJob
from turbodiff.spec.out_of_memory import aborted_in_an_allocation
from turbodiff.supervisor.context import SupervisorContext
from turbodiff.supervisor.ports import Port
from turbodiff.supervisor.watchdog import RunMonitor, Watchdog, expected_steps_s
from turbodiff.supervisor.worker_process import describe_exit

CANCEL_GRACE_S = 30.0  # a step of a large clip may take this long before the worker sees the cancel
CHECK_EVERY_S = 1.0
LAST_LINES = 64  # a C++ exception is followed by a stack of about 30


class AttemptMonitor:
    """An attempt of a job on a worker, from the command to the verdict.

    Args:
        context: what every slot shares.
        card: where its card stands in the machine now.
        job: claimed for this attempt.
        worker: runs it; only spoken to here, never ended.
        log: writes a line about the job into the log.

    `over` once the job has left for another state; `end_worker` when its ending asks for a fresh worker.
    """

    def __init__(
        self, context: SupervisorContext, card: Callable[[], int], job: QueuedJob, worker: Port,
        log: Callable[..., None],
    ) -> None:  # fmt: skip
        self.context, self.card, self.job, self.worker, self.log = context, card, job, worker, log
        self.over = self.end_worker = False
        usual_s = measurements.usual_seconds(context.store, job, context.memory.machine(), card())
        self.watchdog = Watchdog(context.now(), usual_s)
        self._host_ooms, self._others_bytes = context.memory.host_ooms(), context.memory.others_bytes(card())
        self.run_monitor = RunMonitor(self._others_bytes, expected_steps_s(job.plan, usual_s))
        self._cancel_sent_s: float | None = None
        self._stop_sent = self._begun = False
        self._told_s = -CHECK_EVERY_S  # when the start-up log last heard of a stage
        self._checked_s = 0.0
        self.last_lines: deque[str] = deque(maxlen=LAST_LINES)  # of the worker's log

    def start(self, cards: tuple[str, ...] = ()) -> bool:
        """Give the job to the worker, with what else may work at it (`RunCommand.cards`); False where its clip would
        have no place, which ends the attempt."""
        job, context = self.job, self.context
        request = job.request.model_copy(update={**job.overrides, "gpu": ""})  # no id of a card in a clip
        context.run_log.say(request_line(request, job.attempt), "job", job.id)
        try:
            check_place(context.outputs, context.state, request.width, request.height, request.num_frames)
        except FileError as error:
            self.end(Ending("error", JobError(**error.fields())))
            return False
        plan = job.plan
        if request.after:
            place = {"continues": clip_before(context.store, request.after)}
            request = request.model_copy(update=place)
            plan = plan and plan.model_copy(update={"request": plan.request.model_copy(update=place)})
        self.worker.send(
            RunCommand(
                job=job.id,
                attempt=job.attempt,
                request=request,
                plan=plan,
                cap_bytes=job.cap_bytes,
                promised_ram_bytes=context.promised_bytes(job.slot),
                outputs=context.outputs,
                state=context.state,
                calibration=measurements.calibration_of(context.store, job, context.memory.machine(), self.card()),
                cards=cards,
                measure_link=lacks_link(self._gpu(), cards),
            )
        )
        return True

    def on_event(self, event: Event) -> None:
        """Keep an event of the worker and draw its consequences; events of an earlier attempt change nothing."""
        if self.over or (event.job, event.attempt) != (self.job.id, self.job.attempt):
            return
        job, store = self.job, self.context.store
        self._begun = True
        self.watchdog.on_event(event, self.context.now())
        self.run_monitor.on_event(event)
        if event.type == "beat":
            return
        planned = measurements.planned_phase(job.plan, event.name) if event.type == "phase" else None
        for line in run_lines(event, planned.peak_bytes if planned else None):
            self.context.run_log.say(line, "job", job.id)
            since_s = self.context.now() - self._told_s
            if event.type == "phase" or (event.type == "step" and since_s >= CHECK_EVERY_S):
                self._told_s = self.context.now()
                self.log(line)
        progress = progress_of(event, self.watchdog.phase)
        if event.type == "phase" and event.state == "done" and self.run_monitor.peak_bytes:
            event = event.model_copy(update={"nvml_bytes": self.run_monitor.peak_bytes})
        record_event(store, event, progress)
        self.job = replace(self.job, progress=progress or self.job.progress)
        if event.type == "plan":
            self.job = store.job(job.id)
        if event.type != "error" or self._others_grew_bytes() <= NEIGHBOUR_BYTES:  # else it was no mistake of the plan
            machine = self.context.memory.machine()
            measurements.record(store, job, event, machine, self.card())
        if event.type == "result":
            move_job(store, job.id, job.attempt, "verifying", out_of=("running",))
            try:
                clip = self.worker.bring(event)
            except VerifyError as error:
                self.end(Ending("unverified", JobError(**error.fields())))
                return
            self._finish(clip)
        elif event.type == "error":
            self.end(Ending("error", event, others_grew_bytes=self._others_grew_bytes()))
        elif event.type == "wait":
            self.end(Ending("wait", need_bytes=event.need_bytes))

    def tick(self, output_lines: int) -> None:
        """Pass on what a person asked; once a second, check whether the worker is stuck."""
        job, now = self.job, self.context.now()
        ask = self.context.store.rows("SELECT ask FROM job WHERE id = ?", job.id)[0]["ask"]
        if ask == "cancel" and self._cancel_sent_s is None:
            self.worker.send(JobCommand(cmd="cancel", job=job.id))
            self._cancel_sent_s = now
        elif ask == "stop_and_decode" and not self._stop_sent:
            self._stop_sent = self.worker.send(JobCommand(cmd="stop_and_decode", job=job.id))
        elif self._cancel_sent_s is not None and now - self._cancel_sent_s > CANCEL_GRACE_S:
            self.log(f"did not hear the cancel for {CANCEL_GRACE_S:.0f} s, it is ended", "WARNING")
            self.end_worker = True
        if not (self.over or self.end_worker) and now - self._checked_s >= CHECK_EVERY_S:
            self._checked_s = now
            self._check_worker(now, output_lines)

    def _check_worker(self, now: float, output_lines: int) -> None:
        watchdog, gpu = self.watchdog, self._gpu()
        seen = replace(
            self.worker.look(),
            ram_available_bytes=self.context.memory.ram_available_bytes(),
            vram_free_bytes=gpu.free_bytes,
            own_bytes=gpu.reclaimable_bytes or None,
            others_bytes=self.context.memory.others_bytes(self.card()),
            utilisation=gpu.utilisation,
            power_w=gpu.power_w,
            output_lines=output_lines,
        )
        verdict = watchdog.check(now, seen)
        for notice in self.run_monitor.check(now, seen, watchdog.cold_and_busy()):
            self._notify(notice)
        if verdict in ("quiet", "slow"):
            self._notify(watchdog.silence(), "slow, still alive: " if verdict == "slow" else "")
        elif verdict == "dump":
            self.log("stacks of all threads follow: " + watchdog.reason(), "ERROR")
            self.worker.dump_stacks()
        elif verdict == "end":
            advice = "a smaller setting; the log holds its stacks"
            stuck = {"what": "the worker is stuck", "field": watchdog.phase, "got": watchdog.reason()}
            self.end(Ending("stuck", JobError(code="stuck", **stuck, expected="", try_instead=advice)))

    def _gpu(self) -> GpuFacts:
        return self.context.memory.gpu(self.card())

    def _notify(self, notice: Notice, before: str = "") -> None:
        self.log(before + notice.text, "WARNING")
        self.context.run_log.say(notice.text, "job", self.job.id, "WARNING")
        event = NoticeEvent(job=self.job.id, attempt=self.job.attempt, **notice.model_dump())
        record_event(self.context.store, event)

    def _finish(self, result: ClipResult) -> None:
        job, store = self.job, self.context.store
        if abs(self._others_grew_bytes()) > NEIGHBOUR_BYTES:
            measurements.forget_samples(store, job.id, job.attempt)
        if finish_job(store, job.id, job.attempt, result):
            archive_clip(store, job.id)
            self.log(f"done: {result.path}")
        self.over = True

    def end(self, ending: Ending) -> None:
        """Without a clip: decide what that means for the job, say it in both logs, move the job."""
        job = self.context.store.job(self.job.id)
        decision = decide(job, ending)
        level = "ERROR" if decision.to in ("failed", "parked") else "INFO"
        self.context.run_log.say(f"verdict: {decision.say}", "job", job.id, level)
        self.log(f"{decision.to}: {decision.say}", level)
        columns = decision.columns
        if decision.to == "queued" and job.ask == "cancel":
            decision, columns = Decision("cancelled", "cancelled", end_worker=decision.end_worker), {}
        move_job(self.context.store, job.id, job.attempt, decision.to, **columns)
        self.over, self.end_worker = True, self.end_worker or decision.end_worker

    def give_up(self, error: Exception) -> None:
        """Park the job: what the supervisor itself has to do for it fails with this error."""
        self.end(Ending("fault", fault_of(error)))

    def worker_died(self, status: int | None, lost: str = "") -> None:
        """The worker ended in the middle: its clip is adopted if it was finished, else the job's fate is decided.

        Args:
            lost: why the machine that it ran on is gone.
        """
        if lost:
            self.end(Ending("lost", JobError(got=lost)))
            return
        self.log(f"ended in the middle of the job: {describe_exit(status)}", "ERROR")
        clip = find_clip(self.context.outputs, self.job.nonce)
        if clip is not None:
            self.log("its clip was finished: adopted")
            self._finish(clip)
            return
        host_oom = self.context.memory.host_ooms() > self._host_ooms
        self.end(
            Ending(
                "died",
                JobError(got=describe_exit(status)),
                exit_status=status,
                host_oom=host_oom,
                others_grew_bytes=self._others_grew_bytes(),
                begun=self._begun,
                allocation=aborted_in_an_allocation(self.last_lines),
            )
        )

    def _others_grew_bytes(self) -> int:
        now = self.context.memory.others_bytes(self.card())
        return now - self._others_bytes if now is not None and self._others_bytes is not None else 0


def fault_of(error: Exception) -> JobError:
    """What is said of a job that fails in the supervisor and not in its worker."""
    advice = "turbodiff support-bundle collects what is needed for a report; then retry the job"
    what = "the app itself failed at this job"
    got = f"{type(error).__name__}: {error}"[:500]
    return JobError(code="supervisor_fault", what=what, got=got, try_instead=advice)


def progress_of(event: Event, phase: str) -> Progress | None:
    """How far a run is by an event of it in that phase; None where it does not say."""
    match event.type:
        case "phase":
            return Progress(phase=event.name) if event.state == "start" else None
        case "step":
            return Progress(phase=phase, step=event.i, of=event.n, eta_s=event.eta_s)
        case "progress":
            return Progress(phase=phase, step=event.i, of=event.n)
    return None
