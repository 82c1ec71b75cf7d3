"""The small process that `python webui/app.py` and `turbodiff serve` run: it owns the page, the probe and the workers.

Everything comes together in one loop of one thread: workers' events, log lines, controls from the store, the web
process, the clock. Only the main thread may run it, because children die with the thread that started them.
A fault of the disk stops nothing: the loop goes on, says so, and tries again.
"""

import os
import platform
import select
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from turbodiff.archive.disk import check_place
from turbodiff.diagnostics.logs import RUN_LOG, STARTUP_LOG, LogFile, log_folder
from turbodiff.gpu.probe import Probe, Sample, machine_from, take_sample
from turbodiff.jobs.attempts import claim
from turbodiff.jobs.database import file_system
from turbodiff.spec.errors import FileError, TurbodiffError
from turbodiff.spec.numbers import gib
from turbodiff.supervisor.attempt_monitor import SupervisorContext
from turbodiff.supervisor.memory import Memory
from turbodiff.supervisor.recovery import backup, recover
from turbodiff.supervisor.restart import restart
from turbodiff.supervisor.slots import GpuSlot
from turbodiff.supervisor.state_lock import StateLock
from turbodiff.supervisor.web_process import WebProcess
from turbodiff.supervisor.worker_process import WORKER, new_run_id

TICK_S = 0.1
SLOW_TICK_S = 1.0  # facts, idle workers, log size
IDLE_RELEASE_S = 900.0  # an idle worker with warm models lets go after a quarter of an hour
NEIGHBOUR_FREE_BYTES = 512 << 20  # or at once, when a neighbour is about to run out


class Supervisor:
    """One per state folder.

    Args:
        state / outputs: folders; made if missing.
        worker_argv: the worker's command line, another one in tests.
        devices: one worker each, GPU UUIDs or indices; "" sees what we see. None: one worker per visible card.
        working: where the two log files go, if it can be written.
        sample: the newest probe sample; None starts a probe of our own.

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
    ) -> None:
        self.state, self.outputs = Path(state).resolve(), Path(outputs).resolve()
        self.lock = StateLock(self.state)
        try:
            self._open(worker_argv, devices, working or Path.cwd(), sample, now)
        except BaseException:
            self.lock.close()
            raise

    def _open(
        self,
        worker_argv: Sequence[str],
        devices: Sequence[str] | None,
        working: Path,
        sample: Callable[[], Sample | None] | None,
        now: Callable[[], float],
    ) -> None:
        run_id = new_run_id()
        folder = log_folder(working, self.state)
        self.log, runs = LogFile(folder / STARTUP_LOG), LogFile(folder / RUN_LOG)
        self.archive, self.run_name = self.state / "logs", time.strftime("%Y%m%d_%H%M%S", time.gmtime())
        self.log.start_over(self.archive, self.run_name)
        runs.cap(self.archive, f"runs_{self.run_name}")
        self.store, report = recover(self.state, self.outputs)
        self._probe = None if sample else Probe()
        self.sample = sample or self._probe.latest  # type: ignore[union-attr]
        memory = Memory(self.sample, lambda: [slot.worker.pid for slot in self.slots if slot.worker])
        self.shop = SupervisorContext(
            self.store, self.log, runs, self.state, self.outputs, run_id, memory, worker_argv, now
        )
        devices = visible_devices(sample() if sample else take_sample()) if devices is None else devices
        self.slots = [GpuSlot(self.shop, index, device) for index, device in enumerate(devices)]
        self.web: WebProcess | None = None
        self.exit_code: int | None = None
        self._slow_s = self._store_failed_s = 0.0
        self._signals, self._closed, self._introduced, self._no_place = 0, False, False, False
        mode = str(self.store.rows("PRAGMA journal_mode")[0][0])
        self.log.say(f"turbodiff supervisor, pid {os.getpid()}, run {run_id[:8]}")
        system = file_system(self.state)
        self.log.say(f"python {platform.python_version()} on {platform.system()} {platform.release()}")
        self.log.say(f"state {self.state} ({system}, journal {mode}), outputs {self.outputs}")
        for line in report.lines:
            self.log.say(line)
        self.store.put("supervisor", {"pid": os.getpid(), "run_id": run_id, "journal": mode, "log": str(self.log.path)})

    def serve(self, web_argv: Sequence[str] | None = None, address: tuple[str, int] | None = None) -> int:
        """Run until SIGTERM, SIGINT or SIGHUP, or until the page cannot start; returns the exit code.

        `address` is where the page answers; one that no longer does is replaced.
        A first signal puts running jobs back into the queue and ends the workers with patience, a second at once.
        """
        before = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        try:
            if web_argv:
                self.web = WebProcess(web_argv, self.shop, address)
            while self.exit_code is None:
                self.tick()
            return self.exit_code
        finally:
            self.close()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: object) -> None:
        self._signals += 1
        self.exit_code = 130 if number == signal.SIGINT else 0

    def tick(self, timeout_s: float = TICK_S) -> None:
        """One turn of the loop, at most `timeout_s` long when nothing happens."""
        self._wait(timeout_s)
        try:
            self._turn()
        except TurbodiffError as error:  # the store: disk full, read-only, locked; jobs are kept, the next turn retries
            now = self.shop.now()
            if now - self._store_failed_s > 10.0:
                self._store_failed_s = now
                self.log.say(str(error), level="ERROR")
            time.sleep(timeout_s)

    def _turn(self) -> None:
        for slot in self.slots:
            slot.start()
            slot.tick()
        if self.web is not None:
            self.web.tick()
            if self.web.failed_code is not None:
                self.exit_code = self.web.failed_code
        for control, what, fields in self.store.take_controls():
            self.store.answer(control, self._control(what, fields))
        for slot in self.slots:
            self._dispatch(slot)
        if self.shop.now() - self._slow_s >= SLOW_TICK_S:
            self._slow_s = self.shop.now()
            self._housekeeping()

    def _dispatch(self, slot: GpuSlot) -> None:
        if not slot.free or self._no_place:
            return
        why = slot.worn_out()
        if why:
            slot.say(f"a fresh worker follows: it {why}")
            slot.stop("recycled")
            return
        job = claim(self.store, slot.index, self.shop.memory.free_bytes(slot.index))
        if job is not None and not slot.run(job):
            self._no_place = True  # one job says so to everybody; the others keep their place in the queue
            self.log.say("the queue waits: there is no place for clips", level="ERROR")

    def _control(self, what: str, fields: dict[str, Any]) -> dict[str, Any]:
        if what == "restart":
            self.log.say("restart asked for by a person")
            outcome = restart(self.shop, self.slots, self._refresh)
            self.log.say(f"restart: {outcome['text']}", level="INFO" if outcome["ok"] else "ERROR")
            return outcome
        if what == "stop":
            self.exit_code = 0
            return {"ok": True, "text": "stopping"}
        return {"ok": False, "text": f"unknown control {what}"}

    def _refresh(self) -> None:
        self.sample()
        if self.web is not None:
            self.web.tick()

    def _housekeeping(self) -> None:
        sample = self.sample()
        self.store.put("probe", sample._asdict() if sample else None, durable=False)
        self._introduce(sample)
        if self._no_place:
            self._look_for_a_place()
        self.log.cap(self.archive, f"{self.run_name}_{int(time.time())}")
        for slot in self.slots:
            self._let_go(slot)
        if not any(slot.job for slot in self.slots):
            made = backup(self.store, self.state)
            if made is not None:
                self.log.say(f"backup {made.name}")

    def _look_for_a_place(self) -> None:
        try:
            check_place(self.outputs, self.state, 0, 0, 0)
        except FileError:
            return
        self._no_place = False
        self.log.say("there is a place for clips again: the queue goes on")

    def _introduce(self, sample: Sample | None) -> None:
        """Say once which cards there are, as soon as the driver has answered or has had time to."""
        if self._introduced or (sample is not None and sample.state == "hang" and sample.age_s < 3.0):
            return
        self._introduced = True
        machine = machine_from(sample) if sample else None
        for gpu in machine.gpus if machine else ():
            free = "unknown" if gpu.free_bytes is None else gib(gpu.free_bytes)
            total = "unknown" if gpu.total_bytes is None else gib(gpu.total_bytes)
            self.log.say(
                f"GPU {gpu.index}: {gpu.name} {gpu.uuid}, {free} free of {total}, driver {sample and sample.driver}"
            )
        if machine is None or not machine.gpus:
            why = f"{sample.state} {sample.error}".strip() if sample else "no probe"
            self.log.say(f"no GPU: {why}")

    def _let_go(self, slot: GpuSlot) -> None:
        """Replace an idle worker with warm models after a while, or when a neighbour needs the memory."""
        if not slot.free or not slot.jobs_run:
            return
        gpu = self.shop.memory.gpu(slot.index)
        tight = gpu is not None and gpu.free_bytes is not None and gpu.free_bytes < NEIGHBOUR_FREE_BYTES
        if tight or self.shop.now() - slot.idle_since_s > IDLE_RELEASE_S:
            slot.say("idle models released" + (": a neighbour needs the memory" if tight else ""))
            slot.stop("released")

    def _wait(self, timeout_s: float) -> None:
        fds = [fd for slot in self.slots if slot.worker for fd in slot.worker.filenos()]
        fds += self.web.filenos() if self.web else []
        select.select(fds, [], [], timeout_s)

    def close(self) -> None:
        """Requeue what runs, end all children, let the state folder go."""
        if self._closed:
            return
        self._closed = True
        patience_s = 0.0 if self._signals > 1 else 3.0
        for slot in self.slots:
            try:
                slot.stop("the app was stopped", patience_s, patience_s)
            except TurbodiffError as error:
                self.log.say(f"{error}; the next start settles it", level="ERROR")
        if self.web is not None:
            self.web.stop()
        if self._probe is not None:
            self._probe.stop()
        self.log.say("stopped")
        self.store.close()
        self.log.close()
        self.shop.runs.close()
        self.lock.close()


def visible_devices(sample: Sample | None) -> tuple[str, ...]:
    """The UUIDs of the visible cards, one worker each; ("",) for at most one card: then nothing needs to be chosen."""
    gpus = machine_from(sample).gpus if sample else ()
    return tuple(gpu.uuid for gpu in gpus) if len(gpus) > 1 and all(gpu.uuid for gpu in gpus) else ("",)


_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
