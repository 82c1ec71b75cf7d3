"""Why a plan looks like this: which phase binds, what was settled or lowered, what levers save, what cannot help."""

from collections.abc import Iterator

from turbodiff.plan import offload_search, phase_costs
from turbodiff.plan.candidates import Candidate, has_weights, only_int8
from turbodiff.plan.hardware import GpuFacts, prefers_int8
from turbodiff.plan.offload_search import CandidateCost
from turbodiff.plan.plan_context import PlanContext, cudnn_number, job_of, placement_of, unlimited
from turbodiff.plan.reasons import reason
from turbodiff.plan.torch_compat import conv3d_is_broken
from turbodiff.plan.weight_sizes import missing_bytes
from turbodiff.spec.plan import Change, Levers, Reason
from turbodiff.spec.request import Request
from turbodiff.spec.shapes import RESOLUTIONS

HELPS = 0.95  # fewer frames help only if the peak falls below this share
FEW_FRAMES = 5
SHARED = 0.05  # of a card in other hands is worth a word


def reasons(
    wish: Request, setting: PlanContext, choice: Candidate, placement: CandidateCost, changes: tuple[Change, ...]
) -> tuple[Reason, ...]:
    """Every reason that applies, the deciding phase first."""
    return (
        _binding(setting, placement),
        *_about_wish(wish, setting, choice, placement, changes),
        *_about_changes(setting, choice, changes),
        *_about_levers(wish, setting, choice, placement),
        *_about_schedule(wish, setting, choice),
        *_about_machine(setting, placement),
        *_about_weights(setting, choice),
    )


def _binding(setting: PlanContext, placement: CandidateCost) -> Reason:
    need = placement.binding
    return reason(
        "binding_phase",
        phase=need.name,
        peak_bytes=need.peak,
        budget_bytes=setting.room.device,
        weights_bytes=need.weights,
        activations_bytes=need.activations,
    )


def _about_wish(
    wish: Request, setting: PlanContext, choice: Candidate, placement: CandidateCost, changes: tuple[Change, ...]
) -> Iterator[Reason]:
    """Whether the wish fitted, and which wishes cannot help."""
    lossy = any(change.lossy for change in changes)
    if lossy:
        asked = choice_of(wish, choice, setting)
        yield from _wish_or_slow(wish, setting, asked, placement)
    few = min(FEW_FRAMES, choice.num_frames)
    shorter = placement_of(wish, choice._replace(num_frames=few), setting, like=placement.levers)
    at_few = next(need for need in shorter.needs if need.name == placement.binding.name)
    if at_few.peak > HELPS * placement.peak and choice.num_frames > few:
        yield reason(
            "fewer_frames_will_not_help",
            phase=at_few.name,
            peak_bytes=placement.peak,
            peak_at_5_frames_bytes=at_few.peak,
        )
    if lossy or placement.peak > offload_search.FITS_SHARE * setting.room.device:
        yield reason("fewer_steps_save_time_only", steps=wish.steps)


def _wish_or_slow(wish: Request, setting: PlanContext, asked: Candidate, placement: CandidateCost) -> Iterator[Reason]:
    try_wish = placement_of(wish, asked, setting)
    if try_wish.fits:
        at_full_memory = unlimited(wish, asked, setting)
        slower = round(try_wish.seconds / at_full_memory.seconds, 1)
        yield reason("lossless_is_slow", seconds=try_wish.seconds, seconds_chosen=placement.seconds, slower=slower)
        return
    short = try_wish.short(setting.room)
    worst = max(try_wish.needs, key=setting.room.short)
    yield reason(
        "wish_does_not_fit",
        need_bytes=worst.peak,
        budget_bytes=setting.room.device,
        short_bytes=short,
        phase=worst.name,
    )


def choice_of(wish: Request, choice: Candidate, setting: PlanContext) -> Candidate:
    """The wish itself as a choice; "auto" INT8 takes what was chosen for it."""
    int8 = choice.int8 if wish.quant_linear == "auto" else wish.quant_linear == "on"
    return Candidate(wish.spec, wish.resolution, wish.aspect, wish.width, wish.height, wish.num_frames, int8)


def _about_changes(setting: PlanContext, choice: Candidate, changes: tuple[Change, ...]) -> Iterator[Reason]:
    for change in changes:
        if change.field in ("width", "height", "aspect"):
            continue
        if change.lossy:
            yield reason("lowered", field=change.field, **{"from": change.from_value, "to": change.to_value})
        else:
            yield reason("settled", field=change.field, to=change.to_value)
    named = choice.resolution in RESOLUTIONS and choice.resolution not in choice.spec.limits.trained_resolutions
    if named:
        trained = ", ".join(choice.spec.limits.trained_resolutions)
        yield reason(
            "outside_trained_size", model=choice.spec.display_name, resolution=choice.resolution, trained=trained
        )
    gpu = setting.gpu
    if choice.int8 and gpu is not None:
        if any(change.field == "quant_linear" for change in changes) and prefers_int8(gpu.total_bytes):
            yield reason("int8_below_40gb", total_bytes=gpu.total_bytes, saved_bytes=_int8_saves(setting, choice))
        if gpu.capability is not None and gpu.capability[0] == 9:
            yield reason("int8_not_faster_here", device_name=gpu.name)


def _int8_saves(setting: PlanContext, choice: Candidate) -> int:
    return setting.weights(choice.spec, False).dit - setting.weights(choice.spec, True).dit


def _about_levers(wish: Request, setting: PlanContext, choice: Candidate, placement: CandidateCost) -> Iterator[Reason]:
    """What each lever saves and costs, against the same clip with all memory in the world."""
    free, chosen = unlimited(wish, choice, setting), placement.levers
    groups = {
        "text": (chosen.text != free.levers.text, ("text_encode",)),
        "blocks": (chosen.experts != free.levers.experts, ("denoise", "denoise_high", "denoise_low")),
        "vae": (chosen.vae != free.levers.vae, ("image_encode", "vae_decode")),
    }
    for group, (pulled, names) in groups.items():
        if not pulled:
            continue
        before = [need for need in free.needs if need.name in names]
        after = [need for need in placement.needs if need.name in names]
        saved = max(need.peak for need in before) - max(need.peak for need in after)
        seconds_before, seconds_after = (sum(need.seconds for need in needs) for needs in (before, after))
        yield _lever_reason(group, chosen, setting.weights(choice.spec, choice.int8).blocks, saved,
                            seconds_before, seconds_after)  # fmt: skip
    if chosen.ffn_chunks > 1:
        job = job_of(wish, choice, setting)
        one, many = (phase_costs.denoise_activations(job, chunks) for chunks in (1, chosen.ffn_chunks))
        yield reason("ffn_chunked", chunks=chosen.ffn_chunks, saved_bytes=one - many)


def _lever_reason(
    group: str, chosen: Levers, blocks: int, saved: int, seconds_before: float, seconds_after: float
) -> Reason:
    more_s = round(seconds_after - seconds_before, 1)
    if group == "text":
        key = "text_streamed" if chosen.text == "streamed" else "text_on_cpu"
        return reason(key, saved_bytes=saved, seconds=more_s)
    if group == "vae":
        return reason("vae_tiled", saved_bytes=saved, seconds=more_s)
    if chosen.experts == "swapped":
        return reason("experts_swapped", saved_bytes=saved, seconds=more_s)
    slower = round(seconds_after / seconds_before, 2)
    return reason(
        "blocks_streamed", blocks_resident=chosen.blocks_resident, blocks=blocks, saved_bytes=saved, slower=slower
    )


def _about_schedule(wish: Request, setting: PlanContext, choice: Candidate) -> Iterator[Reason]:
    job = job_of(wish, choice, setting)
    if choice.spec.two_experts and len(set(job.experts)) == 2:
        yield reason("experts_by_step", experts="".join(expert.letter for expert in job.experts))
    elif choice.spec.two_experts:
        yield reason("one_expert_runs", expert=job.experts[0].value, steps=wish.steps, boundary=wish.boundary)


def _about_machine(setting: PlanContext, placement: CandidateCost) -> Iterator[Reason]:
    machine, gpu = setting.machine, setting.gpu
    if gpu is None:
        yield from _about_cpu(setting)
        return
    yield from _about_free_memory(gpu, setting)
    if machine.pretended:
        yield reason("pretended", total_bytes=gpu.total_bytes)
    elif machine.torch and conv3d_is_broken(machine.torch, cudnn_number(machine.cudnn)):
        yield reason("conv3d_trap", torch=machine.torch, cudnn=machine.cudnn)
    if setting.room.host is None:
        yield reason("host_memory_unknown")
    elif (
        worst := max(placement.needs, key=lambda need: need.host)
    ).host > offload_search.FITS_SHARE * setting.room.host:
        yield reason("host_memory_binds", need_bytes=worst.host, available_bytes=setting.room.host, phase=worst.name)


def _about_free_memory(gpu: GpuFacts, setting: PlanContext) -> Iterator[Reason]:
    total, free = gpu.total_bytes, phase_costs.free_bytes(gpu)
    if total is None and setting.room.host is not None:
        yield reason("unified_memory", available_bytes=setting.room.device)
    elif total is None:
        yield reason("card_memory_unknown", assumed_bytes=setting.room.device)
    elif free is None and gpu.free_bytes is None:
        yield reason("free_memory_unknown", total_bytes=total)
    elif free is None or free != gpu.free_bytes:
        yield reason("free_memory_bogus", free_bytes=gpu.free_bytes, used_bytes=gpu.used_bytes, total_bytes=total)
    elif (others := total - free - gpu.reclaimable_bytes) > SHARED * total:
        yield reason("card_shared", others_bytes=others, total_bytes=total)


def _about_cpu(setting: PlanContext) -> Iterator[Reason]:
    machine = setting.machine
    if setting.room.host is None:
        yield reason("host_memory_unknown")
    else:
        yield reason("cpu_run", available_bytes=setting.room.host)
    if machine.gpus and (machine.torch or "").endswith("+cpu"):
        yield reason("torch_without_cuda", torch=machine.torch)
    if machine.gpu_state not in ("ok", "none"):
        yield reason("gpu_unavailable", state=machine.gpu_state)


def _about_weights(setting: PlanContext, choice: Candidate) -> Iterator[Reason]:
    spec, inventory = choice.spec, setting.inventory
    if not has_weights(spec, setting.machine, inventory):
        yield reason("download", model=spec.display_name, bytes=missing_bytes(spec, inventory, choice.int8))
    elif choice.int8 and not setting.machine.pretended and only_int8(spec, inventory):
        yield reason("only_int8_on_disk", model=spec.display_name)
    if setting.calibration is not None and setting.calibration.samples:
        yield reason("calibrated", factor=setting.calibration.factor, samples=setting.calibration.samples)
