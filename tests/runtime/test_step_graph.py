"""Steps as one CUDA graph, on a CPU: a stub of torch's graph writes down every operation of a capture and its tensors.

Its replay runs those again, on the very tensors and into their memory, as a GPU does: what a graph would read stale is
read stale here.
"""

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from turbodiff.models.attention import AttentionPlan
from turbodiff.models.linear import int8_blocks
from turbodiff.models.wan_dit import WanConfig, WanDiT
from turbodiff.runtime import denoise, offload, preview, step_graph
from turbodiff.runtime.denoise import Network
from turbodiff.runtime.device import Device
from turbodiff.runtime.model_cache import PlacedDit
from turbodiff.runtime.pipeline import encode_text
from turbodiff.runtime.step_graph import GraphedSteps, Recording, StepGraphs, pays
from turbodiff.runtime.text import TextRows
from turbodiff.spec.plan import Levers

CPU, LEVERS = torch.device("cpu"), Levers()
CONFIG = WanConfig(dim=128, ffn_dim=256, num_heads=1, num_layers=2, text_dim=32, sla=True)


class Graph:
    """In the place of torch.cuda.CUDAGraph."""

    made: list["Graph"]

    def __init__(self):
        self.calls, self.replays, self.freed = [], 0, False
        self.made.append(self)

    def replay(self):
        assert not self.freed
        self.replays += 1
        for func, args, kwargs, out in self.calls:
            given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)}
            for before, now in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if torch.is_tensor(now) and now.untyped_storage()._cdata not in given:
                    before.copy_(now)

    def reset(self):
        self.freed, self.calls = True, []


class Capture(TorchDispatchMode):
    """In the place of torch.cuda.graph."""

    def __init__(self, graph, capture_error_mode):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.graph.calls.append((func, args, kwargs or {}, out))
        return out


@pytest.fixture
def made(monkeypatch):
    """The stub in the place of torch's graphs; the list of those that were made. Each pays from the second step on."""
    Graph.made = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
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


def test_what_cannot_be_recorded_runs_as_it_would_and_is_told_once(made, monkeypatch):
    class Refusing(Capture):
        def __exit__(self, *error):
            super().__exit__(*error)
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", Refusing)
    worker = Worker()
    worker.clip()
    worker.clip()
    assert worker.told == ["graph_failed"] and "not permitted" in worker.notices[0].numbers["got"] and len(made) == 1


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


@pytest.mark.parametrize("end", ["another model", "off the device", "less room", "the same model"])
def test_no_graph_outlives_its_network_or_its_room(made, attempt_of, models, monkeypatch, end):
    monkeypatch.setattr(models, "graphs", StepGraphs(models.device))
    plan = attempt_of().plan
    models.graphs.recordings[id(models.get_or_load("dit"))] = recording(pool_bytes=1000)
    weights_bytes = sum(phase.weights_bytes for phase in plan.phases)
    work_bytes = max(phase.peak_bytes - phase.weights_bytes for phase in plan.phases)
    if end == "another model":
        attempt_of(model="demo-i2v", image="none.png")
    elif end == "the same model":
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
            worker.graphs.drop_all_but()
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
