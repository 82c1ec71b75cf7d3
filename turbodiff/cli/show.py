"""How events and plans look in a shell: English, and a plan's reasons in Chinese where that is spoken."""

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from turbodiff.diagnostics.run_log import flaw_lines
from turbodiff.gpu.holders import CardHolders
from turbodiff.plan.hardware import GpuFacts, Machine
from turbodiff.spec.events import Event
from turbodiff.spec.models import ModelSpec, find_model
from turbodiff.spec.numbers import gib, seconds
from turbodiff.spec.plan import Alternative, Plan
from turbodiff.spec.wording import Words

PHASES = {
    "text_encode": "reading the prompt",
    "image_encode": "reading the picture",
    "denoise": "denoising",
    "denoise_high": "denoising (high-noise expert)",
    "denoise_low": "denoising (low-noise expert)",
    "vae_decode": "decoding frames",
    "write": "writing and checking the file",
}


def plan_lines(plan: Plan) -> list[str]:
    """What will run, whether it fits, and what was lowered to make it fit."""
    request = plan.request
    name = find_model(request.model).display_name
    lines = [
        f"{name}  {request.width}x{request.height}  {request.num_frames} frames  {request.steps} steps"
        f"  seed {request.seed}  attention {request.attention}  on {plan.device_name}",
        f"peak {gib(plan.peak_bytes)} of {gib(plan.budget_bytes)}: {plan.band}",
    ]
    lossy = [change for change in plan.changes if change.lossy]
    return lines + [f"changed to fit: {c.field} {c.from_value} -> {c.to_value}" for c in lossy]


def event_line(event: Event) -> str:
    """One event as one line, or "" for those that need none."""
    if event.type == "phase" and event.state == "start":
        return f"{PHASES.get(event.name, event.name)} ..."
    if event.type == "step":
        return f"  step {event.i}/{event.n}  {event.dt_s:.1f} s a step, {seconds(event.eta_s)} left"
    if event.type == "result":
        done = f"done in {seconds(event.seconds or 0.0)}: {event.frames} frames, {event.width}x{event.height}"
        return "\n".join([done, *(f"note: {line}" for line in flaw_lines(event))])
    if event.type == "wait":
        return f"waiting for {gib(event.need_bytes)} of memory, {gib(event.free_bytes)} free"
    return ""


def plan_table(plan: Plan, words: Words) -> None:
    """A plan with its phases as a table, the phase that binds marked; then why, and what else there is."""
    console = Console(highlight=False, soft_wrap=True)
    for line in plan_lines(plan):
        console.print(line, markup=False)
    table = Table(
        "phase", "weights", "activations", "workspace", "peak", "host RAM", "seconds", box=None, pad_edge=False
    )
    for phase in plan.phases:
        mark = " <- binds" if phase is plan.binding_phase else ""
        sizes = (phase.weights_bytes, phase.activations_bytes, phase.workspace_bytes, phase.peak_bytes)
        table.add_row(
            phase.name + mark, *(gib(size) for size in sizes), gib(phase.host_ram_bytes), f"{phase.seconds:.1f}"
        )
    console.print(table)
    for reason in plan.reasons:
        console.print(f"- {words.reason(reason.key, reason.numbers)}", markup=False)
    if plan.alternatives:
        console.print(alternatives_line(plan, words), markup=False)


def alternatives_line(plan: Plan, words: Words) -> str:
    """ "or instead: 81 frames at 480p: 18.9 GiB, 41 s; 49 at 720p: 21.7 GiB, 58 s"."""
    wish = plan.request.model_dump() | {change.field: change.from_value for change in plan.changes}
    options = [_option(other, wish, plan, words, first=not index) for index, other in enumerate(plan.alternatives)]
    return words("option.instead", options="; ".join(options))


def _option(other: Alternative, wish: dict[str, Any], plan: Plan, words: Words, *, first: bool) -> str:
    fields = wish | {change.field: change.to_value for change in other.changes}
    custom = fields["resolution"] == "custom"
    size = f"{fields['width']}x{fields['height']}" if custom else fields["resolution"]
    text = words("option.first" if first else "option.further", frames=fields["num_frames"], size=size)
    if fields["quant_linear"] == "on" and plan.request.quant_linear != "on":
        text = words("option.int8", option=text)
    if fields["model"] != plan.request.model:
        text = words("option.model", option=text, model=find_model(fields["model"]).display_name)
    if fields["steps"] != plan.request.steps:
        text = words("option.steps", option=text, steps=fields["steps"])
    text = words("option.needs", option=text, peak=words.gib(other.peak_bytes), time=words.seconds(other.seconds))
    if other.download_bytes:
        text = words("option.download", option=text, size=words.gib(other.download_bytes))
    return text


def trace_table(plan: Plan, traced: dict[str, int]) -> None:
    """Activations by formula beside those that the real modules allocated on meta tensors."""
    table = Table("phase", "formula", "traced", box=None, pad_edge=False)
    for phase in plan.phases:
        if phase.name in traced:
            table.add_row(phase.name, gib(phase.activations_bytes), gib(traced[phase.name]))
    Console(highlight=False, soft_wrap=True).print(table)


def machine_table(machine: Machine, held: Iterable[CardHolders] = ()) -> None:
    """GPUs with who holds their memory, and RAM; what is unknown says so."""
    console = Console(highlight=False, soft_wrap=True)
    if not machine.gpus:
        console.print(f"no GPU ({machine.gpu_state}) {machine.gpu_error}".rstrip(), markup=False)
    for card in machine.gpus:
        console.print(_card_line(card, machine.driver), markup=False)
        for holders in held:
            if holders.uuid == card.uuid:
                _holders_table(console, holders)
    console.print(f"RAM {_known(machine.ram_available_bytes)} free of {_known(machine.ram_total_bytes)}")


def _card_line(card: GpuFacts, driver: str | None) -> str:
    parts = [f"cuda:{card.index} {card.name}", card.uuid, "MIG slice" if card.mig else ""]
    parts += [f"{_known(card.free_bytes)} free of {_known(card.total_bytes)}", f"driver {driver or 'unknown'}"]
    parts += [f"{card.utilisation:.0%} busy"] if card.utilisation is not None else []
    parts += [f"{card.power_w:.0f} W"] if card.power_w is not None else []
    parts += ["a display is attached"] if card.display else []
    return "  ".join(part for part in parts if part)


def _holders_table(console: Console, card: CardHolders) -> None:
    table = Table("", "holds", "pid", "who", "age", "", "to end it", box=None, pad_edge=False)
    for row in card.rows:
        age = "" if row.age_s is None else seconds(row.age_s)
        idle = "" if row.idle is None else "idle" if row.idle else "busy"
        who = row.kind.replace("_", " ") + (f": {row.command or row.name}" if row.command or row.name else "")
        table.add_row("", _known(row.bytes), str(row.pid or ""), who, age, idle, row.kill_line)
    if card.rows:
        console.print(table, markup=False)
    if card.host_command:
        console.print(f"  the driver lists no processes here; on the host: {card.host_command}", markup=False)


def _known(n_bytes: int | None) -> str:
    return "unknown" if n_bytes is None else gib(n_bytes)


def models_table(states: list[tuple[ModelSpec, list[str]]], fits: Mapping[str, str]) -> None:
    """Models with whether each fits this machine, by name, and with what is missing of it."""
    console = Console(highlight=False, soft_wrap=True)
    for spec, missing in states:
        ready = "ready" if not missing else "missing files"
        console.print(f"{spec.display_name:14} {spec.kind}  {ready:13}  {fits[spec.name]}", markup=False)
        console.print(f"    {spec.about}", markup=False)
        for line in missing:
            console.print(f"    {line}", markup=False)
