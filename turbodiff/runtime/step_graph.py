"""A step of the denoiser as one CUDA graph, where nothing moves between two steps: one launch instead of 700 to 2,200.

A graph reads and writes the addresses that it was recorded with. So it runs only while every weight lies where it lay,
latents and timestep are copied into buffers of its own, and so is what a later clip's texts and picture became. The
first step of a clip never is a graph: it makes those. The memory of a step stays the graph's, beside that of all else,
so nothing is recorded unless the plan has room for it twice; whoever needs the room drops it (runtime/model_cache.py).

A first replay must give the bits of the step that it was recorded from, in a buffer that held none of them. Whatever
fails, steps run one launch after the other, as they would without.
"""

import os
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from turbodiff_kernels.backend import current

from turbodiff.runtime import offload
from turbodiff.runtime.device import Device
from turbodiff.spec.events import Notice

if TYPE_CHECKING:
    from turbodiff.runtime.denoise import Network

VARIABLE = "TURBODIFF_CUDA_GRAPH"  # "off": no step becomes a graph
WARM_STEPS = 2  # that ran before: kernels are compiled, and a step's time is known
GAP_SHARE = 0.02  # of a step in which the GPU waits between launches: estimated, see docs of the kernels
HOST_BOUND, HOST_SHARE = 0.9, 0.5  # where queueing takes that share of a step the GPU waits for Python: for so much

Kind = tuple[object, ...]


def pays(seen: int, left: int, step_s: float, queued_s: float) -> bool:
    """Whether to record the next step, of a kind that ran `seen` times in this worker; `left` more follow in the clip.

    A recording costs the time to queue a step, and one step to compare with. It saves the gaps between launches. Of
    what may follow in other clips nothing is known: it is taken to be as many steps as there were. That never costs
    more than twice what the best choice would have, as with skis that are bought once their rent has cost as much.

    Args:
        step_s, queued_s: the quickest step so far, and how long Python took to queue it.
    """
    waits_for_host = queued_s >= HOST_BOUND * step_s
    saved_s = step_s * (HOST_SHARE if waits_for_host else GAP_SHARE)
    return seen >= WARM_STEPS and left > 0 and (seen + left) * saved_s >= step_s + queued_s


def usable(device: Device) -> bool:
    """Whether steps may become graphs here: on a GPU, whose networks all can, unless a person said "off"."""
    return device.torch_device.type == "cuda" and os.environ.get(VARIABLE, "auto").lower() != "off"


def captured(work: Callable[[], Tensor], device: torch.device) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of what `work` launches, none of which runs yet, and the tensor that each of its replays fills.

    A capture takes place on the current device, whichever that of the tensors is. After one that fails torch goes on
    with the capture's stream, and its allocator takes the capture to last for ever (torch.cuda.graph,
    CUDAGraph::capture_end): both are put right here.

    Raises:
        Exception: of torch, whatever could not be recorded.
    """
    with current(device):
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()  # type: ignore[no-untyped-call]
        stream, before = torch.cuda.Stream(device), torch.cuda.current_stream(device)  # type: ignore[no-untyped-call]
        try:
            # other threads of a worker ask the allocator for its figures meanwhile: the calls of this one alone count
            with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
                return graph, work()
        except BaseException:
            torch.cuda.set_stream(before)
            with suppress(RuntimeError):  # it had ended: the graph itself gives the pool back
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
                torch._C._cuda_releasePool(torch.cuda.current_device(), pool)
            raise


@contextmanager
def workspaces_of_its_own() -> Iterator[None]:
    """Inside the block cuBLAS makes its workspaces anew: it keeps one for each stream for good, and one that was made
    in a capture would hold the graph's memory when the graph is gone."""
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


class Recording(NamedTuple):
    """A graph with its buffers: what it is given, what of the clip it reads, its result; and where the weights lay."""

    kind: Kind
    graph: torch.cuda.CUDAGraph
    latents: Tensor
    timesteps: Tensor
    of_clip: tuple[Tensor, ...]
    velocity: Tensor
    weights_at: tuple[int, ...]
    pool_bytes: int  # that the allocator took for it

    @property
    def tensor_bytes(self) -> int:
        """Bytes of its buffers."""
        return sum(t.nbytes for t in (self.latents, self.timesteps, self.velocity, *self.of_clip))

    def replay(self, latents: Tensor, timesteps: Tensor) -> Tensor:
        """The velocity of these latents, in memory that is not the graph's."""
        self.latents.copy_(latents)
        self.timesteps.copy_(timesteps)
        self.graph.replay()
        return self.velocity.clone()


@dataclass
class Timing:
    """Steps of a kind in this worker that were no replays: how many, and the quickest."""

    seen: int = 0
    step_s: float = float("inf")
    queued_s: float = float("inf")


class StepGraphs:
    """The graphs of a worker, one a network at most, and what they take of its device."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.recordings: dict[int, Recording] = {}  # by the id of the network
        self.timings: dict[Kind, Timing] = {}
        self.refused: set[Kind] = set()  # for good: it failed, or its numbers differed
        self.told: set[tuple[str, Kind]] = set()
        self._peak_bytes = self._reserved_bytes = 0  # of this phase, without graphs, up to the last change of them

    @property
    def bytes(self) -> int:
        """Bytes of the device that would be free without them."""
        return sum(one.pool_bytes + one.tensor_bytes for one in self.recordings.values())

    def reset_peak(self) -> None:
        """Start measuring a new phase."""
        self._peak_bytes = self._reserved_bytes = 0
        self.device.reset_peak()

    def peaks_beside(self) -> tuple[int, int | None]:
        """Peak bytes of tensors and of the allocator since `reset_peak` less the graphs': what a plan speaks of."""
        tensors_bytes = sum(one.tensor_bytes for one in self.recordings.values())
        reserved_bytes = self.device.reserved_bytes()
        if reserved_bytes is not None:
            reserved_bytes = max(self._reserved_bytes, reserved_bytes - self.bytes)
        return max(self._peak_bytes, self.device.peak_bytes() - tensors_bytes), reserved_bytes

    def record(self, network: "Network", kind: Kind, latents: Tensor, timesteps: Tensor) -> Recording:
        """Record a step of a network that has run, in the place of another graph of it.

        Raises:
            Exception: of torch, whatever could not be recorded.
        """
        device, weights_at = self.device.torch_device, network.weights_at()
        assert weights_at is not None
        self.drop(id(network.dit))
        self._note_peaks()
        given, at = latents.clone(), timesteps.clone()
        with workspaces_of_its_own():
            offload.free_cached(device)
            before_bytes = self.device.held_bytes()
            graph, velocity = captured(partial(network.alone(), given, at), device)
        of_clip, pool_bytes = tuple(network.clip_tensors()), self.device.held_bytes() - before_bytes
        recording = Recording(kind, graph, given, at, of_clip, velocity, weights_at, max(0, pool_bytes))
        self.recordings[id(network.dit)] = recording
        self.device.reset_peak()
        return recording

    def drop(self, *networks: int) -> int:
        """Free the graphs of some networks, by their ids; returns the bytes of the device that are free now."""
        gone, before_bytes = [id_ for id_ in networks if id_ in self.recordings], self.bytes
        if gone:
            self._note_peaks()
        for id_ in gone:
            self.recordings.pop(id_).graph.reset()
        if gone:
            offload.free_cached(self.device.torch_device)
            self.device.reset_peak()
        return before_bytes - self.bytes

    def drop_all_but(self, networks: Collection[nn.Module] = ()) -> int:
        """Free the graphs of all networks but these; returns the bytes of the device that are free now."""
        return self.drop(*(set(self.recordings) - {id(network) for network in networks}))

    def _note_peaks(self) -> None:
        self._peak_bytes, reserved_bytes = self.peaks_beside()
        self._reserved_bytes = reserved_bytes or 0


class GraphedSteps:
    """The steps of a network in one clip, called as the network is: each a replay where that pays, else the network's.

    Args:
        steps: how many come.
        has_room: whether the plan leaves a graph the room it takes.
        tell: takes a notice of why there is none where one would pay.
    """

    def __init__(
        self, graphs: StepGraphs, network: "Network", steps: int, has_room: Callable[[], bool],
        tell: Callable[[Notice], None],
    ) -> None:  # fmt: skip
        self._graphs, self._network, self._left, self._has_room, self._tell = graphs, network, steps, has_room, tell
        self._kind: Kind | None = None  # None: no step has run
        self._filled: torch.cuda.CUDAGraph | None = None  # whose buffers hold what is this clip's; not those themselves
        self._start_s = self._queued_s = 0.0  # of the last step that was no replay; 0: there is none to time

    def __call__(self, latents: Tensor, timesteps: Tensor) -> Tensor:
        """Velocity float32 of latents [1, 16, T, H, W] at timesteps [1, 1] (x1000)."""
        start_s = time.monotonic()
        self._left -= 1
        if self._kind is not None:
            self._time(start_s)
            velocity = self._network.run(lambda: self._replayed(latents, timesteps))
            if velocity is None and self._should_record():
                return self._recorded(latents, timesteps)
            if velocity is not None:
                return velocity
        velocity = self._network(latents, timesteps)
        self._start_s, self._queued_s = start_s, time.monotonic() - start_s
        if self._kind is None:
            shapes = tuple((t.shape, t.dtype) for t in (latents, timesteps, *self._network.clip_tensors()))
            self._kind = (id(self._network.dit), self._network.settings, shapes)
        return velocity

    def _time(self, now_s: float) -> None:
        """Note the time of the step before this one: whoever checked its latents has waited for it."""
        if self._start_s and self._kind is not None:
            timing = self._graphs.timings.setdefault(self._kind, Timing())
            step_s, timing.seen = now_s - self._start_s, timing.seen + 1
            if step_s < timing.step_s:
                timing.step_s, timing.queued_s = step_s, self._queued_s
        self._start_s = 0.0

    def _replayed(self, latents: Tensor, timesteps: Tensor) -> Tensor | None:
        """The velocity by the graph that there is; None where there is none for such a step, or it fails."""
        recording = self._graphs.recordings.get(id(self._network.dit))
        if recording is None or recording.kind != self._kind or self._network.weights_at() != recording.weights_at:
            return None
        try:
            if self._filled is not recording.graph:
                for buffer, mine in zip(recording.of_clip, self._network.clip_tensors(), strict=True):
                    buffer.copy_(mine)
                self._filled = recording.graph
            return recording.replay(latents, timesteps)
        except torch.OutOfMemoryError:  # the network knows what to do
            raise
        except Exception as error:  # noqa: BLE001 - a driver may refuse in any way; the step runs without
            failed = in_words(error)
        self._give_up("graph_failed", failed)
        return None

    def _should_record(self) -> bool:
        """Whether a graph pays, may be made and has room."""
        graphs, kind = self._graphs, self._kind
        assert kind is not None
        timing = graphs.timings.get(kind, Timing())
        if kind in graphs.refused or not pays(timing.seen, self._left, timing.step_s, timing.queued_s):
            return False
        if self._network.weights_at() is None:  # blocks left for a neighbour, or never were there
            return False
        if not self._has_room():
            self._say("graph_no_room")
            return False
        return True

    def _recorded(self, latents: Tensor, timesteps: Tensor) -> Tensor:
        """The velocity by the network; from now on steps are replays if the graph gives the same."""
        replayed, failed = None, ""
        try:
            replayed = self._first_replay(latents, timesteps)
        except Exception as error:  # noqa: BLE001 - whatever could not be recorded runs one launch after the other
            failed = in_words(error)
        if failed:
            self._give_up("graph_failed", failed)
        velocity = self._network(latents, timesteps)
        if replayed is not None and not torch.equal(replayed, velocity):
            self._give_up("graph_differs")
        return velocity

    def _first_replay(self, latents: Tensor, timesteps: Tensor) -> Tensor:
        """The velocity by a graph that is recorded now."""
        assert self._kind is not None
        recording = self._graphs.record(self._network, self._kind, latents, timesteps)
        recording.velocity.fill_(float("nan"))  # a graph of nothing leaves it as it is
        self._filled = recording.graph
        return recording.replay(latents, timesteps)

    def _give_up(self, key: str, got: str = "") -> None:
        """Record no such step again, free what it took, and say so. Not while an error is handled, whose traceback
        holds the tensors of the step."""
        assert self._kind is not None
        self._filled = None
        if not self._graphs.drop(id(self._network.dit)):
            offload.free_cached(self._graphs.device.torch_device)
        self._graphs.refused.add(self._kind)
        self._say(key, got)

    def _say(self, key: str, got: str = "") -> None:
        """Tell once in this worker why a kind of step is no graph."""
        assert self._kind is not None
        if (key, self._kind) in self._graphs.told:
            return
        self._graphs.told.add((key, self._kind))
        happened = {
            "graph_failed": f"the steps could not be recorded as one CUDA graph: {got}",
            "graph_differs": "the steps recorded as one CUDA graph gave other numbers",
            "graph_no_room": "the steps as one CUDA graph would need more memory than is planned",
        }
        text = f"{happened[key]}; they run one launch after the other, the clip is the same"
        self._tell(Notice(key=key, text=text, numbers={"got": got} if got else {}))


def in_words(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
