"""Every field of a Request as a flag, once, for all commands that take a request."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from turbodiff.spec.errors import RequestError

Option = typer.Option
STRENGTH = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)")

Prompt = Annotated[str, typer.Argument(help='What to show, e.g. "a red circle moves right on a black background"')]
Model = Annotated[str, Option("--model", help="Demo, Wan2.1-1.3B, Wan2.1-14B, Wan2.2-A14B")]
Seed = Annotated[str | None, Option("--seed", help="0 .. 2^53-1; left out or -1: random")]
Negative = Annotated[str | None, Option("--negative-prompt", help="only with --sampler unipc and --guidance > 1")]
Resolution = Annotated[str | None, Option("--resolution", help="480p, 720p; the demo: 128")]
Aspect = Annotated[str | None, Option("--aspect", "--aspect-ratio", "--aspect_ratio", help="16:9, 9:16, 1:1, 4:3, 3:4")]
Size = Annotated[str | None, Option("--size", help="WIDTHxHEIGHT, multiples of 16, instead of a resolution")]
Frames = Annotated[str | None, Option("--frames", "--num-frames", "--num_frames", help="4n+1: 17, 49, 81")]
Steps = Annotated[str | None, Option("--steps", "--num-steps", "--num_steps", help="1-4; with unipc up to 100")]
Sampler = Annotated[str | None, Option("--sampler", help="sde (default), ode (sharper, less robust), unipc")]
Ode = Annotated[bool, Option("--ode", help="the same as --sampler ode")]
SigmaMax = Annotated[str | None, Option("--sigma-max", "--sigma_max", help="noise of the first step")]
Guidance = Annotated[str | None, Option("--guidance", help="classifier-free guidance, only with unipc")]
Shift = Annotated[str | None, Option("--shift", help="timestep shift, only with unipc")]
Boundary = Annotated[str | None, Option("--boundary", help="A14B: the low-noise expert runs where t < boundary")]
Attention = Annotated[
    str | None, Option("--attention", "--attention-type", "--attention_type", help="auto, dense, sage, sla, sagesla")
]
Topk = Annotated[
    str | None, Option("--topk", "--sla-topk", "--sla_topk", help="SLA TopK: share of key blocks, 0.1, 0.15")
]
QuantLinear = Annotated[
    bool | None, Option("--quant-linear/--no-quant-linear", "--quant_linear", help="INT8 linears; left out: auto")
]
Fps = Annotated[str | None, Option("--fps", help="frames per second of the file, 16")]
Image = Annotated[str | None, Option("--image", "--image-path", "--image_path", help="the picture to start from")]
Fit = Annotated[str | None, Option("--fit", help="crop, pad or stretch, with --no-adaptive-resolution")]
Adaptive = Annotated[
    bool | None,
    Option("--adaptive-resolution/--no-adaptive-resolution", "--adaptive_resolution", help="keep the picture's aspect"),
]
Loras = Annotated[
    list[str] | None,
    Option("--lora", metavar="PATH[:STRENGTH][:high|low]", help="a LoRA, strength -4 to 4, 1; may be given repeatedly"),
]
NoiseDevice = Annotated[str | None, Option("--noise-device", help="cpu; cuda reproduces TurboDiffusion's noise")]
Pin = Annotated[str | None, Option("--pin", help="fields the guard must not lower: model,resolution,num_frames,...")]
Json = Annotated[bool, Option("--json", help="one JSON object a line instead of text")]


def read_lora(text: str) -> dict[str, Any]:
    """ "style.safetensors:0.8:high" as the fields of a Lora; a colon within the path stays in it.

    Raises:
        RequestError: field `lora`: no such file.
    """
    fields: dict[str, Any] = {"path": text}
    head, _, tail = text.rpartition(":")
    if head and tail in ("high", "low"):
        fields |= {"path": head, "expert": tail}
        head, _, tail = head.rpartition(":")
    if head and STRENGTH.fullmatch(tail):
        fields |= {"path": head, "strength": float(tail)}
    path = Path(fields["path"]).expanduser()
    if not path.exists():
        raise RequestError(
            "there is no such file",
            code="lora_missing",
            field="lora",
            got=path,
            expected="PATH[:STRENGTH][:high|low]",
            try_instead="--lora style.safetensors:0.8",
        )
    return fields | {"path": str(path.absolute())}
