"""`webui_test.log`, the run log: per job its request, plan, loading, steps, peaks and verdict, in words.

On failure the cause and what to try. `turbodiff selftest` writes here too.
"""

from collections.abc import Iterator

from turbodiff.spec.clips import ClipResult
from turbodiff.spec.events import Event
from turbodiff.spec.models import display_name_of
from turbodiff.spec.numbers import GB, gib, seconds
from turbodiff.spec.request import Request
from turbodiff.spec.wording import Words


def request_line(request: Request, attempt: int) -> str:
    """The first line of an attempt."""
    size = f"{request.width}x{request.height}"
    seed = "random" if request.seed is None else request.seed
    name = display_name_of(request.model)
    words = f"attempt {attempt}: {request.kind} {name} {size} {request.num_frames} frames"
    tuning = f"{request.steps} steps {request.sampler} attention {request.attention} topk {request.topk}"
    return f"{words} {tuning} quant_linear {request.quant_linear} seed {seed} prompt {request.prompt!r}"


def run_lines(event: Event, planned_bytes: int | None = None) -> Iterator[str]:
    """What an event adds to the run log."""
    match event.type:
        case "plan":
            plan = event.plan
            need = f"needs {gib(plan.peak_bytes)} of {gib(plan.budget_bytes)}"
            yield f"plan: {plan.band} on {plan.device_name}, {need}, about {seconds(plan.seconds)}"
            for change in plan.changes:
                yield f"plan changed {change.field}: {change.from_value} -> {change.to_value}"
        case "phase" if event.state == "done":
            held = f", peak {gib(event.peak_bytes)}" if event.peak_bytes else ""
            held += f" of {gib(planned_bytes)} planned" if event.peak_bytes and planned_bytes else ""
            yield f"{event.name} done in {seconds(event.seconds or 0.0)}{held}"
        case "phase":
            yield f"{event.name} starts"
        case "step":
            expert = f" {event.expert}" if event.expert else ""
            yield f"step {event.i}/{event.n}{expert} t {event.t:.3f} {event.dt_s:.2f} s"
        case "link":
            yield f"{event.cards} cards send each other {event.bytes_s / GB:.1f} GB/s each, measured"
        case "notice":
            yield event.text
        case "result":
            size = f"{event.width}x{event.height}"
            yield f"verdict: done, {event.path} {event.frames} frames {size} sha256 {event.sha256[:12]}"
            yield from (f"[WARNING] verdict: {line}" for line in flaw_lines(event, Words("en")))
        case "error":
            cause = {"got ": event.got, "expected ": event.expected, "try: ": event.try_instead}
            told = [name + text for name, text in cause.items() if text]
            yield "; ".join([f"[ERROR] verdict: {event.code}: {event.what}", *told])


def flaw_lines(result: ClipResult, words: Words) -> list[str]:
    """What a finished clip may be wrong with, and the knob that helps."""
    return [words.or_else(f"flaw.{flaw}", flaw) for flaw in result.warnings]
