"""Steps as one CUDA graph, on a CPU: a stub stands for CUDA's graphs (graph_stub.py)."""

import weakref
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.runtime.graph_stub import Capture, Cuda, Graph, Stream
from turbodiff.models.attention import AttentionPlan
from turbodiff.models.linear import int8_blocks
from turbodiff.models.wan_dit import WanConfig, WanDiT
from turbodiff.runtime import denoise, offload, preview, step_graph
from turbodiff.runtime.denoise import Network
from turbodiff.runtime.device import Device
from turbodiff.runtime.elastic import Elastic
from turbodiff.runtime.loras import LoraModel
from turbodiff.runtime.model_cache import PlacedDit
from turbodiff.runtime.pipeline import encode_text
from turbodiff.runtime.step_graph import GraphedSteps, Recording, StepGraphs, pays
from turbodiff.runtime.text import TextRows
from turbodiff.spec.plan import Levers

CPU, LEVERS = torch.device("cpu"), Levers()
CONFIG = WanConfig(dim=128, ffn_dim=256, num_heads=1, num_layers=2, text_dim=32, sla=True)


@pytest.fixture
def cuda(monkeypatch):
    """The stub in the place of the rest of CUDA."""
    cuda, driver = Cuda(), partial(monkeypatch.setattr, torch._C, raising=False)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: cuda.stream)
    monkeypatch.setattr(torch.cuda, "set_stream", partial(setattr, cuda, "stream"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    driver("_cuda_endAllocateToPool", cuda.end_pool)
    driver("_cuda_releasePool", cuda.release_pool)
    driver("_cuda_clearCublasWorkspaces", lambda: cuda.log.append("no workspaces"))
    return cuda


@pytest.fixture
def made(monkeypatch, cuda):
    """The stub in the place of torch's graphs; the list of those that were made. Each pays from the second step on."""
    Graph.made = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", partial(Capture, cuda))
    monkeypatch.setattr(offload, "free_cached", lambda *given, **how: None)  # it collects garbage, which takes long
    monkeypatch.setattr(step_graph, "pays", lambda seen, left, step_s, queued_s: left > 0)
    return Graph.made


class Worker:
    """Networks and graphs that outlive clips."""

    def __init__(self, config=CONFIG, int8=False):
        torch.manual_seed(0)
        self.graphs, self.notices = StepGraphs(Device.pick("cpu")), []
        self.dit = WanDiT(config).eval().requires_grad_(False)
        if int8:
            int8_blocks(self.dit)

    @torch.inference_mode()
    def clip(self, seed=1, steps=4, shape=(1, 16, 2, 4, 4), levers=LEVERS, room=True, given=(), bias=False, **how):
        """Velocities of a clip whose texts, and what is `given` by name and shape, follow the seed: with graphs,
        which must have the bits of those without."""
        random = torch.Generator().manual_seed(seed)
        randn = partial(torch.randn, generator=random)
        text = TextRows(randn(1, 8, 32), 8, randn(1, 1, 1, 8) if bias else None)
        how |= {name: randn(*size) for name, size in given}
        if how.get("guidance"):
            how["negative"] = TextRows(randn(1, 8, 32), 8)
        latents = [(randn(*shape), torch.full((1, 1), 900.0 - 100 * step)) for step in range(steps)]
        with offload.dit_on_device(self.dit, CPU, levers) as blocks:
            make = partial(Network, PlacedDit(self.dit, blocks, ()), CPU, text, levers=levers, **how)
            steps = GraphedSteps(self.graphs, make(), steps, lambda: room, self.notices.append)
            found, network = [steps(*at) for at in latents], make()
            assert all(map(torch.equal, found, [network(*at) for at in latents]))

    @property
    def told(self):
        return [notice.key for notice in self.notices]


def recording(pool_bytes=0):
    """One of three buffers of five bytes."""
    buffers = torch.zeros(3, 5, dtype=torch.uint8).clone().unbind()
    return Recording((), Graph(), buffers[0], buffers[1], (), buffers[2], (), pool_bytes)


@pytest.mark.parametrize("how", [
    {},
    {"attention": AttentionPlan("sagesla", 0.5), "bias": True},
    {"guidance": 3.0},
    {"levers": Levers(text_keys="recomputed", ffn_chunks=2)},
    {"given": (("condition", (1, 20, 2, 4, 4)),)},
    {"given": (("features", (1, 5, 16)),)},
    {"int8": True},
], ids=lambda how: " ".join(how) or "plain")  # fmt: skip
def test_clips_of_replays_have_the_bits_of_clips_without_and_one_graph_does_for_all_prompts(made, how):
    how = dict(how)
    condition, features = "condition" in str(how), "features" in str(how)
    config = {**vars(CONFIG), "in_dim": 36 if condition else 16, "image_dim": 16 if features else 0}
    worker = Worker(WanConfig(**config), how.pop("int8", False))
    for number, seed in enumerate((1, 2, 1), 1):
        worker.clip(seed, **how)
        assert [graph.replays for graph in made] == [3 * number]  # the first clip compares with one of them
    assert worker.told == [] and worker.graphs.bytes > 0


def test_clips_of_the_demo_are_the_same_with_graphs(made, attempt_of, models, monkeypatch):
    monkeypatch.setattr(preview, "show", lambda *given: None)
    monkeypatch.setattr(models, "graphs", StepGraphs(models.device))
    text, _ = encode_text(attempt_of())
    plain = denoise.denoise(attempt_of(steps=3), text, None)
    monkeypatch.setattr(denoise, "usable", lambda device: True)
    for number in (1, 2):
        attempt = attempt_of(steps=3)
        assert torch.equal(denoise.denoise(attempt, text, None), plain)
        assert [graph.replays for graph in made] == [2 * number] and attempt.send.of("notice") == []


def test_each_expert_has_a_graph_of_its_own(made):
    high, low = Worker(), Worker()
    low.graphs = high.graphs
    for number in (1, 2):
        high.clip(steps=3)
        low.clip(steps=4)
        assert [graph.replays for graph in made] == [2 * number, 3 * number]


def test_another_shape_is_another_graph_and_the_one_before_is_freed(made):
    worker = Worker()
    worker.clip()
    worker.clip(shape=(1, 16, 2, 4, 8))
    assert [graph.freed for graph in made] == [True, False]


def test_a_weighted_prompt_is_not_replayed_as_one_without(made):
    worker = Worker()
    worker.clip()
    worker.clip(bias=True)
    worker.clip(guidance=2.0)
    worker.clip(guidance=3.0)
    assert len(made) == 4


def test_weights_that_lie_elsewhere_are_another_graph(made):
    worker = Worker()
    worker.clip()
    weight = worker.dit.blocks[0].self_attn.q.weight
    weight.data = weight.data + 1
    worker.clip()
    assert [graph.replays for graph in made] == [3, 3] and made[0].freed


class Invalid(Capture):
    """One that CUDA refuses when it ends, as after any call that is not permitted in it: torch stays in it."""

    def __exit__(self, *error):
        TorchDispatchMode.__exit__(self, *error)
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


class Short(Capture):
    """One in which memory runs out; it ends as it should."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(("kind", "got", "log"), [
    (Invalid, "due to a previous error", ["released", "no workspaces"]),
    (Short, "out of memory", ["no workspaces"]),
])  # fmt: skip
def test_what_cannot_be_recorded_runs_as_it_would_and_is_told_once(made, cuda, monkeypatch, kind, got, log):
    """Else every later clip would run on the stream of a capture that nothing waits for."""
    monkeypatch.setattr(torch.cuda, "graph", partial(kind, cuda))
    worker = Worker()
    worker.clip()
    worker.clip()
    assert worker.told == ["graph_failed"] and got in worker.notices[0].numbers["got"] and len(made) == 1
    assert (cuda.stream, cuda.pool) == ("the usual stream", None)
    assert cuda.log == ["no workspaces", "capture", *log]


def test_a_capture_that_caught_nothing_is_found_out(made, cuda, monkeypatch):
    """Its replays would leave the velocity of the step that it was recorded from, for every step after that."""

    class Elsewhere(Capture):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(torch.cuda, "graph", partial(Elsewhere, cuda))
    worker = Worker()
    worker.clip()
    assert worker.told == ["graph_differs"] and made[0].freed


def test_a_step_is_captured_with_its_card_as_the_current_one_and_a_stream_of_it(made, cuda, monkeypatch):
    """`--device cuda:1` alone changes nothing of torch's: it would capture the first card, where nothing runs."""
    entered = []

    @contextmanager
    def enter(device):
        entered.append(device)
        cuda.log.append("its card")
        yield

    monkeypatch.setattr(torch.cuda, "device", enter)
    monkeypatch.setattr(Device, "reset_peak", lambda self: None)
    for figure in ("peak_bytes", "reserved_bytes", "held_bytes"):
        monkeypatch.setattr(Device, figure, lambda self: 0)
    second, streams = torch.device("cuda", 1), []
    monkeypatch.setattr(
        torch.cuda, "graph", lambda *given, **how: streams.append(given[2]) or Capture(cuda, *given, **how)
    )
    worker = Worker()
    worker.graphs = StepGraphs(Device(second, "a card", torch.bfloat16))
    worker.clip()
    assert entered == [second] and [stream.device for stream in streams] == [second] and worker.told == []
    assert cuda.log == ["no workspaces", "its card", "capture", "no workspaces"]


def test_a_graph_with_other_numbers_is_freed_and_never_recorded_again(made, monkeypatch):
    replay = Recording.replay
    monkeypatch.setattr(Recording, "replay", lambda self, *given: replay(self, *given) + 1e-6)
    worker = Worker()
    worker.clip()
    worker.clip()
    assert worker.told == ["graph_differs"] and [graph.freed for graph in made] == [True]


def test_a_replay_that_fails_later_ends_in_the_same_clip(made, monkeypatch):
    def failing(self):
        if self.replays:
            raise RuntimeError("CUDA error: unknown error")
        original(self)

    original = Graph.replay
    monkeypatch.setattr(Graph, "replay", failing)
    worker = Worker()
    worker.clip()
    assert worker.told == ["graph_failed"] and [graph.freed for graph in made] == [True]


def test_blocks_that_are_streamed_are_never_recorded(made):
    worker = Worker()
    worker.clip(levers=Levers(experts="streamed", blocks_resident=1))
    assert made == [] and worker.told == []


def test_a_plan_without_room_for_a_second_step_has_no_graph_and_says_so_once(made):
    worker = Worker()
    worker.clip(room=False)
    worker.clip(room=False)
    assert made == [] and worker.told == ["graph_no_room"]


@pytest.mark.parametrize("end", ["another model", "another LoRA", "off the device", "less room", "the same model"])
def test_no_graph_outlives_its_network_or_its_room(made, attempt_of, models, monkeypatch, end):
    monkeypatch.setattr(models, "graphs", StepGraphs(models.device))
    plan, network = attempt_of().plan, models.get_or_load("dit")
    if end == "another LoRA":
        network = offload.share_parameters(network)
        models._kept["the same with a LoRA on"] = LoraModel(network, ())
    models.graphs.recordings[id(network)] = recording(pool_bytes=1000)
    weights_bytes = sum(phase.weights_bytes for phase in plan.phases)
    work_bytes = max(phase.peak_bytes - phase.weights_bytes for phase in plan.phases)
    if end == "another model":
        attempt_of(model="demo-i2v", image="none.png")
    elif end in ("the same model", "another LoRA"):
        attempt_of(steps=4)
    elif end == "off the device":
        models.leave_device()
    else:
        models.make_room(plan, weights_bytes + work_bytes + 1015)
        assert not made[0].freed and models.has_room(plan) and not models.has_room(plan, 1)
        models.make_room(plan, weights_bytes + work_bytes + 1014)
        models.make_room(plan)
    assert made[0].freed == (end != "the same model")


def test_memory_that_runs_out_is_the_networks_to_handle(made, monkeypatch):
    """It leaves the device to others and repeats the step, whose graph is gone by then."""
    worker, full = Worker(), [torch.OutOfMemoryError("CUDA out of memory")]

    def run(self, work):
        try:
            return work()
        except torch.OutOfMemoryError:
            velocity = weakref.ref(next(iter(worker.graphs.recordings.values())).velocity)
        assert worker.graphs.drop_all_but() > 0 and velocity() is None, "what is left of it holds memory of its pool"
        return work()

    def replay(self, *given):
        if made[0].replays == 2 and full:
            raise full.pop()
        return original(self, *given)

    original = Recording.replay
    monkeypatch.setattr(Network, "run", run)
    monkeypatch.setattr(Recording, "replay", replay)
    worker.clip(steps=5)
    assert worker.told == [] and made[0].freed and full == []


def test_where_memory_runs_out_a_graph_goes_before_any_block(made, attempt_of, models, monkeypatch):
    monkeypatch.setattr(models, "graphs", StepGraphs(models.device))
    full, dit = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB")], models.get_or_load("dit")
    attempt = attempt_of()
    models.graphs.recordings[id(dit)] = recording(pool_bytes=1000)
    blocks = offload.BlockStream(dit.blocks, CPU, len(dit.blocks))

    def work():
        if full:
            raise full.pop()
        return "done"

    with blocks:
        assert Elastic(attempt, "denoise", PlacedDit(dit, blocks, ())).run(work) == "done"
        assert made[0].freed and blocks.resident == len(blocks)
    (notice,) = attempt.send.of("notice")
    assert (notice.key, notice.numbers["bytes"]) == ("block_repeated", 1015)


class HostReads(TorchDispatchMode):
    """Counts what waits for a GPU: a number of a tensor, or a shape that depends on its numbers."""

    WAITING = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique", "_unique2")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.names += [name] if name in self.WAITING else []
        return func(*args, **(kwargs or {}))


def test_a_step_waits_for_the_device_once_to_see_that_its_latents_are_numbers(attempt_of, monkeypatch):
    """And what it sends there goes by way of page-locked memory, for which nothing waits."""
    monkeypatch.setattr(preview, "show", lambda *given: None)
    copied: list[torch.Size] = []
    monkeypatch.setattr(offload, "sent", lambda tensor, device: tensor)
    monkeypatch.setattr(offload, "to_device", lambda tensor, device: copied.append(tensor.shape) or tensor)
    attempt = attempt_of(steps=2, attention="sagesla")
    reads = HostReads()
    text, _ = encode_text(attempt)
    with reads:
        denoise.denoise(attempt, text, None)
    assert len(reads.names) == 2, reads.names
    assert copied == [text.rows.shape]  # once a clip, before the first step


def test_a_phase_peaks_as_planned_whatever_graphs_hold(made, monkeypatch):
    """Else measured runs would teach the plan that a step needs twice as much."""
    held = {"peak": 100, "reserved": 140}
    monkeypatch.setattr(Device, "peak_bytes", lambda self: held["peak"])
    monkeypatch.setattr(Device, "reserved_bytes", lambda self: held["reserved"])
    monkeypatch.setattr(Device, "reset_peak", lambda self: held.update(peak=40, reserved=70))
    graphs = StepGraphs(Device.pick("cpu"))
    graphs._note_peaks()
    graphs.recordings[1] = recording(50)
    graphs.device.reset_peak()
    assert graphs.peaks_beside() == (100, 140)
    held.update(peak=130, reserved=230)
    assert graphs.peaks_beside() == (115, 165)
    graphs.drop_all_but()
    assert graphs.peaks_beside() == (115, 165) and graphs.bytes == 0
    graphs.reset_peak()
    assert graphs.peaks_beside() == (40, 70)


@pytest.mark.parametrize(("seen", "left", "step_s", "queued_s", "recorded"), [
    (0, 49, 0.2, 0.05, False),  # nothing is known of its time
    (1, 200, 0.2, 0.05, False),  # in one step kernels may have been compiled, which a capture does not permit
    (2, 47, 0.2, 0.05, False),  # fifty steps of a large clip do not earn a recording,
    (50, 47, 0.2, 0.05, True),  # a second such clip says that there will be more of them
    (50, 0, 0.2, 0.05, False),  # none is left in this clip
    (60, 3, 0.2, 0.05, True),  # sixteen clips of four steps
    (2, 1, 0.03, 0.029, False),
    (2, 2, 0.03, 0.029, True),  # a small clip waits for Python: it pays at once
])  # fmt: skip
def test_a_graph_is_recorded_once_steps_would_have_earned_it(seen, left, step_s, queued_s, recorded):
    assert pays(seen, left, step_s, queued_s) is recorded


@pytest.mark.parametrize("word", ["off", "OFF"])
def test_only_a_gpu_records_and_a_person_may_forbid_it(monkeypatch, word):
    monkeypatch.delenv(step_graph.VARIABLE, raising=False)
    gpu = Device(torch.device("cuda", 0), "a card", torch.bfloat16)
    assert step_graph.usable(gpu) and not step_graph.usable(Device.pick("cpu"))
    monkeypatch.setenv(step_graph.VARIABLE, word)
    assert not step_graph.usable(gpu)
