"""Does a plan's memory suffice for torch's allocator? Each phase's allocations, replayed under the cap that it gives.

The smallest cap under which a phase runs depends on what it allocates (memory_lab/streams.py) and on the allocator, not
on the plan: it is kept (`scripts/bench_guard.py --replay`), and the plan of the day is held to what is kept. Every
phase begins with an empty allocator, as runtime/offload.py leaves it. cuDNN's scratch is not in a stream: its share of
a phase's workspace is taken off the cap, so that it remains for cuDNN.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

from turbodiff.memory_lab import allocator_model, streams
from turbodiff.memory_lab.allocator_model import live_peak_bytes, smallest_cap, works
from turbodiff.memory_lab.streams import Stream
from turbodiff.plan import phase_costs
from turbodiff.plan.allocator_slack import SLACK
from turbodiff.plan.candidates import candidates
from turbodiff.plan.context import plan_context
from turbodiff.plan.hardware import ALL_REFERENCE, Allocator, Kernels, Machine, pretend
from turbodiff.plan.offload_search import cost_inputs
from turbodiff.plan.phase_costs import CostInputs, PhaseCost
from turbodiff.plan.streaming import STREAM_BUFFERS
from turbodiff.spec.attention import SPARSE_ATTENTION
from turbodiff.spec.models import Inventory, find_model
from turbodiff.spec.numbers import MIB
from turbodiff.spec.plan import Levers
from turbodiff.spec.request import TextDtype, make_request
from turbodiff.spec.shapes import VAE_TILES

RESULTS = Path(__file__).resolve().parents[2] / "scripts" / "results"
TURBO = ("wan2.1-1.3b", "wan2.1-14b", "wan2.2-a14b")
REPLAYED = (*TURBO, "wan2.2-t2v-a14b", "wan2.1-i2v-14b")
REFERENCE_KERNELS = ALL_REFERENCE.model_copy(update={"wish": "reference"})


class Cell(NamedTuple):
    """One phase with its levers: what the plan says, what it leaves for the allocator, and the allocations."""

    name: str
    cost: PhaseCost
    cap_bytes: int
    stream: Stream
    mode: Allocator

    @property
    def works(self) -> bool:
        """Whether the allocations find a place under what was planned."""
        return works(self.stream.events(), self.mode, self.cap_bytes)

    @property
    def margin_bytes(self) -> int:
        """What was planned beyond the smallest cap that works; negative where it is too low."""
        return self.cap_bytes - smallest_cap(self.stream.events(), self.mode)


class Row(NamedTuple):
    """What runs, and its phases under each choice of levers."""

    name: str
    inputs: CostInputs
    cells: Callable[[CostInputs], Iterator[Cell]]

    def under(self, mode: Allocator) -> dict[str, Cell]:
        """The cells where torch's allocator works that way, by name; their streams are the same in all modes."""
        return {cell.name: cell for cell in self.cells(replace(self.inputs, allocator=mode))}


class Known(NamedTuple):
    """The smallest caps that work, in MiB by kind of allocator, of a stream with that digest and fingerprint."""

    digest: str
    fingerprint: str
    allocator: str
    caps_mib: dict[Allocator, int]


class Margin(NamedTuple):
    """What was planned beyond the smallest cap that works; `stale`: another code made the stream of that cap."""

    row: str
    cell: str
    mode: Allocator
    n_bytes: int
    stale: bool


def caps_path() -> Path:
    """The newest file of caps in the repository, whose name begins with the day when it was begun."""
    kept = sorted(RESULTS.glob("*-replay.jsonl"))
    return kept[-1] if kept else RESULTS / f"{datetime.now(UTC):%Y-%m-%d}-replay.jsonl"


def read_caps(path: Path) -> dict[str, dict[str, Known]]:
    """What a file keeps, by row and cell; of a row that it has twice the later."""
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []
    return {line["row"]: {name: Known(*found) for name, found in line["cells"].items()} for line in lines}


def caps_line(row: str, cells: dict[str, Known]) -> str:
    """A row for such a file."""
    return json.dumps({"row": row, "cells": cells}, separators=(",", ":")) + "\n"


def _allocator() -> str:
    """Tells the model of torch's allocator from another."""
    model = allocator_model
    sizes = (
        model.GRAIN_BYTES, model.SMALL_BYTES, model.SMALL_SEGMENT_BYTES, model.LARGE_SEGMENT_BYTES,
        model.LARGE_REQUEST_BYTES, model.ROUND_BYTES, model.MAX_SPLIT_BYTES,
    )  # fmt: skip
    return streams.code_digest(model.CachingAllocator, model.Pool, model._could_be, model._segment_bytes, sizes)


def find_caps(row: Row, before: dict[str, Known]) -> dict[str, Known]:
    """The smallest caps of a row's cells; what is known of a stream that did not change is not sought again."""
    found, near, allocator = dict[str, Known](), dict[Allocator, int](), _allocator()
    for name, cell in row.under("native").items():
        digest, old = cell.stream.digest(), before.get(name)
        if old is not None and (old.digest, old.allocator) == (digest, allocator):
            found[name] = old
            continue
        events = cell.stream.events()
        fingerprint = streams.fingerprint(events)
        if old is not None and (old.fingerprint, old.allocator) == (fingerprint, allocator):
            found[name] = old._replace(digest=digest)
            continue
        caps = {mode: smallest_cap(events, mode, near.get(mode, 0)) for mode in SLACK}
        near = {mode: cap - live_peak_bytes(events) for mode, cap in caps.items()}  # alike in the cells of a row
        found[name] = Known(digest, fingerprint, allocator, {mode: cap // MIB for mode, cap in caps.items()})
    return found


def margins(rows: Iterator[Row], kept: dict[str, dict[str, Known]]) -> Iterator[Margin]:
    """The plan of today beside the caps that are known."""
    allocator = _allocator()
    for row in rows:
        known, stale = kept.get(row.name, {}), dict[str, bool]()
        for mode in SLACK:
            for name, cell in row.under(mode).items():
                if name in known:
                    if name not in stale:
                        stale[name] = (known[name].digest, known[name].allocator) != (cell.stream.digest(), allocator)
                    n_bytes = cell.cap_bytes - known[name].caps_mib[mode] * MIB
                    yield Margin(row.name, name, mode, n_bytes, stale[name])


def matrix(models: tuple[str, ...] = REPLAYED) -> Iterator[Row]:
    """Models, sizes, frames, attention kinds, INT8, LoRAs and references; all models of Wan have one text encoder and
    one VAE, whose two kinds of convolutions are there."""
    card = pretend(Machine(torch="2.11.0"), 80.0)
    context = plan_context(card, Inventory())

    def inputs_of(kernels: Kernels | None = None, **fields: Any) -> CostInputs:
        request = make_request({"prompt": "a cat", **fields})
        choice = next(candidates(request, card, Inventory(), context.total_bytes, frozenset()))
        here = card.model_copy(update={"kernels": kernels or Kernels()})
        return cost_inputs(request, choice, plan_context(here, Inventory()))

    for model, size, frames, int8 in product(models, ("480p", "720p"), (17, 81), ("off", "on")):
        spec = find_model(model)
        picture = {"image": "cat.jpg"} if spec.kind == "i2v" else {}
        clip: dict[str, Any] = {
            "model": model,
            "resolution": size,
            "num_frames": frames,
            "quant_linear": int8,
            **picture,
        }
        for attention in ("dense", "sage", "sla", "sagesla") if spec.turbo else ("dense", "sage"):
            name = f"{model} {size} {frames} {int8} {attention}"
            yield Row(name, inputs_of(attention=attention, **clip), network_cells)
            if model in TURBO and (frames == 17 or attention not in SPARSE_ATTENTION):
                # sparse references take a step per 128 queries
                plain = inputs_of(REFERENCE_KERNELS, attention=attention, **clip)
                yield Row(f"{name} references", plain, partial(network_cells, blocks=2))
            if model in TURBO and int8 == "on":
                lora = inputs_of(attention=attention, loras=[{"path": "any.safetensors"}], **clip)
                yield Row(f"{name} LoRA", lora, network_cells)
    for size, frames in product(("480p", "720p"), (17, 81, 161)):
        clip = {"resolution": size, "num_frames": frames, "image": "cat.jpg"}
        yield Row(f"vae {size} {frames}", inputs_of(model="wan2.2-a14b", **clip), vae_cells)
        yield Row(f"words {size} {frames}", inputs_of(model="wan2.1-i2v-14b", **clip), words_cells)


def denoise_cell(inputs: CostInputs, levers: Levers, blocks: int | None = None) -> Cell:
    """All steps of one expert; `blocks` of its blocks run (None: all), of the others text and weights are there."""
    expert, many = inputs.experts[0], inputs.spec.dit.num_layers
    work, streamed = phase_costs.step_work(inputs, levers.ffn_chunks, levers.text_keys), levers.experts == "streamed"
    cost = phase_costs.denoise(inputs, expert, levers.experts, levers.blocks_resident, work)
    inside = inputs.attention_bytes - math.ceil(phase_costs.ATTENDING_UNITS * inputs.unit) - inputs.state_bytes
    half = inputs.unit // 2  # INT8 rows of q and of k: half a copy of the stream each
    networks = len(set(inputs.experts)) if levers.experts == "resident" else 1
    run = streams.NetworkRun(
        inputs.int8, inputs.lora > 0, inputs.attention, levers.ffn_chunks, levers.text_keys == "kept", inputs.forwards,
        (*(inside // half * (half,)), inside % half), inputs.kernels, min(many, blocks or many),
        passing=STREAM_BUFFERS if streamed else 0, networks=0 if streamed else networks,
        resident=levers.blocks_resident,
    )  # fmt: skip
    said = f"{levers.experts} {levers.blocks_resident}" if streamed else levers.experts
    said = f"denoise {said}, chunks {levers.ffn_chunks}, text keys {levers.text_keys}"
    stream = Stream(streams.network, (inputs.spec, inputs.shape, run))
    return Cell(said, cost, cost.peak_bytes - inputs.context_bytes, stream, inputs.allocator)


def vae_cell(inputs: CostInputs, name: Literal["vae_decode", "image_encode"], tile: int | None) -> Cell:
    """Decoding a clip, or encoding a picture and the empty frames after it."""
    cost = phase_costs.vae(inputs, name, tile)
    scratch = cost.workspace_bytes - cost.slack_bytes - phase_costs.workspace(inputs)
    stream = Stream(streams.vae, (inputs.spec.vae, inputs.shape, tile, name == "vae_decode"))
    said = f"{name.partition('_')[0]} {f'tiles of {tile}' if tile else 'whole'}"
    return Cell(said, cost, cost.peak_bytes - inputs.context_bytes - scratch, stream, inputs.allocator)


def text_cell(inputs: CostInputs, lever: Literal["resident", "streamed"], dtype: TextDtype = "bf16") -> Cell:
    """The text encoder over a prompt of 512 tokens: all of it on the device, or a layer at a time."""
    cost = phase_costs.text_encode(inputs, lever, dtype)
    stream = Stream(streams.text, (inputs.spec.text_encoder, lever == "streamed", dtype))
    said = f"text {lever if dtype == 'bf16' else dtype}"
    return Cell(said, cost, cost.peak_bytes - inputs.context_bytes, stream, inputs.allocator)


def picture_cell(inputs: CostInputs) -> Cell:
    """CLIP's encoder over the picture of an I2V clip."""
    assert inputs.spec.image_encoder is not None
    cost = phase_costs.image_embed(inputs)
    stream = Stream(streams.picture, (inputs.spec.image_encoder, inputs.shape))
    return Cell("picture resident", cost, cost.peak_bytes - inputs.context_bytes, stream, inputs.allocator)


def vae_cells(inputs: CostInputs) -> Iterator[Cell]:
    """The VAE as a whole and in tiles, decoding and, of an I2V clip, encoding."""
    for tile in (None, *VAE_TILES):
        yield vae_cell(inputs, "vae_decode", tile)
        if inputs.spec.kind == "i2v":
            yield vae_cell(inputs, "image_encode", tile)


def network_cells(inputs: CostInputs, blocks: int | None = None) -> Iterator[Cell]:
    """Placements of the blocks and chunks of the feed-forward."""
    both, many = len(set(inputs.experts)) > 1, inputs.spec.dit.num_layers - STREAM_BUFFERS
    yield denoise_cell(inputs, Levers(experts="streamed", text_keys="recomputed"), blocks)
    for chunks in (1, 4):
        for experts, resident in (("resident", 0), *((("swapped", 0),) if both else ()), ("streamed", 0),
                                  ("streamed", many // 2)):  # fmt: skip
            yield denoise_cell(inputs, Levers(experts=experts, blocks_resident=resident, ffn_chunks=chunks), blocks)


def words_cells(inputs: CostInputs) -> Iterator[Cell]:
    """The text encoder with each of its levers, and the picture's where there is one."""
    yield text_cell(inputs, "resident")
    yield text_cell(inputs, "streamed")
    yield text_cell(inputs, "resident", "int8")
    yield text_cell(inputs, "resident", "nf4")
    if inputs.spec.image_encoder:
        yield picture_cell(inputs)
