"""A grid: one clip for each pair of values of two fields, and where each stands on the contact sheet."""

import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from turbodiff.spec.errors import RequestError

# what a person may want to compare; files and what only says where a clip runs are no part of it
GRID_FIELDS = (
    "seed", "steps", "boundary", "guidance", "guidance_low", "shift", "sigma_max", "sampler", "topk", "attention",
    "quant_linear", "num_frames", "resolution", "aspect", "model", "prompt", "negative_prompt",
)  # fmt: skip
MAX_CELLS = 36
MAX_VALUES = 12  # of a field
MAX_LABEL = 60  # characters


class GridCell(BaseModel):
    """The place of a clip in a grid; `id` is the grid's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(pattern=r"^[0-9a-f]{16}$")
    row: int = Field(ge=0, lt=MAX_VALUES)
    column: int = Field(ge=0, lt=MAX_VALUES)
    rows: int = Field(ge=1, le=MAX_VALUES)
    columns: int = Field(ge=1, le=MAX_VALUES)
    row_label: str = Field(max_length=MAX_LABEL)
    column_label: str = Field(max_length=MAX_LABEL)

    @model_validator(mode="after")
    def _check_place(self) -> Self:
        if self.row >= self.rows or self.column >= self.columns:
            raise ValueError("a cell lies inside its grid: row < rows, column < columns")
        return self


def values_of(said: object) -> list[str]:
    """The values of a field as a list, or as text between commas, or between semicolons where they hold commas."""
    if isinstance(said, Sequence) and not isinstance(said, str):
        parts = [str(part) for part in said]
    else:
        text = str(said or "").replace("\uff0c", ",").replace("\uff1b", ";")
        parts = text.split(";" if ";" in text else ",")
    return list(dict.fromkeys([part.strip() for part in parts if part.strip()]))


def axis_of(said: object) -> tuple[str, object]:
    """A field and its values, as "seed=1,2" or as a pair; whatever else is none."""
    if isinstance(said, str):
        name, _, values = said.partition("=")
        return name.strip().replace("-", "_"), values
    pair = list(said) if isinstance(said, list | tuple) else []
    return (str(pair[0]), pair[1]) if len(pair) == 2 else ("", "")


def grid_requests(
    fields: Mapping[str, Any], rows: tuple[str, object], columns: tuple[str, object]
) -> list[dict[str, Any]]:
    """The fields of one request for each cell, row by row; all have one seed where no axis is the seed.

    Args:
        rows, columns: a field each, and its values.

    Raises:
        RequestError: no such field, the same twice, no value, or too many.
    """
    axes = []
    for name, said in (rows, columns):
        if name not in GRID_FIELDS:
            raise _refused("no field of a grid", name, " | ".join(GRID_FIELDS))
        if not 1 <= len(values := values_of(said)) <= MAX_VALUES:
            raise _refused(f"{name} needs 1 to {MAX_VALUES} values", len(values), f"1..{MAX_VALUES}")
        axes.append((name, values))
    (row_field, row_values), (column_field, column_values) = axes
    if row_field == column_field:
        raise _refused("the two fields of a grid are the same", row_field, "two fields")
    if (count := len(row_values) * len(column_values)) > MAX_CELLS:
        raise _refused("too many clips for one grid", count, f"at most {MAX_CELLS}")
    made, name = list[dict[str, Any]](), secrets.token_hex(8)
    given = dict(fields)
    if "seed" not in (row_field, column_field) and str(given.get("seed") or "").strip() in ("", "-1", "random"):
        given["seed"] = secrets.randbelow(2**31)
    for row, down in enumerate(row_values):
        for column, across in enumerate(column_values):
            cell = {"row_label": _label(row_field, row, down), "column_label": _label(column_field, column, across)}
            place = {"row": row, "column": column, "rows": len(row_values), "columns": len(column_values)}
            own = {row_field: down, column_field: across, "grid": {"id": name, **place, **cell}}
            made.append({**given, **own, "nonce": secrets.token_hex(16)})
    return made


def _label(field: str, index: int, value: str) -> str:
    """What stands beside a row or a column: its value, or its number where the sheet has no letters for it."""
    said = " ".join(value.split()) if value.isprintable() and value.isascii() else f"#{index + 1}"
    return f"{field} {said}"[:MAX_LABEL]


def _refused(what: str, got: object, expected: str) -> RequestError:
    return RequestError(what, code="bad_grid", field="grid", got=str(got)[:40], expected=expected)
