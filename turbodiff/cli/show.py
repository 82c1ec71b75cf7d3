"""How events and plans look in a shell, in its language."""

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TextIO

from rich.console import Console
from rich.table import Table

from turbodiff.diagnostics.run_log import flaw_lines
from turbodiff.spec.events import Event
from turbodiff.spec.models import find_model
from turbodiff.spec.numbers import gib
from turbodiff.spec.plan import Plan, Reason
from turbodiff.spec.schedules import SCHEDULE_REASONS, WARNINGS, Schedule
from turbodiff.spec.text import printable
from turbodiff.spec.wording import Words, language_of, shell_language

if TYPE_CHECKING:
    from turbodiff.plan.hardware import Machine

ABOUT_FILES = ("network_files", "package_missing", "expert_untold", "download", "download_parts")


def words_here(lang: str | None = None) -> Words:
    """The sentences in a language, by default that of the shell."""
    return Words(language_of(lang) if lang else shell_language())


def why_no_gpu(machine: "Machine", words: Words) -> str:
    """That there is no card to use, and why."""
    sentence = words.or_else(f"reason.{machine.gpu_reason}", "", got=machine.gpu_error)
    return f"{words('value.no_gpu')} ({machine.gpu_state}){': ' if sentence else ''}{sentence}"


def print_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows below their heads; brackets and colons in them are text."""
    table = Table(*head, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*map(printable, row))
    Console(highlight=False, soft_wrap=True, markup=False, emoji=False).print(table)


def print_lines(lines: Iterable[str], stream: TextIO | None = None) -> None:
    """Print each as one line, on standard output unless told otherwise: prompts, names of files and of tensors are
    other people's text, of which a terminal must obey nothing."""
    (stream or sys.stdout).writelines(printable(line) + "\n" for line in lines)


def print_raw(text: str) -> None:
    """Print what a program may read on, a path or a table, as it is; at a terminal as `print_lines` does."""
    if sys.stdout.isatty():
        print_lines(text.split("\n"))
    else:
        sys.stdout.write(f"{text}\n")


def is_said_first(reason: Reason) -> bool:
    """Whether a reason is said wherever a plan is: which files, what is not here, which sampler, what cannot work, that
    no card can be used."""
    return reason.key in (*SCHEDULE_REASONS, *WARNINGS, *ABOUT_FILES) or reason.key.startswith("gpu_")


def plan_lines(plan: Plan, words: Words) -> list[str]:
    """What will run, whether it fits, what was lowered to make it fit; which sampler and why."""
    request = plan.request
    name = find_model(request.model).display_name
    asked = request.model_dump(include={"steps", "sampler", "attention"})
    seed = words("shell.random") if request.seed is None else request.seed
    size, frames = f"{request.width}x{request.height}", request.num_frames
    band = words(f"shell.band_{plan.band}")
    lines = [
        words("shell.plan", model=name, size=size, frames=frames, device=plan.device_name, seed=seed, **asked),
        words("shell.plan_peak", peak=gib(plan.peak_bytes), budget=gib(plan.budget_bytes), band=band),
    ]
    sizes = [(share, {"peak": gib(share.peak_bytes), "budget": gib(share.budget_bytes)}) for share in plan.shares]
    lines += [words("shell.plan_card", device=share.device, name=share.device_name, **told) for share, told in sizes]
    lossy = [change for change in plan.changes if change.lossy]
    lines += [words("shell.changed", field=c.field, before=c.from_value, now=c.to_value) for c in lossy]
    about = [reason for reason in plan.reasons if is_said_first(reason)]
    return lines + [words.say(reason) for reason in about]


def event_lines(event: Event, words: Words) -> list[str]:
    """An event as lines, [] for those that need none."""
    match event.type:
        case "plan":
            return plan_lines(event.plan, words)
        case "phase" if event.state == "start":
            return [f"{words.or_else(f'phase.doing_{event.name}', event.name)} ..."]
        case "step":
            times = {"step": words.seconds(event.dt_s), "left": words.seconds(event.eta_s)}
            return [words("shell.step", i=event.i, n=event.n, **times)]
        case "result":
            size, took = f"{event.width}x{event.height}", words.seconds(event.seconds or 0.0)
            done = words("shell.done", seconds=took, frames=event.frames, size=size)
            return [done, *(f"{words('value.notice')}: {line}" for line in flaw_lines(event, words))]
        case "notice":
            return [f"{words('value.notice')}: {words.notice(event)}"]
        case "wait":
            return [words("shell.wait", need=gib(event.need_bytes), free=gib(event.free_bytes))]
    return []


def plan_table(plan: Plan, words: Words) -> None:
    """Print a plan with its phases as a table, the phase that binds marked; then why, and what else there is."""
    print_lines(plan_lines(plan, words))
    rows = []
    for phase in plan.phases:
        name = words.or_else(f"phase.{phase.name}", phase.name) if words.lang != "en" else phase.name
        name = words("shell.binds", phase=name) if phase is plan.binding_phase else name
        sizes = (phase.weights_bytes, phase.activations_bytes, phase.workspace_bytes, phase.peak_bytes)
        host_ram = gib(phase.host_ram_bytes)
        rows.append((name, *(gib(size) for size in sizes), host_ram, f"{phase.seconds:.1f}"))
    heads = ("phase", "weights", "activations", "workspace", "peak", "host_ram", "seconds")
    print_table([words(f"shell.{head}") for head in heads], rows)
    reasons = [reason for reason in plan.reasons if not is_said_first(reason)]
    print_lines(f"- {words.say(reason)}" for reason in reasons)
    if plan.alternatives:
        print_lines([alternatives_line(plan, words)])


def alternatives_line(plan: Plan, words: Words) -> str:
    """ "or instead: 81 frames at 480p: 18.9 GiB, 41 s; 49 at 720p: 21.7 GiB, 58 s"."""
    changes = [change for change in plan.changes if change.lossy or change.field not in Schedule._fields]
    wish = plan.request.model_dump() | {change.field: change.from_value for change in changes}
    options: list[str] = []
    for other in plan.alternatives:
        fields = wish | {change.field: change.to_value for change in other.changes}
        custom = fields["resolution"] == "custom"
        size = f"{fields['width']}x{fields['height']}" if custom else fields["resolution"]
        text = words("option.further" if options else "option.first", frames=fields["num_frames"], size=size)
        if fields["quant_linear"] == "on" and plan.request.quant_linear != "on":
            text = words("option.int8", option=text)
        if fields["model"] != plan.request.model:
            text = words("option.model", option=text, model=find_model(fields["model"]).display_name)
        if fields["steps"] != plan.request.steps:
            text = words("option.steps", option=text, steps=fields["steps"])
        text = words("option.needs", option=text, peak=words.gib(other.peak_bytes), time=words.predicted(other.seconds))
        if other.download_bytes:
            text = words("option.download", option=text, size=words.gib(other.download_bytes))
        options.append(text)
    return words("option.instead", options="; ".join(options))
