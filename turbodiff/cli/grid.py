"""`turbodiff grid`: a clip for each pair of values of two fields, and one contact sheet."""

from functools import partial
from typing import Annotated

import typer

from turbodiff.cli.flags import OUTPUTS, Json, Outputs, open_studio, takes_request
from turbodiff.cli.generate import tell
from turbodiff.spec.grids import GRID_FIELDS, axis_of, grid_requests

AXIS = typer.Option(help="a field and its values, seed=1,2,3; fields: " + ", ".join(GRID_FIELDS))


@takes_request
def grid(
    *,
    rows: Annotated[str, AXIS],
    columns: Annotated[str, AXIS],
    fields: dict[str, object],
    outputs: Outputs = OUTPUTS,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda:0")] = "auto",
    as_json: Json = False,
) -> None:
    """Make a clip for each pair of values of two fields, then a contact sheet of them; all are planned first."""
    studio = open_studio(None, outputs)
    said = {name: value for name, value in fields.items() if value is not None}
    many = grid_requests(said, axis_of(rows), axis_of(columns))
    for one in many:
        studio.plan(one)
    for one in many:
        studio.generate(one, output=None, device=device, on_event=partial(tell, as_json))
