"""`turbodiff models`: which weights there are, and where they belong."""

import typer

models_app = typer.Typer(help="Weights: list, verify.", no_args_is_help=True)


@models_app.command("list")
def list_models() -> None:
    """Every model, whether its files are here, and what is missing."""
    from turbodiff import studio
    from turbodiff.cli.show import models_table

    models_table(studio.model_states())
