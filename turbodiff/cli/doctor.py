"""`turbodiff doctor`: what this machine has, what is wrong with it, and the exact line that mends it."""

import sys

from turbodiff.cli import flags


def doctor(as_json: flags.Json = False) -> None:
    """Versions, GPUs, ffmpeg, disk, optional kernels; ends with warnings and the pip line for this machine."""
    from turbodiff import studio

    report = studio.doctor()
    if as_json:
        sys.stdout.write(report.model_dump_json() + "\n")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("what", "found", box=None, pad_edge=False)
    for name, value in report.found.items():
        table.add_row(name, str(value))
    console = Console(soft_wrap=True)
    console.print(table)
    for key, text in report.warnings:
        console.print(f"[yellow]warning[/] {key}: {text}", highlight=False)
    console.print(f"torch for this machine: {report.pip_line}", highlight=False, markup=False)
    for note in report.notes:
        console.print(note, highlight=False, markup=False)
