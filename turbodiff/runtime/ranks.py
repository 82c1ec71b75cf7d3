"""The processes that share one clip, seen from the first: it starts the others and hears when one is lost.

The first rank is the worker. Each follower (runtime/follower.py) computes on a card of its own and does what it is
told on its standard input, one JSON line at a time; tensors and what the networks exchange travel by torch.distributed,
gloo on CPUs and NCCL on GPUs. A follower says that it is alive once a second. One that ends or falls silent ends the
group: the others are killed, what the first waits for fails, and the clip goes on with fewer. Where one runs out of
memory, the first does as if it had itself.
"""

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from turbodiff.gpu.probe import visible_name
from turbodiff.models.parallel import SequenceParallel
from turbodiff.runtime.device import Device, installed
from turbodiff.runtime.link_rate import link_rate
from turbodiff.spec.errors import TurbodiffError

FOLLOWER = (sys.executable, "-P", "-m", "turbodiff.runtime.follower")
SILENT_S = 10.0  # without a word, of which there is one a second: the process is stopped or its machine hangs
LOOK_S = 0.2
START_S = 60.0  # longer until it has said what it is made of: no thread runs while torch's libraries are loaded
AGREE_S = 600.0  # until all have said that, beats or not: a process whose import hangs still beats
JOIN_S = 30.0  # to meet once all have: one that dies meanwhile is waited for that long, whatever is heard of it
WAIT_S = 3600.0  # of one exchange: a lost process is noticed by its silence, long before
MEETINGS = "turbodiff-ranks-"  # what the folders are called in which groups meet
UNHELD_S = 60.0  # after so long a folder that no process holds is one that a killed process has left
GRACE_S = 10.0  # from the death of a follower until the first rank must have noticed: NCCL may wait for it for ever


class RanksLostError(TurbodiffError):
    """A process that shared the clip is gone, or cannot share it: what was being made must begin again with fewer."""


class Ranks:
    """The group of this process and its followers. `close` ends it, whatever became of it.

    Args:
        followers: CUDA_VISIBLE_DEVICES for each, a number as this process counts, "" where it computes on the CPU.
        on_end: hears why this process ends where nothing wakes it any more.
    """

    def __init__(
        self, device: Device, followers: Sequence[str], on_end: Callable[[RanksLostError], None] = lambda lost: None
    ) -> None:
        self.device, self.parallel = device, place(device, 0, 1 + len(followers))
        self._lost: str | None = None
        self._ran_out: tuple[type[Exception], str] | None = None  # the error of a follower's memory, and its words
        self.lost_rank: int | None = None  # the first that was lost
        self._losing, self._closing = threading.Lock(), False
        self._folder = tempfile.TemporaryDirectory(prefix=MEETINGS)
        self._store, self._held = Path(self._folder.name) / "store", -1
        self._followers, self._on_end = tuple(followers), on_end
        self._processes: list[subprocess.Popen[bytes]] = []
        self._heard_s: list[float] = []
        self._said: list[list[dict[str, str]]] = []
        self._listeners: list[threading.Thread] = []

    def open(self) -> None:
        """Start the followers and wait until all have joined.

        Raises:
            RanksLostError: one did not start or join, or is another program than this.
        """
        remove_left()
        self._held = os.open(self._folder.name, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(self._held, fcntl.LOCK_EX)
        for rank, visible in enumerate(self._followers, 1):
            try:
                self._processes.append(self._start(rank, visible))
            except OSError as error:
                self._lose(rank, f"did not start: {error}")
                self._raise_if_lost()
            self._heard_s.append(time.monotonic() + START_S)
            self._said.append([])
            self._listeners.append(threading.Thread(target=self._listen, args=(rank - 1,), daemon=True))
            self._listeners[-1].start()
        threading.Thread(target=self._watch, name="ranks", daemon=True).start()
        self._agree(made_of(self.device))
        with self._heard():
            weights = join(self.device, self._store, 0, self.parallel.ranks)
        self.parallel = replace(self.parallel, weights=weights)

    def _start(self, rank: int, visible: str) -> subprocess.Popen[bytes]:
        arguments = [str(rank), str(self.parallel.ranks), str(self._store), str(os.getpid())]
        if visible.isdigit():  # of a card that has no UUID
            visible = visible_name(int(visible), os.environ.get("CUDA_VISIBLE_DEVICES"))
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": visible}
        command = [*FOLLOWER, *arguments]
        return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def tell(self, do: str, tensors: Sequence[Tensor | None] = (), **facts: object) -> None:
        """Have every follower do something with these tensors.

        Raises:
            RanksLostError: one is gone.
        """
        shapes = [None if t is None else [list(t.shape), str(t.dtype).removeprefix("torch.")] for t in tensors]
        line = json.dumps({"do": do, "tensors": shapes, **facts}).encode() + b"\n"
        with self._heard():
            for process in self._processes:
                assert process.stdin is not None
                process.stdin.write(line)
                process.stdin.flush()
            for tensor in tensors:
                if tensor is not None:
                    dist.broadcast(tensor.to(self.device.torch_device).contiguous(), 0)

    def evaluate(self, network: Callable[[Tensor, Tensor], Tensor], latents: Tensor, timesteps: Tensor) -> Tensor:
        """Velocity of `network`, which all ranks evaluate together.

        Raises:
            RanksLostError: one is gone.
        """
        self.tell("evaluate", (latents, timesteps))
        return self.alongside(lambda: network(latents, timesteps))

    def link_rate(self, n_bytes: int) -> float:
        """Bytes that one process sends a second in an all-to-all of so many.

        Raises:
            RanksLostError: one is gone.
        """
        self.tell("link_rate", n_bytes=n_bytes)
        with self._heard():
            return link_rate(self.device, self.parallel.ranks, n_bytes)

    def alongside(self, work: Callable[[], Tensor]) -> Tensor:
        """What `work` returns, in which this process exchanges with the followers.

        Raises:
            RanksLostError: one is gone.
        """
        with self._heard():
            return work()

    def close(self) -> None:
        """End the followers and the group; returns when none is left."""
        with self._losing:
            self._closing = True
        for process in self._processes:
            process.kill()
            process.wait()
        if dist.is_initialized():
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()
        for process in self._processes:
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError, AttributeError):
                    pipe.close()  # type: ignore[union-attr]
        self._folder.cleanup()
        if self._held >= 0:
            os.close(self._held)
            self._held = -1

    def _agree(self, mine: dict[str, str]) -> None:
        """Wait until every follower has said what it is made of.

        Raises:
            RanksLostError: not what this process is made of: its numbers would be others; or not said in time.
        """
        deadline_s = time.monotonic() + AGREE_S
        for rank, said in enumerate(self._said, 1):
            while not said:
                self._raise_if_lost()
                if time.monotonic() > deadline_s:
                    self._lose(rank, f"did not start within {AGREE_S:g} s")
                time.sleep(LOOK_S / 10)
            if said[0] != mine:
                self._lose(rank, f"is another program: {said[0]}, the first is {mine}")
                self._raise_if_lost()

    @contextmanager
    def _heard(self) -> Iterator[None]:
        """Turn what fails because a follower is gone into one error."""
        try:
            self._raise_if_lost()
            yield
        except (RuntimeError, OSError) as error:
            deadline_s = time.monotonic() + GRACE_S
            while (
                self._lost is None and time.monotonic() < deadline_s and not isinstance(error, torch.OutOfMemoryError)
            ):
                time.sleep(LOOK_S / 10)  # the end of an exchange is heard before that of its process
            self._raise_if_lost()
            raise

    def _raise_if_lost(self) -> None:
        if self._ran_out is not None:
            error, words = self._ran_out  # made anew: a traceback holds tensors
            raise error(words)
        if self._lost is not None:
            raise self._lost_error()

    def _lost_error(self) -> RanksLostError:
        return RanksLostError(
            "a process that shared the clip is gone", code="ranks_lost", got=self._lost or "",
            expected=f"{self.parallel.ranks} processes", try_instead="see the log; one card makes the same clip",
        )  # fmt: skip

    def _lose(self, rank: int, why: str, ran_out: tuple[type[Exception], str] | None = None) -> None:
        """End the group because of this rank, unless it has ended already, or because of another.

        Args:
            ran_out: the error of its memory: no reason not to use its card again.
        """
        with self._losing:
            if self._lost is None and not self._closing:
                self.lost_rank, self._ran_out = None if ran_out else rank, ran_out
                self._lost = f"rank {rank} {why}"
        for process in self._processes:
            process.kill()

    def _hear_of_failure(self, rank: int, word: dict[str, str]) -> None:
        """Lose the rank that said why it fails, unless it fails because another has ended."""
        if line := word.get("out_of_memory"):
            kind = torch.OutOfMemoryError if word["where"] == "device" else MemoryError
            self._lose(rank, "ran out of memory", (kind, f"rank {rank}: {line}"))
            return
        time.sleep(LOOK_S)  # what it exchanged with breaks before that process can be waited for
        self._lose_ended()
        self._lose(rank, word["error"])

    def _lose_ended(self, rank: int | None = None) -> None:
        """Lose the first rank that a signal ended, since others fail of that; where there is none this one."""
        ended = {other: process.poll() for other, process in enumerate(self._processes, 1)}
        first = next((other for other, code in ended.items() if code is not None and code < 0), rank)
        if first is not None:
            self._lose(first, f"ended with {ended[first]}")

    def _listen(self, index: int) -> None:
        stream = self._processes[index].stdout
        assert stream is not None
        with contextlib.suppress(ValueError, OSError):  # closed under us: the group has ended
            for line in stream:
                word = word_of(line)
                if word is None:
                    continue
                if "error" in word or "out_of_memory" in word:
                    self._hear_of_failure(index + 1, word)
                elif word:
                    self._said[index].append(word)
                self._hear(index)

    def _hear(self, index: int) -> None:
        """Count a follower's silence from now on, of one that starts from later on."""
        self._heard_s[index] = time.monotonic() + (0 if self._said[index] else START_S)

    def _watch(self) -> None:
        """Lose the group where a follower has ended or is silent; where that does not wake the first rank, end it."""
        looked_s = time.monotonic()
        while not self._closing and self._lost is None:
            time.sleep(LOOK_S)
            looked_s, before_s = time.monotonic(), looked_s
            if looked_s - before_s > SILENT_S / 2:  # this process was stopped itself: what they said is still unread
                for index in range(len(self._processes)):
                    self._hear(index)
            for rank, (process, heard_s) in enumerate(zip(self._processes, self._heard_s, strict=True), 1):
                if process.poll() is not None:
                    self._listeners[rank - 1].join(JOIN_S)  # it may have said why
                    self._lose_ended(rank)
                elif time.monotonic() - heard_s > SILENT_S:
                    self._lose(rank, f"said nothing for {SILENT_S:g} s")
        if self.device.is_cuda and not self._closing:
            time.sleep(GRACE_S)
            if not self._closing and self._ran_out is not None:  # by which the supervisor knows an out-of-memory
                sys.stderr.write(f"{self._ran_out[1]}\n")
                sys.stderr.flush()
                os.abort()
            if not self._closing:
                sys.stderr.write(f"[ERROR] a process that shared the clip is gone, and this one waits: {self._lost}\n")
                sys.stderr.flush()
                try:
                    self._on_end(self._lost_error())
                finally:
                    os._exit(1)  # as an out-of-memory: the supervisor starts a worker anew and the job goes on


def remove_left() -> None:
    """Remove the folders in which groups of killed processes met: those of this user that hold nothing else, and that
    no process holds a lock on, which the kernel takes from a process that ends."""
    for folder in Path(tempfile.gettempdir()).glob(f"{MEETINGS}*"):
        with contextlib.suppress(OSError):  # a link, a file, another user's, locked, or removed by somebody else
            held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                facts, names = os.fstat(held), [path.name for path in folder.iterdir()]
                if facts.st_uid == os.getuid() and time.time() - facts.st_mtime > UNHELD_S and names in ([], ["store"]):
                    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    for name in names:
                        os.unlink(name, dir_fd=held)
                    folder.rmdir()
            finally:
                os.close(held)


def word_of(line: bytes) -> dict[str, str] | None:
    """What a follower says in a line of its standard output; None: something else prints there."""
    try:
        word = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return word if isinstance(word, dict) else None


def join(device: Device, store: Path, rank: int, ranks: int) -> dist.ProcessGroup:
    """Make this process one of a group on this machine: sockets on the loopback interface, met through a file. Returns
    a second group of the same, so that weights do not wait for what attention exchanges, nor that for them."""
    for library in ("GLOO", "NCCL"):
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
    meeting = dist.FileStore(str(store), ranks)
    meeting.set_timeout(timedelta(seconds=JOIN_S))
    how = "nccl" if device.is_cuda else "gloo"
    dist.distributed_c10d._world.group_count = 0  # part of the names they meet under, one more where a meeting failed
    dist.init_process_group(how, store=meeting, rank=rank, world_size=ranks, timeout=timedelta(seconds=JOIN_S))
    weights = cast("dist.ProcessGroup", dist.new_group(timeout=timedelta(seconds=JOIN_S)))
    for group in (None, weights):  # from now on that of the exchanges, which has no public name
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=WAIT_S), group)
    return weights


def place(device: Device, rank: int, ranks: int) -> SequenceParallel:
    """A process' place among so many. On cards half of the heads attend while the others' come, and what the first half
    gives goes back while the second attends; a CPU has nothing to spare for that."""
    return SequenceParallel(rank, ranks, head_groups=2 if device.is_cuda else 1)


def made_of(device: Device) -> dict[str, str]:
    """What must be alike in processes that share a clip, or their numbers are not those of one."""
    return {name: installed(name) for name in ("torch", "turbodiff")} | {"arch": str(device.facts()["arch"])}
