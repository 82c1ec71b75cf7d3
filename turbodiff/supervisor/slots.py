"""The worker of one GPU: started, listened to, ended, replaced. The job on it is attempt_monitor.py's.

Where it runs is its port's (ports.py).
"""

import contextlib
import signal
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

import psutil

from turbodiff.jobs.retry_policy import Ending
from turbodiff.plan.hardware import GpuFacts
from turbodiff.spec.errors import TurbodiffError
from turbodiff.spec.events import Event, ExitCommand, HelloEvent
from turbodiff.spec.jobs import QueuedJob
from turbodiff.supervisor.attempt_monitor import AttemptMonitor
from turbodiff.supervisor.context import SupervisorContext
from turbodiff.supervisor.ports import Port
from turbodiff.supervisor.worker_process import BACKOFF_S, MAX_FAILED_STARTS, TERM_S, describe_exit

SETTLED_S = 10.0  # a worker that dies this early without having had a job has a problem of its own
HELLO_S = 300.0  # importing torch from a cold network disk takes minutes
SILENT_S = (
    60.0  # an idle worker beats once a second: one that is silent is stopped (SIGSTOP) or hangs, and takes no job
)
RECYCLE_JOBS = 20  # a fresh process returns what allocators keep (TurboDiffusion issue 52)
NOTED_BYTES = 64 << 20  # by which what a worker holds must change to be written down
RECYCLE_GROWTH_BYTES = 8 << 30  # of RSS, over the end of the first job


class Loan(NamedTuple):
    """That a card works at the attempt of another slot, whose worker has a process on it."""

    slot: "GpuSlot"
    attempt: AttemptMonitor

    @property
    def over(self) -> bool:
        """Whether that attempt has ended, whatever became of it, and no process of its worker is left on the card."""
        leaves = self.attempt.end_worker and self.slot.worker is self.attempt.worker
        return self.slot.monitor is not self.attempt and not leaves


@dataclass
class GpuSlot:
    """A worker and its job. `tick` never blocks longer than it takes to end a worker."""

    context: SupervisorContext
    index: int = 0
    device: str = ""
    worker: Port | None = None
    monitor: AttemptMonitor | None = None
    hello: HelloEvent | None = None
    failed_starts: int = 0
    start_after_s: float = 0.0
    started_s: float = 0.0
    jobs_run: int = 0
    rss_bytes: int = 0
    held_bytes: int = 0  # of the device, as the worker says
    first_rss_bytes: int = 0
    idle_since_s: float = 0.0
    heard_s: float = 0.0  # when it last said anything
    ending_since_s: float | None = None
    host_ooms: int = 0
    output_lines: int = 0
    weights: str = ""  # what its worker holds (placement.py)
    unseen: int = 0  # samples in a row without its card
    lent_to: Loan | None = None
    cards: tuple[str, ...] = ()  # that its worker's processes use beside its own (shared_clips.py)
    followers: tuple[int, ...] = ()  # those processes
    inbox: deque[Event] = field(default_factory=deque)

    @property
    def job(self) -> QueuedJob | None:
        """The job that runs here now."""
        return self.monitor.job if self.monitor else None

    @property
    def card(self) -> int:
        """Where its card stands in the machine now."""
        return self.context.memory.place(self.index, self.device)

    @property
    def gpu(self) -> GpuFacts:
        """What is known of its card now."""
        return self.context.memory.gpu(self.card)

    @property
    def available_bytes(self) -> int | None:
        """Memory of its card that a job could have: what is free, and what our own worker holds; None: unknown."""
        gpu = self.gpu
        return None if gpu.free_bytes is None else gpu.free_bytes + gpu.reclaimable_bytes

    @property
    def seen(self) -> bool:
        """Whether its card is among those that the probe sees."""
        machine = self.context.memory.machine()
        return machine is not None and self.card < len(machine.gpus)

    @property
    def lent(self) -> bool:
        """Whether its card works at the clip of another slot: it has no worker and takes no job until that is over."""
        return self.lent_to is not None and not self.lent_to.over

    @property
    def pids(self) -> tuple[int, ...]:
        """Our processes here, whose memory is ours."""
        return (self.worker.pid, *self.followers) if self.worker else ()

    @property
    def broken(self) -> bool:
        """The worker died at its start too often; a restart by a person tries again."""
        return self.failed_starts >= MAX_FAILED_STARTS

    @property
    def free(self) -> bool:
        """A worker is up, has said hello, has nothing to do, and is not on its way out."""
        up = self.worker is not None and self.hello is not None and not self.worker.wait(0)
        return up and self.monitor is None and self.ending_since_s is None

    @property
    def is_stopped(self) -> bool:
        """Whether the worker is stopped (SIGSTOP): it would take a job and do nothing."""
        return self.worker is not None and self.worker.look().state == psutil.STATUS_STOPPED

    def log(self, text: str, level: str = "INFO") -> None:
        """Write a line about the worker ("worker", or "worker1" beside another GPU's)."""
        self.context.log.say(text, f"worker{self.index or ''}", self.job.id if self.job else None, level)

    # --- the worker's life ---------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start a worker if there is none and it is time."""
        now, context = self.context.now(), self.context
        if self.worker is not None or self.broken or now < self.start_after_s or self.lent:
            return
        self.lent_to, self.held_bytes = None, 0
        try:
            self.worker = context.open_port(self.index, self.device)
        except (OSError, TurbodiffError) as error:
            self._start_failed(f"cannot start: {error}")
            return
        self.weights, self.hello, self.jobs_run, self.first_rss_bytes, self.output_lines, self.held_bytes = (
            "",
            None,
            0,
            0,
            0,
            0,
        )
        self.ending_since_s, self.host_ooms = None, context.memory.host_ooms()
        self.started_s = self.idle_since_s = self.heard_s = now
        self.log(f"started, {self.worker.where}")
        self._publish("starting")

    def _start_failed(self, why: str) -> None:
        wait_s = BACKOFF_S[min(self.failed_starts, len(BACKOFF_S) - 1)]
        self.failed_starts += 1
        self.start_after_s = self.context.now() + wait_s
        if self.broken:
            self.log(f"{why}; gave up after {self.failed_starts} starts, the lines above say why", "ERROR")
        else:
            self.log(f"{why}; next start in {wait_s:.0f} s", "WARNING")
        self._publish("broken" if self.broken else "waiting")

    def stop(self, reason: str, exit_s: float = 3.0, term_s: float = 5.0) -> bool:
        """End the worker, put its job back uncharged; False if the process hangs in the driver."""
        if self.worker is None:
            return True
        status = self.worker.stop(exit_s, term_s)
        self.pump()  # its last words, a result perhaps
        if self.monitor is not None:
            self.monitor.end(Ending("stopped", reason=reason))
            self._settle()
        return self._close_worker(status)

    def _close_worker(self, status: int | None) -> bool:
        assert self.worker is not None
        if status is None:
            self.failed_starts = MAX_FAILED_STARTS
            self.log("does not end even by SIGKILL: the driver is not answering, a reboot is needed", "CRITICAL")
        self.worker.close()
        self.worker, self.held_bytes, self.cards, self.followers = None, 0, (), ()
        self._publish("broken" if self.broken else "none")
        return status is not None

    def lend(self, loan: Loan, peak_bytes: int) -> None:
        """Let the card, whose worker has ended, work for another slot, where a process of it takes so much memory."""
        self.lent_to, self.held_bytes = loan, peak_bytes
        self._publish("lent")

    def ask_to_end(self) -> None:
        """Tell the worker to end, without waiting for it; `stop` comes next."""
        if self.worker is not None:
            self.worker.send(ExitCommand())

    def give_up(self, error: Exception) -> None:
        """Park the job with which the turns of this slot fail, and end its worker: the next job gets a fresh one."""
        self.inbox.clear()
        self._end_worker()
        if self.monitor is not None:
            try:
                self.monitor.give_up(error)
            finally:  # a job that cannot even be parked is found by the supervisor, see its housekeeping
                self.monitor.over = True
                self._settle()

    def _publish(self, state: str) -> None:
        self.context.memory.workers_changed()
        hello = self.hello.model_dump() if self.hello else {}
        pid = self.worker.pid if self.worker else None
        facts = {**hello, "pid": pid, "state": state, "failed_starts": self.failed_starts}
        facts |= {"card": self.device, "held_bytes": self.held_bytes, "node": self.context.node}
        facts |= {"followers": self.followers}
        self.context.store.put(f"worker{self.index}", facts)

    # --- a turn --------------------------------------------------------------------------------------------------

    def run(self, job: QueuedJob, cards: tuple[str, ...] = ()) -> bool:
        """Give a claimed job to the worker, with the `cards` that may work at it, too (`RunCommand.cards`); False where
        the disk has no place for its clip."""
        assert self.worker is not None and self.monitor is None
        self.monitor = AttemptMonitor(self.context, lambda: self.card, job, self.worker, self.log)
        self.cards = cards
        started = self.monitor.start(cards)
        self._settle()
        return started

    def tick(self) -> None:
        """Hear the worker, look after it, notice its end."""
        self.pump()
        if self.worker is None:
            return
        now = self.context.now()
        if self.worker.wait(0):
            self.pump()
            self._on_exit(self.worker.exit_status())
        elif self.ending_since_s is not None:
            if now - self.ending_since_s > TERM_S:
                self._on_exit(self.worker.kill())
        elif self.monitor is not None:
            self.monitor.tick(self.output_lines)
            self._settle()
        elif self.hello is None and now - self.started_s > HELLO_S:
            self.log(f"said nothing for {HELLO_S:.0f} s after its start", "ERROR")
            self._end_worker()
        elif self.hello is not None and now - max(self.heard_s, self.idle_since_s) > SILENT_S:
            self.log(f"idle, and silent for {SILENT_S:.0f} s: a fresh one follows", "ERROR")
            self._end_worker()

    def pump(self) -> None:
        """Write the worker's log lines, handle its events."""
        if self.worker is None:
            return
        for line in self.worker.output():
            self.output_lines += 1
            self.log(line)
            if self.monitor is not None:
                self.monitor.last_lines.append(line)
        heard = self.worker.events()
        if heard:
            self.heard_s = self.context.now()
        self.inbox.extend(heard)
        while self.inbox:
            event = self.inbox[0]  # stays in the box if the store cannot be written: the next turn repeats it
            if event.type == "hello":
                self.hello = event
                self.log(f"ready on {event.device_name or event.device or 'its device'}")
                self._publish("ready")
            elif event.type == "beat":
                self.rss_bytes = event.rss_bytes
                followers = children_of(self.worker.pid) if self.cards and self.monitor else ()
                if abs(event.held_bytes - self.held_bytes) >= NOTED_BYTES or followers != self.followers:
                    self.held_bytes, self.followers = event.held_bytes, followers
                    self._publish("ready")
            if self.monitor is not None and event.type != "hello":
                try:
                    self.monitor.on_event(event)
                except (KeyError, TypeError, ValueError) as error:
                    self.log(f"{event.type} event not understood: {error!r}", "WARNING")
                self._settle()
            self.inbox.popleft()

    def _settle(self) -> None:
        """Draw the consequences of what the attempt has come to."""
        monitor = self.monitor
        if monitor is None:
            return
        if monitor.over:
            self.monitor, self.failed_starts = None, 0
            self.jobs_run += 1
            self.idle_since_s = self.context.now()
            self.first_rss_bytes = self.first_rss_bytes or self.rss_bytes
        if monitor.end_worker:
            self._end_worker()

    def _end_worker(self) -> None:
        """SIGTERM now, SIGKILL later if need be; it gets no more work."""
        if self.worker is not None and self.ending_since_s is None:
            self.ending_since_s = self.context.now()
            self.worker.signal(signal.SIGTERM)

    def _on_exit(self, status: int | None) -> None:
        host_oom = self.context.memory.host_ooms() > self.host_ooms
        outside = status in (-signal.SIGKILL, -signal.SIGTERM) and not host_oom
        young = self.hello is None or self.context.now() - self.started_s < SETTLED_S
        if self.monitor is not None:
            self.monitor.worker_died(status, self.worker.lost if self.worker else "")
            self._settle()
        elif young and not outside and self.ending_since_s is None and not self.jobs_run:  # of no use: the next waits
            when = "right after" if self.hello else "before"
            self._start_failed(f"ended {when} it was ready: {describe_exit(status)}")
        else:
            self.log(f"ended: {describe_exit(status)}")
        self._close_worker(status)

    def recycle_reason(self) -> str:
        """Why this idle worker should be replaced by a fresh one, or ""."""
        if self.jobs_run >= RECYCLE_JOBS:
            return f"ran {self.jobs_run} jobs"
        if self.first_rss_bytes and self.rss_bytes > self.first_rss_bytes + RECYCLE_GROWTH_BYTES:
            return "grew by more than 8 GiB of RAM"
        return ""


def children_of(pid: int) -> tuple[int, ...]:
    """The processes that a process of this machine has started and that live."""
    with contextlib.suppress(psutil.Error):
        return tuple(sorted(child.pid for child in psutil.Process(pid).children(recursive=True)))
    return ()
