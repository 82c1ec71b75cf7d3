"""`turbodiff export`: a clip in another format, trimmed, at another rate."""

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from turbodiff.cli.flags import OUTPUTS, Json, Outputs, open_studio
from turbodiff.spec.environment import expand
from turbodiff.spec.errors import FileError, RequestError, TurbodiffError
from turbodiff.spec.exports import FORMATS, make_export
from turbodiff.spec.text import printable


def export(
    clip: Annotated[str, typer.Argument(help="a clip: its file, or its name in the library")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="the file to write")] = None,
    kind: Annotated[str, typer.Option("--format", help=", ".join(FORMATS) + "; left out: what -o ends in")] = "",
    quality: Annotated[int, typer.Option("--quality", help="1..100")] = 80,
    fps: Annotated[int, typer.Option("--fps", help="24, 30, 60: frames in between are made; 0: as it is")] = 0,
    upscale: Annotated[int, typer.Option("--upscale", help="1, 2, 4: how many times as wide and high")] = 1,
    start_s: Annotated[float, typer.Option("--from", help="seconds of the clip to begin at")] = 0.0,
    end_s: Annotated[float, typer.Option("--to", help="seconds of the clip to end at; 0: its end")] = 0.0,
    outputs: Outputs = OUTPUTS,
    as_json: Json = False,
) -> None:
    """Write a clip as WebM, WebP, GIF, ProRes, PNG frames, H.265 or one picture."""
    from turbodiff.media.export import export as write

    longest_first = sorted(FORMATS, key=lambda name: -len(FORMATS[name].suffix))  # .h265.mp4 before .mp4
    ending = output.name.lower() if output else ""
    by_ending = next((name for name in longest_first if ending.endswith(FORMATS[name].suffix)), None)
    by_ending = by_ending or ("first" if ending.endswith(".png") else "" if output else "mp4")
    if not (named := kind or by_ending):  # an mp4 under any other name opens nowhere
        endings = " | ".join(dict.fromkeys("." + one.suffix.rpartition(".")[2] for one in FORMATS.values()))
        raise RequestError(
            "no format of an export has this ending", code="export_field", field="output", got=ending[-40:],
            expected=endings, try_instead="--format gif",
        )  # fmt: skip
    limits = {"fps": fps, "upscale": upscale, "start_s": start_s, "end_s": end_s}
    asked = make_export({"format": named, "quality": quality, **limits})
    source, is_file = expand(clip), False
    with contextlib.suppress(OSError):  # longer than any name
        is_file = source.is_file()
    if not is_file:
        found = open_studio(None, outputs).clip(Path(clip).name.removesuffix(".mp4"))
        if found is None:
            raise FileError("no such clip", code="clip_unknown", field="clip", got=clip[:200])
        source = found.path
    target = output or Path(source.stem + FORMATS[asked.format].suffix)
    is_same = False
    with contextlib.suppress(OSError):
        is_same = target.samefile(source)
    if is_same:
        raise FileError("the clip would be replaced", code="export_same", field="output", got=target.name)

    shown = [-1]

    def tell(share: float) -> None:
        percent = int(100 * share)
        if percent > shown[0]:
            shown[0] = percent
            line = json.dumps({"done": share}) + "\n" if as_json else f"\r{percent:3} %"
            (sys.stdout if as_json else sys.stderr).write(line)
            (sys.stdout if as_json else sys.stderr).flush()

    try:
        write(source, asked, target, tell)
    except TurbodiffError as error:
        if not as_json:
            raise
        sys.stdout.write(json.dumps({"error": error.fields()}) + "\n")
        raise typer.Exit(error.exit_code) from None
    sys.stdout.write(json.dumps({"path": str(target)}) + "\n" if as_json else f"{printable(str(target))}\n")
