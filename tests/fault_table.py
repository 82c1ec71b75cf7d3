"""Reads the fault table of tests/README.md: which tests hold which row."""

import ast
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.sources import syntax_tree

HERE = Path(__file__).parent
ROWS = range(1, 83)
ROW = re.compile(r"^\| (\d+) \| ([^|]+) \| ([^|]+) \| ([^|]*)\|$", re.M)


@dataclass(frozen=True)
class Claim:
    """A row, a file, and a piece of the names of its tests."""

    row: int
    file: str
    piece: str

    def tests(self):
        """The names of the tests that are meant."""
        return [name for name in names_in(HERE / self.file) if re.search(rf"(?<![a-z]){self.piece}(?!\d)", name)]


@cache
def claims():
    """Every claim of the table."""
    found = []
    for number, _, held, _ in ROW.findall((HERE / "README.md").read_text("utf-8")):
        for part in held.split(";"):
            file, _, pieces = part.strip().partition(": ")
            found += [Claim(int(number), file, piece.strip()) for piece in pieces.split(",")]
    return tuple(found)


@cache
def names_in(file):
    """The names of the test functions of a file, () if there is no such file."""
    if not file.is_file():
        return ()
    nodes = ast.walk(syntax_tree(file))
    return tuple(node.name for node in nodes if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"))


@cache
def numbers():
    """(file, test) -> the words "fault_N" of the rows that it holds."""
    found = {}
    for claim in claims():
        for name in claim.tests():
            found.setdefault((claim.file, name), set()).add(f"fault_{claim.row}")
    return found
