"""`webui_test.log`, the run log: per job its request, plan, loading, steps, peaks and verdict, in words.

On failure the cause and what to try. `turbodiff selftest` writes here too.
"""

from collections.abc import Iterator
from typing import Any

from turbodiff.spec.events import Event
from turbodiff.spec.models import display_name_of
from turbodiff.spec.numbers import gib, seconds

# what a sound clip may still look like (media/flaws.py), and what helps
FLAWS = {
    "black": "every frame is black; try: another seed, or attention dense",
    "frozen": "nothing moves; try: say what moves, with a verb",
    "noisy_start": "the first frames look noisy; try: Boundary 0.7 or SDE with the same seed",
}


def request_line(request: dict[str, Any], attempt: int) -> str:
    """The first line of an attempt."""
    size = f"{request['width']}x{request['height']}"
    seed = "random" if request.get("seed") is None else request["seed"]
    name = display_name_of(request["model"])
    words = f"attempt {attempt}: {request['kind']} {name} {size} {request['num_frames']} frames"
    tuning = f"{request['steps']} steps {request['sampler']} attention {request['attention']} topk {request['topk']}"
    return f"{words} {tuning} quant_linear {request['quant_linear']} seed {seed} prompt {request['prompt']!r}"


def run_lines(event: Event, planned_bytes: int | None = None) -> Iterator[str]:
    """What an event adds to the run log."""
    fields = event.fields
    match event.type:
        case "plan":
            yield from plan_lines(fields["plan"])
        case "phase" if fields.get("state") == "done":
            peak = fields.get("peak_bytes")
            held = f", peak {gib(peak)}" if peak else ""
            held += f" of {gib(planned_bytes)} planned" if peak and planned_bytes else ""
            yield f"{fields['name']} done in {seconds(fields.get('seconds') or 0.0)}{held}"
        case "phase":
            note = f": {fields['note']}" if fields.get("note") else ""
            yield f"{fields['name']} starts{note}"
        case "step":
            expert = f" {fields['expert']}" if fields.get("expert") else ""
            yield f"step {fields['i']}/{fields['n']}{expert} t {fields.get('t', 0):.3f} {fields.get('dt_s', 0):.2f} s"
        case "notice":
            yield str(fields.get("text", ""))
        case "result":
            size = f"{fields.get('width')}x{fields.get('height')}"
            yield f"verdict: done, {fields['path']} {fields.get('frames')} frames {size} sha256 {fields['sha256'][:12]}"
            yield from (f"[WARNING] verdict: {line}" for line in flaw_lines(fields))
        case "error":
            yield error_line(fields)


def flaw_lines(result: dict[str, Any]) -> list[str]:
    """What a finished clip may be wrong with, and the knob that helps."""
    return [FLAWS.get(flaw, flaw) for flaw in result.get("warnings", ())]


def plan_lines(plan: dict[str, Any]) -> Iterator[str]:
    """The plan: what runs, what it needs, what was changed."""
    need, budget = gib(plan["peak_bytes"]), gib(plan["budget_bytes"])
    total_s = sum(phase["seconds"] for phase in plan["phases"])
    yield f"plan: {plan['band']} on {plan['device_name']}, needs {need} of {budget}, about {seconds(total_s)}"
    for change in plan.get("changes", ()):
        yield f"plan changed {change['field']}: {change['from_value']} -> {change['to_value']}"


def error_line(fields: dict[str, Any]) -> str:
    """Cause and remedy in one line; memory failures say OOM."""
    parts = [f"[ERROR] verdict: {fields.get('code')}: {fields.get('what')}"]
    parts += [f"{name} {fields[name]}" for name in ("got", "expected") if fields.get(name)]
    parts += [f"try: {fields['try_instead']}"] if fields.get("try_instead") else []
    return "; ".join(parts)
