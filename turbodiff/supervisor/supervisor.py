"""The small process that `python webui/app.py` and `turbodiff serve` run: it owns the page, the probe and the workers.

Everything comes together in one loop of one thread: workers' events, log lines, controls from the store, the web
process, the clock. Only the main thread may run it, because children die with the thread that started them.
Each part of a turn is tried by itself: a fault of the disk or a mistake of ours is said and tried again, and holds up
no other part. A job that a slot cannot get on with for half a minute is parked.
"""

import contextlib
import os
import platform
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import cast

from turbodiff.archive.disk import check_place
from turbodiff.archive.seeds import write_if_due
from turbodiff.diagnostics.logs import RUN_LOG, LogFile, startup_log
from turbodiff.gpu.probe import Probe, Sample, take_sample
from turbodiff.jobs.attempts import claim, move_job
from turbodiff.jobs.cards import weights_of
from turbodiff.spec.environment import BEAT_FD, LAST_END, current_folder
from turbodiff.spec.errors import FileError, OutputError, TurbodiffError
from turbodiff.spec.files import file_system
from turbodiff.spec.jobs import Outcome
from turbodiff.spec.numbers import gib, seconds
from turbodiff.spec.wording import Words, shell_language
from turbodiff.supervisor.attempt_monitor import fault_of
from turbodiff.supervisor.cards import RemoteCards, card_lines, follow_cards, slots_of, visible_devices
from turbodiff.supervisor.context import Memory, SupervisorContext
from turbodiff.supervisor.ownership import StateLock
from turbodiff.supervisor.placement import Chosen, Placement
from turbodiff.supervisor.recovery import backup, recover
from turbodiff.supervisor.shared_clips import run_job
from turbodiff.supervisor.slots import GpuSlot
from turbodiff.supervisor.state_folder import StateFolder
from turbodiff.supervisor.web_process import WebProcess
from turbodiff.supervisor.worker_process import WORKER, new_run_id

TICK_S, TOGETHER_S = 0.1, 0.001  # the latter for each slot: what many workers say is heard in one turn
SLOW_TICK_S = 1.0  # facts, idle workers, log size
FAULT_EVERY_S = 10.0  # between two times that the same part's fault is said
FAULT_PATIENCE_S = 30.0  # with a slot whose turns fail; a full disk or a locked store may be well again
STOP_S, TERM_S = 2.5, 1.0  # from a first signal to SIGTERM, from there to SIGKILL: within five seconds all are gone
IDLE_RELEASE_S = 900.0  # an idle worker with warm models lets go after a quarter of an hour
NEIGHBOUR_FREE_BYTES = 512 << 20  # or at once, when a neighbour is about to run out
PROOF_S = 15.0  # for the memory of an ended worker to be free again; Ollama sees 0.5-1.5 s
POLL_S = 0.25
SLACK_BYTES = 256 << 20
TYPED = (signal.SIGINT, signal.SIGQUIT)  # Ctrl-C and Ctrl-\: the exit code tells them, as a shell would
SIGNALS = (*TYPED, signal.SIGTERM, signal.SIGHUP)


class Supervisor:
    """One per state folder.

    Args:
        state / outputs: folders; made if missing.
        worker_argv: the worker's command line, another one in tests.
        devices: one worker each, GPU UUIDs or indices; "" sees what we see. None: one worker per visible card.
        working: where the two log files go, if it can be written.
        sample: the newest probe sample; None starts a probe of our own.
        cluster: makes the cards of other machines.

    Raises:
        StateInUseError: another supervisor holds the state folder; the error names it.
        FileError, OutputError: the store is newer than this program, or the folder cannot be written.
    """

    def __init__(
        self,
        state: Path,
        outputs: Path,
        *,
        worker_argv: Sequence[str] = WORKER,
        devices: Sequence[str] | None = None,
        working: Path | None = None,
        sample: Callable[[], Sample | None] | None = None,
        now: Callable[[], float] = time.monotonic,
        cluster: Callable[[SupervisorContext], RemoteCards] | None = None,
    ) -> None:
        self.state, self.outputs = Path(state).resolve(), Path(outputs).resolve()
        self.lock = StateLock(self.state)
        try:
            run_id, self.log = new_run_id(), startup_log(working or current_folder(), self.state)
            run_log = LogFile(self.log.path.with_name(RUN_LOG))
            self.archive, self.run_name = self.state / "logs", time.strftime("%Y%m%d_%H%M%S", time.gmtime())
            self.log.start_over(self.archive, self.run_name)
            run_log.cap(self.archive, f"runs_{self.run_name}")
            self.store, report = recover(self.state, self.outputs)
            self._probe = None if sample else Probe()
            self.sample = sample or self._probe.latest  # type: ignore[union-attr]
            memory = Memory(
                self.sample,
                lambda: [pid for slot in slots_of(self.context, self.slots) for pid in slot.pids],
                lambda: {slot.device: slot.held_bytes for slot in slots_of(self.context, self.slots)},
            )
            self.context = SupervisorContext(
                self.store, self.log, run_log, self.state, self.outputs, run_id, memory, worker_argv, now
            )
            self._follow = devices is None  # the cards come and go
            devices = visible_devices(sample() if sample else take_sample()) if devices is None else devices
            self.slots = [GpuSlot(self.context, index, device) for index, device in enumerate(devices)]
            self.cluster = cluster(self.context) if cluster else None
            self._placement, self._chosen = Placement(self.context, lambda: self.slots), cast("Chosen | None", None)
            self.web: WebProcess | None = None
            self.exit_code: int | None = None
            self._slow_s = self._beat_s = 0.0
            self._faults: dict[str, tuple[float, float]] = {}  # part of the turn: since when it fails, when it was said
            self._beat_fd = int(os.environ.pop(BEAT_FD, -1))
            self._signals, self._closed, self._introduced, self._no_place = 0, False, False, False
            mode = str(self.store.rows("PRAGMA journal_mode")[0][0])
            self.log.say(f"turbodiff supervisor, pid {os.getpid()}, run {run_id[:8]}")
            if how := os.environ.pop(LAST_END, ""):
                self.log.say(f"the supervisor before this one ended ({how}); the queue goes on", level="ERROR")
            self.log.say(f"python {platform.python_version()} on {platform.system()} {platform.release()}")
            self.log.say(f"state {self.state} ({file_system(self.state)}, journal {mode}), outputs {self.outputs}")
            for line in report.lines:
                self.log.say(line)
            self.store.put(
                "supervisor", {"pid": os.getpid(), "run_id": run_id, "journal": mode, "log": str(self.log.path)}
            )
            self._folder = StateFolder(self.store, self.log)
        except BaseException:
            self.lock.close()
            raise

    def serve(self, web_argv: Sequence[str] | None = None, address: tuple[str, int] | None = None) -> int:
        """Run until a signal of `SIGNALS`, or until the page cannot start; returns the exit code.

        `address` is where the page answers; one that no longer does is replaced.
        A first signal puts running jobs back into the queue and ends the workers with patience, a second at once.
        """

        def stop(number: int, frame: object) -> None:
            self._signals += 1
            self.exit_code = 128 + number if number in TYPED else 0

        heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores SIGHUP
        before = {number: signal.signal(number, stop) for number in heard}
        try:
            if web_argv:
                self.web = WebProcess(web_argv, self.context, address)
            while self.exit_code is None:
                self.tick()
            return self.exit_code
        finally:
            self.close()
            for number, handler in before.items():
                signal.signal(number, handler)

    def tick(self, timeout_s: float = TICK_S) -> None:
        """One turn of the loop, at most `timeout_s` long when nothing happens. Never raises."""
        parts: dict[str, Callable[[], object]] = {"wait": partial(self._wait, timeout_s)}
        for slot in self.slots:
            parts[f"slot {slot.index}"] = partial(self._turn_of, slot)
        parts |= {"page": self._turn_of_page, "controls": self._controls, "cluster": self._turn_of_cluster}
        parts["dispatch"] = self._dispatch
        for slot in self.slots:
            parts[f"queue for slot {slot.index}"] = partial(self._next_job, slot)
        if self.context.now() - self._slow_s >= SLOW_TICK_S:
            parts["housekeeping"] = self._housekeeping
            parts["seeds.md"] = partial(write_if_due, self.store, self.outputs)
        if [part for part, step in parts.items() if not self._try(part, step)]:
            time.sleep(timeout_s)

    def _try(self, part: str, step: Callable[[], object]) -> bool:
        """Do one part of a turn; False where it failed: a disk, a mistake of ours. That is said every ten seconds."""
        now = self.context.now()
        if self._beat_fd >= 0 and now - self._beat_s >= SLOW_TICK_S:
            self._beat_s = now
            with contextlib.suppress(OSError):  # whoever listened is gone, or has enough
                os.write(self._beat_fd, b".")
        try:
            step()
        except Exception as error:  # noqa: BLE001  whatever it is, the other parts go on
            since_s, said_s = self._faults.get(part, (now, now - FAULT_EVERY_S))
            if now - said_s >= FAULT_EVERY_S:
                said_s = now
                if not isinstance(error, TurbodiffError):
                    for line in traceback.format_exception(error)[-3:]:
                        self.log.say(line.rstrip(), level="ERROR")
                self.log.say(f"{part}: {error}", level="ERROR")
            self._faults[part] = since_s, said_s
            self.exit_code = self._folder.exit_code_of(error) if self.exit_code is None else self.exit_code
            return False
        self._faults.pop(part, None)
        return True

    def _wait(self, timeout_s: float) -> None:
        fds = [fd for slot in self.slots if slot.worker for fd in slot.worker.filenos()]
        fds += [fd for child in (self.web, self.cluster) if child for fd in child.filenos()]
        is_heard = any(select.select(fds, [], [], timeout_s))
        time.sleep(min(timeout_s, TOGETHER_S * len(self.slots)) if is_heard else 0)

    def _turn_of(self, slot: GpuSlot) -> None:
        try:
            self._placement.start(slot)
            slot.tick()
            if slot.free and (why := slot.recycle_reason()):  # before dispatch counts on it
                slot.log(f"a fresh worker follows: it {why}")
                slot.stop("recycled")
        except OutputError:  # the disk is full or the store is locked: no doing of the job
            raise
        except Exception as error:
            since_s, _ = self._faults.get(f"slot {slot.index}", (self.context.now(), 0.0))
            if self.context.now() - since_s >= FAULT_PATIENCE_S:
                slot.give_up(error)
            raise

    def _turn_of_page(self) -> None:
        if self.web is not None:
            self.web.tick()
            if self.web.failed_code is not None:
                self.exit_code = self._folder.exit_code_if_damaged() or self.web.failed_code

    def _turn_of_cluster(self) -> None:
        if self.cluster is not None:
            self.slots = self.cluster.tick(self.slots)

    def _controls(self) -> None:
        for control, what in self.store.take_controls():
            if what == "restart":
                outcome = self.restart()
            elif what == "stop":
                self.exit_code = 0
                outcome = Outcome(ok=True, text="stopping; what runs goes back to the queue")
            else:
                outcome = Outcome(ok=False, text=f"unknown control {what}")
            self.store.answer(control, outcome)

    def _dispatch(self) -> None:
        self._chosen = {}  # nothing starts where this fails
        self._chosen = self._placement.choose(self.slots)

    def _next_job(self, slot: GpuSlot) -> None:
        chosen = self._chosen
        is_wanted = chosen is None or slot.index in chosen
        if not is_wanted or not slot.free or self._no_place or slot.is_stopped:
            return
        choice = chosen[slot.index] if chosen else None
        job = claim(self.store, slot.index, slot.available_bytes, choice, slot.gpu.uuid)
        if job is None:
            return
        slot.weights = weights_of(job.plan) if job.plan else ""
        try:
            started = run_job(slot, job, self.slots, choice.also if choice else ())
        except Exception as error:
            slot.monitor = None
            move_job(self.store, job.id, job.attempt, "parked", error=fault_of(error))
            raise
        if not started:
            self._no_place = True  # one job says so to everybody; the others keep their place in the queue
            self.log.say("the queue waits: there is no place for clips", level="ERROR")

    def restart(self) -> Outcome:
        """重启应用: end every worker, prove that its memory is back, start a new one. Page and queue stay.

        Success is claimed only for what the driver confirms: free memory back at what it was before our worker, within
        256 MiB. Otherwise the other holders are to be looked at; nobody else's process is signalled.
        """
        self.log.say("restart asked for by a person")
        now, start_s = self.context.now, self.context.now()
        before = [(slot.index, slot.gpu) for slot in slots_of(self.context, self.slots)]
        ran = [slot.job.id for slot in self.slots if slot.job]
        ended = [slot.stop("restart by a person") for slot in self.slots]
        for slot, gone in zip(self.slots, ended, strict=True):
            if gone:
                slot.failed_starts, slot.start_after_s = 0, 0.0
        if not all(ended):
            text = "the driver does not let the worker go: a reboot is needed"
            outcome = Outcome(ok=False, freed_bytes=None, seconds=now() - start_s, text=text)
        else:
            held = {n: (gpu.free_bytes, gpu.reclaimable_bytes) for n, gpu in before if gpu.free_bytes is not None}
            freed = dict.fromkeys(held, 0)
            while held:
                self.sample()  # the probe takes in its newest sample
                if self.web is not None:
                    self.web.tick()
                free_now = {slot.index: slot.gpu.free_bytes for slot in self.slots if slot.index in held}
                freed = {index: (free_now[index] or free) - free for index, (free, _) in held.items()}
                back = all(freed[index] >= ours - SLACK_BYTES for index, (_, ours) in held.items())
                if back or now() - start_s > PROOF_S:
                    break
                time.sleep(POLL_S)
            for slot in self.slots:
                slot.start()
            outcome = _restarted(held, freed, now() - start_s)
        fates = {job: self.store.job(job).state for job in ran}
        said = " ".join([f"{outcome.text}.", *Words("en").fates(fates)])
        self.log.say(f"restart: {said}", level="INFO" if outcome.ok else "ERROR")
        return outcome.model_copy(update={"jobs": fates})

    def _housekeeping(self) -> None:
        self._slow_s = self.context.now()
        if self._folder.is_lost():
            self.exit_code = self._folder.bring_back()
            return
        if late := self.store.take_in():
            numbers = ", ".join(map(str, late))
            self.log.say(f"job(s) {numbers} are in the queue now: another program held the job store", level="WARNING")
        sample = self.sample()
        self.store.put("probe", sample.model_dump(mode="json", exclude_unset=True) if sample else None, durable=False)
        self._introduce_cards(sample)
        if self._follow:
            self.slots = follow_cards(self.context, self.slots, sample)
        if self._no_place:
            with contextlib.suppress(FileError):
                check_place(self.outputs, self.state, 0, 0, 0)
                self._no_place = False
                self.log.say("there is a place for clips again: the queue goes on")
        self.log.cap(self.archive, f"{self.run_name}_{int(time.time())}")
        here = {slot.job.id for slot in self.slots if slot.job}
        for job, attempt in self.store.rows("SELECT id, attempt FROM job WHERE state IN ('running', 'verifying')"):
            if job not in here:  # a fault between its row and its slot
                self.log.say(f"job {job} runs nowhere: back to the queue", level="ERROR")
                move_job(self.store, job, attempt, "queued")
        for slot in self.slots:
            if not slot.free or not slot.jobs_run:
                continue
            free_bytes = slot.gpu.free_bytes
            tight = free_bytes is not None and free_bytes < NEIGHBOUR_FREE_BYTES
            if tight or self.context.now() - slot.idle_since_s > IDLE_RELEASE_S:
                slot.log("idle models released" + (": a neighbour needs the memory" if tight else ""))
                slot.stop("released")
        if not any(slot.job for slot in self.slots) and (made := backup(self.store, self.state)) is not None:
            self.log.say(f"backup {made.name}")

    def _introduce_cards(self, sample: Sample | None) -> None:
        """Say once which cards there are, as soon as the driver has answered or has had time to."""
        if self._introduced or (sample is not None and sample.state == "hang" and sample.age_s < 3.0):
            return
        self._introduced = True
        for line in card_lines(sample):
            self.log.say(line)

    def close(self) -> None:
        """Requeue what runs, end all children, let the state folder go."""
        if self._closed:
            return
        self._closed = True
        end_s = self.context.now() + (0.0 if self._signals > 1 else STOP_S)
        ran = [slot.job.id for slot in self.slots if slot.job]
        for child in (*self.slots, self.web):  # all at once, then each has what is left of the patience
            if child is not None:
                child.ask_to_end()
        for slot in self.slots:
            left_s = max(0.0, end_s - self.context.now())
            try:
                slot.stop("the app was stopped", left_s, min(left_s, TERM_S))
            except Exception as error:  # noqa: BLE001  the others are stopped all the same
                self.log.say(f"{error}; the next start settles it", level="ERROR")
        self._tell_fates(ran)
        if self.cluster is not None:
            self.cluster.stop()
        if self.web is not None:
            self.web.stop(max(0.5, end_s - self.context.now()))
        if self._probe is not None:
            self._probe.stop()
        self._try("seeds.md", partial(write_if_due, self.store, self.outputs))
        self.store.close()
        self.log.close()
        self.context.run_log.close()
        self.lock.close()

    def _tell_fates(self, ran: list[int]) -> None:
        """The last line of the log, and of the terminal: where the jobs are that ran, and how many wait."""
        fates, waiting = dict.fromkeys(ran, "unsettled"), 0
        with contextlib.suppress(TurbodiffError):  # a disk or a lock: the journal has them all
            waiting = self.store.overview(0)[1]
            fates = {job: str(self.store.job(job).state) for job in ran}
        self.log.say(_stopped(fates, waiting, Words("en")))
        if self.web is not None:
            sys.stdout.write(f"{_stopped(fates, waiting, Words(shell_language()))}\n")


def _stopped(fates: Mapping[int, str], waiting: int, words: Words) -> str:
    told = [words("fate.stopped"), *words.fates(fates)]
    return " ".join([*told, words("fate.waiting", n=waiting)] if waiting else told)


def _restarted(held: dict[int, tuple[int, int]], freed: dict[int, int], took_s: float) -> Outcome:
    """The outcome of a restart from free bytes before, bytes our worker held, and bytes that came back, by slot."""
    if not held:
        text = f"worker replaced in {seconds(took_s)}; no GPU driver to ask about memory"
        return Outcome(ok=True, freed_bytes=None, seconds=took_s, text=text)
    total = sum(freed.values())
    ok = all(freed[index] >= ours - SLACK_BYTES for index, (_, ours) in held.items())
    text = f"freed {gib(max(0, total))} in {seconds(took_s)}"
    if not ok:
        missing = sum(ours for _, ours in held.values()) - total
        text += f"; {gib(missing)} did not come back: another program took it, see who holds the memory"
    return Outcome(ok=ok, freed_bytes=max(0, total), seconds=took_s, text=text)
