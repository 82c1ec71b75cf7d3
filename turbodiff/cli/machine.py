"""This machine from the shell: `turbodiff gpu`, `doctor`, `selftest` and `models`."""

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from turbodiff.cli.flags import Json, ModelName, StateDir, open_studio
from turbodiff.spec.environment import current_folder
from turbodiff.spec.errors import TurbodiffError
from turbodiff.spec.experts import Expert
from turbodiff.spec.text import printable

if TYPE_CHECKING:
    from turbodiff.gpu.processes import CardHolders
    from turbodiff.spec.events import Event
    from turbodiff.spec.wording import Words

PROMPT = "a red circle moves right on a black background"
CHECKS = ("install", "gpu", "plan", "clip")
SHOWN_FILES = 100  # of those that no model uses
models_app = typer.Typer(help="Weights: list, pull, verify, move, delete, quantize.", no_args_is_help=True)


def gpu(as_json: Json = False) -> None:
    """Show the GPUs, their memory and who holds it."""
    from turbodiff.cli.show import print_lines, print_table, why_no_gpu, words_here
    from turbodiff.spec.numbers import gib

    words, (machine, held) = words_here(), open_studio(None).cards_now()
    if as_json:
        holders = [card.model_dump(mode="json") for card in held]
        sys.stdout.write(json.dumps({**machine.model_dump(mode="json"), "holders": holders}) + "\n")
        return

    def size(n_bytes: int | None) -> str:
        return words("shell.unknown") if n_bytes is None else gib(n_bytes)

    def print_holders(on_card: "CardHolders") -> None:
        rows = []
        for row in on_card.rows:
            name = row.command or row.name
            who = words(f"shell.holder_{row.kind}") + (f": {name}" if name else "")
            age = "" if row.age_s is None else words.seconds(row.age_s)
            idle = "" if row.idle is None else words("shell.idle" if row.idle else "shell.busy")
            rows.append(("", size(row.bytes), str(row.pid or ""), who, age, idle, row.kill_line))
        if rows:
            heads = [words(f"shell.{head}") for head in ("holds", "who", "age", "to_end")]
            print_table(("", heads[0], "pid", *heads[1:3], "", heads[3]), rows)
        if on_card.host_command:
            print_lines(["  " + words("shell.on_host", command=on_card.host_command)])

    if not machine.gpus:
        print_lines([why_no_gpu(machine, words)])
    for card in machine.gpus:
        parts = [f"cuda:{card.index} {card.name}", card.uuid, words("shell.gpu_mig") if card.mig else ""]
        parts += [words("shell.gpu_free", free=size(card.free_bytes), total=size(card.total_bytes))]
        parts += [words("shell.gpu_driver", driver=machine.driver or words("shell.unknown"))]
        parts += [words("shell.gpu_busy", share=f"{card.utilisation:.0%}")] if card.utilisation is not None else []
        parts += [f"{card.power_w:.0f} W"] if card.power_w is not None else []
        parts += [words("shell.gpu_display")] if card.display else []
        print_lines(["  ".join(part for part in parts if part)])
        for on_card in held:
            if on_card.uuid == card.uuid:
                print_holders(on_card)
    for on_card in held:
        if not on_card.uuid:  # programs have a card open that NVML does not know
            print_holders(on_card)
    ram = {"free": size(machine.ram_available_bytes), "total": size(machine.ram_total_bytes)}
    print_lines([words("shell.ram", **ram)])


def doctor(as_json: Json = False) -> None:
    """Versions, GPUs, ffmpeg, disk, optional kernels; ends with warnings and the pip line for this machine."""
    from rich.console import Console
    from rich.text import Text

    from turbodiff import studio
    from turbodiff.cli.show import print_lines, print_table, why_no_gpu, words_here
    from turbodiff.diagnostics.doctor import doctor_notes

    report, words = studio.doctor(), words_here()
    if as_json:
        sys.stdout.write(report.model_dump_json() + "\n")
        return
    none = {} if report.machine.gpus else {"GPU": f"{words('fact.none')} ({report.machine.gpu_state})"}
    found = {
        name: version or words("fact.not_needed" if name in report.optional else "fact.none")
        for name, version in report.versions.items()
    }
    rows = [
        (words.or_else(f"fact.{name.replace(' ', '_').lower()}", name), version)
        for name, version in (found | none).items()
    ]
    print_table((words("shell.what"), words("shell.found")), rows)
    print_lines([why_no_gpu(report.machine, words)] if none else [])
    for key, text in report.warnings:
        told = words.or_else(f"warning.{key}", text)
        Console(soft_wrap=True).print(Text.assemble((words("value.warning"), "yellow"), printable(f" {key}: {told}")))
    notes = doctor_notes(report.machine, words)
    print_lines([words("shell.torch_for", line=report.pip_line), *notes])


def selftest(as_json: Annotated[bool, typer.Option("--json", hidden=True)] = False) -> None:
    """Install, GPU, plan, a demo clip, and its verification."""
    from turbodiff.cli.show import words_here
    from turbodiff.diagnostics import logs
    from turbodiff.diagnostics.background_tasks import Check
    from turbodiff.spec.wording import Words
    from turbodiff.studio import state_folder

    words = words_here()
    log, failed = logs.LogFile(logs.log_folder(current_folder(), state_folder()) / logs.RUN_LOG), False
    for name in CHECKS:
        try:
            facts = _check(name)
            english, told = (_told(name, facts, in_words) for in_words in (Words("en"), words))  # logs are English
            found = Check(name=name, ok=True, detail=english, facts=facts)
        except TurbodiffError as error:
            found, told = Check(name=name, ok=False, detail=str(error), facts=error.fields()), words.error_line(error)
        log.say(f"selftest {name}: {'ok' if found.ok else 'FAILED'}, {found.detail}", who="selftest")
        numbers = {"name": words(f"shell.check_{name}"), "detail": told}
        line = words("shell.check_ok" if found.ok else "shell.check_failed", **numbers)
        sys.stdout.write((found.model_dump_json() if as_json else printable(line)) + "\n")
        sys.stdout.flush()  # the page shows each as it comes
        failed = failed or not found.ok
    if failed:
        raise typer.Exit(1)


def _told(name: str, facts: dict[str, str], words: "Words") -> str:
    """What one of `CHECKS` found, in words."""
    from turbodiff.cli.show import why_no_gpu
    from turbodiff.gpu.probe import machine_now

    if facts.get("cards") == "":
        return why_no_gpu(machine_now(), words)
    return words(f"shell.found_{name}", **facts)


def _check(name: str) -> dict[str, str]:
    """What one of `CHECKS` found; a clip has its name only if every frame agreed with
    what was sent.

    Raises:
        TurbodiffError: something is wrong.
    """
    from turbodiff.diagnostics.doctor import doctor as look
    from turbodiff.gpu.probe import machine_now
    from turbodiff.spec.numbers import gib

    if name == "install":
        report = look()
        for key, text in report.warnings:
            raise TurbodiffError(text, code=key)
        return {name: report.found[name] for name in ("torch", "ffmpeg")}
    if name == "gpu":
        machine = machine_now()
        cards = ", ".join(card.name for card in machine.gpus)
        return {"cards": cards, "reason": machine.gpu_reason, "got": machine.gpu_error}
    if name == "plan":
        plan = open_studio(None).plan({"prompt": PROMPT})
        return {"peak": gib(plan.peak_bytes), "budget": gib(plan.budget_bytes)}
    with tempfile.TemporaryDirectory() as folder:
        studio, output = open_studio(None, Path(folder)), Path(folder) / "selftest.mp4"
        events: list[Event] = []
        made = studio.generate({"prompt": PROMPT, "seed": 1}, output=output, on_event=events.append)
    return {"frames": str(made.frames), "seconds": f"{made.seconds:.1f}", "sha256": made.sha256[:12]}


@models_app.command("list")
def list_models() -> None:
    """Every model: which files are taken, what is missing, how those and each download would run here."""
    from turbodiff.cli.show import print_lines, words_here
    from turbodiff.gpu.probe import machine_now
    from turbodiff.spec.numbers import gb

    studio, words, machine = open_studio(None), words_here(), machine_now()
    offers, on_disk = studio.offers(machine), studio.installed(machine)
    for spec, missing in studio.models():
        ready = words("model.missing" if missing else "model.here")
        print_lines([f"{spec.display_name:16} {spec.kind}  {ready}", f"    {words.model(spec)}"])
        print_lines(f"    {line}" for line in missing)
        if one := on_disk.get(spec.name):
            print_lines(f"    {line}" for line in (words.takes(one.files, one.fit), *map(words.say, one.reasons)))
        for offer in offers[spec.name]:
            size = gb(offer.network_bytes)
            need = words("fit.download", size=gb(offer.nbytes)) if offer.files else words("fit.here")
            suits = f"  <- {words('fit.suited')}" if offer.fit.suited and offer.fit.mark != "no" else ""
            print_lines([f"    {offer.variant.name:12} {size:>8}  {need:20}  {words.fit(offer.fit)}{suits}"])
    passed_over = studio.inventory().passed_over
    print_lines(words("model.passed_over", why=words.passed_over(other)) for other in passed_over[:SHOWN_FILES])
    if more := passed_over[SHOWN_FILES:]:
        print_lines([words("model.passed_over", why=words("model.more_files", n=len(more)))])


@models_app.command("tell")
def tell_expert(
    path: Annotated[Path, typer.Argument(help="a checkpoint")],
    expert: Annotated[Expert, typer.Option("--expert", help="which network of Wan2.2 A14B it is; single: of no pair")],
) -> None:
    """Say what no file tells: which of two experts it is. Written beside it as FILE.toml."""
    from turbodiff.cli.show import print_raw
    from turbodiff.weights import locate

    print_raw(str(locate.tell_expert(path, expert.value)))


@models_app.command("pull")
@models_app.command("download")
def pull_model(
    model: ModelName,
    variant: Annotated[
        str,
        typer.Option("--variant", help="480p-quant, 720p-plain, ...; left out: the one begun, or what suits here"),
    ] = "",
    root: Annotated[
        Path | None, typer.Option("--root", help="target folder; default: that of the one begun, or checkpoints/")
    ] = None,
    mirror: Annotated[str, typer.Option("--mirror", help="server to ask first, over HF_ENDPOINT")] = "",
    state_dir: StateDir = None,
) -> None:
    """Download what a model needs: go on with what stopped, or begin. Ctrl-C pauses; `models list` has the variants."""
    from turbodiff.cli.show import print_lines, print_raw, words_here
    from turbodiff.gpu.probe import machine_now
    from turbodiff.plan.tiers import suited
    from turbodiff.spec.downloads import Progress
    from turbodiff.spec.models import find_model
    from turbodiff.spec.numbers import gb
    from turbodiff.weights.sources import check_mirror

    words, spec, downloads = words_here(), find_model(model), open_studio(state_dir).downloads
    mirror = check_mirror(mirror) or downloads.mirror
    said = [""]

    def tell(progress: Progress) -> None:
        start, end = ("\r\x1b[K", "") if sys.stderr.isatty() else ("", "\n")
        if (notice := words.download_notice(progress)) != said[0]:
            said[0] = notice
            sys.stderr.write(f"{start}{printable(notice)}\n")
        sys.stderr.write(f"{start}{printable(f'{spec.display_name} {words.download(progress)}')}{end}")
        sys.stderr.flush()

    if begun := downloads.begun(spec, variant):
        variant, root, size = begun.variant, root or Path(begun.root), gb(begun.progress.done_bytes)
        print_lines([words("download.goes_on", variant=variant, folder=root, done=size)], sys.stderr)
    chosen = spec.variant(variant) if variant else suited(spec, machine_now())
    try:
        paths = downloads.run(spec, variant=chosen, root=root, mirror=mirror, tell=tell)
    finally:
        sys.stderr.write("\n" if sys.stderr.isatty() else "")
    for path in paths:
        print_raw(str(path))


@models_app.command("verify")
def verify_weights(
    path: Annotated[Path, typer.Argument(help="a file or a folder of shards")],
    sha256: Annotated[bool, typer.Option("--sha256", help="read every byte, too")] = False,
) -> None:
    """Say what a checkpoint is, whether it is complete, and which models can use it."""
    from turbodiff.cli.show import print_table, words_here
    from turbodiff.weights.locate import verify

    words, report, rows = words_here(), verify(path, sha256=sha256), list[tuple[str, str]]()
    for name, value in report._asdict().items():
        if isinstance(value, Mapping):  # "BF16 189, I8 300"
            value = ", ".join(f"{part} {number}" for part, number in value.items())
        elif isinstance(value, tuple):
            value = "; ".join(value) or words("fact.none")
        elif isinstance(value, bool):
            value = words("shell.yes" if value else "shell.no")
        rows.append((words(f"shell.verify_{name}"), str(value)))
    print_table((words("shell.what"), words("shell.found")), rows)
    if report.problems:
        raise typer.Exit(2)


@models_app.command("quantize")
def quantize_weights(source: Path, target: Path) -> None:
    """Write the -quant layout (INT8 tiles) of any DiT checkpoint."""
    from turbodiff.cli.show import print_raw
    from turbodiff.weights.quantize import quantize

    print_raw(str(quantize(source, target)))
