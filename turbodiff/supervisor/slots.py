"""One GPU's place at the bench: its worker, started, listened to, ended; the job on it is running.py's."""

import signal
from collections import deque
from dataclasses import dataclass, field

from turbodiff.jobs.retry_policy import Ending
from turbodiff.spec.events import Event, HelloEvent
from turbodiff.spec.jobs import QueuedJob
from turbodiff.supervisor.attempt_monitor import AttemptMonitor, SupervisorContext
from turbodiff.supervisor.leftover_workers import forget_worker, remember_worker
from turbodiff.supervisor.worker_process import TERM_S, Worker, exit_words

BACKOFF_S = (1.0, 2.0, 4.0, 8.0, 16.0, 60.0)
MAX_FAILED_STARTS = 5
SETTLED_S = 10.0  # a worker that dies this early without having had a job has a problem of its own
HELLO_S = 300.0  # importing torch from a cold network disk takes minutes
RECYCLE_JOBS = 20  # a fresh process returns what allocators keep (TurboDiffusion issue 52)
RECYCLE_GROWTH_BYTES = 8 << 30  # of RSS, over the end of the first job


@dataclass
class GpuSlot:
    """A worker and its job. `tick` never blocks longer than it takes to end a worker."""

    shop: SupervisorContext
    index: int = 0
    device: str = ""
    worker: Worker | None = None
    running: AttemptMonitor | None = None
    hello: HelloEvent | None = None
    failed_starts: int = 0
    start_after_s: float = 0.0
    started_s: float = 0.0
    jobs_run: int = 0
    rss_bytes: int = 0
    first_rss_bytes: int = 0
    idle_since_s: float = 0.0
    ending_since_s: float | None = None
    host_ooms: int = 0
    output_lines: int = 0
    inbox: deque[Event] = field(default_factory=deque)

    @property
    def name(self) -> str:
        """ "worker", or "worker1" beside another GPU's."""
        return f"worker{self.index or ''}"

    @property
    def job(self) -> QueuedJob | None:
        """The job that runs here now."""
        return self.running.job if self.running else None

    @property
    def broken(self) -> bool:
        """The worker died at its start too often; a restart by a person tries again."""
        return self.failed_starts >= MAX_FAILED_STARTS

    @property
    def free(self) -> bool:
        """A worker is up, has said hello, has nothing to do, and is not on its way out."""
        up = self.worker is not None and self.hello is not None and not self.worker.wait(0)
        return up and self.running is None and self.ending_since_s is None

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
        self.hello, self.jobs_run, self.first_rss_bytes, self.output_lines = None, 0, 0, 0
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
        host_oom = self.shop.memory.host_ooms() > self.host_ooms
        outside = status in (-signal.SIGKILL, -signal.SIGTERM) and not host_oom
        young = not self.hello or self.shop.now() - self.started_s < SETTLED_S
        return young and not outside and self.ending_since_s is None and not self.jobs_run

    def stop(self, reason: str, exit_s: float = 3.0, term_s: float = 5.0) -> bool:
        """End the worker, put its job back uncharged; False if the process hangs in the driver."""
        if self.worker is None:
            return True
        status = self.worker.stop(exit_s, term_s)
        self.pump()  # its last words, a result perhaps
        if self.running is not None:
            self.running.end(Ending("stopped", reason=reason))
            self._settle()
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
        facts = {
            **(self.hello.model_dump() if self.hello else {}),
            "pid": pid,
            "state": state,
            "failed_starts": self.failed_starts,
        }
        self.shop.store.put(f"worker{self.index}", facts)

    # --- a turn --------------------------------------------------------------------------------------------------

    def run(self, job: QueuedJob) -> bool:
        """Give a claimed job to the worker; False where the disk has no place for its clip."""
        assert self.worker is not None and self.running is None
        self.running = AttemptMonitor(self.shop, self.index, job, self.worker, self.say)
        started = self.running.start()
        self._settle()
        return started

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
        elif self.running is not None:
            self.running.tick(self.output_lines)
            self._settle()
        elif not self.hello and self.shop.now() - self.started_s > HELLO_S:
            self.say(f"said nothing for {HELLO_S:.0f} s after its start", "ERROR")
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
            self._hear(self.inbox[0])  # stays in the box if the store cannot be written: the next turn repeats it
            self.inbox.popleft()

    def _hear(self, event: Event) -> None:
        if event.type == "hello":
            self.hello = event
            self.say(f"ready on {event.device_name or event.device or 'its device'}")
            self._publish("ready")
            return
        if event.type == "beat":
            self.rss_bytes = event.rss_bytes
        if self.running is not None:
            self.running.hear(event)
            self._settle()

    def _settle(self) -> None:
        """Draw the consequences of what the attempt has come to."""
        running = self.running
        if running is None:
            return
        if running.over:
            self.running, self.failed_starts = None, 0
            self.jobs_run += 1
            self.idle_since_s = self.shop.now()
            self.first_rss_bytes = self.first_rss_bytes or self.rss_bytes
        if running.worn:
            self._end_worker()

    def _end_worker(self) -> None:
        """SIGTERM now, SIGKILL later if need be; it gets no more work."""
        if self.worker is not None and self.ending_since_s is None:
            self.ending_since_s = self.shop.now()
            self.worker.signal(signal.SIGTERM)

    def _died(self, status: int | None) -> None:
        if self.running is not None:
            self.running.worker_died(status)
            self._settle()
        elif self._failed_to_start(status):
            self._start_failed(f"ended {'right after' if self.hello else 'before'} it was ready: {exit_words(status)}")
        else:
            self.say(f"ended: {exit_words(status)}")
        self._put_away(status)

    def worn_out(self) -> str:
        """Why this idle worker should be replaced by a fresh one, or ""."""
        if self.jobs_run >= RECYCLE_JOBS:
            return f"ran {self.jobs_run} jobs"
        if self.first_rss_bytes and self.rss_bytes > self.first_rss_bytes + RECYCLE_GROWTH_BYTES:
            return "grew by more than 8 GiB of RAM"
        return ""
