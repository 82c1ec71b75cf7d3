"""The commands by name; each lives in a file of its own."""

import typer

from turbodiff.cli.doctor import doctor
from turbodiff.cli.generate import generate
from turbodiff.cli.models import models_app
from turbodiff.cli.plan import gpu, plan

app = typer.Typer(
    name="turbodiff",
    help="Text or a picture to a short video, fast, and never out of memory. `turbodiff generate --help` is the start.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(generate)
app.command()(plan)
app.command()(gpu)
app.command()(doctor)
app.add_typer(models_app, name="models")
