"""One GPU's place at the bench: its worker, the job on it, and everything that may happen to the two."""

import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from turbodiff.jobs import peaks, procfs
from turbodiff.jobs.attempts import finish, move_on, note, set_plan
from turbodiff.jobs.clips import check_clip, discard, find_clip
from turbodiff.jobs.logs import LogFile
from turbodiff.jobs.memory import Memory
from turbodiff.jobs.orphans import forget_worker, remember_worker
from turbodiff.jobs.runlog import request_line, run_lines
from turbodiff.jobs.seeds import archive_clip
from turbodiff.jobs.store import Job, Store
from turbodiff.jobs.stuck import Evidence, Watch, as_notice
from turbodiff.jobs.verdicts import NEIGHBOUR_BYTES, Decision, Ending, decide
from turbodiff.jobs.workerproc import TERM_S, WORKER, Worker, exit_words, run_command
from turbodiff.spec.errors import TurbodiffError, VerifyError
from turbodiff.spec.events import Event

BACKOFF_S = (1.0, 2.0, 4.0, 8.0, 16.0, 60.0)
MAX_FAILED_STARTS = 5
SETTLED_S = 10.0  # a worker that dies this early without having had a job has a problem of its own
CANCEL_GRACE_S = 30.0  # a step of a large clip may take this long before the worker sees the cancel
RECYCLE_JOBS = 20  # a fresh process returns what allocators keep (TurboDiffusion issue 52)
RECYCLE_GROWTH_BYTES = 8 << 30  # of RSS, over the end of the first job


@dataclass
class Shop:
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


@dataclass
class Slot:
    """A worker and its job. `tick` never blocks longer than it takes to end a worker."""

    shop: Shop
    index: int = 0
    device: str = ""
    worker: Worker | None = None
    job: Job | None = None
    hello: dict[str, Any] = field(default_factory=dict)
    failed_starts: int = 0
    start_after_s: float = 0.0
    started_s: float = 0.0
    jobs_run: int = 0
    rss_bytes: int = 0
    first_rss_bytes: int = 0
    idle_since_s: float = 0.0
    cancel_sent_s: float | None = None
    ending_since_s: float | None = None
    heard: bool = False
    stop_sent: bool = False
    host_ooms: int = 0
    others_bytes: int | None = None
    watch: Watch | None = None
    looked_s: float = 0.0
    output_lines: int = 0
    inbox: deque[Event] = field(default_factory=deque)

    @property
    def name(self) -> str:
        """ "worker", or "worker1" beside another GPU's."""
        return f"worker{self.index or ''}"

    @property
    def broken(self) -> bool:
        """The worker died at its start too often; a restart by a person tries again."""
        return self.failed_starts >= MAX_FAILED_STARTS

    def say(self, text: str, level: str = "INFO") -> None:
        """A line about the worker, in the log."""
        self.shop.log.say(text, self.name, self.job.id if self.job else None, level)

    # --- the worker's life ---------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start a worker if there is none and it is time."""
        now = self.shop.now()
        if self.worker is not None or self.broken or now < self.start_after_s:
            return
        try:
            self.worker = Worker(self.shop.worker_argv, self.shop.run_id, self.device)
        except OSError as error:
            self._start_failed(f"cannot start: {error}")
            return
        remember_worker(self.shop.state, self.index, self.worker.pid, self.shop.run_id)
        self.hello, self.jobs_run, self.first_rss_bytes, self.output_lines = {}, 0, 0, 0
        self.ending_since_s, self.host_ooms = None, self.shop.memory.host_ooms()
        self.started_s = self.idle_since_s = now
        self.say(f"started, pid {self.worker.pid}")
        self._publish("starting")

    def _start_failed(self, why: str) -> None:
        wait_s = BACKOFF_S[min(self.failed_starts, len(BACKOFF_S) - 1)]
        self.failed_starts += 1
        self.start_after_s = self.shop.now() + wait_s
        if self.broken:
            self.say(f"{why}; gave up after {self.failed_starts} starts, the lines above say why", "ERROR")
        else:
            self.say(f"{why}; next start in {wait_s:.0f} s", "WARNING")
        self._publish("broken" if self.broken else "waiting")

    def _failed_to_start(self, status: int | None) -> bool:
        """Whether a worker ended of its own accord before it was of any use: then the next one waits."""
        outside = status in (-signal.SIGKILL, -signal.SIGTERM) and not self._host_oom()
        young = not self.hello or self.shop.now() - self.started_s < SETTLED_S
        return young and not outside and self.ending_since_s is None and not self.jobs_run

    def stop(self, reason: str, exit_s: float = 3.0, term_s: float = 5.0) -> bool:
        """End the worker, put its job back uncharged; False if the process hangs in the driver."""
        if self.worker is None:
            return True
        status = self.worker.stop(exit_s, term_s)
        self.pump()  # its last words, a result perhaps
        if self.job is not None:
            self._end(Ending("stopped", reason=reason))
        return self._put_away(status)

    def _put_away(self, status: int | None) -> bool:
        assert self.worker is not None
        if status is None:
            self.failed_starts = MAX_FAILED_STARTS
            self.say("does not end even by SIGKILL: the driver is not answering, a reboot is needed", "CRITICAL")
        self.worker.close()
        self.worker = None
        forget_worker(self.shop.state, self.index)
        self._publish("broken" if self.broken else "none")
        return status is not None

    def _publish(self, state: str) -> None:
        pid = self.worker.pid if self.worker else None
        facts = {**self.hello, "pid": pid, "state": state, "failed_starts": self.failed_starts}
        self.shop.store.put(f"worker{self.index}", facts)

    # --- a job's life --------------------------------------------------------------------------------------------

    @property
    def free(self) -> bool:
        """A worker is up, has said hello, has nothing to do, and is not on its way out."""
        up = self.worker is not None and bool(self.hello) and not self.worker.wait(0)
        return up and self.job is None and self.ending_since_s is None

    def run(self, job: Job) -> None:
        """Give a claimed job to the worker."""
        assert self.worker is not None and self.job is None
        self.job = job
        self.watch = Watch(self.shop.now(), peaks.usual_seconds(self.shop.store, job))
        self.host_ooms, self.others_bytes = self.shop.memory.host_ooms(), self.shop.memory.others_bytes(self.index)
        self.cancel_sent_s, self.stop_sent, self.heard = None, False, False
        request = job.request | job.overrides
        self.shop.runs.say(request_line(request, job.attempt), "job", job.id)
        self.worker.send(
            run_command(
                request,
                job.plan,
                self.shop.outputs,
                self.shop.state,
                job=job.id,
                attempt=job.attempt,
                cap_bytes=job.cap_bytes,
                parent=job.parent,
            )
        )

    def tick(self) -> None:
        """Hear the worker, look after it, notice its end."""
        self.pump()
        if self.worker is None:
            return
        if self.worker.wait(0):
            self.pump()
            self._died(self.worker.exit_status())
        elif self.ending_since_s is not None:
            if self.shop.now() - self.ending_since_s > TERM_S:
                self._died(self.worker.kill())
        elif self.job is not None:
            self._obey()
            self._look()
        elif not self.hello and self.shop.now() - self.started_s > 300.0:
            self.say("said nothing for 300 s after its start", "ERROR")
            self._end_worker()

    def pump(self) -> None:
        """Write the worker's log lines, handle its events."""
        if self.worker is None:
            return
        for line in self.worker.output():
            self.output_lines += 1
            self.say(line)
        self.inbox.extend(self.worker.events())
        while self.inbox:
            try:
                self._heard(self.inbox[0])  # stays in the box if the store cannot be written: the next turn repeats it
            except (KeyError, TypeError, ValueError) as error:
                self.say(f"{self.inbox[0].type} event not understood: {error!r}", "WARNING")
            self.inbox.popleft()

    def _heard(self, event: Event) -> None:
        if event.type == "hello":
            self.hello = dict(event.fields)
            self.say(f"ready on {event.fields.get('device_name') or event.fields.get('device', 'its device')}")
            self._publish("ready")
            return
        if event.type == "beat":
            self.rss_bytes = int(event.fields.get("rss_bytes", 0))
        job = self.job
        if job is None or (event.job, event.attempt) != (job.id, job.attempt):
            return  # the words of an earlier attempt change nothing
        self.heard = True
        if self.watch is not None:
            self.watch.heard(event, self.shop.now())
        self._keep(event, job)
        if event.type == "result":
            self._verify(event)
        elif event.type == "error":
            self._end(Ending("error", event.fields, others_grew_bytes=self._others_grew()))
        elif event.type == "wait":
            self._end(Ending("wait", event.fields))

    def _keep(self, event: Event, job: Job) -> None:
        if event.type == "beat":
            return
        for line in run_lines(event, peaks.planned_bytes(self.job, event)):
            self.shop.runs.say(line, "job", job.id)
        if event.type == "plan":
            set_plan(self.shop.store, job.id, job.attempt, event.fields["plan"])
            self.job = self.shop.store.job(job.id)
            return
        phase = self.watch.phase if self.watch else ""
        note(self.shop.store, event, progress_of(event, phase))
        peaks.record(self.shop.store, self.job, event, self.shop.memory.machine(), self.index)

    def _verify(self, event: Event) -> None:
        job = self._current()
        move_on(self.shop.store, job.id, job.attempt, "verifying", out_of=("running",))
        try:
            check_clip(event.fields)
        except VerifyError as error:
            discard(self.shop.outputs, event.fields)
            self._end(Ending("unverified", error.fields()))
            return
        self._done(event.fields)

    def _done(self, result: dict[str, Any]) -> None:
        job = self._current()
        if abs(self._others_grew()) > NEIGHBOUR_BYTES:
            peaks.forget_samples(self.shop.store, job.id, job.attempt)
        if finish(self.shop.store, job.id, job.attempt, result):
            archive_clip(self.shop.store, self.shop.outputs, job.id)
            self.say(f"done: {result['path']}")
        self._idle()

    def _end(self, ending: Ending) -> None:
        job = self.shop.store.job(self._current().id)
        decision = decide(job, ending)
        self.shop.runs.say(f"verdict: {decision.say}", "job", job.id, _level(decision))
        self.say(f"{decision.to}: {decision.say}", _level(decision))
        self._apply(job, decision)
        self._idle()
        if decision.end_worker:
            self._end_worker()

    def _end_worker(self) -> None:
        """SIGTERM now, SIGKILL later if need be; it gets no more work."""
        if self.worker is not None and self.ending_since_s is None:
            self.ending_since_s = self.shop.now()
            self.worker.signal(signal.SIGTERM)

    def _apply(self, job: Job, decision: Decision) -> None:
        columns = decision.columns
        if decision.to == "queued" and job.ask == "cancel":
            decision, columns = Decision("cancelled", "cancelled"), {}
        move_on(self.shop.store, job.id, job.attempt, decision.to, **columns)

    def _idle(self) -> None:
        self.job, self.watch, self.failed_starts = None, None, 0
        self.jobs_run += 1
        self.idle_since_s = self.shop.now()
        self.first_rss_bytes = self.first_rss_bytes or self.rss_bytes

    def _current(self) -> Job:
        assert self.job is not None
        return self.job

    def _died(self, status: int | None) -> None:
        if self.job is not None:
            self.say(f"ended in the middle of the job: {exit_words(status)}", "ERROR")
            self._adopt_or_end(Ending("died", {"got": exit_words(status)}, status, self._host_oom(), begun=self.heard))
        elif self._failed_to_start(status):
            self._start_failed(f"ended {'right after' if self.hello else 'before'} it was ready: {exit_words(status)}")
        else:
            self.say(f"ended: {exit_words(status)}")
        self._put_away(status)

    def _adopt_or_end(self, ending: Ending) -> None:
        job = self._current()
        clip = find_clip(self.shop.outputs, job.nonce)
        if clip is not None:
            self.say("its clip was finished: adopted")
            self._done(clip)
        else:
            self._end(ending)

    def _host_oom(self) -> bool:
        return self.shop.memory.host_ooms() > self.host_ooms

    def _others_grew(self) -> int:
        now = self.shop.memory.others_bytes(self.index)
        return now - self.others_bytes if now is not None and self.others_bytes is not None else 0

    def _obey(self) -> None:
        """Pass on what a person asked of the running job."""
        job, worker, now = self._current(), self.worker, self.shop.now()
        assert worker is not None
        ask = self.shop.store.rows("SELECT ask FROM job WHERE id = ?", job.id)[0]["ask"]
        if ask == "cancel" and self.cancel_sent_s is None:
            worker.send({"cmd": "cancel", "job": job.id})
            self.cancel_sent_s = now
        elif ask == "stop_and_decode" and not self.stop_sent:
            self.stop_sent = worker.send({"cmd": "stop_and_decode", "job": job.id})
        elif self.cancel_sent_s is not None and now - self.cancel_sent_s > CANCEL_GRACE_S:
            self.say(f"did not hear the cancel for {CANCEL_GRACE_S:.0f} s, it is ended", "WARNING")
            self._end_worker()

    def _look(self) -> None:
        """Once a second: is it stuck?"""
        now, worker, watch = self.shop.now(), self.worker, self.watch
        if now - self.looked_s < 1.0 or worker is None or watch is None:
            return
        self.looked_s = now
        verdict = watch.look(now, self._evidence(worker))
        if verdict in ("quiet", "slow"):
            self.say(("slow, still alive: " if verdict == "slow" else "") + watch.why(), "WARNING")
            job = self._current()
            note(self.shop.store, Event(job=job.id, attempt=job.attempt, type="notice", fields=as_notice(watch.why())))
        elif verdict == "dump":
            self.say("stacks of all threads follow: " + watch.why(), "ERROR")
            if procfs.catches(worker.pid, signal.SIGUSR1):  # faulthandler's, or the signal would end it
                worker.signal(signal.SIGUSR1)
        elif verdict == "end":
            error = TurbodiffError(
                "the worker is stuck",
                code="stuck",
                field=watch.phase,
                got=watch.why(),
                try_instead="a smaller setting; the log holds its stacks",
            )
            self._end(Ending("stuck", error.fields()))

    def _evidence(self, worker: Worker) -> Evidence:
        memory = self.shop.memory
        return Evidence(
            procfs.bytes_read(worker.pid),
            procfs.cpu_seconds(worker.pid),
            procfs.process_state(worker.pid),
            memory.ram_available_bytes(),
            *memory.card(self.index),
            self.output_lines,
        )

    def worn_out(self) -> str:
        """Why this idle worker should be replaced by a fresh one, or ""."""
        if self.jobs_run >= RECYCLE_JOBS:
            return f"ran {self.jobs_run} jobs"
        if self.first_rss_bytes and self.rss_bytes > self.first_rss_bytes + RECYCLE_GROWTH_BYTES:
            return "grew by more than 8 GiB of RAM"
        return ""


def progress_of(event: Event, phase: str) -> dict[str, Any] | None:
    """What the page's progress bar shows after this event, or None for no change."""
    if event.type == "phase" and event.fields.get("state") == "start":
        return {"phase": event.fields["name"], "step": 0, "of": 0, "eta_s": None}
    if event.type == "step":
        fields = event.fields
        return {"phase": phase, "step": fields["i"], "of": fields["n"], "eta_s": fields.get("eta_s")}
    return None


def _level(decision: Decision) -> str:
    return {"failed": "ERROR", "parked": "ERROR"}.get(decision.to, "INFO")
