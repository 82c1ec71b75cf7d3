"""`turbodiff generate` and `turbodiff plan`: one clip from the shell, and whether it fits."""

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from turbodiff.cli.flags import OUTPUTS, Json, Outputs, open_studio, takes_request
from turbodiff.spec.environment import expand
from turbodiff.spec.errors import OutputError

if TYPE_CHECKING:
    from turbodiff.spec.events import Event

OF_THE_CLIP = ("model", "image", "fit", "adaptive_resolution", "resolution", "aspect", "size", "fps")
NOT_PLANNED = (
    "negative_prompt",
    "ode",
    "fps",
    "fit",
    "adaptive_resolution",
    "noise_device",
)


@takes_request
def generate(
    *,
    output: Annotated[Path | None, typer.Option("-o", "--output", "--save-path", "--save_path")] = None,
    fields: dict[str, object],
    outputs: Outputs = OUTPUTS,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda:0")] = "auto",
    as_json: Json = False,
) -> None:
    """Turn a sentence (and a picture) into an mp4."""
    from turbodiff.cli.show import print_lines, words_here
    from turbodiff.spec.models import find_model
    from turbodiff.studio import pictures
    from turbodiff.weights.lora_facts import lora_facts

    words = words_here()
    picture, proposed = fields["image"], fields["boundary"] is None and not as_json
    if isinstance(picture, str) and picture and proposed and find_model(str(fields["model"])).two_experts:
        seen = pictures.look(Path(picture))
        numbers = ", ".join(f"{name} {value:g}" for name, value in seen.numbers.items())
        proposal = f"--boundary {seen.boundary:g} --sampler {seen.sampler}"
        told = words("shell.advice", why=words(f"shell.{seen.key}"), numbers=numbers, proposal=proposal)
        print_lines([told], sys.stderr)

    loras = fields["loras"] if find_model(str(fields["model"])).two_experts else []
    for row in loras if isinstance(loras, list) else []:
        side = lora_facts(Path(row["path"])).expert if "expert" not in row else ""
        if side in ("high", "low"):
            proposal = f"--lora {row['path']}:{row.get('strength', 1):g}:{side}"
            print_lines([f"{words(f'value.lora_is_{side}')}: {proposal}"], sys.stderr)

    open_studio(None, outputs).generate(fields, output=output, device=device, on_event=partial(tell, as_json))


def tell(as_json: bool, event: "Event") -> None:
    """Each event as its own JSON line; or a line per phase and step, and the file's name last."""
    from turbodiff.cli.show import event_lines, print_lines, print_raw, words_here

    if as_json:
        sys.stdout.write(event.line() + "\n")
        sys.stdout.flush()
        return
    print_lines(event_lines(event, words_here()), sys.stderr)
    if event.type == "result":
        print_raw(event.path)


@partial(takes_request, left_out=OF_THE_CLIP)
def extend(
    *,
    clip: Annotated[Path, typer.Argument(help="the mp4 to go on from; it stays as it is")],
    output: Annotated[Path | None, typer.Option("-o", "--output", "--save-path", "--save_path")] = None,
    fields: dict[str, object],
    model: Annotated[str | None, typer.Option("--model", help="left out: the clip's own, or its picture model")] = None,
    outputs: Outputs = OUTPUTS,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda:0")] = "auto",
    as_json: Json = False,
) -> None:
    """Go on where a clip ends: one mp4 of the clip and what the sentence says next."""
    source = expand(str(clip)).absolute()
    if output is not None and expand(str(output)).resolve() == source.resolve():
        raise OutputError("the clip would be replaced", code="extend_same", field="output", got=output.name)
    fields |= {"continues": str(source), **({"model": model} if model else {})}
    open_studio(None, outputs).generate(fields, output=output, device=device, on_event=partial(tell, as_json))


@partial(takes_request, left_out=NOT_PLANNED)
def plan(
    *,
    fields: dict[str, object],
    pretend_vram: Annotated[
        float | None, typer.Option("--pretend-vram", help="plan for a card of this many GiB")
    ] = None,
    machine_file: Annotated[
        Path | None, typer.Option("--machine", help="plan for a machine described in a file")
    ] = None,
    trace: Annotated[
        bool, typer.Option("--trace", help="beside the formulas, count what the real modules allocate")
    ] = False,
    lang: Annotated[
        str | None, typer.Option("--lang", help="en or zh for the reasons; left out: as $LANG says")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what a request needs on this machine, phase by phase, without running anything."""
    from turbodiff.cli.show import ABOUT_FILES, plan_table, print_lines, print_table, why_no_gpu, words_here
    from turbodiff.gpu.probe import machine_now
    from turbodiff.plan.hardware import pretend, read_machine
    from turbodiff.plan.planner import Refusal
    from turbodiff.spec.errors import DoesNotFitError
    from turbodiff.spec.numbers import gib

    machine = read_machine(machine_file) if machine_file is not None else machine_now()
    machine = machine if pretend_vram is None else pretend(machine, pretend_vram)
    try:
        made = open_studio(None).plan(fields, machine)
    except DoesNotFitError as error:
        words = words_here(lang)
        if machine.gpu_state not in ("ok", "none"):  # with the card it might fit
            print_lines([why_no_gpu(machine, words)], sys.stderr)
        reasons = error.plan.reasons if isinstance(error, Refusal) else ()
        print_lines([words.say(reason) for reason in reasons if reason.key in ABOUT_FILES], sys.stderr)
        raise
    if as_json:
        sys.stdout.write(made.model_dump_json() + "\n")
    else:
        plan_table(made, words_here(lang))
    if trace:
        from turbodiff.memory_lab.dry_run import dry_run

        traced = dry_run(made)
        counted = [phase for phase in made.phases if phase.name in traced]
        rows = [(phase.name, gib(phase.activations_bytes), gib(traced[phase.name])) for phase in counted]
        words = words_here(lang)
        print_table([words(f"shell.{head}") for head in ("phase", "formula", "traced")], rows)
