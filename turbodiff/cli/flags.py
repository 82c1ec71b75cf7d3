"""Every field of a Request as a flag, once, for all commands that take a request; and which folders a command uses."""

import contextlib
import functools
import inspect
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypedDict

import typer

from turbodiff.spec.environment import expand
from turbodiff.spec.errors import FileError, RequestError
from turbodiff.spec.files import check_file
from turbodiff.spec.models import all_models

if TYPE_CHECKING:
    from turbodiff.studio import Studio


class PageFlags(TypedDict):
    """Settings of a command."""

    add_help_option: bool
    context_settings: dict[object, object]


def model_names(bundled: bool = True) -> str:
    """The display names of the models for `--help`, those of downloads alone with `bundled` False; where their table
    cannot be read, which every command says of itself, how to ask for them."""
    with contextlib.suppress(FileError):
        return ", ".join(spec.display_name for spec in all_models() if bundled or not spec.bundled)
    return "turbodiff models list"


ModelName = Annotated[str, typer.Argument(help=model_names(bundled=False))]
Json = Annotated[bool, typer.Option("--json", help="one JSON object a line instead of text")]
StateDir = Annotated[Path | None, typer.Option("--state-dir", help="queue and caches; default: the XDG state folder")]
Outputs = Annotated[Path, typer.Option("--outputs", help="the library's folder")]
OUTPUTS = Path("outputs")

# a command that leaves its flags, --help too, to the parser of the page's (spec/page_flags.py)
PAGE_FLAGS: PageFlags = {
    "add_help_option": False,
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
}

PROMPT = typer.Argument(help='What to show, e.g. "a red circle moves right on a black background"')
# field of a request (spec/request.py) -> its flag, other names of it, what --help says; values are checked there
FLAGS: Mapping[str, tuple[str, ...]] = {
    "model": ("--model", model_names()),
    "seed": ("--seed", "0 .. 2^53-1; left out or -1: random"),
    "negative_prompt": ("--negative-prompt", "where there is guidance; left out: Wan's own"),
    "resolution": ("--resolution", "480p, 720p; the demo: 128"),
    "aspect": ("--aspect", "--aspect-ratio", "--aspect_ratio", "16:9, 9:16, 1:1, 4:3, 3:4"),
    "size": ("--size", "WIDTHxHEIGHT, multiples of 16, instead of a resolution"),
    "num_frames": ("--frames", "--num-frames", "--num_frames", "4n+1: 17, 49, 81"),
    "steps": ("--steps", "--num-steps", "--num_steps", "1-4 for Turbo weights, 30-50 for plain Wan; left out: auto"),
    "sampler": ("--sampler", "auto (follows the weights), sde, ode (sharper, less robust), unipc, euler, lcm, dmd"),
    "weights_are": ("--weights-are", "auto, rcm (Turbo), base (plain Wan), step-distilled: over what the files tell"),
    "ode": ("--ode", "the same as --sampler ode"),
    "sigma_max": ("--sigma-max", "--sigma_max", "noise of the first step"),
    "guidance": ("--guidance", "classifier-free guidance with unipc, euler, lcm; left out: auto"),
    "guidance_low": ("--guidance-low", "the same for the low-noise expert; left out: auto"),
    "shift": ("--shift", "timestep shift with unipc, euler, lcm; left out: auto"),
    "boundary": ("--boundary", "A14B: the low-noise expert runs where t < boundary"),
    "attention": ("--attention", "--attention-type", "--attention_type", "auto, dense, sage, sla, sagesla"),
    "topk": ("--topk", "--sla-topk", "--sla_topk", "SLA TopK: share of key blocks, 0.1, 0.15"),
    "quant_linear": ("--quant-linear/--no-quant-linear", "--quant_linear", "INT8 linears; left out: auto"),
    "text_dtype": ("--text-dtype", "text encoder: auto, bf16, int8, nf4 (bitsandbytes); the last two differ a little"),
    "fps": ("--fps", "frames per second of the file, 16"),
    "smooth_fps": ("--smooth-fps", "24, 30, 60: frames in between are made for the file; 0: none"),
    "interpolator": (
        "--interpolator", "RIFE for that, a file in the folder interpolators of the weights; needs ccvfi; or: ffmpeg",
    ),
    "upscale": ("--upscale", "1, 2, 4: how many times as wide and high the file is"),
    "upscaler": ("--upscaler", "a network for that, a file in the folder upscalers of the weights; left out: Lanczos"),
    "image": ("--image", "--image-path", "--image_path", "the picture to start from"),
    "end_image": ("--end-image", "--last-image", "--last_image", "the picture to end with: Wan2.2 A14B"),
    "fit": ("--fit", "crop, pad or stretch, with --no-adaptive-resolution"),
    "adaptive_resolution": (
        "--adaptive-resolution/--no-adaptive-resolution", "--adaptive_resolution", "keep the picture's aspect",
    ),
    "loras": ("--lora", "a LoRA, strength -4 to 4, 1; may be given repeatedly"),
    "gpu": ("--gpu", "the card to run on: its name, number or UUID, as `turbodiff gpu` lists them"),
    "cards": ("--cards", "cards here that make the clip together: 1, 2, 4, ...; auto: 1, in the queue as many as help"),
    "exchange": ("--exchange", "what those cards send each other: full, int8 (half the bytes; differs a little)"),
    "encoder": ("--encoder", "of the mp4: cpu (libx264), nvenc (the card's own, where it works)"),
    "noise_device": ("--noise-device", "cpu; cuda reproduces TurboDiffusion's noise"),
    "auto": ("--auto", "fields that follow the weights under a --sampler of one's own: steps,guidance,shift,..."),
    "pinned": ("--pin", "fields the guard must not lower: model,resolution,num_frames,..."),
}  # fmt: skip
SWITCHES: Mapping[str, tuple[object, object]] = {  # flags that are not text or nothing: type and default
    "model": (str, "demo"),
    "ode": (bool, False),
    "quant_linear": (bool | None, None),
    "adaptive_resolution": (bool | None, None),
    "loras": (list[str] | None, None),
}
LORA_FORM = "PATH[:STRENGTH][:high|low]"
LORA_STRENGTH = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)")


def takes_request(command: Callable[..., None], left_out: Collection[str] = ()) -> Callable[..., None]:
    """Give a command the prompt and every flag of `FLAGS` but `left_out`, as one mapping in place of its `fields`."""
    keyword, names = inspect.Parameter.KEYWORD_ONLY, [name for name in FLAGS if name not in left_out]
    options = [inspect.Parameter("prompt", keyword, annotation=Annotated[str, PROMPT])]
    for name in names:
        *flags, help_text = FLAGS[name]
        kind, default = SWITCHES.get(name, (str | None, None))
        option = typer.Option(*flags, help=help_text, metavar=LORA_FORM if name == "loras" else None)
        options.append(inspect.Parameter(name, keyword, default=default, annotation=Annotated[kind, option]))
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        parameters += options if parameter.name == "fields" else [parameter]

    @functools.wraps(command)
    def run(**given: object) -> None:
        fields = {name: given.pop(name) for name in ("prompt", *names)}
        loras = fields.get("loras")
        fields["loras"] = [read_lora(text) for text in loras] if isinstance(loras, list) else []
        command(fields=fields, **given)

    run.__dict__["__signature__"] = inspect.Signature(parameters)
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def read_lora(text: str) -> dict[str, str | float]:
    """ "style.safetensors:0.8:high" as the fields of a Lora; a colon within the path stays in it.

    Raises:
        RequestError: field `lora`: it is not there, may not be looked at, or is no file.
    """
    fields: dict[str, str | float] = {}
    path, _, tail = text.rpartition(":")
    if path and tail in ("high", "low"):
        text, fields["expert"] = path, tail
        path, _, tail = text.rpartition(":")
    if path and LORA_STRENGTH.fullmatch(tail):
        text, fields["strength"] = path, float(tail)
    file = expand(text)
    try:
        check_file(file)
        file.stat()
    except OSError as error:
        raise RequestError(
            "a LoRA is a file that this user can read",
            code="lora_missing",
            field="lora",
            got=f"{file}: {error.strerror}",
            expected=LORA_FORM,
            try_instead="--lora style.safetensors:0.8",
        ) from None
    return fields | {"path": str(file.absolute())}


def open_studio(state_dir: Path | None, outputs: Path = OUTPUTS) -> "Studio":
    """The studio of a state folder; works while the app runs."""
    from turbodiff.studio import Studio

    return Studio(state_dir, outputs)
