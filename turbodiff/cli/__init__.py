"""The command line: flags in, Studio calls, lines out.

Contents: commands and how they print. Heavy imports happen inside commands, so `--help` answers at once.
Never here: decisions; everything is asked of `turbodiff.studio`.
Used by: the shell.
"""

# ruff: noqa: PTH100, PTH112, PTH117, PTH120, PTH121  (pathlib imports much, and before that the path is mended)
import os
import sys

# `-m` and an empty entry of PYTHONPATH put the folder that this is started in before the library: a queue.py there
# would be imported below. Only the folder that we lie in ourselves may stay.
if not os.path.samefile(os.curdir, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))):
    sys.path[:] = (
        entry
        for entry in tuple(sys.path)
        if os.path.isabs(entry) and not (os.path.isdir(entry) and os.path.samefile(entry, os.curdir))
    )

import contextlib
import io
import signal
from types import FrameType

import typer

from turbodiff.cli import downloads  # noqa: F401  adds commands to models_app
from turbodiff.cli.calibration import calibrate
from turbodiff.cli.cluster import cluster_app
from turbodiff.cli.export import export
from turbodiff.cli.flags import PAGE_FLAGS
from turbodiff.cli.generate import extend, generate, plan
from turbodiff.cli.grid import grid
from turbodiff.cli.machine import doctor, gpu, models_app, selftest
from turbodiff.cli.queue import card, jobs_app, restart, seeds_app, serve, support_bundle
from turbodiff.cli.service import service_app
from turbodiff.cli.users import users_app
from turbodiff.spec import stdio
from turbodiff.spec.environment import check_folder
from turbodiff.spec.errors import TurbodiffError, closed_to_us
from turbodiff.spec.text import printable
from turbodiff.spec.wording import Words, shell_language

app = typer.Typer(
    name="turbodiff",
    help="Text or a picture to a short video, fast, and never out of memory. `turbodiff generate --help` is the start.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (generate, extend, grid, export, plan, restart, gpu, card, calibrate, doctor, selftest, support_bundle):
    app.command()(command)
app.command(**PAGE_FLAGS)(serve)
app.add_typer(jobs_app, name="jobs")
app.add_typer(seeds_app, name="seeds")
app.add_typer(models_app, name="models")
app.add_typer(service_app, name="service")
app.add_typer(cluster_app, name="cluster")
app.add_typer(users_app, name="users")


def main() -> None:
    """Run one command; a TurbodiffError becomes one line on stderr and its exit code."""
    stdio.make_safe()
    for place, given in enumerate(sys.argv):
        if any("\udc80" <= letter <= "\udcff" for letter in given):  # bytes that a locale of ASCII has no letter for
            sys.argv[place] = os.fsencode(given).decode("utf-8", "surrogateescape")

    def stop(number: int, frame: FrameType | None) -> None:  # as Ctrl-C does, with a code of its own
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores SIGHUP, and that stays
            signal.signal(number, stop)
    words = Words(shell_language())
    try:
        check_folder()
        code = app(standalone_mode=False)
    except TurbodiffError as error:
        sys.stderr.write(f"{words.error_line(error, 'error.line')}\n")
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, EOFError):
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)
    except PermissionError as error:
        sys.stderr.write(f"{words.error_line(refused := closed_to_us(error), 'error.line')}\n")
        sys.exit(refused.exit_code)
    except Exception as error:
        show = getattr(error, "show", None)
        if show is not None:  # flags that the parser refused print their own line
            with contextlib.redirect_stderr(io.StringIO()) as said:
                show()
            sys.stderr.writelines(f"{printable(line)}\n" for line in said.getvalue().splitlines())
            sys.exit(2)
        if type(error).__name__ in {"Exit", "Abort"}:
            sys.exit(int(getattr(error, "exit_code", 130)))
        raise  # ours: it keeps its traceback
    if lost := stdio.output_error():
        sys.stderr.write(f"{words('error.line', said=words('error.output_lost', got=lost.strerror))}\n")
        sys.exit(1)
    sys.exit(code or 0)
