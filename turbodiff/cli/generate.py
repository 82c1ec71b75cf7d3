"""`turbodiff generate`: one clip from the shell."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from turbodiff.cli import flags
from turbodiff.cli.show import event_line, plan_lines
from turbodiff.spec.events import Event

NOT_FIELDS = {"output", "outputs", "device", "as_json"}


def generate(
    prompt: flags.Prompt,
    output: Annotated[Path | None, typer.Option("-o", "--output", "--save-path", "--save_path")] = None,
    model: flags.Model = "demo",
    seed: flags.Seed = None,
    negative_prompt: flags.Negative = None,
    resolution: flags.Resolution = None,
    aspect: flags.Aspect = None,
    size: flags.Size = None,
    num_frames: flags.Frames = None,
    steps: flags.Steps = None,
    sampler: flags.Sampler = None,
    ode: flags.Ode = False,
    sigma_max: flags.SigmaMax = None,
    guidance: flags.Guidance = None,
    shift: flags.Shift = None,
    boundary: flags.Boundary = None,
    attention: flags.Attention = None,
    topk: flags.Topk = None,
    quant_linear: flags.QuantLinear = None,
    fps: flags.Fps = None,
    image: flags.Image = None,
    fit: flags.Fit = None,
    adaptive_resolution: flags.Adaptive = None,
    loras: flags.Loras = None,
    noise_device: flags.NoiseDevice = None,
    pinned: flags.Pin = None,
    outputs: Annotated[Path, typer.Option("--outputs", help="the library's folder")] = Path("outputs"),
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda:0")] = "auto",
    as_json: flags.Json = False,
) -> None:
    """Turn a sentence (and a picture) into an mp4."""
    fields = {name: value for name, value in locals().items() if name not in NOT_FIELDS}
    fields["loras"] = [flags.read_lora(text) for text in loras or ()]
    from turbodiff.studio import Studio

    printer = JsonPrinter() if as_json else TextPrinter()
    if image and boundary is None and not as_json:
        _say_advice(Path(image), model)
    Studio(outputs=outputs).generate(fields, output=output, device=device, on_event=printer)


def _say_advice(picture: Path, model: str) -> None:
    """What the picture proposes for the handoff of the experts; a proposal, nothing is set."""
    from turbodiff import studio
    from turbodiff.spec.models import find_model

    if find_model(model).two_experts:
        seen = studio.pictures.look(picture)
        numbers = ", ".join(f"{name} {value:g}" for name, value in seen.numbers.items())
        why = seen.key.removeprefix("advice_").replace("_", " ")
        sys.stderr.write(f"{why} ({numbers}): --boundary {seen.boundary:g} --sampler {seen.sampler} is proposed\n")


class JsonPrinter:
    """Each event as its own JSON line."""

    def __call__(self, event: Event) -> None:
        sys.stdout.write(event.line() + "\n")
        sys.stdout.flush()


class TextPrinter:
    """A line per phase and step, with the time left; the file's name last."""

    def __call__(self, event: Event) -> None:
        lines = plan_lines(event.plan) if event.type == "plan" else [event_line(event)]
        for line in filter(None, lines):
            sys.stderr.write(line + "\n")
        if event.type == "result":
            sys.stdout.write(event.path + "\n")
