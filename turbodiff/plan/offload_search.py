"""Where a request is planned for, and what one candidate costs there with the best of its levers.

Levers cost time and not one pixel, but for a text encoder of fewer bits, which is taken where no other lever makes its
phase fit, or by wish. Phases run one after the other, so each phase gets its own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple, cast

from turbodiff.plan import phase_costs
from turbodiff.plan.allocator_slack import slack_bytes
from turbodiff.plan.candidates import Candidate, candidates
from turbodiff.plan.context import PlanContext
from turbodiff.plan.finishing_costs import file_pixels, finish_costs
from turbodiff.plan.links import link_of, possible_ranks
from turbodiff.plan.memory_limits import FITS_SHARE, NEARLY, NO_LIMIT_BYTES, MemoryLimits, Option, best_of, rate
from turbodiff.plan.phase_costs import CostInputs, PhaseCost
from turbodiff.plan.roofline import kernels_here
from turbodiff.plan.schedule import dit_files, network_file, scheduled
from turbodiff.plan.streaming import STAGED_BLOCKS, STREAM_BUFFERS, spread
from turbodiff.plan.weight_sizes import lora_bytes
from turbodiff.spec.attention import AttentionKind
from turbodiff.spec.plan import Lesson, Levers, lessons_of
from turbodiff.spec.request import Request
from turbodiff.spec.shapes import VAE_TILES

FFN_CHUNKS = (1, 2, 4, 8)


class CandidateCost(NamedTuple):
    """A candidate with its levers set, the fastest that fits or the smallest when none does, and what was measured.

    Over all phases: `short`, the bytes by which the worst does not fit, <= 0 when it does; the largest peak; the
    formulas' seconds, and those that go into reading the networks' weights."""

    levers: Levers
    phases: tuple[PhaseCost, ...]
    short: int
    peak_bytes: int
    seconds: float
    reading_s: float
    lessons: tuple[Lesson, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether every phase fits."""
        return self.short <= 0


def attention_for(request: Request, candidate: Candidate, context: PlanContext) -> str:
    """What "auto" becomes: dense on a CPU, for the demo and for UniPC; SageSLA for distilled weights, else Sage.

    Args:
        request: as `scheduled` for this candidate.

    SageSLA needs a file with the projections of SLA's linear branch; one that is not here is taken for the published.
    """
    if request.attention != "auto":
        return request.attention
    if context.gpu is None or candidate.spec.bundled or request.sampler == "unipc":
        return "dense"
    file = network_file(candidate, context.inventory)
    return "sagesla" if candidate.spec.turbo and (file is None or file.sla) else "sage"


def cost_inputs(request: Request, candidate: Candidate, context: PlanContext) -> CostInputs:
    """One candidate with everything the formulas need."""
    spec, gpu, machine = candidate.spec, context.gpu, context.machine
    schedule_key = (spec.name, candidate.int8, candidate.width * candidate.height, request.steps)
    if schedule_key not in context.schedules:
        context.schedules[schedule_key] = scheduled(request, candidate, context.inventory)
    request = context.schedules[schedule_key]
    latent, element_bytes = candidate.shape.latent, 4 if gpu is None else 2
    tokens, weights = latent.tokens, context.weights(spec, candidate.int8)
    loras = [lora_bytes(request.loras, spec, context.inventory, expert) for expert in spec.experts if request.loras]
    lora = max(loras, default=0)
    int8_file, plain_file = dit_files(spec, context.inventory)
    # INT8 weights are made from a plain file where there is no other; a pretended disk has both
    quantised_here = not machine.pretended and int8_file is None and plain_file is not None
    file, encoder = (int8_file if candidate.int8 else plain_file), context.inventory.of(spec.name, "text_encoder")
    made = (quantised_here and candidate.int8) or (file is not None and file.converted)
    # LoRAs make weights anew beside those: plain ones always, INT8 ones where a change is no low rank
    whole = {found.path for found in context.inventory.loras if found.dense} if loras else set()
    merged = any(one.path in whole for one in request.loras if one.strength) if candidate.int8 else lora > 0
    wished = cast("AttentionKind", attention_for(request, candidate, context))
    page_lock_bytes = machine.pinned_limit_bytes and machine.pinned_limit_bytes // context.ranks
    ranks = next(iter(possible_ranks(spec.dit.num_heads, tokens, context.ranks)), 1)
    learned = context.calibration if ranks == 1 else None
    attention, kernels = kernels_here(wished, machine, gpu)
    facts = candidate.shape, context.inventory, context.speed.conv_flops, element_bytes
    return CostInputs(
        spec=spec,
        shape=candidate.shape,
        latent=latent,
        tokens=tokens,
        unit=tokens * spec.dit.dim * element_bytes,
        pixels=candidate.width * candidate.height * candidate.num_frames,
        finishing=finish_costs(request, *facts) if request.finishing else (),
        file_pixels=file_pixels(request, candidate.shape),
        int8=candidate.int8,
        attention=attention,
        kernels=kernels,
        topk=request.topk,
        forwards=2 if max(map(request.guidance_of, spec.experts)) > 1 else 1,
        experts=request.experts_of(spec),
        weights=weights,
        made=weights.dit * (made + merged),
        merged=weights.dit * merged,
        text_made=weights.text if encoder is not None and encoder.converted else 0,
        lora=lora if candidate.int8 else 0,
        speed=context.speed,
        on_cpu=gpu is None,
        element_bytes=element_bytes,
        context_bytes=0 if gpu is None else gpu.cuda_context_bytes,
        loaded=context.loaded,
        allocator=machine.allocator or "expandable",
        host_bytes=context.limits.host,
        page_lock_bytes=0 if machine.unified_memory else page_lock_bytes,
        ranks=ranks,
        link_bytes_s=link_of(gpu, ranks).bytes_s,
        exchange=request.exchange,
        nvenc_bytes=phase_costs.NVENC_BYTES if gpu is not None and request.encoder == "nvenc" else 0,
        lessons=lessons_of(learned, spec.name, candidate.int8, wished, request.networks),
    )


def settled(request: Request, context: PlanContext, pinned: frozenset[str]) -> Iterator[Candidate]:
    """`candidates` with "auto" for INT8 settled; for cards that share a clip as for one, so that it is the same."""
    for alike in look_alikes(request, context, pinned):
        yield faster(request, context.alone or context, alike)


def look_alikes(request: Request, context: PlanContext, pinned: frozenset[str]) -> Iterator[list[Candidate]]:
    """`candidates`, those together that differ only in INT8 where the request leaves that to the plan."""
    found = candidates(request, context.machine, context.inventory, context.total_bytes, pinned)
    if request.quant_linear != "auto":
        return ([choice] for choice in found)
    return (list(same) for _, same in groupby(found, attrgetter("visible")))


def faster(request: Request, context: PlanContext, alike: Sequence[Candidate]) -> Candidate:
    """Of a clip with plain weights and with INT8 the one that fits, and of two that fit the faster once its weights are
    read; where both are nearly as fast the plain weights, where neither fits those that lack the least."""
    if len(alike) == 1:
        return alike[0]
    plain, int8 = (evaluate(request, choice, context) for choice in alike)
    if plain.fits and int8.fits:
        return alike[plain.seconds - plain.reading_s > NEARLY * (int8.seconds - int8.reading_s)]
    return alike[int8.short < plain.short]


def evaluate(
    request: Request, candidate: Candidate, context: PlanContext, *, like: Levers | None = None, unlimited: bool = False
) -> CandidateCost:
    """What a candidate costs here: with the fastest levers that fit, phase by phase, or the smallest where none fits.

    Args:
        like: these levers and no others.
        unlimited: as if memory had no end: what levers cost is measured against it.
    """
    key = (*candidate.visible, candidate.int8, request.steps, unlimited)
    if like is None and key in context.evaluated:
        return context.evaluated[key]
    limits = MemoryLimits(NO_LIMIT_BYTES, None) if unlimited else context.limits
    inputs = cost_inputs(request, candidate, context)
    if like is not None:
        inputs = phase_costs.on_disk(inputs) if like.converted == "on_disk" else inputs
        return _cost(replace(inputs, drops=like.made_experts == "dropped"), limits, context, like)
    found = _cost(replace(inputs, drops=_drops(inputs)), limits, context)
    lossless, host_bytes = context.text_dtypes[0], limits.host
    in_host = host_bytes is not None and max(map(limits.in_host, found.phases)) > host_bytes
    if (inputs.made or inputs.text_made) and (in_host or found.levers.text_dtype != lossless):
        copied, room_bytes = phase_costs.on_disk(inputs), context.inventory.copies_room_bytes or 0
        if copied.copied and phase_costs.copies_bytes(copied) <= room_bytes:
            other = _cost(replace(copied, drops=_drops(copied)), limits, context)
            if other.short < found.short if not found.fits else other.fits and other.levers.text_dtype == lossless:
                found = other
    context.evaluated[key] = found
    return found


def _cost(inputs: CostInputs, limits: MemoryLimits, context: PlanContext, like: Levers | None = None) -> CandidateCost:
    """What a candidate costs with these levers, or with the best of them."""
    if like is not None:
        work = phase_costs.step_work(inputs, like.ffn_chunks, like.text_keys)
        text: tuple[PhaseCost, ...] = (phase_costs.text_encode(inputs, like.text, like.text_dtype),)
        blocks = like.blocks_resident, work, like.blocks_page_locked, like.blocks_shared
        denoise = _denoise_option(inputs, like.experts, *blocks)[1]
        vae = _vae_option(inputs, like.tile)[1]
        levers = like
    else:
        by_text, unlimited = context.text_options, limits.host is None and limits.device == NO_LIMIT_BYTES
        text_key = (inputs.spec.name, inputs.forwards > 1, unlimited, "text_encoder" in inputs.copied)
        if text_key not in by_text:
            by_text[text_key] = _text_option(inputs, limits, context)
        text_fields, text = by_text[text_key]
        denoise_fields, denoise = best_of(_denoise_options(inputs, limits), limits)
        vae_fields, vae = _vae_options(inputs, limits)
        made_fields: dict[str, str | int] = {"made_experts": "dropped"} if inputs.drops else {}
        made_fields |= {"converted": "on_disk"} if inputs.copied else {}
        made_fields |= {"cards": inputs.ranks, "exchange": inputs.exchange} if inputs.ranks > 1 else {}
        levers = Levers.model_validate({**text_fields, **denoise_fields, **vae_fields, **made_fields})
    if inputs.spec.image_encoder:
        text = (*text, phase_costs.image_embed(inputs))
    phases = (*text, *vae[:-1], *denoise, vae[-1], *phase_costs.after_decode(inputs))
    return CandidateCost(levers, phases, *rate(phases, limits), phase_costs.reading_s(inputs), inputs.lessons)


def _drops(inputs: CostInputs) -> bool:
    """Whether one expert's weights that were made at load time leave host memory before the next is made: where both
    are too many. This clip takes as long; the next has to read the first expert again."""
    if not inputs.made or inputs.on_cpu or inputs.host_bytes is None or len(set(inputs.experts)) < 2:
        return False
    costs = *phase_costs.after_decode(inputs), phase_costs.vae(inputs, "vae_decode", None)
    staged = STAGED_BLOCKS * inputs.weights.block + inputs.lora
    return max([cost.host_ram_bytes for cost in costs]) + staged > inputs.host_bytes


def _text_option(inputs: CostInputs, limits: MemoryLimits, context: PlanContext) -> Option:
    """Where the text encoder sits: of the precisions that may be taken the first that fits, full ones anywhere, fewer
    bits whole on the device; where none fits the one that is short by the least."""
    best: list[Option] = []
    for dtype in context.text_dtypes:
        names: list[phase_costs.TextLever] = ["resident", "streamed", "cpu"] if dtype == "bf16" else ["resident"]
        if inputs.on_cpu or context.text_cached:
            names = ["cached"] if context.text_cached else ["resident"]
        options: list[Option] = [
            ({"text": name, "text_dtype": dtype}, (phase_costs.text_encode(inputs, name, dtype),)) for name in names
        ]
        best.append(best_of(options, limits))
        if rate(best[-1][1], limits)[0] <= 0:
            return best[-1]
    return best_of(best, limits)


def _denoise_options(inputs: CostInputs, limits: MemoryLimits) -> list[Option]:
    """Placements of the blocks x chunks of the feed-forward; streaming keeps as many blocks as fit.

    More chunks are tried only while they save something and nothing faster fits, keys and values of the text are made
    anew only where that is about what is missing; where not even the smallest placement has room on the device, nothing
    but that: as little as possible on the device, the fewest chunks that need the same.
    """
    both = len(set(inputs.experts)) > 1
    levers: tuple[phase_costs.ExpertLever, ...] = ("resident", "swapped") if both else ("resident",)
    if not inputs.on_cpu:
        levers = (*levers, "streamed")
    options: list[Option] = []
    one_chunk = phase_costs.step_work(inputs, 1)
    easiest = _denoise_option(inputs, "resident", 0, one_chunk)
    if rate(easiest[1], limits)[0] <= 0:
        return [easiest]
    works = [one_chunk, *[phase_costs.step_work(inputs, chunks) for chunks in FFN_CHUNKS[1:]]]
    fewest = min([(work.activations, work.chunks) for work in works])[1]
    smallest = _denoise_option(inputs, levers[-1], 0, phase_costs.step_work(inputs, fewest, "recomputed"))
    if max(map(limits.on_device, smallest[1])) > limits.device:
        return [smallest]
    saved, easy_bytes, activations = phase_costs.text_keys_bytes(inputs), int(FITS_SHARE * limits.device), None
    for work in works:
        if work.activations == activations:
            break
        activations = work.activations
        for lever in levers:
            option = _filled(inputs, limits, lever, work)
            short, peak, _ = rate(option[1], limits)
            if 0 < (short if short > 0 else peak - easy_bytes) <= 2 * saved:  # slack included
                options.append(option)
                option = _filled(inputs, limits, lever, phase_costs.step_work(inputs, work.chunks, "recomputed"))
            options.append(option)
            if lever == "streamed" and inputs.ranks > 1:
                options.append(_filled(inputs, limits, lever, work, shares=True))
            if lever != "streamed" and rate(option[1], limits)[0] <= 0:
                return options
    return options


def _filled(
    inputs: CostInputs, limits: MemoryLimits, lever: phase_costs.ExpertLever, work: phase_costs.StepWork, *,
    shares: bool = False,
) -> Option:  # fmt: skip
    """A placement of the blocks, streamed with as many resident as there is room for: a block more is worth little
    time, so blocks fill the budget only as far as a plan still "fits". `shares`: those that stay nowhere, or on one
    card only, are sent by the process that has them."""
    if lever != "streamed":
        return _denoise_option(inputs, lever, 0, work)
    bare, w = phase_costs.denoise(inputs, inputs.experts[-1], lever, 0, work, 0), inputs.weights
    block = w.block + slack_bytes(inputs.allocator, "denoise", 0, w.block)
    if shares:
        resident, on_cards = spread(inputs, limits.device, limits.on_device(bare), block)
        return _denoise_option(inputs, lever, resident, work, shared=on_cards)
    room = (int(FITS_SHARE * limits.device) - limits.on_device(bare)) // block
    return _denoise_option(inputs, lever, max(0, min(room, w.blocks - STREAM_BUFFERS)), work)


def _denoise_option(
    inputs: CostInputs, lever: phase_costs.ExpertLever, resident: int, work: phase_costs.StepWork,
    locked: int | None = None, shared: int | None = None,
) -> Option:  # fmt: skip
    """One way to place the blocks, with a phase for each expert that runs at all.

    Page-locked copies are a wish: as many of the streamed blocks get one as host memory and the platform have room for.
    """
    fields: dict[str, str | int] = {"experts": lever, "blocks_resident": resident}
    fields |= {} if shared is None else {"blocks_shared": shared}
    fields |= {"ffn_chunks": work.chunks, "text_keys": work.text_keys}
    experts = dict.fromkeys(inputs.experts)
    if lever == "streamed" and locked is None:
        waiting, block = inputs.weights.blocks - resident, inputs.weights.block
        waiting = waiting if shared is None else -(-(waiting - shared) // inputs.ranks)
        rooms = [waiting * block if inputs.page_lock_bytes is None else inputs.page_lock_bytes]
        if inputs.host_bytes is not None and not inputs.made:
            costs = [phase_costs.denoise(inputs, expert, lever, resident, work, 0, shared) for expert in experts]
            bare_bytes = max([cost.host_ram_bytes for cost in costs])
            rooms.append(inputs.host_bytes - bare_bytes + STAGED_BLOCKS * block)
        locked = min(waiting, max(0, min(rooms) // block))
    if locked is not None:
        fields["blocks_page_locked"] = locked
    where = lever, resident, work, locked, shared
    return fields, tuple([phase_costs.denoise(inputs, expert, *where) for expert in experts])


def _vae_options(inputs: CostInputs, limits: MemoryLimits) -> Option:
    """The VAE as a whole where that fits with ease, else in the largest tiles that fit."""
    whole = _vae_option(inputs, None)
    short, peak, _ = rate(whole[1], limits)
    if short <= 0 and peak <= FITS_SHARE * limits.device:
        return whole
    longest = max(inputs.latent.height, inputs.latent.width)
    sides = [side for side in VAE_TILES if side < longest] or VAE_TILES[-1:]
    return best_of([whole, *[_vae_option(inputs, side) for side in sides]], limits)


def _vae_option(inputs: CostInputs, tile: int | None) -> Option:
    """The VAE as a whole or in tiles, for the picture of an I2V clip too; the last phase is the decode."""
    fields: dict[str, str | int] = {"vae": "tiled", "vae_tile": tile} if tile else {"vae": "whole"}
    decode = phase_costs.vae(inputs, "vae_decode", tile)
    if inputs.spec.kind == "i2v":
        return fields, (phase_costs.vae(inputs, "image_encode", tile), decode)
    return fields, (decode,)
