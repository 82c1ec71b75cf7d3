"""The commands by name; each lives in a file of its own."""

import typer

from turbodiff.cli.calibrate import calibrate
from turbodiff.cli.doctor import doctor
from turbodiff.cli.generate import generate
from turbodiff.cli.gpu import gpu
from turbodiff.cli.jobs import jobs_app
from turbodiff.cli.models import models_app
from turbodiff.cli.plan import plan
from turbodiff.cli.seeds import seeds_app
from turbodiff.cli.selftest import selftest
from turbodiff.cli.service import restart, serve, support_bundle

app = typer.Typer(
    name="turbodiff",
    help="Text or a picture to a short video, fast, and never out of memory. `turbodiff generate --help` is the start.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (generate, plan, serve, restart, gpu, calibrate, doctor, selftest):
    app.command()(command)
app.command("support-bundle")(support_bundle)
app.add_typer(jobs_app, name="jobs")
app.add_typer(seeds_app, name="seeds")
app.add_typer(models_app, name="models")
