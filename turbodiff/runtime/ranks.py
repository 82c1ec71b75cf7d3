"""The processes that share one clip, seen from the first: it starts the others and hears when one is lost.

The first rank is the worker. Each follower (runtime/follower.py) computes on a card of its own and does what it is
told on its standard input, one JSON line at a time; tensors and what the networks exchange travel by torch.distributed,
gloo on CPUs and NCCL on GPUs. A follower says that it is alive once a second. One that ends or falls silent ends the
group: the others are killed, what the first waits for fails, and the clip goes on with fewer.
"""

import contextlib
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

from turbodiff.models.parallel import SequenceParallel
from turbodiff.runtime.device import Device, installed
from turbodiff.spec.errors import TurbodiffError

FOLLOWER = (sys.executable, "-P", "-m", "turbodiff.runtime.follower")
SILENT_S = 10.0  # without a word, of which there is one a second: the process is stopped or its machine hangs
LOOK_S = 0.2
START_S = 60.0  # until a follower says its first word, before it imports torch
JOIN_S = 30.0  # to meet once all have: one that dies meanwhile is waited for that long, whatever is heard of it
WAIT_S = 3600.0  # of one exchange: a lost process is noticed by its silence, long before
GRACE_S = 10.0  # from the death of a follower until the first rank must have noticed: NCCL may wait for it for ever


class RanksLostError(TurbodiffError):
    """A process that shared the clip is gone, or cannot share it: what was being made must begin again with fewer."""


class Ranks:
    """The group of this process and its followers. `close` ends it, whatever became of it.

    Args:
        followers: CUDA_VISIBLE_DEVICES for each, "" where it computes on the CPU.
    """

    def __init__(self, device: Device, followers: Sequence[str]) -> None:
        self.device, self.parallel = device, place(device, 0, 1 + len(followers))
        self._lost: str | None = None
        self.lost_rank: int | None = None  # the first that was lost
        self._losing, self._closing = threading.Lock(), False
        self._folder = tempfile.TemporaryDirectory(prefix="turbodiff-ranks-")
        self._store = Path(self._folder.name) / "store"
        self._processes: list[subprocess.Popen[bytes]] = []
        self._heard_s: list[float] = []
        self._said: list[list[dict[str, str]]] = []
        for rank, visible in enumerate(followers, 1):
            self._processes.append(self._start(rank, visible))
            self._heard_s.append(time.monotonic() + START_S)
            self._said.append([])
            threading.Thread(target=self._listen, args=(rank - 1,), daemon=True).start()
        threading.Thread(target=self._watch, name="ranks", daemon=True).start()

    def open(self) -> None:
        """Wait until all have joined.

        Raises:
            RanksLostError: one did not, or is another program than this.
        """
        self._agree(made_of(self.device))
        with self._heard():
            weights = join(self.device, self._store, 0, self.parallel.ranks)
        self.parallel = replace(self.parallel, weights=weights)

    def _start(self, rank: int, visible: str) -> subprocess.Popen[bytes]:
        arguments = [str(rank), str(self.parallel.ranks), str(self._store), str(os.getpid())]
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

    def alongside(self, work: Callable[[], Tensor]) -> Tensor:
        """What `work` returns, in which this process exchanges with the followers.

        Raises:
            RanksLostError: one is gone.
        """
        with self._heard():
            return work()

    def close(self) -> None:
        """End the followers and the group; returns when none is left."""
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

    def _agree(self, mine: dict[str, str]) -> None:
        """Wait until every follower has said what it is made of.

        Raises:
            RanksLostError: not what this process is made of: its numbers would be others.
        """
        for rank, said in enumerate(self._said, 1):
            while not said:
                self._raise_if_lost()
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
        if self._lost is not None:
            raise RanksLostError(
                "a process that shared the clip is gone", code="ranks_lost", got=self._lost,
                expected=f"{self.parallel.ranks} processes", try_instead="see the log; one card makes the same clip",
            )  # fmt: skip

    def _lose(self, rank: int, why: str) -> None:
        with self._losing:
            if self._lost is None:
                self.lost_rank, self._lost = rank, f"rank {rank} {why}"
        for process in self._processes:
            process.kill()

    def _listen(self, index: int) -> None:
        stream = self._processes[index].stdout
        assert stream is not None
        with contextlib.suppress(ValueError, OSError):  # closed under us: the group has ended
            for line in stream:
                self._heard_s[index] = time.monotonic()
                word = json.loads(line)
                if "error" in word:
                    self._lose(index + 1, word["error"])
                elif word:
                    self._said[index].append(word)

    def _watch(self) -> None:
        """Lose the group where a follower has ended or is silent; where that does not wake the first rank, end it."""
        while not self._closing and self._lost is None:
            time.sleep(LOOK_S)
            for rank, (process, heard_s) in enumerate(zip(self._processes, self._heard_s, strict=True), 1):
                if process.poll() is not None:
                    self._lose(rank, f"ended with {process.returncode}")
                elif time.monotonic() - heard_s > SILENT_S:
                    self._lose(rank, f"said nothing for {SILENT_S:g} s")
        if self.device.is_cuda and not self._closing:
            time.sleep(GRACE_S)
            if not self._closing:
                os._exit(1)  # as an out-of-memory: the supervisor starts a worker anew and the job goes on


def join(device: Device, store: Path, rank: int, ranks: int) -> dist.ProcessGroup:
    """Make this process one of a group on this machine: sockets on the loopback interface, met through a file. Returns
    a second group of the same, so that weights do not wait for what attention exchanges, nor that for them."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    meeting = dist.FileStore(str(store), ranks)
    meeting.set_timeout(timedelta(seconds=JOIN_S))
    how = "nccl" if device.is_cuda else "gloo"
    dist.init_process_group(how, store=meeting, rank=rank, world_size=ranks, timeout=timedelta(seconds=JOIN_S))
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=WAIT_S))  # that of the exchanges has no public name
    return cast("dist.ProcessGroup", dist.new_group(timeout=timedelta(seconds=WAIT_S)))


def place(device: Device, rank: int, ranks: int) -> SequenceParallel:
    """A process' place among so many. On cards half of the heads attend while the others' come, and what the first half
    gives goes back while the second attends; a CPU has nothing to spare for that."""
    return SequenceParallel(rank, ranks, head_groups=2 if device.is_cuda else 1)


def made_of(device: Device) -> dict[str, str]:
    """What must be alike in processes that share a clip, or their numbers are not those of one."""
    return {name: installed(name) for name in ("torch", "turbodiff")} | {"arch": str(device.facts()["arch"])}
