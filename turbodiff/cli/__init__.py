"""The command line: flags in, Studio calls, lines out.

Contents: commands and how they print. Heavy imports happen inside commands, so `--help` answers at once.
Never here: decisions; everything is asked of `turbodiff.studio`.
Used by: the shell.
"""

import sys

import typer

from turbodiff.cli.generate import generate, plan
from turbodiff.cli.machine import calibrate, doctor, gpu, models_app, selftest
from turbodiff.cli.queue import jobs_app, restart, seeds_app, serve, support_bundle
from turbodiff.spec.errors import TurbodiffError

app = typer.Typer(
    name="turbodiff",
    help="Text or a picture to a short video, fast, and never out of memory. `turbodiff generate --help` is the start.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (generate, plan, serve, restart, gpu, calibrate, doctor, selftest, support_bundle):
    app.command()(command)
app.add_typer(jobs_app, name="jobs")
app.add_typer(seeds_app, name="seeds")
app.add_typer(models_app, name="models")


def main() -> None:
    """Run one command; a TurbodiffError becomes one line on stderr and its exit code."""
    try:
        code = app(standalone_mode=False)
    except TurbodiffError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, EOFError):
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)
    except Exception as error:
        show = getattr(error, "show", None)
        if show is not None:  # flags that the parser refused print their own line
            show()
            sys.exit(2)
        if type(error).__name__ in {"Exit", "Abort"}:
            sys.exit(int(getattr(error, "exit_code", 130)))
        raise  # ours: it keeps its traceback
    sys.exit(code or 0)
