"""Several cards: which of them a person lets take jobs, what their jobs share, and that a promise is kept."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from supervisor.bench import Bench, scripted
from supervisor.test_cards import SLOW, Driver, no_selected_cards  # noqa: F401  its cards
from tests.plan.machines import disk, gpu
from tests.plan.machines import machine as machine_of
from turbodiff import studio
from turbodiff.gpu import probe
from turbodiff.gpu.host_memory import HostMemory, private_bytes
from turbodiff.gpu.probe import CardSample, Sample
from turbodiff.jobs import cards
from turbodiff.jobs.dispatch import Card
from turbodiff.jobs.measurements import usual_seconds
from turbodiff.jobs.nodes import CLUSTER, ClusterFacts, NodeFacts
from turbodiff.plan.context import plan_context
from turbodiff.plan.hardware import Machine, only
from turbodiff.plan.planner import plan_request, seconds_on
from turbodiff.runtime import replan
from turbodiff.spec.errors import FileError, RequestError
from turbodiff.spec.events import RunCommand
from turbodiff.spec.models import Inventory
from turbodiff.studio.cards import Cards
from turbodiff.supervisor import context, placement
from turbodiff.supervisor.context import machine_of as machine_seen
from turbodiff.supervisor.slots import RECYCLE_JOBS
from turbodiff.weights.locate import resolve_files

Make = Callable[..., Bench]
GIB = 1 << 30


@pytest.fixture
def make(make_bench: Make, monkeypatch: pytest.MonkeyPatch) -> Make:
    """A supervisor on two cards whose weights are all here; 64 GiB of RAM unless told otherwise."""

    def made(*ids: str, ram_gib: int = 64) -> Bench:
        monkeypatch.setattr(probe, "host_memory", lambda pids=(): HostMemory(ram_gib * GIB, (ram_gib - 2) * GIB, 0))
        monkeypatch.setattr(probe, "_version", lambda name: "2.11.0+cu130" if name == "torch" else "")
        monkeypatch.setattr(context, "inventory", disk)
        return make_bench(sample=Driver(*(ids or ("GPU-a", "GPU-b"))))

    return made


def machine_here(bench: Bench) -> Machine:
    found = bench.supervisor.context.memory.machine()
    assert found is not None
    return found


def turn(bench: Bench, looks: int = 2) -> None:
    """Until the supervisor has looked at queue and switches so many times more."""
    end_s = time.monotonic() + looks * placement.EVERY_S + 0.1
    bench.turn_until(lambda: time.monotonic() > end_s)


def states(bench: Bench, *jobs: int) -> list[str]:
    return [bench.store.job(job).state for job in jobs]


def free(bench: Bench) -> bool:
    return all(slot.free for slot in bench.supervisor.slots)


def test_a_paused_card_ends_its_job_and_takes_no_more_also_after_a_restart(make: Make) -> None:
    bench = make()
    first, second = (bench.store.submit(scripted({"steps": 8, "dt_s": 0.2})) for _ in range(2))
    bench.turn_until(lambda: states(bench, first, second) == ["running"] * 2)
    held = next(slot.device for slot in bench.supervisor.slots if slot.job and slot.job.id == first)
    bench.store.put(cards.SWITCH + held, "paused")
    bench.turn_until(lambda: states(bench, first, second) == ["done"] * 2)
    later = [bench.store.submit(scripted({"steps": 1})) for _ in range(3)]
    bench.turn_until(lambda: states(bench, *later) == ["done"] * 3)
    paused = next(slot for slot in bench.supervisor.slots if slot.device == held)
    assert paused.index not in {bench.store.job(job).slot for job in later} and paused.worker is not None
    bench.supervisor.close()
    again = make()
    again.turn_until(lambda: free(again))
    later = [again.store.submit(scripted({"steps": 1})) for _ in range(3)]
    again.turn_until(lambda: states(again, *later) == ["done"] * 3)
    paused = next(slot for slot in again.supervisor.slots if slot.device == held)
    assert paused.index not in {again.store.job(job).slot for job in later}
    again.store.put(cards.SWITCH + held, "on")
    both = [again.store.submit(scripted({"steps": 20, "dt_s": 0.1})) for _ in range(2)]
    again.turn_until(lambda: states(again, *both) == ["running"] * 2)


def test_jobs_of_a_user_start_in_their_order_where_a_worker_makes_room_for_a_fresh_one(make: Make) -> None:
    bench = make()
    bench.turn_until(lambda: free(bench))
    bench.store.put("paused", True)
    jobs = [bench.store.submit(scripted({"steps": 4, "dt_s": 0.05}), user="ann") for _ in range(2)]
    old = bench.supervisor.slots[0]
    assert old.worker is not None
    pid, old.jobs_run = old.worker.pid, RECYCLE_JOBS
    bench.store.put("paused", False)
    bench.supervisor._placement._chosen_s = -placement.EVERY_S  # it looks in the turn in which the worker is due
    bench.turn_until(lambda: states(bench, *jobs) == ["done"] * 2 and free(bench))
    first, second = (bench.store.job(job).started_s for job in jobs)
    assert first is not None and second is not None and first < second
    assert old.worker.pid != pid


def test_an_excluded_card_holds_no_worker_once_its_job_is_done(make: Make) -> None:
    bench = make()
    jobs = [bench.store.submit(scripted({"steps": 8, "dt_s": 0.2})) for _ in range(2)]
    bench.turn_until(lambda: states(bench, *jobs) == ["running"] * 2)
    bench.store.put(cards.SWITCH + "GPU-b", "excluded")
    slot = bench.supervisor.slots[1]
    bench.turn_until(lambda: states(bench, *jobs) == ["done"] * 2 and slot.worker is None)
    turn(bench)
    assert slot.worker is None and bench.store.job(jobs[0]).attempt == bench.store.job(jobs[1]).attempt == 1
    bench.store.put(cards.SWITCH + "GPU-b", "on")
    bench.turn_until(lambda: free(bench))


def test_the_only_card_can_be_paused(make: Make) -> None:
    bench = make("GPU-a")
    bench.turn_until(lambda: free(bench))
    bench.store.put(cards.SWITCH + "GPU-a", "paused")
    turn(bench)
    job = bench.store.submit(scripted({"steps": 1}))
    turn(bench)
    assert states(bench, job) == ["queued"]
    bench.store.put(cards.SWITCH + "GPU-a", "on")
    bench.turn_until(lambda: states(bench, job) == ["done"])


def test_a_job_for_one_card_waits_for_it_holds_up_nobody_and_can_be_let_go(make: Make) -> None:
    bench = make()
    bench.turn_until(lambda: free(bench))
    bench.store.put(cards.SWITCH + "GPU-b", "paused")
    turn(bench)
    mine = bench.store.submit(scripted({"steps": 1}, gpu="GPU-b"))
    gone = bench.store.submit(scripted({"steps": 1}, gpu="GPU-gone"))
    others = [bench.store.submit(scripted({"steps": 1})) for _ in range(4)]
    bench.turn_until(lambda: states(bench, *others) == ["done"] * 4)
    assert states(bench, mine, gone) == ["queued"] * 2
    fleet = cards.fleet(bench.store)
    assert fleet is not None
    assert [fleet.blocked(uuid) for uuid in ("GPU-b", "GPU-gone", "GPU-a", "")] == ["paused", "gone", "", ""]
    assert {mine, gone}.isdisjoint(fleet.starts())
    bench.store.put(cards.SWITCH + "GPU-b", "on")
    Cards(lambda: bench.store).release(gone)
    bench.turn_until(lambda: states(bench, mine, gone) == ["done"] * 2)
    assert bench.supervisor.slots[bench.store.job(mine).slot].device == "GPU-b"
    clip = bench.store.job(mine).result
    assert clip is not None and "GPU-b" not in Path(clip.sidecar).read_text()  # it tells nobody which card made it


def test_a_card_is_named_by_number_name_or_uuid_and_two_of_a_kind_are_told_apart() -> None:
    third = gpu(12, uuid="GPU-c", index=2, name="NVIDIA GeForce RTX 3060")
    here = machine_of(gpu(24, uuid="GPU-aaaa1111"), gpu(24, uuid="GPU-bbbb2222", index=1), third)
    assert cards.labels(here.gpus) == ["RTX 4090 #1", "RTX 4090 #2", "RTX 3060"]
    named = Cards(lambda: None)
    found = [named.uuid_of(card, here) for card in ("rtx 3060", "1", "GPU-aaaa1", "RTX 4090 #2", "")]
    assert found == ["GPU-c", "GPU-bbbb2222", "GPU-aaaa1111", "GPU-bbbb2222", ""]
    for wrong in ("NVIDIA GeForce RTX 4090", "RTX 5090", "GPU-", "7"):
        with pytest.raises(RequestError, match="RTX 4090 #2"):
            named.uuid_of(wrong, here)


def test_two_workers_do_not_count_the_same_free_ram(make: Make) -> None:
    """A14B keeps one expert's weights in RAM: on a PC of 40 GiB beside a second one of its kind that is too much."""
    bench = make(ram_gib=40)
    machine = machine_here(bench)
    asked = scripted(SLOW, model="Wan2.2-T2V-A14B", num_frames=81)
    plan = plan_request(asked, only(machine, "cuda:0"), disk())
    most_bytes = max(phase.host_ram_bytes for phase in plan.phases)
    assert most_bytes < 38 * GIB < 2 * most_bytes, most_bytes / GIB
    first, second = (bench.store.submit(asked, plan) for _ in range(2))
    bench.turn_until(lambda: states(bench, first) == ["running"] and free_slots(bench) == 1)
    turn(bench)
    assert states(bench, second) == ["queued"]
    (runs,) = [slot for slot in bench.supervisor.slots if slot.job]
    promised = bench.supervisor.context.promised_bytes
    assert promised(runs.index) == 0 and most_bytes - GIB < promised(1 - runs.index) <= most_bytes
    small = bench.store.submit(scripted({"steps": 1}))
    bench.turn_until(lambda: states(bench, small) == ["done"])  # beside it there is room for a small one
    bench.store.cancel(first)
    bench.turn_until(lambda: states(bench, second) == ["running"])


def free_slots(bench: Bench) -> int:
    return sum(slot.free for slot in bench.supervisor.slots)


def test_a_worker_leaves_alone_what_jobs_of_others_will_still_take(monkeypatch: pytest.MonkeyPatch) -> None:
    here = machine_of(gpu(24), ram_gib=30, ram_reclaimable_bytes=4 * GIB)
    monkeypatch.setattr(replan, "machine_now", lambda own_pids: here)
    device: Any = SimpleNamespace(is_cuda=True, torch_device=SimpleNamespace(index=0), held_bytes=lambda: 0)
    for promised_gib, left_gib in ((0, 33), (20, 13), (50, 3)):  # its own warm memory and 1 GiB for others beside it
        command = RunCommand(request=scripted(), outputs=Path(), state=Path(), promised_ram_bytes=promised_gib * GIB)
        seen = replan.machine_for(command, device)
        assert seen is not None and seen.host_budget_bytes == left_gib * GIB


def test_what_is_promised_is_what_the_run_takes_on_unlike_cards(make: Make) -> None:
    """16 and 24 GB: 90 s were promised and 390 s ran, for the plan was the large card's and any free card took it."""
    bench = make("GPU-16", "GPU-24")
    bench.turn_until(lambda: free(bench))
    machine = machine_here(bench)
    asked = scripted(model="Wan2.1-14B", num_frames=81)
    plan = plan_request(asked, machine, disk())
    on = {card.uuid: seconds_on(plan, card, machine, disk()) for card in machine.gpus}
    seconds = {uuid: price[0] for uuid, price in on.items() if price}
    assert seconds["GPU-16"] > 2 * seconds["GPU-24"]
    promises, jobs = [], []
    for _ in range(3):
        bench.store.put("paused", True)  # or what was asked before would start while the supervisor looks
        turn(bench)
        bench.store.put("paused", False)  # in a paused queue no start is told
        begin = Cards(lambda: bench.store).begin(plan, machine, disk())
        assert begin is not None
        promises.append(begin)
        asked = scripted({"seconds_on": seconds}, model="Wan2.1-14B", num_frames=81)
        jobs.append(bench.store.submit(asked, plan))
    assert [begin.card for begin in promises] == ["RTX 4090"] * 3
    assert promises[0].start_s == 0 and promises[0].seconds == pytest.approx(plan.seconds)
    assert promises[1].start_s == pytest.approx(plan.seconds) and promises[2].start_s > 1.5 * plan.seconds
    bench.turn_until(lambda: states(bench, *jobs) == ["done"] * 3)
    for job in map(bench.store.job, jobs):
        took = usual_seconds(bench.store, job, machine, bench.supervisor.slots[job.slot].card)
        assert took["denoise"] == pytest.approx(promises[0].seconds)


def test_what_the_worker_of_another_card_holds_is_not_free_for_a_plan() -> None:
    cards = gpu(24, uuid="GPU-a", worker_ram_bytes=20 * GIB), gpu(16, uuid="GPU-b", index=1, worker_ram_bytes=1 * GIB)
    here = machine_of(*cards, ram_available_bytes=9 * GIB, ram_reclaimable_bytes=21 * GIB)
    assert [here.host_budget_with(card) for card in here.gpus] == [28 * GIB, 9 * GIB]
    limits = [plan_context(only(here, f"cuda:{card.index}"), Inventory(files=())).limits for card in here.gpus]
    assert [one.host for one in limits] == [28 * GIB, 9 * GIB]


def test_the_page_counts_the_ram_of_each_worker_for_its_own_card_alone(bench: Bench) -> None:
    listed = [CardSample(name="Test 24", uuid=f"GPU-{n}", total_bytes=24 * GIB, free_bytes=23 * GIB) for n in range(2)]
    sample = Sample(state="ok", error="", driver="580.1", cards=tuple(listed), age_s=0.0)
    bench.store.put("probe", sample.model_dump(mode="json"))
    for n, pid in enumerate((os.getpid(), 1)):
        bench.store.put(f"worker{n}", {"pid": pid, "card": f"GPU-{n}", "held_bytes": 0, "node": ""})
    seen = machine_seen(bench.store)
    assert seen is not None and (seen.gpus[0].worker_ram_bytes or 0) > 32 << 20
    assert seen.gpus[1].worker_ram_bytes == private_bytes(1)
    bench.store.put("worker1", None)
    alone = machine_seen(bench.store)
    assert alone is not None and [card.worker_ram_bytes for card in alone.gpus] == [None, None]


def planned_on(made: Cards, machine: Machine, card: str = "", model: str = "wan2.1-14b") -> list[str]:
    return [gpu.uuid for gpu in made.planned_on(machine, Inventory(files=()), card, model)[0].gpus]


def test_a_clip_for_the_card_of_a_node_or_of_a_machine_without_any_is_planned_for_that_card(bench: Bench) -> None:
    far = machine_of(gpu(24, uuid="GPU-far"), gpu(8, uuid="GPU-small", index=1))
    node = NodeFacts(host="far", machine=far)
    silent = NodeFacts(host="attic", state="unreachable")
    told = ClusterFacts(address="10.0.0.1:6379", joined=True, nodes=(node, silent))
    bench.store.put(CLUSTER, told.model_dump(mode="json"))
    ours = cards.FleetCard(slot=0, uuid="GPU-here", name="RTX 3060")
    fleet = cards.Fleet(cards=(ours, cards.FleetCard(slot=1000, uuid="GPU-far", name="RTX 4090 (far)")))
    bench.store.put(cards.FLEET, fleet.model_dump(mode="json"))
    made, bare = Cards(lambda: bench.store), Machine()
    here = machine_of(gpu(12, uuid="GPU-here"))
    assert planned_on(made, here) == ["GPU-here"]
    for name in ("GPU-far", "rtx 4090 (far)"):
        assert planned_on(made, here, name) == ["GPU-far"]
    assert planned_on(made, bare) == ["GPU-far"]
    assert made.switch("RTX 4090 (far)", "paused", here) == "RTX 4090 (far)"
    assert planned_on(made, bare) == ["GPU-small"]
    bench.store.put(CLUSTER, None)
    assert planned_on(made, bare) == []


def test_where_this_machines_cards_do_not_work_a_clip_is_planned_for_and_named_after_a_node_with_its_weights(
    bench: Bench,
) -> None:
    """`--no-local-gpus`: a plan for the 12 GB card here promised what no card of the cluster did."""
    large, small = machine_of(gpu(24, uuid="GPU-24")), machine_of(gpu(16, uuid="GPU-16"))
    nodes = (
        NodeFacts(host="bare", machine=large, inventory=Inventory(files=())),
        NodeFacts(host="attic", machine=small, inventory=disk()),
    )
    told = ClusterFacts(address="10.0.0.1:6379", joined=True, nodes=nodes)
    bench.store.put(CLUSTER, told.model_dump(mode="json"))
    bench.store.put(cards.FLEET, cards.Fleet().model_dump(mode="json"))  # no card is asked for: nothing waits
    made, here, nothing = Cards(lambda: bench.store), machine_of(gpu(12, uuid="GPU-here")), Inventory(files=())
    assert planned_on(made, here) == ["GPU-16"]  # the larger card lacks the weights
    machine, there = made.planned_on(here, nothing, "", "wan2.1-14b")
    assert there == disk() and resolve_files("wan2.1-14b", there)
    plan = plan_request(scripted(model="Wan2.1-14B", num_frames=81), machine, there)
    begin = made.begin(plan, here, nothing)
    assert begin is not None and (begin.card, begin.seconds) == ("RTX 4090 (attic)", plan.seconds)
    up = cards.FleetCard(slot=1000, uuid="GPU-16", name="RTX 4090 (attic)")
    fleet = cards.Fleet(cards=(up,), workers=(Card(1000, busy_s=30.0),))
    bench.store.put(cards.FLEET, fleet.model_dump(mode="json"))
    begin = made.begin(plan, here, nothing)
    assert begin is not None and begin.start_s == 30.0


def test_beside_this_machines_cards_a_clip_whose_weights_a_node_alone_has_is_planned_there_and_not_refused(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was refused for want of weights that the queue's machine does not need."""
    monkeypatch.setattr(studio, "find_weights", lambda: disk("demo"))
    listed = CardSample(name="Test 12", uuid="GPU-here", total_bytes=12 * GIB, free_bytes=11 * GIB)
    sample = Sample(state="ok", error="", driver="580.1", cards=(listed,), age_s=0.0)
    bench.store.put("probe", sample.model_dump(mode="json"))
    attic = NodeFacts(host="attic", machine=machine_of(gpu(16, uuid="GPU-16")), inventory=disk("wan2.1-14b"))
    told = ClusterFacts(address="10.0.0.1:6379", joined=True, nodes=(attic,))
    bench.store.put(CLUSTER, told.model_dump(mode="json"))
    ours = cards.FleetCard(slot=0, uuid="GPU-here", name="Test 12")
    fleet = cards.Fleet(cards=(ours,), workers=(Card(0, busy_s=0.0),))  # none of the node: nothing waits
    bench.store.put(cards.FLEET, fleet.model_dump(mode="json"))
    made = studio.Studio(bench.state, bench.outputs)
    fields = {"prompt": "a red circle", "model": "wan2.1-14b", "num_frames": 81}
    plan = made.plan(fields, made.machine())
    begin = made.cards.begin(plan, made.machine(), disk("demo"))
    assert begin is not None and begin.card == "RTX 4090 (attic)"
    queued = made.job(made.submit(fields)).plan
    assert queued is not None and queued.seconds == plan.seconds
    with pytest.raises(FileError):
        made.submit({**fields, "gpu": "GPU-here"})
    assert planned_on(made.cards, made.machine(), model="demo") == ["GPU-here"]
    bare = attic.model_copy(update={"inventory": disk("demo")})
    for downloads in (True, False):
        told = ClusterFacts(address="10.0.0.1:6379", joined=True, nodes=(bare,), downloads=downloads)
        bench.store.put(CLUSTER, told.model_dump(mode="json"))
        if downloads:  # it has them before it begins
            assert made.cards.may_download("wan2.1-14b", disk("demo")) and made.submit(fields)
        else:
            with pytest.raises(FileError):
                made.submit(fields)
    made.close()
