"""Why a plan looks like this: which phase binds, what was settled or lowered, what levers save, what cannot help; and
what else there is to run."""

import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

from turbodiff.plan import phase_costs
from turbodiff.plan.candidates import Candidate, as_wished, has_weights, only_int8, smaller_models
from turbodiff.plan.context import PlanContext
from turbodiff.plan.links import link_of
from turbodiff.plan.memory_limits import FITS_SHARE
from turbodiff.plan.offload_search import CandidateCost, cost_inputs, evaluate, faster, look_alikes
from turbodiff.plan.roofline import INT8_SENT_BYTES, sent_bytes
from turbodiff.plan.schedule import network_file, schedule_reasons, scheduled
from turbodiff.plan.shared_clip import MIN_SPEEDUP
from turbodiff.plan.weight_sizes import encoder_bytes, missing_bytes, needed_files
from turbodiff.spec.models import Inventory, short_path
from turbodiff.spec.numbers import GB
from turbodiff.spec.plan import Alternative, CardOffer, Change, JsonScalar, Reason, learned_seconds
from turbodiff.spec.request import Request
from turbodiff.spec.schedules import RCM_SAMPLERS, SCHEDULE_REASONS, WARNINGS
from turbodiff.spec.shapes import RESOLUTIONS

HELPS = 0.95  # fewer frames help only if the peak falls below this share
FEW_FRAMES = 5
SHARED = 0.05  # of a card in other hands is worth a word
KEPT_QUALITIES = ("frames", "size", "model")  # by alternatives, in this order
MOST_ALTERNATIVES = 3
ALTERNATIVE_FIELDS = ("model", "resolution", "width", "height", "num_frames", "quant_linear", "steps")
FAST_STEPS = 2
FEWER_BITS = (("auto", "int8"), ("auto", "nf4"), ("bf16", "int8"), ("bf16", "nf4"), ("int8", "nf4"))
NOT_TOLD = ("width", "height", "aspect", "sampler")  # said by the resolution, and by the schedule's own reason

# the names of the numbers of every reason
REASON_KEYS: Mapping[str, list[str]] = tomllib.loads(Path(__file__).with_name("reasons.toml").read_text("utf-8"))
# those about what was chosen of the picture, which stay true when levers change
OF_THE_PICTURE = frozenset(
    ("wish_does_not_fit", "settled", "lowered", "int8_is_faster", "int8_makes_it_fit", "int8_not_faster_here",
     "text_of_fewer_bits", "only_int8_on_disk", "outside_trained_size", "lossless_is_slow", "negative_prompt_of_wan",
     *SCHEDULE_REASONS, *WARNINGS)
)  # fmt: skip


def reason(key: str, **numbers: JsonScalar) -> Reason:
    """A reason with exactly the numbers its key carries."""
    assert set(numbers) == set(REASON_KEYS[key]), (key, sorted(numbers))
    return Reason(key=key, numbers=numbers)


def changes_between(before: Request, fields: Mapping[str, JsonScalar], names: tuple[str, ...]) -> tuple[Change, ...]:
    """Those of `names` whose value in `fields` is another; what "auto" or the weights settled is no loss, nor are more
    steps."""
    pairs = [(name, getattr(before, name), fields[name]) for name in names if name in fields]
    changed = [pair for pair in pairs if pair[1] != pair[2]]
    more = {name for name, old, new in changed if name == "steps" and int(str(new)) > int(str(old))}
    left = before.auto | more | {name for name, old, _ in changed if old == "auto"}
    if any(name == "text_dtype" and (old, new) in FEWER_BITS for name, old, new in changed):
        left -= {"text_dtype"}  # "auto" means all of them
    elif "text_dtype" in [name for name, _, _ in changed]:
        left |= {"text_dtype"}
    return tuple([Change(field=f, from_value=old, to_value=new, lossy=f not in left) for f, old, new in changed])


def reasons(
    wish: Request, settled: Request, context: PlanContext, choice: Candidate, cost: CandidateCost,
    changes: tuple[Change, ...], offers: tuple[CardOffer, ...],
) -> tuple[Reason, ...]:  # fmt: skip
    """Every reason that applies, the schedule and the deciding phase first."""
    return (
        *(reason(key, **numbers) for key, numbers in schedule_reasons(wish, settled, choice, context.inventory)),
        *_about_wish(
            wish,
            context,
            choice,
            cost,
            lossy=True in [change.lossy for change in changes if change.field not in ("steps", "text_dtype")],
        ),
        *_about_changes(wish, context, choice, changes),
        *_about_levers(wish, context, choice, cost),
        *_about_cards(wish, context, choice, cost, offers),
        *_about_machine(context, cost),
        *_about_weights(context, choice),
        *_about_loras(wish, choice, context.inventory),
        *_about_measurements(context, choice, cost),
    )


def _about_wish(
    wish: Request, context: PlanContext, choice: Candidate, cost: CandidateCost, lossy: bool
) -> Iterator[Reason]:
    """The phase that decides, whether the wish fitted, and which wishes cannot help."""
    binding, budget_bytes = max(cost.phases, key=lambda phase: phase.peak_bytes), max(0, context.limits.device)
    sizes = {name: getattr(binding, name) for name in ("peak_bytes", "weights_bytes", "activations_bytes")}
    yield reason("binding_phase", phase=binding.name, budget_bytes=budget_bytes, **sizes)
    if lossy:
        asked = as_wished(wish, choice.int8)
        tried = evaluate(wish, asked, context)
        if tried.fits:
            slower = round(tried.seconds / evaluate(wish, asked, context, unlimited=True).seconds, 1)
            yield reason("lossless_is_slow", seconds=tried.seconds, seconds_chosen=cost.seconds, slower=slower)
        else:
            worst = max(tried.phases, key=context.limits.short)
            need = {"need_bytes": worst.peak_bytes, "short_bytes": tried.short, "phase": worst.name}
            yield reason("wish_does_not_fit", budget_bytes=budget_bytes, **need)
    if choice.num_frames > FEW_FRAMES:
        shorter = evaluate(wish, choice._replace(num_frames=FEW_FRAMES), context, like=cost.levers)
        number = [phase.peak_bytes for phase in cost.phases].index(cost.peak_bytes)
        at_few = shorter.phases[number]
        if at_few.peak_bytes > HELPS * cost.peak_bytes:
            peaks = {"peak_bytes": cost.peak_bytes, "peak_at_5_frames_bytes": at_few.peak_bytes}
            yield reason("fewer_frames_will_not_help", phase=at_few.name, **peaks)
    if lossy or cost.peak_bytes > FITS_SHARE * budget_bytes:
        yield reason("fewer_steps_save_time_only", steps=scheduled(wish, choice, context.inventory).steps)


def _about_changes(
    wish: Request, context: PlanContext, choice: Candidate, changes: tuple[Change, ...]
) -> Iterator[Reason]:
    spec = choice.spec
    for change in changes:
        if change.field in NOT_TOLD or change.field in wish.auto or (change.field == "steps" and not change.lossy):
            continue
        if change.lossy:
            yield reason("lowered", field=change.field, **{"from": change.from_value, "to": change.to_value})
        else:
            yield reason("settled", field=change.field, to=change.to_value)
    trained = spec.limits.trained_resolutions
    if choice.resolution in RESOLUTIONS and choice.resolution not in trained:
        yield reason(
            "outside_trained_size", model=spec.display_name, resolution=choice.resolution, trained=", ".join(trained)
        )
    if choice.int8 and context.gpu is not None:
        settled_here = "quant_linear" in [change.field for change in changes]
        plain = evaluate(wish, choice._replace(int8=False), context)
        if settled_here and plain.fits:
            seconds = evaluate(wish, choice, context).seconds
            yield reason("int8_is_faster", seconds=round(seconds, 1), seconds_bf16=round(plain.seconds, 1))
        elif settled_here:
            saved_bytes = context.weights(spec, False).dit - context.weights(spec, True).dit
            yield reason("int8_makes_it_fit", saved_bytes=saved_bytes, short_bytes=plain.short)
        if context.speed.int8_flops <= context.speed.bf16_flops:
            yield reason("int8_not_faster_here", device_name=context.gpu.name)


def _about_levers(wish: Request, context: PlanContext, choice: Candidate, cost: CandidateCost) -> Iterator[Reason]:
    """What each lever saves and costs, against the same clip in unlimited memory; and which experts run."""
    free, chosen = evaluate(wish, choice, context, unlimited=True), cost.levers
    inputs = cost_inputs(wish, choice, context)
    text_key = "text_streamed" if chosen.text == "streamed" else "text_on_cpu"
    blocks_key = "experts_swapped" if chosen.experts == "swapped" else "blocks_streamed"
    groups = (
        (text_key, chosen.text != free.levers.text, ("text_encode",)),
        (blocks_key, chosen.experts != free.levers.experts, ("denoise", "denoise_high", "denoise_low")),
        ("vae_tiled", chosen.vae != free.levers.vae, ("image_encode", "vae_decode")),
    )
    for key, pulled, names in groups:
        if not pulled:
            continue
        before = [phase for phase in free.phases if phase.name in names]
        after = [phase for phase in cost.phases if phase.name in names]
        saved = max([phase.peak_bytes for phase in before]) - max([phase.peak_bytes for phase in after])
        seconds_before, seconds_after = (sum([phase.seconds for phase in phases]) for phases in (before, after))
        if key == "blocks_streamed":
            slower = round(seconds_after / seconds_before, 2)
            resident, blocks = chosen.blocks_resident, inputs.weights.blocks
            yield reason(key, blocks_resident=resident, blocks=blocks, saved_bytes=saved, slower=slower)
            streamed, locked = blocks - resident, chosen.blocks_page_locked
            if (shared := chosen.blocks_shared) is not None:
                yield reason("blocks_shared", shared=shared, streamed=streamed, cards=chosen.cards)
                streamed, locked = streamed - shared, chosen.cards * (locked or 0)
            if locked is not None and locked < streamed and not context.machine.unified_memory:
                yield reason("blocks_pageable", blocks=streamed - locked, streamed=streamed)
        else:
            yield reason(key, saved_bytes=saved, seconds=round(seconds_after - seconds_before, 1))
    if chosen.text_dtype != "bf16":
        sizes = [encoder_bytes(choice.spec.text_encoder, dtype, 2) for dtype in ("bf16", chosen.text_dtype)]
        yield reason("text_of_fewer_bits", text_dtype=chosen.text_dtype, saved_bytes=sizes[0] - sizes[1])
    elif wish.text_dtype not in ("auto", "bf16") and context.text_dtypes == ("bf16",):
        yield reason("text_dtype_unavailable", text_dtype=wish.text_dtype)
    if chosen.ffn_chunks > 1:
        one, many = (phase_costs.denoise_activations(inputs, chunks) for chunks in (1, chosen.ffn_chunks))
        yield reason("ffn_chunked", chunks=chosen.ffn_chunks, saved_bytes=one - many)
    if chosen.converted == "on_disk":
        told = {"disk_bytes": inputs.weights.dit * len(set(inputs.experts)) * (inputs.made > inputs.merged)}
        told["disk_bytes"] += inputs.weights.text if inputs.text_made else 0
        yield reason("converted_on_disk", **told)
    if chosen.made_experts == "dropped":
        yield reason(
            "made_experts_dropped", saved_bytes=inputs.merged if chosen.converted == "on_disk" else inputs.made
        )
    if chosen.text_keys == "recomputed":
        passes = inputs.forwards * len(inputs.experts)
        yield reason(
            "text_keys_recomputed",
            saved_bytes=phase_costs.text_keys_bytes(inputs),
            seconds=round(passes * phase_costs.text_keys_s(inputs), 1),
        )
    if choice.spec.two_experts and len(set(inputs.experts)) == 2:
        yield reason("experts_by_step", experts="".join([expert.letter for expert in inputs.experts]))
    elif choice.spec.two_experts:
        ran = scheduled(wish, choice, context.inventory)
        yield reason("one_expert_runs", expert=inputs.experts[0].value, steps=ran.steps, boundary=ran.boundary)


def _about_cards(
    wish: Request, context: PlanContext, choice: Candidate, cost: CandidateCost, offers: tuple[CardOffer, ...]
) -> Iterator[Reason]:
    """What several cards gain on the clip, or would gain; and that as many clips side by side finish sooner."""
    ranks, gpu = cost.levers.cards, context.gpu
    if wish.cards not in ("auto", ranks):
        yield reason("fewer_cards", asked=wish.cards, cards=ranks)
    if ranks == 1:
        for offer in offers[:1]:
            gain: dict[str, JsonScalar] = {"cards": offer.cards, "seconds": offer.seconds}
            yield (
                reason("cards_would_help", **gain, clips=offer.clips)
                if offer.clips
                else reason("cards_would_fit", **gain)
            )
        return
    alone, link = evaluate(wish, choice, context.alone or context), link_of(gpu, ranks)
    told = {"cards": ranks, "seconds": round(cost.seconds, 1)}
    sent_size = INT8_SENT_BYTES if cost.levers.exchange == "int8" else 4 if gpu is None else 2
    sent = sent_bytes(choice.spec.dit, choice.shape.latent.tokens, ranks, sent_size)
    if alone.fits:
        yield reason("shared_clip", **told, seconds_alone=round(alone.seconds, 1))
        if ranks * cost.seconds > alone.seconds:  # not where one must pass through what several can hold
            yield reason("side_by_side", cards=ranks, clips=round(ranks * cost.seconds / alone.seconds, 2))
        if alone.seconds < MIN_SPEEDUP * cost.seconds:
            yield reason("sharing_does_not_pay", times=round(alone.seconds / cost.seconds, 2))
    else:
        yield reason("only_shared", **told, short_bytes=alone.short)
    yield reason(f"link_{link.kind}", sent_bytes=sent, gb_per_second=round(link.bytes_s / GB, 1))
    if cost.levers.exchange == "int8":
        yield reason("exchanged_in_int8")


def _about_machine(context: PlanContext, cost: CandidateCost) -> Iterator[Reason]:
    machine, gpu, host = context.machine, context.gpu, context.limits.host
    if gpu is None:
        yield reason("host_memory_unknown") if host is None else reason("cpu_run", available_bytes=host)
        for old in [card for card in machine.gpus if card.too_old][:1]:
            major, minor = old.known_capability or (0, 0)
            yield reason("card_too_old", device_name=old.name, capability=f"sm_{major}{minor}", oldest="sm_80")
        if machine.gpus and (machine.torch or "").endswith("+cpu"):
            yield reason("torch_without_cuda", torch=machine.torch)
        if machine.gpu_state not in ("ok", "none"):
            known = REASON_KEYS.get(machine.gpu_reason) == ["got"]
            told = reason(machine.gpu_reason, got=machine.gpu_error) if known else None
            yield told or reason("gpu_unavailable", state=machine.gpu_state)
        return
    total, free = gpu.total_bytes, gpu.plausible_free_bytes
    if total is None and host is not None:
        yield reason("unified_memory", available_bytes=context.limits.device)
    elif total is None:
        yield reason("card_memory_unknown", assumed_bytes=context.limits.device)
    elif free is None and gpu.free_bytes is None:
        yield reason("free_memory_unknown", total_bytes=total)
    elif free is None or free != gpu.free_bytes:
        yield reason("free_memory_bogus", free_bytes=gpu.free_bytes, used_bytes=gpu.used_bytes, total_bytes=total)
    elif (others := total - free - gpu.reclaimable_bytes) > SHARED * total:
        yield reason("card_shared", others_bytes=others, total_bytes=total)
    if machine.pretended:
        yield reason("pretended", total_bytes=gpu.total_bytes)
    elif machine.torch and context.conv3d_is_broken:
        yield reason("conv3d_trap", torch=machine.torch, cudnn=machine.cudnn)
    if host is None:
        yield reason("host_memory_unknown")
    elif (worst := max(cost.phases, key=lambda phase: phase.host_ram_bytes)).host_ram_bytes > FITS_SHARE * host:
        yield reason("host_memory_binds", need_bytes=worst.host_ram_bytes, available_bytes=host, phase=worst.name)


def _about_weights(context: PlanContext, choice: Candidate) -> Iterator[Reason]:
    spec, inventory = choice.spec, context.inventory
    files = [network_file(choice, inventory, expert) for expert in spec.experts]
    if names := [short_path(file.path) for file in files if file and not file.to_fetch]:
        yield reason("network_files", files=", ".join(names))
    lacking, unread = needed_files(spec, inventory, choice.int8), set[str]()
    for one in inventory.passed_over:
        if spec.name in one.models and any(file.component.startswith(one.component) for file in lacking):
            unread.add(one.component)
            key = "expert_untold" if one.code == "expert_unknown" else "package_missing"
            yield reason(key, file=short_path(one.path), model=spec.display_name, command=one.expected)
    lacking = tuple(file for file in lacking if not file.component.startswith((*unread,)))
    if any(file.component.startswith("dit") for file in lacking):
        yield reason("download", model=spec.display_name, bytes=sum(file.bytes for file in lacking))
    elif lacking:
        parts = ", ".join(Path(file.names[0]).name for file in lacking)
        yield reason("download_parts", model=spec.display_name, files=parts, bytes=sum(file.bytes for file in lacking))
    elif choice.int8 and not context.machine.pretended and only_int8(spec, inventory):
        yield reason("only_int8_on_disk", model=spec.display_name)


def seconds_shown(choice: Candidate, cost: CandidateCost) -> list[float]:
    """Seconds of each phase, to the millisecond: as measured runs say, the formula's where none do."""
    if not cost.lessons:
        return [round(phase.seconds, 3) for phase in cost.phases]
    told = [learned_seconds(cost.lessons, phase.name, choice.shape, phase.seconds) for phase in cost.phases]
    return [round(seconds, 3) for seconds, _ in told]


def _about_measurements(context: PlanContext, choice: Candidate, cost: CandidateCost) -> Iterator[Reason]:
    """What the card itself told, and what measured runs changed: memory of the deciding phase, and seconds."""
    if context.gpu is not None and context.gpu.measured:
        yield reason("card_measured", device_name=context.gpu.name, day=context.gpu.measured_on)
    if not cost.lessons:
        return
    binding = max(cost.phases, key=lambda phase: phase.peak_bytes)
    samples = sum([lesson.samples for lesson in cost.lessons if lesson.phase == binding.name])
    if binding.learned_bytes:
        formula_bytes = binding.peak_bytes - binding.learned_bytes
        yield reason("calibrated", phase=binding.name, formula_bytes=formula_bytes, samples=samples)
    timed = [learned_seconds(cost.lessons, phase.name, choice.shape, 0.0)[1] for phase in cost.phases]
    if any(timed):
        yield reason("timed", formula_s=round(cost.seconds, 1), samples=max(timed))


def _about_loras(wish: Request, choice: Candidate, inventory: Inventory) -> Iterator[Reason]:
    """LoRAs that the networks cannot take, or take in part."""
    model = choice.spec.display_name
    for lora in wish.loras:
        for fit in inventory.lora_fits(lora.path, lora.expert, choice.spec.name)[:1] if lora.strength else ():
            file = Path(lora.path).name
            if fit.why is not None:
                yield reason("lora_unfit", file=file, model=model, why=fit.why.code, got=fit.why.got)
            elif fit.left_out:
                yield reason("lora_partly", file=file, model=model, layers=fit.layers, names=fit.left_out)


def alternatives(
    wish: Request, context: PlanContext, chosen: Candidate, pinned: frozenset[str]
) -> tuple[Alternative, ...]:
    """At most three that fit and differ from the plan in what a person sees, the nearest to the wish first.

    The wish itself (slow, where it fits), then the first choice below it that keeps each quality in turn: the frames,
    the size, the clip with another model; then smaller models that are not on this disk. Where that is not enough,
    fewer steps: for speed, never for memory.
    """
    asked = as_wished(wish, chosen.int8)
    area = asked.width * asked.height
    kept: dict[str, Candidate] = {}
    for alike in look_alikes(wish, context, pinned):
        choice = alike[0]
        less = choice.width * choice.height < area
        same = choice.width * choice.height == area
        if choice.spec.name != asked.spec.name:
            group = "model"
        elif less and choice.num_frames == asked.num_frames:
            group = "frames"
        elif same and choice.num_frames < asked.num_frames:
            group = "size"
        else:
            continue
        if group not in kept and evaluate(wish, choice := faster(wish, context, alike), context).fits:
            kept[group] = choice
        if len(kept) == len(KEPT_QUALITIES):
            break
    trades = [asked, *[kept[group] for group in KEPT_QUALITIES if group in kept]]
    if "model" not in pinned:
        absent = [s for s in smaller_models(wish.spec) if not has_weights(s, context.machine, context.inventory)]
        trades += [chosen._replace(spec=spec) for spec in absent]

    said = wish.model_copy(update={"auto": frozenset()})  # what a button sets is a choice

    def option(choice: Candidate, cost: CandidateCost, download_bytes: int = 0, **more: JsonScalar) -> Alternative:
        changes = changes_between(said, {**choice.fields(), **more}, ALTERNATIVE_FIELDS)
        seconds = round(sum(seconds_shown(choice, cost)), 1)
        return Alternative(
            changes=changes, peak_bytes=cost.peak_bytes, seconds=seconds, fits=cost.fits, download_bytes=download_bytes
        )

    found: list[Alternative] = []
    seen = {chosen.visible}
    for choice in trades:
        if choice.visible in seen or len(found) == MOST_ALTERNATIVES:
            continue
        cost = evaluate(wish, choice, context)
        if not cost.fits:
            continue
        seen.add(choice.visible)
        found.append(option(choice, cost, missing_bytes(choice.spec, context.inventory, choice.int8)))
    ran = scheduled(wish, chosen, context.inventory)
    fewer = ran.steps > FAST_STEPS and ran.sampler in RCM_SAMPLERS and "steps" not in pinned
    if len(found) < MOST_ALTERNATIVES and fewer:
        cost = evaluate(wish.model_copy(update={"steps": FAST_STEPS, "auto": wish.auto - {"steps"}}), chosen, context)
        found += [option(chosen, cost, steps=FAST_STEPS)] if cost.fits else []
    return tuple(found)
